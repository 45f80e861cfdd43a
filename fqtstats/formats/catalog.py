"""The formats, one literal each.

Source: unsigned fixed point with ``B = 2^b - 1`` bins, as in J. Chen et al., "A Statistical Framework for
Low-bitwidth Training of Deep Neural Networks" (arXiv 2010.14298), section 2; zero points are kept by the quantizers.
Logarithmic formats: B. Chmiel et al., "Accurate Neural Training with 4-bit Matrix Multiplications at Standard Formats"
(arXiv 2112.10769), section 4 (FP4 with 1 sign, 3 exponent and 0 mantissa bits); the other widths likewise.
"""

from __future__ import annotations

from fqtstats.errors import InputError
from fqtstats.formats.spec import IntFormat, LogFormat

__all__ = ["INTEGER_FORMATS", "LOG_FORMATS", "log", "uint"]

INTEGER_FORMATS = (
    IntFormat("uint1", 1),
    IntFormat("uint2", 2),
    IntFormat("uint3", 3),
    IntFormat("uint4", 4),
    IntFormat("uint5", 5),
    IntFormat("uint6", 6),
    IntFormat("uint7", 7),
    IntFormat("uint8", 8),
)

LOG_FORMATS = (
    LogFormat("log2", 1),
    LogFormat("log3", 2),
    LogFormat("log4", 3),
    LogFormat("log5", 4),
)


def uint(bits: int) -> IntFormat:
    """The unsigned format of ``bits`` bits.

    Raises:
        InputError: ``bits`` is not an integer from 1 to 8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise InputError(f"bits must be an integer from 1 to 8, got bits={bits!r}")
    return INTEGER_FORMATS[bits - 1]


def log(bits: int) -> LogFormat:
    """The logarithmic format of ``bits`` bits.

    Raises:
        InputError: ``bits`` is not an integer from 2 to 5.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 5:
        raise InputError(f"bits of a logarithmic format must be an integer from 2 to 5, got bits={bits!r}")
    return LOG_FORMATS[bits - 2]

"""What a storage format is: the facts that define it; everything else is derived."""

from __future__ import annotations

from dataclasses import dataclass

from fqtstats.errors import InputError

__all__ = ["IntFormat", "LogFormat"]


@dataclass(frozen=True, slots=True)
class IntFormat:
    """Unsigned integer codes ``0 .. 2^bits - 1``.

    Attributes:
        name: the format's name in the catalog.
        bits: width of one code.
    """

    name: str
    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise InputError(f"integer formats have 1 to 8 bits, got bits={self.bits}")

    @property
    def levels(self) -> int:
        """Number of bins ``B = 2^bits - 1``: the largest code."""
        return (1 << self.bits) - 1

    @property
    def storage_bits(self) -> int:
        """Width of a code in memory: the smallest of 1, 2, 4, 8 that holds it, so that codes never straddle a byte."""
        return next(width for width in (1, 2, 4, 8) if width >= self.bits)


@dataclass(frozen=True, slots=True)
class LogFormat:
    """One sign bit and an exponent, no mantissa: zero and ``+- 2^(e - 1)`` for the exponent fields ``e = 1, 2, ..``.

    Attributes:
        name: the format's name in the catalog.
        exponent_bits: width of the exponent field, which lies below the sign bit.
    """

    name: str
    exponent_bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.exponent_bits <= 4:
            raise InputError(f"logarithmic formats have 1 to 4 exponent bits, got {self.exponent_bits}")

    @property
    def bits(self) -> int:
        """Width of one code."""
        return 1 + self.exponent_bits

    @property
    def magnitudes(self) -> int:
        """Number of nonzero magnitudes."""
        return (1 << self.exponent_bits) - 1

    @property
    def levels(self) -> int:
        """Number of steps from the lowest point to the highest."""
        return 2 * self.magnitudes

    @property
    def storage_bits(self) -> int:
        """Width of a code in memory: the smallest of 2, 4, 8 that holds it."""
        return next(width for width in (2, 4, 8) if width >= self.bits)

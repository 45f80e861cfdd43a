"""The registry of quantizers: one row each; the command line, the reports and the tests read it."""

from __future__ import annotations

from typing import TypeGuard

from fqtstats.errors import InputError
from fqtstats.quantizers.agp import AGP, TopK
from fqtstats.quantizers.base import Claim, Quantized, Quantizer
from fqtstats.quantizers.baselines import DoReFa, Int4, Nearest
from fqtstats.quantizers.bhq import BHQ, AdaptiveBHQ
from fqtstats.quantizers.dorefa_forward import DoReFaActivation, DoReFaWeight
from fqtstats.quantizers.forward import MinMax, Symmetric, ZeroOnGrid
from fqtstats.quantizers.lsq import LSQ
from fqtstats.quantizers.luq import LUQ, Flush
from fqtstats.quantizers.sawb import SAWB
from fqtstats.quantizers.sign import ScaledSign, Sign
from fqtstats.quantizers.uniform import PCQ, PSQ, PTQ

__all__ = ["QUANTIZERS", "Claim", "Quantized", "Quantizer", "quantizer", "registered"]

QUANTIZERS: dict[str, type[Quantizer]] = {
    cls.name: cls
    for cls in (
        PTQ,
        PSQ,
        PCQ,
        BHQ,
        AdaptiveBHQ,
        LUQ,
        AGP,
        DoReFa,
        Int4,
        Nearest,
        Flush,
        TopK,
        MinMax,
        ZeroOnGrid,
        Symmetric,
        LSQ,
        SAWB,
        Sign,
        ScaledSign,
        DoReFaWeight,
        DoReFaActivation,
    )
}


def quantizer(name: str, **options: object) -> Quantizer:
    """A quantizer by its registry name.

    Args:
        name: see ``fqtstats list quantizers``.
        **options: the quantizer's own options, for instance ``bits=5``.

    Raises:
        InputError: (a ValueError) unknown name or option, or an option out of range; the message lists the known ones.
    """
    if name not in QUANTIZERS:
        raise InputError(f"unknown quantizer {name!r}; known: {', '.join(QUANTIZERS)}")
    cls = QUANTIZERS[name]
    known = options_of(cls)
    unknown = [option for option in options if option not in known]
    if unknown:
        raise InputError(f"unknown option {unknown[0]!r} of quantizer {name!r}; known: {', '.join(known)}")
    return cls(**options)


def registered(q: object) -> TypeGuard[Quantizer]:
    """Whether ``q`` is of one of the registry's own classes; a subclass may do anything otherwise."""
    return type(q) in QUANTIZERS.values()


def options_of(cls: type[Quantizer]) -> dict[str, object]:
    """The options of a quantizer class with their defaults."""
    import dataclasses

    return {f.name: f.default for f in dataclasses.fields(cls)}  # type: ignore[arg-type]

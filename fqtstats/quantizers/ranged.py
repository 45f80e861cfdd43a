"""Forward quantizers whose grid does not follow from the input's extremes, and those with parameters of their own."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fqtstats.errors import InputError
from fqtstats.formats import IntFormat, uint
from fqtstats.ops import quantize as native
from fqtstats.ops.codes import Affine
from fqtstats.quantizers.base import Claim, Frame, NearestQuantizer, Quantized, Quantizer, Role, rows
from fqtstats.random import Stream

__all__ = [
    "Binary",
    "LearnedQuantizer",
    "RangedQuantizer",
    "absolute_mean",
    "binary",
    "require_bits",
    "require_choice",
    "require_finite",
    "thread_free_sum",
]

_CHUNK = 4096


class RangedQuantizer(NearestQuantizer):
    """Rounding to nearest on a grid with a range of its own: the input is brought into it first."""

    @abstractmethod
    def ranged(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The numbers that are rounded, and the ends of their grid.

        Args:
            x: ``[N, ...]`` in the compute dtype (float32 or float64), any strides.

        Returns:
            ``x``'s shape, every number within the ends of its group; the lowest and the highest grid point, ``[G]``.

        Raises:
            NonFiniteError: ``x`` holds NaN or Inf.
        """

    def _frame(self, x: torch.Tensor) -> tuple[torch.Tensor, Frame]:
        view = self._view(x)
        y, low, high = self.ranged(view)
        shape = [n if axis == self.recipe.axis else 1 for axis, n in enumerate(view.shape)]
        grid = self._grid(low.view(shape), high.view(shape))
        n, c, s = view.shape
        return grid.coordinates(y), Frame(x.shape, (n, c, s), grid, None)


@dataclass(frozen=True, slots=True)
class Binary:
    """A quantizer of one bit that is the same for every input.

    Attributes:
        threshold: the code is 1 where ``x >= threshold``, else 0.
        ends: what the codes 0 and 1 stand for.
        passes: ``(low, top)``: gradients pass where ``low < x <= top``.
    """

    threshold: float
    ends: tuple[float, float]
    passes: tuple[float, float]

    @property
    def affine(self) -> Affine:
        """What the codes mean."""
        low, high = (torch.tensor([end], dtype=torch.float32, device="cpu") for end in self.ends)
        if self.ends[0] == 0:
            return Affine(step=high, zero=torch.zeros(1, dtype=torch.int32, device="cpu"))
        return Affine(step=high - low, offset=low)


def binary(q: object) -> Binary | None:
    """What ``q`` is as a quantizer of one bit that does not depend on its input; None: it is none."""
    own: Binary | None = getattr(q, "binary", None)
    return own


class LearnedQuantizer(nn.Module, Quantizer):
    """A forward quantizer that is a module: its parameters are trained with the layer's.

    Parameters that are not set yet hold zeros; the first input that shows what they should be sets them.
    """

    bits: int
    role: ClassVar[Role] = "forward"

    @property
    def format(self) -> IntFormat:
        """Storage format of the codes."""
        return uint(self.bits)

    @abstractmethod
    def fixed(self, x: torch.Tensor) -> NearestQuantizer:
        """The quantizer that this is now; sets parameters that are not set yet by ``x`` ``[N, ...]``."""

    def attach(self, place: str, layer: nn.Module) -> None:
        """Told once where it stands, before anything is quantized.

        Args:
            place: of the policy.
            layer: the linear or convolution layer.

        Raises:
            InputError: it cannot stand there.
        """

    @property
    def claim(self) -> Claim:
        return "biased"

    def forward(self, x: torch.Tensor, stream: Stream) -> torch.Tensor:
        """Quantize and dequantize, as every quantizer."""
        return self.fixed(x)(x, stream)

    def encode(self, x: torch.Tensor, stream: Stream) -> Quantized:
        """The same numbers as calling, as codes in their storage format."""
        return self.fixed(x).encode(x, stream)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        return self.fixed(x).mean(x)

    def variance(self, x: torch.Tensor) -> torch.Tensor:
        return self.fixed(x).variance(x)

    def bound(self, x: torch.Tensor) -> float:
        """Zero: there is nothing random."""
        return 0.0


def require_finite(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of ``x``, 0-dimensional.

    Raises:
        NonFiniteError: ``x`` holds NaN or Inf.
    """
    table = x if x.dim() > 1 else x.unsqueeze(1)
    low, high = native.extremes(table, None) or torch.aminmax(x)
    native.require_finite(low, high, x)
    return torch.maximum(low.abs(), high.abs()).reshape(())


def thread_free_sum(x: torch.Tensor) -> torch.Tensor:
    """Sums of the rows of ``x`` ``[G, n]``, float64 ``[G]``: the same on any number of threads."""
    # A sum that is one number is divided among the threads; those of many short rows are not.
    x = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % _CHUNK))
    return x.view(x.shape[0], -1, _CHUNK).sum(2).sum(1)


def absolute_mean(x: torch.Tensor, axis: int | None) -> torch.Tensor:
    """Mean of ``|x|`` for every index of an axis (``[G]``), or of all (``[1]``); float64."""
    table = rows(x)
    table = table.reshape(1, -1) if axis is None else table.transpose(0, axis).reshape(table.shape[axis], -1)
    return thread_free_sum(table.abs()) / table.shape[1]


def require_bits(name: str, bits: int, only: int, why: str = "") -> None:
    """Raise InputError unless ``bits`` is the one width that a quantizer has."""
    uint(bits)
    if bits != only:
        widths = "1 bit" if only == 1 else f"{only} bits"
        raise InputError(f"{name} has {widths} only{why and f' ({why})'}, got bits={bits}")


def require_choice(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """Raise InputError unless an option has one of its values."""
    if value not in known:
        raise InputError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")

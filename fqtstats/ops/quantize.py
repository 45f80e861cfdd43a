"""Quantization with native kernels: extremes, codes in their storage layout, and back.

The equations are those of ``fqtstats.quantizers.grid`` and ``fqtstats.rounding``, operation by operation, so the codes
are the same bit for bit; the functions here return None where there is no kernel, and the caller takes the torch path.

Shape legend: a tensor is viewed as ``[N, C, S]`` (sample, channel, space).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fqtstats.errors import NonFiniteError
from fqtstats.formats import uint
from fqtstats.ops.codes import Affine, Codes, Kept, array, empty_codes, empty_grids
from fqtstats.ops.extension import native_module

__all__ = [
    "MOST_RANDOM_BITS",
    "OK_WITH_OFFSET",
    "Recipe",
    "decode",
    "encode",
    "extremes",
    "native_for",
    "require_finite",
    "require_finite_ranges",
    "view_of",
]

Rule = Literal["affine", "zero_on_grid", "symmetric", "mirrored", "logarithmic"]

_RULES: dict[Rule, int] = {"affine": 0, "zero_on_grid": 1, "symmetric": 2, "logarithmic": 3, "mirrored": 4}
"""Those that the kernels have."""

OK_WITH_OFFSET, _NOT_FINITE, _RANGE_OVERFLOWS = 1, 2, 3
MOST_RANDOM_BITS = 24


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a uniform quantizer makes codes.

    Attributes:
        axis: the axis of ``[N, C, S]`` that has a grid per index (0 or 1), or None for one grid.
        rule: how a grid follows from a group's extremes, a function of ``fqtstats.quantizers.grid``.
        bits: width of the codes, 1 to 8.
        random_bits: random bits per stochastic rounding, or None: to nearest.
        magnitudes: of the rule ``"logarithmic"``, how many powers of two there are; else 0.
    """

    axis: int | None
    rule: Rule
    bits: int
    random_bits: int | None
    magnitudes: int = 0

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2 * self.magnitudes or (1 << self.bits) - 1

    @property
    def shared(self) -> tuple[int, ...]:
        """Axes of ``[N, C, S]`` that share a grid."""
        return tuple(axis for axis in range(3) if axis != self.axis)


def encode(
    x: torch.Tensor,
    recipe: Recipe,
    words: tuple[int, int, int, int] | None = None,
    pad: tuple[int, int] = (0, 0),
    *,
    extremes: tuple[torch.Tensor, torch.Tensor] | None = None,
    kept: Kept | None = None,
    variant: str | None = None,
) -> Codes | None:
    """Codes of ``x``; float32 arithmetic.

    Args:
        x: ``[N, C]`` or ``[N, C, H, W]``, not empty; contiguous and channels-last memory is read in place.
        recipe: grids and rounding.
        words: key words of the random stream (:meth:`fqtstats.random.Stream.words`); element ``i`` of the logical shape
            takes number ``i``.
        pad: pixels around every image.
        extremes: minimum and maximum of each group (that is kept), float32 ``[G]``, where they are known already.
        kept: which groups along the recipe's axis are quantized, as if there were no others; only the random numbers
            are those of the whole tensor. Needs ``extremes``.
        variant: name of a kernel, by default the fastest.

    Returns:
        None where there is no kernel: the extension is not in use, ``x`` is not float32 or bfloat16 on the CPU, a
        rule that the kernels do not have, or more than 24 random bits.

    Raises:
        NonFiniteError: ``x`` (or, where they are given, an extreme) holds NaN or Inf, or a range overflows.
        ValueError: an argument is out of range.
    """
    random_bits = recipe.random_bits or 0
    native = native_for(x)
    if native is None or random_bits > MOST_RANDOM_BITS or recipe.rule not in _RULES:
        return None
    if random_bits and words is None:
        raise ValueError("stochastic rounding needs the words of a stream, got None")
    shape = tuple(x.shape)
    if len(shape) not in (2, 4):
        raise ValueError(f"x must be [N, C] or [N, C, H, W], got {list(shape)}")
    if kept is not None:
        if (kept.axis, kept.size) != (recipe.axis, shape[kept.axis]):
            raise ValueError(
                f"kept must be {shape[kept.axis]} groups along axis {recipe.axis}, got {kept.size} along {kept.axis}"
            )
        shape = tuple(len(kept.indices) if axis == kept.axis else size for axis, size in enumerate(shape))
    n, _, *size = shape
    height, width = size or (1, 1)
    view, channels_last = view_of(x)
    storage_bits = uint(recipe.bits).storage_bits
    groups = 1 if recipe.axis is None else shape[recipe.axis]
    out = empty_codes(shape, storage_bits, pad)
    step, zero, offset = empty_grids(groups)
    low, high = (None, None) if extremes is None else (t.detach().numpy() for t in extremes)
    status = native.quantize_encode(
        view,
        channels_last,
        -1 if recipe.axis is None else recipe.axis,
        _RULES[recipe.rule],
        recipe.levels,
        random_bits,
        words or (0, 0, 0, 0),
        storage_bits,
        (height, width),
        pad,
        out.numpy(),
        step.numpy(),
        zero.numpy(),
        offset.numpy(),
        low,
        high,
        None if kept is None else kept.indices.numpy(),
        torch.get_num_threads(),
        variant,
    )
    if status in (_NOT_FINITE, _RANGE_OVERFLOWS):
        _fail(x, recipe, extremes)
    affine = Affine(
        step=step,
        zero=None if recipe.rule in ("affine", "mirrored") else zero,
        offset=offset if status == OK_WITH_OFFSET else None,
        axis=recipe.axis if groups > 1 else None,
        magnitudes=recipe.magnitudes if recipe.magnitudes > 1 else 0,  # the points of one are evenly spaced
    )
    return Codes(out if size else out.view(n, -1), storage_bits, shape, pad, affine)


def decode(
    codes: Codes, memory_format: torch.memory_format = torch.contiguous_format, *, variant: str | None = None
) -> torch.Tensor | None:
    """The numbers that codes stand for, float32: the same as :meth:`Codes.decode`, in either memory format.

    Returns:
        None where the extension is not in use or the codes are not on the CPU.
    """
    native = native_module()
    if native is None or codes.data.device.type != "cpu":
        return None
    n, c, *size = codes.shape
    height, width = size or (1, 1)
    affine = codes.affine
    out = torch.empty(codes.shape, dtype=torch.float32, device="cpu", memory_format=memory_format)
    view, channels_last = view_of(out)
    native.quantize_decode(
        (codes.data if size else codes.data.view(n, 1, 1, -1)).numpy(),
        codes.bits,
        c,
        (height, width),
        codes.pad,
        -1 if affine.axis is None else affine.axis,
        affine.magnitudes > 0,
        array(affine.step),
        array(affine.zero),
        array(affine.offset),
        channels_last,
        view,
        torch.get_num_threads(),
        variant,
    )
    return out


def extremes(
    x: torch.Tensor, axis: int | None, *, variant: str | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Minimum and maximum of each group of ``x`` ``[N, C, ...]``, float32 ``[G]``; NaN in a group that holds one.

    Args:
        x: not empty; contiguous and channels-last memory is read in place.
        axis: one group per index of axis 0 or 1, or None for one group.
        variant: name of a kernel, by default the fastest.

    Returns:
        None where there is no kernel, as for :func:`encode`.
    """
    native = native_for(x)
    if native is None:
        return None
    view, channels_last = view_of(x)
    groups = 1 if axis is None else x.shape[axis]
    low, high = torch.empty(2, groups, dtype=torch.float32, device="cpu").unbind()
    native.quantize_extremes(
        view,
        channels_last,
        -1 if axis is None else axis,
        low.numpy(),
        high.numpy(),
        torch.get_num_threads(),
        variant,
    )
    return low, high


def require_finite(low: torch.Tensor, high: torch.Tensor, x: torch.Tensor) -> None:
    """Raise unless the extremes of ``x`` are finite: NaN and Inf propagate into them, so that looking there is enough.

    Raises:
        NonFiniteError: ``x`` holds NaN or Inf.
    """
    if bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        return
    count = int((~torch.isfinite(x)).sum())
    raise NonFiniteError(
        f"expected finite numbers, got {count} NaN or Inf among {x.numel()}; lower the learning rate or rescale the "
        "loss",
        count=count,
        numel=x.numel(),
    )


def require_finite_ranges(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """``high - low`` per group, float64.

    Raises:
        NonFiniteError: a range exceeds the largest number of the groups' dtype.
    """
    span = high.double() - low.double()
    limit = torch.finfo(low.dtype).max
    bad = ~(span <= limit)  # also true for NaN
    if bool(bad.any()):
        raise NonFiniteError(
            f"expected a finite range in every group, got {int(bad.sum())} of {bad.numel()} groups whose range exceeds "
            f"the largest {low.dtype} ({limit:.3g}); rescale the loss",
            count=int(bad.sum()),
            numel=bad.numel(),
        )
    return span


def native_for(x: torch.Tensor) -> Any:
    """The extension where it can read ``x`` (float32 or bfloat16 on the CPU), else None."""
    # Subclasses of tensors (fake ones among them) have no memory of their own.
    if x.device.type != "cpu" or type(x) not in (torch.Tensor, torch.nn.Parameter):
        return None
    return native_module() if x.dtype in (torch.float32, torch.bfloat16) else None


def _fail(x: torch.Tensor, recipe: Recipe, given: tuple[torch.Tensor, torch.Tensor] | None) -> None:
    low, high = given or extremes(x, recipe.axis) or (x.amin(), x.amax())
    require_finite(low, high, x)
    require_finite_ranges(low, high)


def view_of(x: torch.Tensor) -> tuple[object, bool]:
    """``x [N, C, ...]`` as the kernels take it: ``[N, C, S]``, or ``[N, S, C]`` where channels are last in memory."""
    x = x.detach()
    n, c, *size = x.shape
    space = math.prod(size)
    if space == 1:
        view, channels_last = x.contiguous().view(n, 1, c), True
    elif x.is_contiguous() or x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        view, channels_last = x.contiguous().view(n, c, space), False
    else:
        view, channels_last = x.permute(0, 2, 3, 1).reshape(n, space, c), True
    # NumPy has no bfloat16; its own export of other types is the faster one.
    return view if view.dtype == torch.bfloat16 else view.numpy(), channels_last

"""Native block Householder transform; its definition and fallback are :mod:`fqtstats.quantizers.bhq`'s."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fqtstats.formats import uint
from fqtstats.ops.codes import Affine, Codes, empty_codes, empty_grids
from fqtstats.ops.extension import native_module
from fqtstats.ops.quantize import MOST_RANDOM_BITS, OK_WITH_OFFSET, native_for, view_of

__all__ = [
    "Groups",
    "householder_adapt",
    "householder_encode",
    "householder_forward",
    "householder_groups",
    "householder_inverse",
]


class Groups(NamedTuple):
    """Which rows are reflected together: see :class:`fqtstats.quantizers.bhq.BlockHouseholder`.

    Attributes:
        order: row index of each position, ``[N]`` int64.
        heads: position of the first row of each group, ``[K]`` int64, ascending.
        sizes: rows of each group, ``[K]`` float64.
        scale: of each position, N elements, float32.
    """

    order: torch.Tensor
    heads: torch.Tensor
    sizes: torch.Tensor
    scale: torch.Tensor


def householder_groups(ranges: torch.Tensor) -> Groups | None:
    """Groups of rows and their scales in float32.

    Args:
        ranges: of the rows, ``[N]`` float64, N >= 2; finite, not negative, at least one of them positive.

    Returns:
        None where the extension is not in use, or ``ranges`` is not on the CPU.
    """
    native = native_module()
    if native is None or ranges.device.type != "cpu":
        return None
    groups = _empty_groups(ranges.numel())
    count = native.householder_groups(ranges.numpy(), *_arguments(groups))
    return _first_groups(groups, count)


def householder_adapt(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    bits: int,
    random_bits: int,
    *,
    variant: str | None = None,
) -> Groups | None:
    """Groups of rows, each with the map of least variance: what :func:`fqtstats.quantizers.adaptive.adapt` chooses.

    Args:
        x: ``[N, ...]``, its elements in row-major order.
        low: minimum of each row, ``[N]``.
        high: maximum of each row, ``[N]``; with a range that float32 has, and one of them is positive.
        bits: of a code.
        random_bits: per stochastic rounding.
        variant: name of the kernels, by default the fastest.

    Returns:
        None where there is no kernel for ``x``: not float32 on the CPU, or the extension is not in use.
    """
    native = native_module()
    if native is None or not _fits(x):
        return None
    groups = _empty_groups(len(x))
    _, count = native.householder_adapt(
        x.contiguous().view(len(x), -1).numpy(),
        bits,
        random_bits,
        *_arguments(groups),
        low.numpy(),
        high.numpy(),
        torch.get_num_threads(),
        variant,
    )
    return _first_groups(groups, count)


def householder_encode(
    x: torch.Tensor,
    bits: int,
    random_bits: int,
    words: tuple[int, int, int, int],
    pad: tuple[int, int] = (0, 0),
    *,
    adaptive: bool = False,
    extremes: tuple[torch.Tensor, torch.Tensor] | None = None,
    variant: str | None = None,
) -> tuple[Codes, Groups | None] | None:
    """Codes of the transformed rows of ``x`` in group order, an affine grid for each of them.

    Args:
        x: ``[N, C]`` or ``[N, C, H, W]``, not empty; a row is a sample. Contiguous and channels-last memory is read in
            place.
        bits: of a code.
        random_bits: per stochastic rounding.
        words: key words of the random stream (:meth:`fqtstats.random.Stream.words`).
        pad: pixels around every image.
        adaptive: take for each group the map of least variance.
        extremes: minimum and maximum of each row, float32 ``[N]``, where they are known already.
        variant: name of the kernels, by default the fastest.

    Returns:
        Codes, and the groups of rows, or None in their place where the rows are encoded without a transform: there is
        one row, or no range is positive. None instead of the pair where there is no kernel for ``x`` (not float32 or
        bfloat16 on the CPU, more than 24 random bits, or the extension is not in use), or where numbers, ranges, or
        transformed numbers are not finite.
    """
    native = native_for(x)
    if native is None or random_bits > MOST_RANDOM_BITS:
        return None
    n, _, *size = x.shape
    height, width = size or (1, 1)
    view, channels_last = view_of(x)
    storage_bits = uint(bits).storage_bits
    out = empty_codes(tuple(x.shape), storage_bits, pad)
    step, zero, offset = empty_grids(n)
    low, high = (None, None) if extremes is None else (t.detach().numpy() for t in extremes)
    groups = _empty_groups(n)
    status, count = native.householder_encode(
        view,
        channels_last,
        bits,
        random_bits,
        words,
        storage_bits,
        (height, width),
        pad,
        out.numpy(),
        step.numpy(),
        zero.numpy(),
        offset.numpy(),
        *_arguments(groups),
        low,
        high,
        adaptive,
        torch.get_num_threads(),
        variant,
    )
    if status != OK_WITH_OFFSET:
        return None
    affine = Affine(step=step, zero=None, offset=offset, axis=0 if n > 1 else None)
    codes = Codes(out if size else out.view(n, -1), storage_bits, tuple(x.shape), pad, affine)
    return codes, None if count < 0 else _first_groups(groups, count)


def householder_forward(x: torch.Tensor, groups: Groups) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Transformed rows in group order, and the minimum and maximum ``[N]`` of each of them.

    Args:
        x: ``[N, ...]``; each row is mapped elementwise, so the result has the memory format of ``x``.

    Returns:
        None where there is no kernel for ``x``: not float32 on the CPU, or the extension is not in use.
    """
    native = native_module()
    if native is None or not _fits(x):
        return None
    x = _dense(x)
    out = torch.empty_like(x)
    low, high = x.new_empty(x.shape[0]), x.new_empty(x.shape[0])
    arguments = _arguments(groups)
    native.householder_forward(
        _matrix(x).numpy(), *arguments, torch.get_num_threads(), _matrix(out).numpy(), low.numpy(), high.numpy()
    )
    return out, low, high


def householder_inverse(y: torch.Tensor, groups: Groups) -> torch.Tensor | None:
    """Rows in their own order from transformed ones, in the memory format of ``y``; None as for the forward map."""
    native = native_module()
    if native is None or not _fits(y):
        return None
    y = _dense(y)
    out = torch.empty_like(y)
    native.householder_inverse(_matrix(y).numpy(), *_arguments(groups), torch.get_num_threads(), _matrix(out).numpy())
    return out


def _fits(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def _empty_groups(n: int) -> Groups:
    # Of n rows; a group has two or more.
    return Groups(
        order=torch.empty(n, dtype=torch.int64, device="cpu"),
        heads=torch.empty(n // 2, dtype=torch.int64, device="cpu"),
        sizes=torch.empty(n // 2, dtype=torch.float64, device="cpu"),
        scale=torch.empty(n, dtype=torch.float32, device="cpu"),
    )


def _first_groups(groups: Groups, count: int) -> Groups:
    return groups._replace(heads=groups.heads[:count], sizes=groups.sizes[:count])


def _arguments(groups: Groups) -> tuple[object, ...]:
    return groups.order.numpy(), groups.heads.numpy(), groups.sizes.numpy(), groups.scale.view(-1).numpy()


def _rows_first(x: torch.Tensor) -> torch.Tensor:
    # Axes in the order of memory, the samples first: channels last becomes [N, H, W, C].
    return x.permute(0, *sorted(range(1, x.dim()), key=x.stride, reverse=True))


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if _rows_first(x).is_contiguous() else x.contiguous()


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """``[N, D]`` view, the elements of a row in the order of memory."""
    return _rows_first(x).view(x.shape[0], -1)

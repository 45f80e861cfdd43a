"""Native block Householder transform; its definition and fallback are :mod:`fqtstats.quantizers.bhq`'s."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fqtstats.ops.extension import native_module

__all__ = ["Groups", "householder_forward", "householder_inverse"]


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

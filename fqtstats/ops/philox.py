"""Philox4x32-10 random bits: schema, fake kernel, CPU kernel, and a pure-torch fallback with identical numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fqtstats.errors import InputError
from fqtstats.ops.extension import native_module

__all__ = ["philox_bits", "philox_bits_torch"]

# The layout is fqtstats.random's.
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_LANES = 16  # blocks per tile


def philox_bits(
    k0: int,
    k1: int,
    c2: int,
    c3: int,
    numel: int,
    n: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    first_tile: int = 0,
) -> torch.Tensor:
    """``numel`` consecutive integers of a stream, uniform on ``[0, 2^n)``.

    Args:
        k0: first word of the Philox key.
        k1: second word of the Philox key.
        c2: third word of the counter.
        c3: fourth word of the counter.
        numel: how many elements.
        n: bits per element, 1 to 32; 1 to 31 for ``torch.int32``.
        dtype: ``torch.int64`` or ``torch.int32``.
        device: where the result lives; the numbers are the same everywhere.
        first_tile: tile that element 0 of the result is the first one of.

    Returns:
        ``[numel]`` tensor.

    Raises:
        InputError: ``n`` or ``dtype`` is out of range, or ``FQTSTATS_ISA`` cannot be met.
    """
    request = _Request(k0, k1, c2, c3, numel, n, dtype, device, first_tile)
    # Tracers must see the operation itself; otherwise its dispatch costs several times a small draw.
    if device.type != "cpu" or torch.compiler.is_compiling() or is_in_torch_dispatch_mode(include_infra_modes=True):
        result: torch.Tensor = torch.ops.fqtstats.philox_bits(*request)
        return result
    return _drawn(request)


def philox_bits_torch(
    k0: int,
    k1: int,
    c2: int,
    c3: int,
    numel: int,
    n: int,
    dtype: torch.dtype,
    device: torch.device,
    first_tile: int = 0,
) -> torch.Tensor:
    """:func:`philox_bits` in torch operations."""
    _check(n, dtype)
    per_tile = _LANES * (4 if n > 16 else 8)
    tiles = -(-numel // per_tile)
    out = torch.empty(numel, dtype=dtype, device=device)
    # In pieces, because a piece's temporaries are some ten times its size: what a cache or a kernel launch prefers.
    step = 2**10 if device.type == "cpu" else 2**16
    for start in range(0, tiles, step):
        stop = min(start + step, tiles)
        block = torch.arange((first_tile + start) * _LANES, (first_tile + stop) * _LANES, device=device)
        words = _philox_words(block, k0, k1, c2, c3)
        if n > 16:
            parts = [w >> (32 - n) for w in words]
        else:
            parts = [half >> (16 - n) for w in words for half in (w & 0xFFFF, w >> 16)]
        tiled = torch.stack([p.view(-1, _LANES) for p in parts], dim=1).view(-1)
        piece = out[start * per_tile : stop * per_tile]
        piece.copy_(tiled[: piece.numel()])
    return out


def _philox_words(block: torch.Tensor, k0: int, k1: int, c2: int, c3: int) -> tuple[torch.Tensor, ...]:
    """The four words, each int64 in ``[0, 2^32)``, of every block in ``block``."""
    x0, x1 = block & _MASK, (block >> 32) & _MASK
    x2, x3 = torch.full_like(block, c2), torch.full_like(block, c3)
    for r in range(10):
        # The int64 products wrap modulo 2^64, and an arithmetic shift followed by a mask still gives bits 32 to 63.
        p0, p1 = x0 * _M0, x2 * _M1
        x0, x2 = (
            ((p1 >> 32) & _MASK) ^ x1 ^ ((k0 + r * _W0) & _MASK),
            ((p0 >> 32) & _MASK) ^ x3 ^ ((k1 + r * _W1) & _MASK),
        )
        x1, x3 = p1 & _MASK, p0 & _MASK
    return x0, x1, x2, x3


class _Request(NamedTuple):
    """The arguments of the operation, in its order."""

    k0: int
    k1: int
    c2: int
    c3: int
    numel: int
    n: int
    dtype: torch.dtype
    device: torch.device
    first_tile: int = 0


def _drawn(request: _Request) -> torch.Tensor:
    native = native_module() if request.device.type == "cpu" else None
    if native is None:
        return philox_bits_torch(*request)
    k0, k1, c2, c3, numel, n, dtype, device, first_tile = request
    _check(n, dtype)
    out = torch.empty(numel, dtype=dtype, device=device)
    native.philox_bits(k0, k1, c2, c3, n, torch.get_num_threads(), out.numpy(), first_tile)
    return out


def _check(n: int, dtype: torch.dtype) -> None:
    if dtype not in (torch.int64, torch.int32) or not 1 <= n <= (32 if dtype == torch.int64 else 31):
        raise InputError(f"n must be 1 to 32 for torch.int64 and 1 to 31 for torch.int32, got n={n} with {dtype}")


# No argument is a tensor, so the dispatcher has no device to go by: one kernel for all of them looks at `device`.
torch.library.define(
    "fqtstats::philox_bits",
    "(int k0, int k1, int c2, int c3, SymInt numel, int n, ScalarType dtype, Device device, "
    "int first_tile=0) -> Tensor",
)


@torch.library.impl("fqtstats::philox_bits", "default")
def _philox_bits_kernel(*arguments: Any) -> torch.Tensor:
    return _drawn(_Request(*arguments))


@torch.library.register_fake("fqtstats::philox_bits")  # type: ignore[untyped-decorator]
def _philox_bits_fake(*arguments: Any) -> torch.Tensor:
    request = _Request(*arguments)
    return torch.empty(request.numel, dtype=request.dtype, device=request.device)

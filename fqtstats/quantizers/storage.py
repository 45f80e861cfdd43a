"""Quantizing into the storage layout that products of codes read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fqtstats.listening import LISTENERS, asked
from fqtstats.ops import native_module
from fqtstats.ops import quantize as native
from fqtstats.ops.codes import Affine, Codes
from fqtstats.ops.householder import householder_encode
from fqtstats.policy import QuantizerLike
from fqtstats.quantizers import QUANTIZERS
from fqtstats.quantizers.base import Quantized, Transform, UniformQuantizer
from fqtstats.quantizers.bhq import BHQ, BlockHouseholder
from fqtstats.random import Stream, key_words

__all__ = ["Extremes", "Stored", "store"]


@dataclass(frozen=True, slots=True)
class Stored:
    """A quantized matrix or batch of images, ready for a product.

    Attributes:
        codes: of the transformed rows, where there is a transform.
        transform: what was applied to the rows (axis 0) before rounding, or None.
    """

    codes: Codes
    transform: Transform | None

    def decode(self) -> torch.Tensor:
        """The numbers that the codes stand for, float32: what the quantizer gives when it is called."""
        x = native.decode(self.codes)
        if x is None:
            x = self.codes.decode()
        if self.transform is None:
            return x
        n, c = x.shape[:2]
        return self.transform.inverse(x.reshape(n, c, -1)).view(x.shape)


Extremes = tuple[torch.Tensor, torch.Tensor]
"""Minimum and maximum of every sample and channel of a tensor, float32 ``[N, C]``; NaN both where it holds NaN."""


def store(
    q: QuantizerLike,
    x: torch.Tensor,
    stream: Stream,
    pad: tuple[int, int] = (0, 0),
    extremes: Extremes | None = None,
) -> Stored | None:
    """``q`` of ``x`` as codes: the same codes, bit for bit, as ``q.encode(x, stream)``.

    Args:
        q: a quantizer.
        x: ``[N, C]`` or ``[N, C, H, W]``, any strides; float32, or bfloat16 or float16, which are quantized in float32.
        stream: where its random numbers come from.
        pad: pixels around every image.
        extremes: of ``x``, where they are known already; saves a pass over it.

    Returns:
        None where ``q`` has no codes, or none with a scale per tensor, row or channel in float32: then there is no
        integer product.

    Raises:
        NonFiniteError: ``x`` holds NaN or Inf.
    """
    if not isinstance(q, UniformQuantizer) or x.dtype == torch.float64 or x.dim() not in (2, 4):
        return None
    if q.recipe.rule == "logarithmic":
        return None
    if q.view_shape(x.shape)[1] != x.shape[1]:
        return None
    stored = _store_native(q, x, stream, pad, extremes)
    if stored is not None:
        return stored
    quantized = q.encode(x, stream)
    affine = _affine(quantized)
    if affine is None:
        return None
    codes = quantized.codes().view(x.shape)
    return Stored(Codes.pack(codes, q.format.storage_bits, affine, pad), quantized.frame.transform)


def _store_native(
    q: UniformQuantizer, x: torch.Tensor, stream: Stream, pad: tuple[int, int], extremes: Extremes | None
) -> Stored | None:
    # A class that is not the registry's may round otherwise than its recipe says, a stream have other numbers.
    ours = QUANTIZERS.get(q.name) is type(q) and type(stream) is Stream
    known = isinstance(q, BHQ) or type(q).transform is UniformQuantizer.transform
    if not (ours and known) or native_module() is None or x.device.type != "cpu" or x.numel() == 0:
        return None
    groups = None if extremes is None else _of_groups(extremes, q.recipe.axis)
    if isinstance(q, BHQ):
        stored = _store_transformed(q, x, stream, pad, groups)
    else:
        codes = native.encode(x, q.recipe, key_words(stream), pad, extremes=groups)
        stored = None if codes is None else Stored(codes, None)
    if LISTENERS and stored is not None and q.recipe.random_bits is not None:
        asked(stream, 0, x.numel(), q.recipe.random_bits)
    return stored


def _store_transformed(
    q: BHQ, x: torch.Tensor, stream: Stream, pad: tuple[int, int], extremes: Extremes | None
) -> Stored | None:
    encoded = householder_encode(
        x.float() if x.dtype == torch.float16 else x, q.bits, q.random_bits, key_words(stream), pad, extremes=extremes
    )
    if encoded is None:
        return None
    codes, groups = encoded
    return Stored(codes, None if groups is None else BlockHouseholder.of_native(groups))


def _of_groups(extremes: Extremes, axis: int | None) -> Extremes:
    """Extremes of the whole tensor (``[1]``), or of the indices of an axis."""
    low, high = extremes
    if axis is None:
        return low.amin().view(1), high.amax().view(1)
    return low.amin(1 - axis), high.amax(1 - axis)


def _affine(quantized: Quantized) -> Affine | None:
    grid, shape = quantized.frame.grid, quantized.frame.shape
    n, c, *_ = grid.step.shape
    if grid.step.numel() == 1:
        axis = None
    elif (n, c) == (shape[0], 1):
        axis = 0
    elif (n, c) == (1, shape[1]):
        axis = 1
    else:
        return None
    return Affine(
        step=grid.step.flatten(),
        zero=None if grid.zero is None else grid.zero.flatten().to(torch.int32),
        offset=None if grid.offset is None else grid.offset.flatten(),
        axis=axis,
    )

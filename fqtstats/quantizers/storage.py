"""Quantizing into the storage layout that products of codes read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fqtstats.errors import NonFiniteError
from fqtstats.listening import LISTENERS, asked
from fqtstats.ops import fused, native_module
from fqtstats.ops import quantize as native
from fqtstats.ops.codes import Affine, Codes, Kept, empty_codes
from fqtstats.ops.householder import householder_encode
from fqtstats.policy import QuantizerLike
from fqtstats.quantizers import registered
from fqtstats.quantizers.agp import AGP, Pruned
from fqtstats.quantizers.base import Quantized, Transform, UniformQuantizer
from fqtstats.quantizers.bhq import BHQ, BlockHouseholder
from fqtstats.quantizers.lsq import Steps
from fqtstats.quantizers.luq import LUQ, Hindsight, LogQuantized
from fqtstats.quantizers.ranged import Binary, LearnedQuantizer, RangedQuantizer, binary, require_finite
from fqtstats.random import Stream, key_words

__all__ = ["Extremes", "Stored", "has_codes", "store"]


_LARGE = 1e38
"""Numbers up to this, the first and last point of a grid, are below the largest of float32 and bfloat16."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A quantized matrix or batch of images, ready for a product.

    Attributes:
        codes: of the transformed rows, where there is a transform; of what is kept.
        transform: what was applied to the rows (axis 0) before rounding, or None.
        kept: the samples or channels that there are codes of, where it is not all of them; the others are zeros.
        samples: how many independent quantizations of the same tensor there are codes of, one after the other along
            axis 0; their mean is meant.
    """

    codes: Codes
    transform: Transform | None = None
    kept: Kept | None = None
    samples: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the tensor."""
        shape = list(self.codes.shape)
        shape[0] //= self.samples
        if self.kept is not None:
            shape[self.kept.axis] = self.kept.size
        return tuple(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of all that decoding them needs."""
        own = self.codes.nbytes + (0 if self.transform is None else self.transform.nbytes)
        return own + (0 if self.kept is None else self.kept.indices.numel() * self.kept.indices.element_size())

    def decode(self) -> torch.Tensor:
        """The numbers that the codes stand for, float32: what the quantizer gives when it is called."""
        if 0 in self.codes.shape:
            return torch.zeros(self.shape, dtype=torch.float32, device="cpu")
        x = native.decode(self.codes)
        if x is None:
            x = self.codes.decode()
        if self.samples > 1:
            # In this order, as the quantizer itself adds them up.
            total, *others = x.unflatten(0, (self.samples, -1)).unbind()
            for one in others:
                total = total + one
            x = total / self.samples
        if self.kept is not None:
            x = self.kept.scattered(x)
        if self.transform is None:
            return x
        n, c = x.shape[:2]
        return self.transform.inverse(x.reshape(n, c, -1)).view(x.shape)


Extremes = tuple[torch.Tensor, torch.Tensor]
"""Minimum and maximum of every sample and channel of a tensor, float32 ``[N, C]``; NaN both where it holds NaN."""


def has_codes(q: object) -> bool:
    """Whether a quantizer encodes: products may then be on its codes."""
    return callable(getattr(q, "encode", None))


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
    if not has_codes(q) or x.dtype == torch.float64 or x.dim() not in (2, 4):
        return None
    if isinstance(q, LearnedQuantizer):
        q = q.fixed(x)
    if isinstance(q, Hindsight):
        stored = store(q.current, x, stream, pad, extremes)  # refuses what is not finite, which is nothing to note
        if stored is not None:
            q.note(x)
        return stored
    if isinstance(q, AGP):
        stored = _store_pruned(q, x, stream, pad, extremes)
        return _packed_pruned(q.encode(x, stream), pad) if stored is None else stored
    if isinstance(q, UniformQuantizer):
        if q.view_shape(x.shape)[1] != x.shape[1]:
            return None
        stored = _store_native(q, x, stream, pad, extremes)
        if stored is not None:
            return stored
    quantized: Quantized = q.encode(x, stream)  # type: ignore[attr-defined]
    if type(quantized) not in (Quantized, LogQuantized):
        return None
    affine = _affine(quantized)
    if affine is None or quantized.frame.view[1] != x.shape[1]:
        return None
    samples = quantized.samples if isinstance(quantized, LogQuantized) else 1
    codes = quantized.codes().reshape(samples * x.shape[0], *x.shape[1:])
    packed = Codes.pack(codes, quantized.format.storage_bits, affine, pad)
    return Stored(packed, quantized.frame.transform, samples=samples)


def _store_native(
    q: UniformQuantizer, x: torch.Tensor, stream: Stream, pad: tuple[int, int], extremes: Extremes | None
) -> Stored | None:
    # A class that is not the registry's may round otherwise than its recipe says, a stream have other numbers.
    ours = registered(q) and type(stream) is Stream
    known = isinstance(q, BHQ) or type(q).transform is UniformQuantizer.transform
    if native_module() is None or x.device.type != "cpu" or x.numel() == 0:
        return None
    if isinstance(q, RangedQuantizer):
        return _store_ranged(q, x, pad) if ours or isinstance(q, Steps) else None
    if not (ours and known):
        return None
    groups = None if extremes is None else _of_groups(extremes, q.recipe.axis)
    if isinstance(q, LUQ):
        return _store_logarithmic(q, x, stream, pad, groups)
    if isinstance(q, BHQ):
        stored = _store_transformed(q, x, stream, pad, groups)
    else:
        codes = native.encode(x, q.recipe, key_words(stream), pad, extremes=groups)
        stored = None if codes is None else Stored(codes, None)
    if LISTENERS and stored is not None and q.recipe.random_bits is not None:
        asked(stream, 0, x.numel(), q.recipe.random_bits)
    return stored


def _store_ranged(q: RangedQuantizer, x: torch.Tensor, pad: tuple[int, int]) -> Stored | None:
    bit = binary(q)
    if bit is not None:
        return Stored(_bits(x.detach().float(), bit, pad))
    y, low, high = q.ranged(x.detach().float())
    native.require_finite_ranges(low, high)
    codes = native.encode(y, q.recipe, None, pad, extremes=(low, high))
    return None if codes is None else Stored(codes, None)


def _bits(x: torch.Tensor, bit: Binary, pad: tuple[int, int]) -> Codes:
    inner = x.movedim(1, -1)
    if bit.threshold == 0 and pad == (0, 0) and x.is_contiguous():
        codes = fused.signs(x, bit.affine)
        if codes is None:
            require_finite(x)
        assert codes is not None
        return codes
    require_finite(x)
    if inner.is_contiguous():
        one = torch.ones(x.shape[1], dtype=torch.float32, device="cpu")
        pixels = inner if x.dim() == 4 else inner.view(len(x), 1, 1, -1)
        whole = fused.Map(one, torch.zeros_like(one), relu=False, pool=False)
        codes = fused.bits(pixels.permute(0, 3, 1, 2), whole, bit.threshold, bit.affine, pad)
        return codes if x.dim() == 4 else replace(codes, data=codes.data.view(len(x), -1), shape=tuple(x.shape))
    return Codes.pack((x >= bit.threshold).to(torch.uint8), 1, bit.affine, pad)


def _store_logarithmic(
    q: LUQ, x: torch.Tensor, stream: Stream, pad: tuple[int, int], extremes: Extremes | None
) -> Stored | None:
    if not q.by_coordinate or native.native_for(x) is None:
        return None
    if q.largest is not None or (q.samples > 1 and extremes is None):
        extremes = native.extremes(x, None) if extremes is None else extremes
        assert extremes is not None
        native.require_finite(*extremes, x)
    if q.largest is not None:
        largest = torch.full((1,), q.largest, dtype=torch.float32, device="cpu")
        extremes = -largest, largest
    parts: list[Codes] = []
    for one in q.streams(stream):
        codes = native.encode(x, q.recipe, key_words(one), pad, extremes=extremes)
        if codes is None:
            return None
        asked(one, 0, x.numel(), q.random_bits)
        parts.append(codes)
    first = parts[0]
    if len(parts) == 1:
        return Stored(first)
    data = torch.cat([codes.data for codes in parts])
    return Stored(replace(first, data=data, shape=(len(parts) * x.shape[0], *x.shape[1:])), samples=len(parts))


def _store_pruned(
    q: AGP, x: torch.Tensor, stream: Stream, pad: tuple[int, int], extremes: Extremes | None
) -> Stored | None:
    """The groups that are kept, and nothing of the others: neither are they rounded nor have they codes."""
    ours = registered(q) and type(stream) is Stream
    if not ours or native.native_for(x) is None or q.random_bits > native.MOST_RANDOM_BITS or x.numel() == 0:
        return None
    groups = native.extremes(x, q.axis) if extremes is None else _of_groups(extremes, q.axis)
    assert groups is not None
    low, high = groups
    try:
        keep = q.keep_of(low, high)
    except NonFiniteError:
        native.require_finite(low, high, x)
        raise
    if float(torch.maximum(high, -low).amax()) * float(keep.weight.amax()) > _LARGE:
        # Rarely: what exceeds the largest number is found on the grids of all groups.
        view = (-1, 1, 1) if q.axis == 0 else (1, -1, 1)
        q.weighted(q.grid(low.view(view), high.view(view)), keep, x.dtype)
    index = q.drawn(keep, stream)
    kept = Kept(q.axis, index, x.shape[q.axis])
    asked(stream, 0, x.numel(), q.random_bits)
    if len(index) == 0:
        return _nothing(x.shape, q.format.storage_bits, pad, kept)
    ends = low[index], high[index]
    codes = native.encode(x, q.rounding.recipe, key_words(stream), pad, extremes=ends, kept=kept)
    assert codes is not None
    affine, weight = codes.affine, keep.weight[index]
    assert affine.offset is not None
    step, offset = ((t.double() * weight).float() for t in (affine.step, affine.offset))
    return Stored(replace(codes, affine=replace(affine, step=step, offset=offset)), kept=kept)


def _packed_pruned(quantized: Pruned, pad: tuple[int, int]) -> Stored | None:
    shape, axis = quantized.shape, quantized.axis
    affine = _affine(quantized)
    if affine is None:
        return None
    kept = Kept(axis, quantized.index, shape[axis])
    bits = quantized.format.storage_bits
    if len(kept.indices) == 0:
        return _nothing(shape, bits, pad, kept)
    part = [len(kept.indices) if i == axis else size for i, size in enumerate(shape)]
    return Stored(Codes.pack(quantized.codes().view(part), bits, affine, pad), kept=kept)


def _nothing(shape: tuple[int, ...], bits: int, pad: tuple[int, int], kept: Kept) -> Stored:
    """No codes at all, of a tensor of zeros."""
    affine = Affine(torch.empty(0, dtype=torch.float32, device="cpu"), axis=kept.axis)
    part = tuple(0 if i == kept.axis else size for i, size in enumerate(shape))
    data = empty_codes(part, bits, pad)
    return Stored(Codes(data if len(part) == 4 else data.flatten(1), bits, part, pad, affine), kept=kept)


def _store_transformed(
    q: BHQ, x: torch.Tensor, stream: Stream, pad: tuple[int, int], extremes: Extremes | None
) -> Stored | None:
    encoded = householder_encode(
        x.float() if x.dtype == torch.float16 else x,
        q.bits,
        q.random_bits,
        key_words(stream),
        pad,
        adaptive=q.grouping == "adaptive",
        extremes=extremes,
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
        magnitudes=grid.magnitudes,
    )

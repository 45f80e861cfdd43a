"""Integer codes in the storage layout that the native products read.

Shape legend: a tensor of codes is ``[N, C]`` (rows of a matrix) or ``[N, C, H, W]`` (images, or the weights ``[O, I,
kh, kw]`` of a convolution). In memory the channel axis is innermost, and the channels of one row or pixel start at a
multiple of 4 bytes (8 bytes for 1 bit): the products read whole words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fqtstats.errors import InputError

__all__ = [
    "STORAGE_BITS",
    "Affine",
    "Codes",
    "Geometry",
    "Kept",
    "array",
    "empty_codes",
    "empty_grids",
    "empty_images",
    "row_bytes",
]

STORAGE_BITS = (1, 2, 4, 8)


def row_bytes(channels: int, bits: int) -> int:
    """Bytes of the codes of one row or pixel: whole words of 4 bytes, of 8 bytes for 1 bit."""
    word = 8 if bits == 1 else 4
    return -(-channels * bits // (8 * word)) * word


def empty_images(n: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Uninitialized ``[N, C, H, W]`` float32 on the CPU in channels-last memory; not a view, unlike a permuted one."""
    return torch.empty(n, channels, height, width, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)


def empty_codes(shape: tuple[int, ...], bits: int, pad: tuple[int, int]) -> torch.Tensor:
    """Uninitialized data of codes of a logical shape ``[N, C]`` or ``[N, C, H, W]``, with its axes of pixels."""
    n, c, *size = shape
    height, width = size or (1, 1)
    lines, line, row = height + 2 * pad[0], width + 2 * pad[1], row_bytes(c, bits)
    return torch.empty(n, lines, line, row, dtype=torch.uint8, device="cpu")


def empty_grids(groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Uninitialized step, zero and offset of an :class:`Affine`, ``[G]`` each."""
    step, offset = torch.empty(2, groups, dtype=torch.float32, device="cpu").unbind()
    return step, torch.empty(groups, dtype=torch.int32, device="cpu"), offset


def array(values: torch.Tensor | None) -> Any:
    """A tensor on the CPU as a contiguous NumPy array, which is how the extension takes it; None for None."""
    return None if values is None else values.detach().contiguous().numpy()


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a 2-D convolution slides; each pair is (height, width)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def positions(self, size: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of the output, for those of the input and of the kernel.

        Raises:
            InputError: the kernel is larger than the input.
        """
        rooms = []
        for axis, name in enumerate(("height", "width")):
            padded = size[axis] + 2 * self.padding[axis]
            extent = self.dilation[axis] * (kernel[axis] - 1) + 1
            if padded < extent:
                raise InputError(
                    f"the kernel is larger than the input: {name} {extent} (with dilation), of the input {padded} "
                    "(with padding)"
                )
            rooms.append(padded - extent)
        return rooms[0] // self.stride[0] + 1, rooms[1] // self.stride[1] + 1


@dataclass(frozen=True, slots=True)
class Affine:
    """What codes mean: ``k * step + offset`` with ``k = code - zero``, one entry per group or one for the whole tensor.

    Of logarithmic codes, ``sign(k) 2^(|k| - 1)`` takes the place of ``k``, and 0 that of 0.

    Attributes:
        step: ``[G]`` float32.
        zero: ``[G]`` int32, or None where it is 0 everywhere.
        offset: ``[G]`` float32, or None where it is 0 everywhere.
        axis: the axis of the logical shape that the G groups run along (0 or 1), or None for one group (G = 1).
        magnitudes: of logarithmic codes, the largest ``|k|``, which is ``zero``; 0 where codes count steps.
    """

    step: torch.Tensor
    zero: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    axis: int | None = None
    magnitudes: int = 0

    def along(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """``values [G]`` shaped to broadcast against a tensor of ``dim`` axes."""
        shape = [1] * dim
        if self.axis is not None:
            shape[self.axis] = -1
        return values.view(shape)

    def arrays(self) -> tuple[Any, Any, Any]:
        """``step, zero, offset`` as the extension's products take them, which multiply logarithmic codes as bytes."""
        zero = self.zero
        if self.magnitudes:
            zero = torch.full_like(self.step, 2 ** (self.magnitudes - 1), dtype=torch.int32)
        return array(self.step), array(zero), array(self.offset)


@dataclass(frozen=True, slots=True)
class Kept:
    """The samples or channels of a tensor that there are codes of; all others are zeros.

    Attributes:
        axis: 0 (samples) or 1 (channels).
        indices: ``[K]`` int64, ascending.
        size: how many there are of both.
    """

    axis: int
    indices: torch.Tensor
    size: int

    def scattered(self, kept: torch.Tensor, axis: int | None = None) -> torch.Tensor:
        """A tensor with zeros beside those of ``kept``, along ``axis`` (by default its own), in the memory format."""
        axis = self.axis if axis is None else axis
        shape = (*kept.shape[:axis], self.size, *kept.shape[axis + 1 :])
        last = kept.dim() == 4 and kept.is_contiguous(memory_format=torch.channels_last) and not kept.is_contiguous()
        whole = torch.empty(
            shape,
            dtype=kept.dtype,
            device=kept.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        ).zero_()
        return whole.index_copy_(axis, self.indices.to(kept.device), kept)


@dataclass(frozen=True, slots=True)
class Codes:
    """A tensor of codes.

    Attributes:
        data: uint8, contiguous: ``[N, row_bytes]`` for a matrix, ``[N, H + 2 ph, W + 2 pw, row_bytes]`` for images. A
            row's codes are packed, the first in the lowest bits of the first byte; what is left of the last word is 0.
        bits: width of a code in memory: 1, 2, 4 or 8.
        shape: logical shape, ``(N, C)`` or ``(N, C, H, W)``.
        pad: ``(ph, pw)`` pixels around every image, with the code ``zero`` (of their group); ``(0, 0)`` for a matrix.
        affine: what the codes mean.
    """

    data: torch.Tensor
    bits: int
    shape: tuple[int, ...]
    pad: tuple[int, int]
    affine: Affine

    @staticmethod
    def pack(codes: torch.Tensor, bits: int, affine: Affine, pad: tuple[int, int] = (0, 0)) -> Codes:
        """Codes from a uint8 tensor of the logical shape.

        Raises:
            InputError: not uint8, or neither 2-D nor 4-D.
        """
        if codes.dtype != torch.uint8 or codes.dim() not in (2, 4):
            raise InputError(f"expected uint8 codes [N, C] or [N, C, H, W], got {list(codes.shape)} {codes.dtype}")
        shape = tuple(codes.shape)
        inner = codes.movedim(1, -1)
        if any(pad):
            ph, pw = pad
            padded = codes.new_zeros(shape[0], shape[2] + 2 * ph, shape[3] + 2 * pw, shape[1])
            if affine.zero is not None:
                padded += affine.along(affine.zero, 4).movedim(1, -1).to(torch.uint8)
            padded[:, ph : ph + shape[2], pw : pw + shape[3]] = inner
            inner = padded
        per_byte = 8 // bits
        total = row_bytes(shape[1], bits)
        inner = torch.nn.functional.pad(inner, (0, total * per_byte - shape[1])).unflatten(-1, (total, per_byte))
        data = inner[..., 0].contiguous()
        for position in range(1, per_byte):
            data |= inner[..., position] << (position * bits)
        return Codes(data, bits, shape, pad, affine)

    def unpack(self) -> torch.Tensor:
        """The codes, uint8, logical shape, contiguous."""
        mask = (1 << self.bits) - 1
        columns = [(self.data >> shift) & mask for shift in range(0, 8, self.bits)]
        inner = torch.stack(columns, dim=-1).flatten(-2)[..., : self.shape[1]]
        if len(self.shape) == 4:
            (ph, pw), (height, width) = self.pad, self.shape[2:]
            inner = inner[:, ph : ph + height, pw : pw + width]
        return inner.movedim(-1, 1).contiguous()

    def centered(self) -> torch.Tensor:
        """The numbers without step and offset, float64 (exact), logical shape."""
        k, zero = self.unpack().double(), self.affine.zero
        if zero is not None:
            k -= self.affine.along(zero, len(self.shape))
        return torch.where(k == 0, 0.0, torch.exp2(k.abs() - 1).copysign_(k)) if self.affine.magnitudes else k

    def decode(self) -> torch.Tensor:
        """The numbers they stand for, float32, logical shape: one multiplication and one addition, each rounded."""
        affine, dim = self.affine, len(self.shape)
        x = self.centered().float() * affine.along(affine.step, dim)
        return x if affine.offset is None else x + affine.along(affine.offset, dim)

    @property
    def fits_bytes(self) -> bool:
        """Whether products can take them as bytes: not where logarithmic ones have magnitudes beyond 64."""
        return self.affine.magnitudes == 0 or self.bits == 4

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of what they mean."""
        affine = self.affine
        return sum(
            t.numel() * t.element_size() for t in (self.data, affine.step, affine.zero, affine.offset) if t is not None
        )

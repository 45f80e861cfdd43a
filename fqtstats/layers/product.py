"""The three products of a linear or convolution layer, on codes where that is possible and else on real numbers.

Shape legend: linear: input ``x [R, I]``, weight ``w [O, I]``, output ``y [R, O]``. Convolution: ``x [N, I, H, W]``,
``w [O, I / groups, kh, kw]``, ``y [N, O, OH, OW]``; a 1-D convolution has H = kh = OH = 1. The incoming gradient ``g =
dL/dY`` has ``y``'s shape.

A product of codes needs its scales on indices that it does not contract: one that varies from term to term cannot be
taken out of an integer sum. The per-sample scales of PSQ and BHQ sit on the rows of the result in the input gradient
``g w``, but on the contracted index in the weight gradient ``g^T x``. There the codes are decoded and multiplied in
floating point: the estimator keeps the mean and the variance of the quantizer that the policy names. The alternative in
the literature is sample-channel joint quantization (SCQ; C. Gao et al., arXiv 2408.14267): for this product the
gradient is quantized with one scale per output channel, which keeps it on integers but is another estimator. Q1 and Q2
being separate quantizers, a policy has that by naming it, ``grad_input`` PSQ or BHQ and ``grad_weight`` PCQ, as
``statquant-psq`` and ``statquant-bhq`` do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal, Protocol

import torch

from fqtstats.layers import real
from fqtstats.layers.operand import Operand
from fqtstats.ops import products
from fqtstats.ops.codes import Codes, Geometry, Kept
from fqtstats.quantizers.base import Transform
from fqtstats.quantizers.storage import Stored

__all__ = ["PRODUCTS", "Border", "ConvProduct", "LinearProduct", "Product", "ProductName", "compute", "how", "integer"]

ProductName = Literal["forward", "grad_input", "grad_weight"]
PRODUCTS: tuple[ProductName, ...] = ("forward", "grad_input", "grad_weight")

Tensor = Any
"""A ``torch.Tensor`` with the arithmetic :mod:`fqtstats.layers.real`, :class:`Codes` with :mod:`fqtstats.ops.products`:
the two modules have functions of the same names and arguments."""


class Product(Protocol):
    """A bilinear layer operation and its two adjoints."""

    def forward(self, arithmetic: ModuleType, x: Tensor, w: Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``y``."""

    def grad_input(self, arithmetic: ModuleType, g: Tensor, w: Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """``dL/dx``, of ``x``'s ``shape``, for ``g = dL/dy``."""

    def grad_weight(self, arithmetic: ModuleType, g: Tensor, x: Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """``dL/dw``, of ``w``'s ``shape``, for ``g = dL/dy``."""

    @property
    def free_axes(self) -> dict[ProductName, tuple[int | None, int | None]]:
        """The axis along which the scales of a product's two operands may vary."""

    @property
    def grouped(self) -> bool:
        """Whether channels are multiplied in groups."""

    def terms(self, name: ProductName, a: tuple[int, ...], b: tuple[int, ...]) -> int:
        """Terms in the longest sum of a product, from the shapes of its operands."""

    def pad(self, place: str, kernel: tuple[int, ...]) -> tuple[int, int]:
        """Pixels around images of codes at ``place`` of a policy, for a weight of the shape ``[.., *kernel]``."""


@dataclass(frozen=True, slots=True)
class LinearProduct:
    """``y = x w^T + bias``."""

    def forward(self, arithmetic: ModuleType, x: Tensor, w: Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = arithmetic.linear(x, w, bias)
        return y

    def grad_input(self, arithmetic: ModuleType, g: Tensor, w: Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        dx: torch.Tensor = arithmetic.linear_grad_input(g, w)
        return dx

    def grad_weight(self, arithmetic: ModuleType, g: Tensor, x: Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        dw: torch.Tensor = arithmetic.linear_grad_weight(g, x)
        return dw

    @property
    def free_axes(self) -> dict[ProductName, tuple[int | None, int | None]]:
        return {"forward": (0, 0), "grad_input": (0, 1), "grad_weight": (1, 1)}

    @property
    def grouped(self) -> bool:
        return False

    def terms(self, name: ProductName, a: tuple[int, ...], b: tuple[int, ...]) -> int:
        return a[0] if name == "grad_weight" else a[1]

    def pad(self, place: str, kernel: tuple[int, ...]) -> tuple[int, int]:
        return (0, 0)


@dataclass(frozen=True, slots=True)
class Border:
    """Pixels around an image that are copies of its own (reflected, replicated, from the other side).

    Attributes:
        mode: as of :func:`torch.nn.functional.pad`.
        sides: pixels on the left, right, top and bottom.
    """

    mode: str
    sides: tuple[int, int, int, int]

    def around(self, x: Tensor) -> Tensor:
        """``x`` with its border: a tensor, or codes without pad."""
        rows, columns = self._sources(x.shape)
        if isinstance(x, Codes):
            data = x.data.index_select(1, rows).index_select(2, columns)
            return replace(x, data=data, shape=(*x.shape[:2], len(rows), len(columns)))
        return x.index_select(2, rows.to(x.device)).index_select(3, columns.to(x.device))

    def adjoint(self, dx: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """What :meth:`around` makes of gradients: each copy's is added to its source's."""
        rows, columns = (source.to(dx.device) for source in self._sources(shape))
        folded = dx.new_zeros(*shape[:3], dx.shape[3]).index_add_(2, rows, dx)
        return dx.new_zeros(shape).index_add_(3, columns, folded)

    def _sources(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """The row and the column that each row and column of the result is copied from."""
        left, right, top, bottom = self.sides
        return self._source(shape[2], (top, bottom)), self._source(shape[3], (left, right))

    def _source(self, size: int, sides: tuple[int, int]) -> torch.Tensor:
        if not any(sides):
            return torch.arange(size, device="cpu")
        index = torch.arange(size, dtype=torch.float64, device="cpu").view(1, 1, size)
        return torch.nn.functional.pad(index, sides, mode=self.mode).long().view(-1)


@dataclass(frozen=True, slots=True)
class ConvProduct:
    """A 2-D convolution.

    Attributes:
        geometry: of the convolution, with the zero padding of the upper and left side.
        extra: 1 along an axis that has one more pixel of zero padding on its far side ("same" with an even kernel).
        border: made around the input before, or None.
    """

    geometry: Geometry
    extra: tuple[int, int] = (0, 0)
    border: Border | None = None

    # Real zeros on one side only cannot be made on the codes (zero need not be on their grid). With one more pixel on
    # both sides, what is too much of the output is cut off; the input gradient is that of an input with one more pixel,
    # which is cut off, too; and the weight gradient is part of that of a larger kernel, which starts one pixel earlier.

    def forward(self, arithmetic: ModuleType, x: Tensor, w: Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.border is not None:
            x = self.border.around(x)
        y: torch.Tensor = arithmetic.convolution(x, w, self._widened, bias)
        return _part(y, slice(self.extra[0], None), slice(self.extra[1], None))

    def grad_input(self, arithmetic: ModuleType, g: Tensor, w: Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        left, right, top, bottom = (0, 0, 0, 0) if self.border is None else self.border.sides
        height, width = shape[2] + top + bottom, shape[3] + left + right
        size = (height + self.extra[0], width + self.extra[1])
        dx: torch.Tensor = arithmetic.convolution_grad_input(g, w, self.geometry, size)
        dx = _part(dx, slice(height), slice(width))
        return dx if self.border is None else self.border.adjoint(dx, shape)

    def grad_weight(self, arithmetic: ModuleType, g: Tensor, x: Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        if self.border is not None:
            x = self.border.around(x)
        geometry, kernel = self._widened, (shape[2], shape[3])
        taps = [slice(None), slice(None)]
        for axis in (0, 1):
            if self.extra[axis]:
                dilation = geometry.dilation[axis]
                taps[axis] = slice(1, None, dilation)
                kernel = _at(kernel, axis, dilation * (kernel[axis] - 1) + 2)
                geometry = replace(geometry, dilation=_at(geometry.dilation, axis, 1))
        dw: torch.Tensor = arithmetic.convolution_grad_weight(g, x, geometry, kernel)
        return _part(dw, *taps)

    @property
    def _widened(self) -> Geometry:
        (ph, pw), (eh, ew) = self.geometry.padding, self.extra
        return replace(self.geometry, padding=(ph + eh, pw + ew)) if eh or ew else self.geometry

    @property
    def free_axes(self) -> dict[ProductName, tuple[int | None, int | None]]:
        # Input channels of w are numbered anew in every group.
        return {"forward": (0, 0), "grad_input": (0, None), "grad_weight": (1, None if self.grouped else 1)}

    @property
    def grouped(self) -> bool:
        return self.geometry.groups > 1

    def terms(self, name: ProductName, a: tuple[int, ...], b: tuple[int, ...]) -> int:
        if name == "grad_weight":
            return a[0] * a[2] * a[3]
        if name == "forward":
            return math.prod(b[1:])
        terms = b[0] // self.geometry.groups * b[2] * b[3]
        if self.border is None:
            return terms
        left, right, top, bottom = self.border.sides  # a pixel and its copies are added up afterwards
        return terms + (1 + left + right) * (1 + top + bottom)

    def pad(self, place: str, kernel: tuple[int, ...]) -> tuple[int, int]:
        if place == "activation":
            return (0, 0) if self.border is not None else self._widened.padding
        if place == "grad_input":  # a convolution of g with the flipped kernel, where the stride is 1
            (kh, kw), (dh, dw), (ph, pw) = kernel, self.geometry.dilation, self.geometry.padding
            return max(0, dh * (kh - 1) - ph), max(0, dw * (kw - 1) - pw)
        return (0, 0)


def _part(images: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    """Some rows and columns, in the memory format of the whole."""
    part = images[:, :, rows, columns]
    if part.shape == images.shape:
        return images
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return part.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _at(pair: tuple[int, int], axis: int, value: int) -> tuple[int, int]:
    return (value, pair[1]) if axis == 0 else (pair[0], value)


_LABELS: dict[ProductName, tuple[str, str]] = {
    "forward": ("x", "w"),
    "grad_input": ("g", "w"),
    "grad_weight": ("g", "x"),
}


def _obstacle(product: Product, name: ProductName, a: Operand, b: Operand) -> str | None:
    """Why a product of two operands cannot be computed on codes; None if it can."""
    for operand, label, free in zip((a, b), _LABELS[name], product.free_axes[name], strict=True):
        stored = operand.stored
        if stored is None:
            return f"{label}: {operand.why}"
        if stored.codes.data.device.type != "cpu":
            return f"{label} is on {stored.codes.data.device.type}"
        if not stored.codes.fits_bytes:
            return f"the magnitudes of {label} do not fit bytes"
        kept = stored.kept
        if kept is not None and (label != "g" or kept.axis != free):
            return f"part of {label} is kept along the {_axis(name, label, kept.axis)}"
        if kept is not None and kept.axis == 1 and product.grouped:
            return f"part of the channels of {label} is kept, and they have groups"
        axis = stored.codes.affine.axis
        if axis is not None and axis != free:
            return f"the scales of {label} vary along the {_axis(name, label, axis)}"
        if stored.samples > 1 and (label, name) != ("g", "grad_weight"):
            return f"{label} is a mean of samples"
        # A transform mixes rows. On the rows of the result, those of the first operand, it is undone afterwards.
        if stored.transform is not None and (label == "w" or name == "grad_weight"):
            return f"the transform of {label} mixes rows"
    return None


def _axis(name: ProductName, label: str, axis: int) -> str:
    contracted = axis == {"forward": 1, "grad_input": 0 if label == "w" else 1, "grad_weight": 0}[name]
    kind = "samples" if axis == 0 and label != "w" else "output channels" if axis == 0 or label == "g" else "channels"
    return f"contracted {kind}" if contracted else kind


def integer(product: Product, name: ProductName, a: Operand, b: Operand) -> bool:
    """Whether a product of two operands is computed on their codes."""
    return _obstacle(product, name, a, b) is None


def how(product: Product, name: ProductName, a: Operand, b: Operand, dtype: torch.dtype) -> str:
    """How a product is computed: ``"integer 8x4"``, or the dtype of its result and why it is not on codes.

    ``log4`` are logarithmic codes of 4 bits.
    """
    obstacle = _obstacle(product, name, a, b)
    if obstacle is None:
        return f"integer {a.width}x{b.width}"
    return f"{str(dtype).removeprefix('torch.')}: {obstacle}"


def compute(product: Product, name: ProductName, a: Operand, b: Operand, last: Any = None) -> torch.Tensor:
    """A product of two operands: on codes if nothing stands in the way, else on what they decode to.

    Args:
        product: the layer's operation.
        name: which of its three products.
        a, b: input and weight, or gradient and weight, or gradient and input.
        last: the bias or None, or the shape of the result.
    """
    if not integer(product, name, a, b):
        result: torch.Tensor = getattr(product, name)(real, a.decode(), b.decode(), last)
        return result
    left, right = a.stored, b.stored
    assert left is not None
    assert right is not None
    on_codes = getattr(product, name)
    if left.kept is not None:
        return _of_kept(on_codes, name, left.codes, right.codes, left.kept, last)
    if left.samples > 1:
        mean: torch.Tensor = on_codes(products, _mean(left), _repeated(right.codes, left.samples), last)
        return mean
    if left.transform is None or name != "forward":
        result = on_codes(products, left.codes, right.codes, last)
        return result if left.transform is None else _undone(result, left.transform)
    result = _undone(on_codes(products, left.codes, right.codes, None), left.transform)
    return result if last is None else result + last.view(1, -1, *[1] * (result.dim() - 2))


def _of_kept(
    on_codes: Any, name: ProductName, g: Codes, other: Codes, kept: Kept, shape: tuple[int, ...]
) -> torch.Tensor:
    """A backward product of what is kept of ``g``: its rows of the result, and zeros."""
    count = len(kept.indices)
    if count == 0:
        last = name == "grad_input" and len(shape) == 4
        zeros = torch.zeros(shape, dtype=torch.float32, device="cpu")
        return zeros.contiguous(memory_format=torch.channels_last) if last else zeros
    result: torch.Tensor = on_codes(products, g, other, (count, *shape[1:]))
    return kept.scattered(result, axis=0)


def _mean(stored: Stored) -> Codes:
    """The codes of all samples, of which the weight gradient, a sum over all of them, is to be a mean."""
    affine = stored.codes.affine
    # A tensor of equal numbers has no step and is its own offset.
    offset = None if affine.offset is None else affine.offset / stored.samples
    return replace(stored.codes, affine=replace(affine, step=affine.step / stored.samples, offset=offset))


def _repeated(codes: Codes, times: int) -> Codes:
    """The same rows or images so many times."""
    data = codes.data.repeat(times, *[1] * (codes.data.dim() - 1))
    return replace(codes, data=data, shape=(times * codes.shape[0], *codes.shape[1:]))


def _undone(y: torch.Tensor, transform: Transform) -> torch.Tensor:
    """``T^-1`` of the rows (samples) of a result; may consume it."""
    rows = y.movedim(1, -1)  # channels last, as images are in memory: the transform does not mind the order
    shape = rows.shape
    return transform.inverse(rows.reshape(shape[0], 1, math.prod(shape[1:]))).view(shape).movedim(-1, 1)

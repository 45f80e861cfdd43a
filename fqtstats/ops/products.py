"""Products of codes: linear layers and convolutions, forward and both backward ones, computed in integers.

With both operands affine in their codes, ``a = (ca - za) sa + oa`` and ``b = (cb - zb) sb + ob``, a bilinear operation
is a sum of three: its value on the centered codes, an exact integer, and one correction for each offset. (Of
logarithmic codes, the powers of two that they stand for take the place of ``ca - za``: integers, too.) Scales may
vary along an axis that is not contracted: ``sa, za, oa`` along axis 0 of the result, ``sb, zb, ob`` along axis 1.
Padding pixels are real zeros, whatever the grid.

The arithmetic is prescribed operation by operation, so that every kernel gives the same float32 result bit for bit:

    I = sum (ca - za) (cb - zb)           exact integer, 0 at padding
    y = float32(I) * (sa * sb)            two products, each rounded to float32
    y += u * ob,  u = float32(sa * Ra)    Ra = sum (ca - za), exact; the product in float64, rounded once; if any ob
    y += oa * v,  v = float32(sb * Cb + n * ob)   Cb = sum (cb - zb), n = number of terms, in float64, rounded once;
                                          both sums over terms that are no padding; if any oa
    y += bias

Where every element is far from the grid's offset, the three parts are large and cancel. In the weight gradient, whose
sums run over all samples and positions, codes without pad are therefore counted from the grid point next to zero, on
the offset's side: with ``k = floor(-o / s)``, as far as ``z <= z + k <= B``, ``z + k`` takes the place of ``z``, and
``float32(o + k s)`` (in float64, rounded once) that of ``o``.

Every step is rounded by itself (no fused multiply-add). Against exact arithmetic on the decoded operands (of a weight
gradient: decoded with ``z`` and ``o`` as just counted) the error is at most
``((1 + 2^-24)^6 - 1) (|I sa sb| + |u ob| + |oa v| + |bias|)`` where nothing over- or underflows: no term passes more
than six roundings. See ``tests/test_products.py``.

Beyond 3.4e38, the range of float32, each of these values becomes Inf, without an error, as in any float32 arithmetic
(one operand of about 1e37 is near it, and so are two of 1e19); ``y`` is then Inf, or NaN where an Inf meets a 0 or an
Inf of the other sign. What counts is the size of ``sa * sb``, ``u``, ``v`` and the three parts, even where they cancel
in ``y``. The sums of codes cannot overflow. A product of decoded numbers overflows in its partial sums instead, so that
either of the two may be finite where the other is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch
import torch.nn.functional as F

from fqtstats.errors import InputError
from fqtstats.ops import convolution1, convolution8, product1, product8
from fqtstats.ops.codes import Codes, Geometry
from fqtstats.ops.extension import native_module

__all__ = [
    "convolution",
    "convolution_grad_input",
    "convolution_grad_weight",
    "linear",
    "linear_grad_input",
    "linear_grad_weight",
]

Bilinear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


KERNELS: tuple[ModuleType, ...] = (
    product1,
    convolution1,
    product8,
    convolution8,
)
"""Modules of native kernels, the first that can is used.

Each has functions of the names below, for arguments that were checked; one returns None where it has no kernel for
those widths of codes.
"""


def linear(x: Codes, w: Codes, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``y = x w^T + bias``: ``[R, O]`` float32.

    Args:
        x: ``[R, I]``; groups along axis 0 or none.
        w: ``[O, I]``; groups along axis 0 or none.
        bias: ``[O]`` float32.

    Raises:
        InputError: shapes do not fit, or a scale varies along a contracted axis; so do the other products.
    """
    _expect("linear", "x", x.shape, "R", "I")
    _expect("linear", "w", w.shape, "O", x.shape[1])
    _expect_bias("linear", bias, w)
    _check("linear", x, w, "x", "w", 0, 0)
    native = _native("linear", x, w, bias)
    if native is not None:
        return native
    return _affine(lambda a, b: a @ b.t(), x, w, bias)


def linear_grad_input(g: Codes, w: Codes) -> torch.Tensor:
    """``dx = g w``: ``[R, I]`` float32, for ``g [R, O]`` (groups along axis 0) and ``w [O, I]`` (axis 1), or none."""
    _expect("linear_grad_input", "w", w.shape, "O", "I")
    _expect("linear_grad_input", "g", g.shape, "R", w.shape[0])
    _check("linear_grad_input", g, w, "g", "w", 0, 1)
    native = _native("linear_grad_input", g, w)
    if native is not None:
        return native
    return _affine(torch.mm, g, w, None)


def linear_grad_weight(g: Codes, x: Codes) -> torch.Tensor:
    """``dw = g^T x``: ``[O, I]`` float32, for ``g [R, O]`` and ``x [R, I]``, groups along axis 1 or none."""
    _expect("linear_grad_weight", "g", g.shape, "R", "O")
    _expect("linear_grad_weight", "x", x.shape, g.shape[0], "I")
    _check("linear_grad_weight", g, x, "g", "x", 1, 1)
    g, x = _counted_from_zero(g), _counted_from_zero(x)
    native = _native("linear_grad_weight", g, x)
    if native is not None:
        return native
    return _affine(lambda a, b: a.t() @ b, g, x, None)


def convolution(x: Codes, w: Codes, geometry: Geometry, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``[N, O, OH, OW]`` float32 in channels-last memory.

    Args:
        x: ``[N, I, H, W]``; groups along axis 0 or none; any pad.
        w: ``[O, I / groups, kh, kw]``; groups along axis 0 or none.
        geometry: of the convolution.
        bias: ``[O]`` float32.
    """
    _expect_weight("convolution", w, geometry)
    _expect("convolution", "x", x.shape, "N", w.shape[1] * geometry.groups, "H", "W")
    _expect_bias("convolution", bias, w)
    geometry.positions(x.shape[2:], w.shape[2:])
    _check("convolution", x, w, "x", "w", 0, 0)
    native = _native("convolution", x, w, geometry, bias)
    if native is not None:
        return native
    y = _affine(lambda a, b: _conv(a, b, geometry), x, w, bias)
    return y.contiguous(memory_format=torch.channels_last)


def convolution_grad_input(g: Codes, w: Codes, geometry: Geometry, size: tuple[int, int]) -> torch.Tensor:
    """``dL/dx [N, I, H, W]`` float32 in channels-last memory.

    Args:
        g: dL/dy ``[N, O, OH, OW]``; groups along axis 0 or none; any pad.
        w: ``[O, I / groups, kh, kw]``; no groups.
        geometry: of the forward convolution.
        size: ``(H, W)`` of the input.
    """
    _expect_weight("convolution_grad_input", w, geometry)
    positions = geometry.positions(size, w.shape[2:])
    _expect("convolution_grad_input", "g", g.shape, "N", w.shape[0], *positions)
    _check("convolution_grad_input", g, w, "g", "w", 0, 1)
    native = _native("convolution_grad_input", g, w, geometry, size)
    if native is not None:
        return native
    channels = w.shape[1] * geometry.groups

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        x = a.new_empty(1).expand(a.shape[0], channels, *size)
        return _backward(a, x, b, geometry, (True, False, False))[0]

    return _affine(product, g, w, None).contiguous(memory_format=torch.channels_last)


def convolution_grad_weight(g: Codes, x: Codes, geometry: Geometry, kernel: tuple[int, int]) -> torch.Tensor:
    """``dL/dw [O, I / groups, kh, kw]`` float32, contiguous.

    Args:
        g: dL/dy ``[N, O, OH, OW]``; groups along axis 1 or none; any pad.
        x: ``[N, I, H, W]``; no groups (or along axis 1, without channel groups); any pad.
        geometry: of the forward convolution.
        kernel: ``(kh, kw)``.
    """
    _expect("convolution_grad_weight", "x", x.shape, "N", "I", "H", "W")
    positions = geometry.positions(x.shape[2:], kernel)
    _expect("convolution_grad_weight", "g", g.shape, x.shape[0], "O", *positions)
    _expect_groups("convolution_grad_weight", "input channels of x", x.shape[1], geometry)
    _expect_groups("convolution_grad_weight", "output channels of g", g.shape[1], geometry)
    _check("convolution_grad_weight", g, x, "g", "x", 1, 1)
    g, x = _counted_from_zero(g), _counted_from_zero(x)
    native = _native("convolution_grad_weight", g, x, geometry, kernel)
    if native is not None:
        return native

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        w = a.new_empty(1).expand(a.shape[1], b.shape[1] // geometry.groups, *kernel)
        return _backward(a, b, w, geometry, (False, True, False))[1]

    return _affine(product, g, x, None).contiguous()


def _expect(name: str, label: str, shape: tuple[int, ...], *expected: int | str) -> None:
    """Refuse another shape; a letter stands for any extent."""
    fits = len(shape) == len(expected) and all(
        isinstance(e, str) or e == s for s, e in zip(shape, expected, strict=True)
    )
    if not fits:
        raise InputError(f"{name}: expected {label} [{', '.join(map(str, expected))}], got {list(shape)}")


def _expect_groups(name: str, label: str, channels: int, geometry: Geometry) -> None:
    if channels % geometry.groups != 0:
        raise InputError(f"{name}: expected a multiple of groups = {geometry.groups} {label}, got {channels}")


def _expect_weight(name: str, w: Codes, geometry: Geometry) -> None:
    _expect(name, "w", w.shape, "O", "I / groups", "kh", "kw")
    _expect_groups(name, "output channels of w", w.shape[0], geometry)


def _expect_bias(name: str, bias: torch.Tensor | None, w: Codes) -> None:
    if bias is not None:
        _expect(name, "bias", tuple(bias.shape), w.shape[0])


def _check(name: str, a: Codes, b: Codes, first: str, second: str, axis_a: int, axis_b: int) -> None:
    for label, codes, axis in ((first, a, axis_a), (second, b, axis_b)):
        if codes.affine.axis not in (None, axis):
            raise InputError(
                f"{name}: the scales of {label} vary along axis {codes.affine.axis}, which the product contracts; an "
                f"integer product needs one scale, or scales along axis {axis}"
            )


def _native(name: str, a: Codes, b: Codes, *others: object) -> torch.Tensor | None:
    if a.data.device.type != "cpu" or native_module() is None:
        return None
    for module in KERNELS:
        function = getattr(module, name, None)
        result: torch.Tensor | None = None if function is None else function(a, b, *others)
        if result is not None:
            return result
    return None


def _counted_from_zero(codes: Codes) -> Codes:
    """The same numbers with an offset below one step, where the grid spans zero."""
    affine = codes.affine
    if affine.offset is None or affine.magnitudes or any(codes.pad):  # a pad's codes are those of `zero` as it is
        return codes
    step, offset = affine.step.double(), affine.offset.double()
    zero = torch.zeros_like(affine.step, dtype=torch.int32) if affine.zero is None else affine.zero
    shift = torch.where(step > 0, (-offset / step).floor_(), 0.0).clamp_(min=0)
    shift = torch.minimum(shift, (1 << codes.bits) - 1 - zero.double())
    return replace(
        codes,
        affine=replace(
            affine,
            zero=zero + shift.to(torch.int32),
            offset=shift.mul_(step).add_(offset).float(),
        ),
    )


def _conv(x: torch.Tensor, w: torch.Tensor, g: Geometry) -> torch.Tensor:
    return F.conv2d(x, w, None, g.stride, g.padding, g.dilation, g.groups)


def _backward(
    g: torch.Tensor, x: torch.Tensor, w: torch.Tensor, geometry: Geometry, mask: tuple[bool, bool, bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten.convolution_backward(
        g, x, w, None, stride, padding, dilation, False, [0, 0], geometry.groups, mask
    )
    return out


def _affine(product: Bilinear, a: Codes, b: Codes, bias: torch.Tensor | None) -> torch.Tensor:
    """The fallback: float64 sums of integers, which are exact below 2^53."""
    ca, cb = a.centered(), b.centered()
    exact = product(ca, cb)

    def rows(values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, *[1] * (exact.dim() - 1))

    def columns(values: torch.Tensor) -> torch.Tensor:
        return values.view(1, -1, *[1] * (exact.dim() - 2))

    sa, sb = rows(a.affine.step), columns(b.affine.step)
    y = exact.float() * (sa * sb)
    if b.affine.offset is not None:
        u = (sa.double() * product(ca, torch.ones_like(cb))).float()
        y = y + u * columns(b.affine.offset)
    if a.affine.offset is not None:
        ones = torch.ones_like(ca)
        v = sb.double() * product(ones, cb)
        if b.affine.offset is not None:
            v = v + product(ones, torch.ones_like(cb)) * columns(b.affine.offset).double()
        y = y + rows(a.affine.offset) * v.float()
    return y if bias is None else y + columns(bias)

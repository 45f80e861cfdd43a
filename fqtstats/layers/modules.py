"""Linear and convolution layers that quantize input, weight and incoming gradient.

They are not constructed but swapped in (:func:`fqtstats.prepare_`): the module object stays and only its class
changes, so parameters, hooks, buffers and state_dict keys remain what they were.
"""

from __future__ import annotations

import torch
from torch import nn

from fqtstats.errors import InputError
from fqtstats.layers import guards, passing
from fqtstats.layers.multiply import multiply
from fqtstats.layers.product import Border, ConvProduct, LinearProduct, Product
from fqtstats.layers.state import Call, LayerState
from fqtstats.ops.codes import Geometry
from fqtstats.policy import PLACES

__all__ = ["QuantConv1d", "QuantConv2d", "QuantLinear"]


class _Quantized(nn.Module):
    """What the quantized layers share."""

    fqt_state: LayerState

    def _multiply(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, product: Product, call: Call
    ) -> torch.Tensor:
        """The layer's product in the dtype that it is computed in.

        Low-bit hardware computes the products exactly and rounds only the result, so half-precision operands are lifted
        to float32 first; under autocast only the output is in the low-precision dtype.
        """
        if not torch.is_autocast_enabled(x.device.type) and x.dtype != weight.dtype:
            raise InputError(
                f"layer {call.layer.name!r}: expected an input of dtype {weight.dtype} (the weight's), got {x.dtype}; "
                "cast it, or use torch.autocast"
            )
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        bias = None if bias is None else bias.to(dtype)
        x, w, passed = passing.enter(call.layer.policy, x.to(dtype), weight, weight.to(dtype))
        scale = passing.output_scale(call.layer.policy, weight)
        if scale is None:
            return multiply(x, w, bias, product, call, passed)
        shape = (1, -1, *[1] * (x.dim() - 2))
        y = multiply(x, w, None, product, call, passed) * scale.to(dtype).view(shape)
        return y if bias is None else y + bias.view(shape)

    def _output_dtype(self, x: torch.Tensor) -> torch.dtype:
        device = x.device.type
        # Autocast leaves float64 alone.
        autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        self.fqt_state.shared.dtypes.add(dtype)
        return dtype

    def extra_repr(self) -> str:
        """The original's, and the quantizers."""
        policy = self.fqt_state.policy
        quantizers = ", ".join(f"{place}={getattr(policy, place)}" for place in PLACES)
        return f"{super().extra_repr()}, {quantizers}"


class QuantLinear(_Quantized, nn.Linear):
    """``nn.Linear`` on quantized operands; the input ``[*, in_features]`` is flattened to rows first."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  (called by this name, as the original)
        """``[*, out_features]`` for ``input`` ``[*, in_features]``."""
        x = input
        guards.check(self)
        if self.fqt_state.plain:
            return super().forward(x)
        call = self.fqt_state.call()
        y = self._multiply(x.reshape(-1, x.shape[-1]), self.weight, self.bias, LinearProduct(), call)
        return y.view(*x.shape[:-1], self.out_features).to(self._output_dtype(x))


class _QuantConv(_Quantized, nn.modules.conv._ConvNd):
    """A convolution on quantized operands, with every option of the original."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  (called by this name, as the original)
        """``[N, out_channels, *space]`` for ``input`` ``[N, in_channels, *space]``, each without N if that has none."""
        x = input
        guards.check(self)
        if self.fqt_state.plain:
            plain: torch.Tensor = super().forward(x)  # that of the convolution
            return plain
        dim = len(self.kernel_size) + 2
        if x.dim() not in (dim - 1, dim):
            raise InputError(
                f"layer {self.fqt_state.name!r}: expected an input of {dim} axes, or {dim - 1} without a batch, got "
                f"{list(x.shape)}"
            )
        call = self.fqt_state.call()
        batched = x if x.dim() == dim else x.unsqueeze(0)
        y = self._multiply(batched, self.weight, self.bias, self._product(), call).to(self._output_dtype(x))
        return y if batched is x else y.squeeze(0)

    def _product(self) -> ConvProduct:
        # As in the original, zero padding follows the layer's attributes as they are now, other modes those it was made
        # with.
        border, padding, extra = None, (0,) * len(self.kernel_size), (0,) * len(self.kernel_size)
        if self.padding_mode != "zeros":
            left, right, top, bottom = (*self._reversed_padding_repeated_twice, 0, 0)[:4]
            border = Border(self.padding_mode, (left, right, top, bottom))
        elif self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            padding, extra = tuple(t // 2 for t in total), tuple(t % 2 for t in total)
        elif not isinstance(self.padding, str):  # the other string is "valid"
            padding = tuple(self.padding)
        geometry = Geometry(_pair(self.stride, 1), _pair(padding, 0), _pair(self.dilation, 1), self.groups)
        return ConvProduct(geometry, _pair(extra, 0), border)


def _pair(values: tuple[int, ...], height: int) -> tuple[int, int]:
    """Height and width; ``height`` for the images of a 1-D convolution."""
    return (height, values[0]) if len(values) == 1 else (values[0], values[1])


class QuantConv1d(_QuantConv, nn.Conv1d):
    """``nn.Conv1d`` on quantized operands: ``[N, C, L]`` or ``[C, L]``."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """``nn.Conv2d`` on quantized operands: ``[N, C, H, W]`` or ``[C, H, W]``."""

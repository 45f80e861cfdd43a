"""Linear and convolution layers that quantize input, weight and incoming gradient.

They are not constructed but swapped in (:func:`fqtstats.prepare_`): the module object stays and only its class
changes, so parameters, hooks, buffers and state_dict keys remain what they were.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fqtstats.errors import InputError
from fqtstats.layers import guards
from fqtstats.layers.product import ConvProduct, LinearProduct, Product, multiply
from fqtstats.layers.state import Call, LayerState
from fqtstats.policy import PLACES, QuantizerLike

__all__ = ["QuantConv1d", "QuantConv2d", "QuantLinear"]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, q: QuantizerLike, site: str, call: Call) -> torch.Tensor:
        return call.quantize(q, site, x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return g, None, None, None


def _straight_through(q: QuantizerLike | None, site: str, x: torch.Tensor, call: Call) -> torch.Tensor:
    if q is None:
        return x
    out: torch.Tensor = _StraightThrough.apply(x, q, site, call)  # type: ignore[no-untyped-call]
    return out


class _Quantized(nn.Module):
    """What the quantized layers share."""

    fqt_state: LayerState

    def _operands(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Quantized input and weight, and bias, in the dtype that the products are computed in.

        Low-bit hardware computes the products exactly and rounds only the result, so half-precision operands are lifted
        to float32 first; under autocast only the output is in the low-precision dtype.
        """
        if not torch.is_autocast_enabled(x.device.type) and x.dtype != weight.dtype:
            raise InputError(
                f"layer {call.layer.name!r}: expected an input of dtype {weight.dtype} (the weight's), got {x.dtype}; "
                "cast it, or use torch.autocast"
            )
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        policy = call.layer.policy
        xq = _straight_through(policy.activation, "activation", x.to(dtype), call)
        wq = _straight_through(policy.weight, "weight", weight.to(dtype), call)
        return xq, wq, None if bias is None else bias.to(dtype)

    def _output_dtype(self, x: torch.Tensor) -> torch.dtype:
        device = x.device.type
        # Autocast leaves float64 alone.
        autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
        return torch.get_autocast_dtype(device) if autocast else x.dtype

    def extra_repr(self) -> str:
        """The original's, and the quantizers."""
        policy = self.fqt_state.policy
        quantizers = ", ".join(f"{place}={getattr(policy, place)}" for place in PLACES)
        return f"{super().extra_repr()}, {quantizers}"


class QuantLinear(_Quantized, nn.Linear):
    """``nn.Linear`` on quantized operands; the input ``[*, in_features]`` is flattened to rows first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[*, out_features]`` for ``x`` ``[*, in_features]``."""
        guards.check(self)
        call = self.fqt_state.call()
        xq, wq, bias = self._operands(x.reshape(-1, x.shape[-1]), self.weight, self.bias, call)
        y = multiply(xq, wq, bias, LinearProduct(), call)
        return y.view(*x.shape[:-1], self.out_features).to(self._output_dtype(x))


class _QuantConv(_Quantized, nn.modules.conv._ConvNd):
    """A convolution on quantized operands, with every option of the original."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, out_channels, *space]`` for ``x`` ``[N, in_channels, *space]``; both without N if ``x`` has none."""
        guards.check(self)
        call = self.fqt_state.call()
        batched = x if x.dim() == len(self.kernel_size) + 2 else x.unsqueeze(0)
        xq, wq, bias = self._operands(batched, self.weight, self.bias, call)
        xq, product = self._padded(xq)
        y = multiply(xq, wq, bias, product, call).to(self._output_dtype(x))
        return y if batched is x else y.squeeze(0)

    def _padded(self, x: torch.Tensor) -> tuple[torch.Tensor, Product]:
        # Zero padding that is the same on both sides belongs to the product; any other is made beforehand. As in the
        # original, zero padding follows the layer's attributes as they are now, other modes those it was made with.
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0,) * (x.dim() - 2)
        elif self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            padding = tuple(t // 2 for t in total)
            if any(t % 2 for t in total):
                pads = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
                x, padding = F.pad(x, pads), (0,) * len(total)
        else:
            padding = (
                (0,) * (x.dim() - 2) if isinstance(self.padding, str) else tuple(self.padding)
            )  # "valid" or numbers
        return x, ConvProduct(tuple(self.stride), padding, tuple(self.dilation), self.groups)


class QuantConv1d(_QuantConv, nn.Conv1d):
    """``nn.Conv1d`` on quantized operands: ``[N, C, L]`` or ``[C, L]``."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """``nn.Conv2d`` on quantized operands: ``[N, C, H, W]`` or ``[C, H, W]``."""

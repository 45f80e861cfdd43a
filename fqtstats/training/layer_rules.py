"""Which layers of a model a recipe treats in another way: the first, the last, and those that down-sample."""

from __future__ import annotations

import glob
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fqtstats.determinism import seeded
from fqtstats.errors import InputError
from fqtstats.layers.swap import QUANTIZED_TYPES
from fqtstats.policy import Policy

__all__ = ["LayerRules", "Roles", "roles"]


@dataclass(frozen=True)
class Roles:
    """The layers of a model that can be quantized.

    Attributes:
        order: their names, in order of use.
        downsampling: of these, the ones that down-sample.
    """

    order: tuple[str, ...]
    downsampling: tuple[str, ...]


def roles(model: nn.Module, inputs: Tensor | None = None) -> Roles:
    """The layers of a model by their part in it.

    Layers are the modules that :func:`fqtstats.prepare_` can change: ``nn.Linear``, ``nn.Conv1d`` and ``nn.Conv2d`` of
    exactly these types. The order is that of a forward pass on ``inputs``: a layer that is called several times counts
    as the first at its first and as the last at its last call, and one that is never called is none. Without inputs
    it is the order in which the model lists its modules, which for all of :data:`fqtstats.models.MODELS` has the same
    ends. A layer down-samples if it is a convolution with a kernel of one pixel and a stride above 1: the shortcut of a
    residual block that halves the resolution.

    Args:
        model: not prepared; it is left as it was (evaluation mode is used and undone).
        inputs: some samples as the model takes them.

    Raises:
        InputError: the model is prepared already, or has no such layer.
    """
    if any(hasattr(module, "fqt_state") for module in model.modules()):
        raise InputError("expected a plain model to find its layers in, got one that is prepared; call remove() first")
    layers = {name: module for name, module in model.named_modules() if type(module) in QUANTIZED_TYPES}
    used = list(layers) if inputs is None else _calls(model, layers, inputs)
    if not used:
        raise InputError(
            f"expected a model with nn.Linear, nn.Conv1d or nn.Conv2d layers, got {type(model).__name__} with none "
            "that is used; give another model"
        )
    # First calls give the order; the layer of the last call goes to the end.
    order = [name for name in dict.fromkeys(used) if name != used[-1]]
    if not order or used[0] != used[-1]:
        order.append(used[-1])
    return Roles(tuple(order), tuple(name for name in order if _downsamples(layers[name])))


def _calls(model: nn.Module, layers: dict[str, nn.Module], inputs: Tensor) -> list[str]:
    """Names of layers in the order in which a forward pass calls them."""
    called: list[str] = []
    modes = {module: module.training for module in model.modules()}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, name=name: called.append(name))
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad(), seeded(0):
            model.eval()(inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return called


def _downsamples(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return False
    return all(k == 1 for k in layer.kernel_size) and any(s > 1 for s in layer.stride)


@dataclass(frozen=True)
class LayerRules:
    """Policies of the layers that a recipe treats in another way; None: as all others; ``Policy()``: full precision.

    Where a layer has several of these parts, the first in this order counts.
    """

    first: Policy | None = None
    last: Policy | None = None
    downsampling: Policy | None = None

    def overrides(self, found: Roles) -> dict[str, Policy]:
        """The policies by pattern of the layers' names, as :class:`fqtstats.Policy` takes them.

        Raises:
            InputError: nothing would be left for the recipe's own policy.
        """
        parts = (
            (self.first, found.order[:1]),
            (self.last, found.order[-1:]),
            (self.downsampling, found.downsampling),
        )
        chosen: dict[str, Policy] = {}
        for policy, names in parts:
            for name in names:
                if policy is not None:
                    chosen.setdefault(name, policy)
        if len(chosen) == len(found.order):
            told = ", ".join(what for what, policy in vars(self).items() if policy is not None)
            raise InputError(
                f"too few layers: the model's {len(found.order)} ({', '.join(found.order[:5])}) are all among those "
                f"that the recipe treats in another way ({told}); give a model with more layers between them"
            )
        return {glob.escape(name): policy for name, policy in chosen.items()}

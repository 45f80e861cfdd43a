"""Which layers of a model a recipe treats in another way: the first, the last, and those that down-sample."""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fqtstats.determinism import seeded
from fqtstats.errors import InputError
from fqtstats.layers.swap import QUANTIZED_TYPES
from fqtstats.policy import Policy, QuantizerLike

__all__ = ["LayerRules", "Roles", "roles"]


@dataclass(frozen=True)
class Roles:
    """The layers of a model that can be quantized.

    Attributes:
        order: their names, in the order of their first use.
        last: the one that is used last; where one is used several times, it need not be the last of ``order``.
        downsampling: of these, the ones that down-sample.
        signed, nonnegative: of these, the ones whose input had negative numbers, and those whose input had none.
    """

    order: tuple[str, ...]
    last: str
    downsampling: tuple[str, ...]
    signed: tuple[str, ...] = ()
    nonnegative: tuple[str, ...] = ()


def roles(model: nn.Module, inputs: Tensor | None = None) -> Roles:
    """The layers of a model by their part in it.

    Layers are the modules that :func:`fqtstats.prepare_` can change: ``nn.Linear``, ``nn.Conv1d`` and ``nn.Conv2d`` of
    exactly these types. The order is that of a forward pass on ``inputs``: a layer that is called several times may be
    the first and the last, and one that is never called is none. Without inputs it is the order in which the model
    lists its modules, which for all of :data:`fqtstats.models.MODELS` has the same ends, and no layer counts as signed
    or nonnegative. A layer down-samples if it is a convolution with a kernel of one pixel and a stride above 1: the
    shortcut of a residual block that halves the resolution.

    Args:
        model: not prepared; it is left as it was (evaluation mode is used and undone).
        inputs: some samples as the model takes them.

    Raises:
        InputError: the model is prepared already, or has no such layer.
    """
    if any(hasattr(module, "fqt_state") for module in model.modules()):
        raise InputError("expected a plain model to find its layers in, got one that is prepared; call remove() first")
    layers = {name: module for name, module in model.named_modules() if type(module) in QUANTIZED_TYPES}
    calls = [(name, False) for name in layers] if inputs is None else _calls(model, layers, inputs)
    used = [name for name, _ in calls]
    if not used:
        raise InputError(
            f"expected a model with nn.Linear, nn.Conv1d or nn.Conv2d layers, got {type(model).__name__} with none "
            "that is used; give another model"
        )
    order = tuple(dict.fromkeys(used))
    signed = {name for name, negative in calls if negative}
    return Roles(
        order,
        used[-1],
        tuple(name for name in order if _downsamples(layers[name])),
        tuple(name for name in order if name in signed),
        () if inputs is None else tuple(name for name in order if name not in signed),
    )


def _calls(model: nn.Module, layers: dict[str, nn.Module], inputs: Tensor) -> list[tuple[str, bool]]:
    """The calls of layers in a forward pass, in order: the name, and whether the input has negative numbers."""
    called: list[tuple[str, bool]] = []
    modes = {module: module.training for module in model.modules()}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            called.append((name, bool((x < 0).any())))

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
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

    Attributes:
        first, last, downsampling: policies of the layers with these parts, see :func:`roles`.
        signed, nonnegative: of the other layers, for those whose input can be negative, or cannot: what quantizes it in
            place of the policy's own; None: its own.
    """

    first: Policy | None = None
    last: Policy | None = None
    downsampling: Policy | None = None
    signed: QuantizerLike | None = None
    nonnegative: QuantizerLike | None = None

    def overrides(self, found: Roles, policy: Policy) -> dict[str, Policy]:
        """The policies by pattern of the layers' names, as :class:`fqtstats.Policy` takes them.

        Args:
            found: the model's layers.
            policy: of all others.

        Raises:
            InputError: nothing would be left for the recipe's own policy.
        """
        parts = {
            "first": found.order[:1],
            "last": (found.last,),
            "downsampling": found.downsampling,
        }
        chosen: dict[str, Policy] = {}
        for part, names in parts.items():
            own: Policy | None = getattr(self, part)
            if own is not None:
                chosen |= {name: own for name in names if name not in chosen}
        if len(chosen) == len(found.order):
            told = ", ".join(part for part in parts if getattr(self, part) is not None)
            raise InputError(
                f"too few layers: the model's {len(found.order)} ({', '.join(found.order[:5])}) are all among those "
                f"that the recipe treats in another way ({told}); give a model with more layers between them"
            )
        for activation, names in ((self.signed, found.signed), (self.nonnegative, found.nonnegative)):
            if activation is not None and policy.activation is not None:
                fitted = replace(policy, activation=activation, overrides={})
                chosen |= {name: fitted for name in names if name not in chosen}
        return {glob.escape(name): own for name, own in chosen.items()}

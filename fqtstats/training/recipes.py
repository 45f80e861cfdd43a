"""Recipes: how the papers train networks in low precision, each as one row of :data:`RECIPES`.

A recipe says what is quantized when, and how the parameters move; the loop that does it is
:func:`fqtstats.training.loop.train`. The numbers of :func:`get` are chosen for the small models on the embedded data;
those of the papers' own runs are in :mod:`fqtstats.training.runs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fqtstats import policies
from fqtstats.errors import InputError
from fqtstats.policy import Policy
from fqtstats.quantizers import quantizer
from fqtstats.training import wide
from fqtstats.training.distillation import Distillation
from fqtstats.training.layer_rules import LayerRules, roles
from fqtstats.training.optimizers import Optimizer
from fqtstats.training.schedules import schedule, warmed_up
from fqtstats.training.stochastic_precision import StochasticPrecision

__all__ = ["RECIPES", "Definition", "LayerRules", "Optimizer", "Recipe", "Stage", "get"]

SGD = Optimizer()
NO_RULES = LayerRules()


@dataclass(frozen=True)
class Stage:
    """One phase of a recipe: which policy, for how long, how fast.

    Attributes:
        name: what results call it.
        policy: the quantizers; ``Policy()`` is full precision.
        share: of the run's epochs; a recipe's shares add up to 1.
        lr_scale: factor of the optimizer's learning rate.
        schedule: over the stage, a key of :data:`fqtstats.training.schedules.SCHEDULES`.
        stochastic: which layers are quantized at each iteration; None: all.

    Raises:
        InputError: an attribute is out of range.
    """

    name: str
    policy: Policy
    share: float = 1.0
    lr_scale: float = 1.0
    schedule: str = "cosine"
    stochastic: StochasticPrecision | None = None

    def __post_init__(self) -> None:
        schedule(self.schedule)
        if not 0 < self.share <= 1:
            raise InputError(f"expected stage {self.name!r} to have a share above 0 and at most 1, got {self.share}")
        if not 0 < self.lr_scale < math.inf:
            raise InputError(f"expected stage {self.name!r} to have a positive lr_scale, got {self.lr_scale}")

    @property
    def quantizes(self) -> bool:
        """Whether any layer may be quantized in it."""
        return self.policy.quantizes_anything or any(p.quantizes_anything for p in self.policy.overrides.values())


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        name: in :data:`RECIPES`.
        source: the paper.
        bits: what the recipe's free number of bits was chosen as; None where it has none.
        stages: one after the other, each from the weights that the one before ends with.
        optimizer: of all stages, begun anew in each.
        label_smoothing: of the cross entropy, in [0, 1).
        warmup: share of the run's epochs in which the learning rate first rises linearly; in the first stage.
        decay_norms: whether weight decay acts on norms and biases, too.
        distillation: the losses of a joint training with a teacher; None: cross entropy alone.
        starts_from: the weights at the beginning: as initialized, or of a network trained in full precision.
        rules: first, last and down-sampling layers in every stage that quantizes; :meth:`for_model` finds them.

    Raises:
        InputError: there is no stage, two have the same name, shares do not add up to 1, or a number is out of range.
    """

    name: str
    source: str
    bits: int | None
    stages: tuple[Stage, ...]
    optimizer: Optimizer = SGD
    label_smoothing: float = 0.0
    warmup: float = 0.0
    decay_norms: bool = True
    distillation: Distillation | None = None
    starts_from: Literal["scratch", "full-precision"] = "scratch"
    rules: LayerRules = NO_RULES

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise InputError(f"expected recipe {self.name!r} to have stages of different names, got {names}")
        total = sum(stage.share for stage in self.stages)
        if abs(total - 1) > 1e-9:
            raise InputError(f"expected the shares of recipe {self.name!r} to add up to 1, got {total}")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"expected label smoothing of at least 0 and less than 1, got {self.label_smoothing}")
        if not 0 <= self.warmup < self.stages[0].share:
            raise InputError(
                f"expected a warm-up of at least 0 and less than the first stage's {self.stages[0].share:g} of the "
                f"run, got {self.warmup}"
            )

    def for_model(self, model: nn.Module, inputs: Tensor | None = None, *, pretrained: bool = False) -> Recipe:
        """The recipe with its rules for first, last and down-sampling layers as overrides of its policies.

        Args:
            model: that is to be trained, not prepared; left as it is.
            inputs: some samples, to find the order in which layers are used; see
                :func:`fqtstats.training.layer_rules.roles` for what is done without.
            pretrained: whether the model has the weights of a training in full precision.

        Raises:
            InputError: the recipe does not fit: no layer is left to quantize, or it needs trained weights.
        """
        if self.starts_from == "full-precision" and not pretrained:
            raise InputError(
                f"recipe {self.name!r} starts from a network that was trained in full precision, and this one was not; "
                "give a full-precision checkpoint"
            )
        if self.rules == NO_RULES or not any(stage.quantizes for stage in self.stages):
            return self
        try:
            found = roles(model, inputs)

            def resolved(policy: Policy) -> Policy:
                return replace(policy, overrides={**self.rules.overrides(found, policy), **policy.overrides})

            stages = [replace(own, policy=resolved(own.policy)) if own.quantizes else own for own in self.stages]
            distillation = self.distillation
            if distillation is not None:
                distillation = replace(distillation, others=tuple(map(resolved, distillation.others)))
        except InputError as error:
            raise InputError(f"recipe {self.name!r} does not fit {type(model).__name__}: {error}") from error
        return replace(self, stages=tuple(stages), distillation=distillation, rules=NO_RULES)

    def epochs(self, total: int) -> tuple[int, ...]:
        """How many of ``total`` epochs each stage has: at least one, and else its share, rounded.

        Raises:
            InputError: there are fewer epochs than stages.
        """
        if total < len(self.stages):
            raise InputError(
                f"recipe {self.name!r} has {len(self.stages)} stages, which need at least one epoch each; got {total} "
                "epochs"
            )
        counts = [max(1, math.floor(stage.share * total + 1e-9)) for stage in self.stages]
        while sum(counts) != total:
            # The stage that is furthest from its share gives or gets one.
            gaps = [stage.share * total - count for stage, count in zip(self.stages, counts, strict=True)]
            if sum(counts) < total:
                counts[gaps.index(max(gaps))] += 1
            else:
                counts[gaps.index(min(gap for gap, count in zip(gaps, counts, strict=True) if count > 1))] -= 1
        return tuple(counts)

    def factor(self, stage: int, done: int, steps: int) -> float:
        """Factor of the optimizer's learning rates in a step.

        Args:
            stage: which one, from 0.
            done: steps of the stage that are done, at least 0 and less than ``steps``.
            steps: how many it has.
        """
        own = self.stages[stage]
        shape = schedule(own.schedule)
        if stage == 0 and self.warmup > 0:
            shape = warmed_up(shape, self.warmup / own.share)
        return own.lr_scale * shape(done, steps)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer for a prepared model; see :meth:`fqtstats.training.optimizers.Optimizer.groups`."""
        return self.optimizer.build(model, decay_norms=self.decay_norms)


@dataclass(frozen=True)
class Definition:
    """A row of :data:`RECIPES`; called with the bits, or None for its default, it gives the recipe.

    Attributes:
        name: of the recipe.
        summary: one line for listings.
        source: the paper.
        build: from the bits to the recipe but for name, source and bits, which are filled in.
        bits: the numbers of bits that it is defined for; empty: there is none to choose.
        default: of these, the one to take without a choice.
        means: what the bits are the bits of.
    """

    name: str
    summary: str
    source: str
    build: Callable[[int], Recipe]
    bits: tuple[int, ...] = ()
    default: int | None = None
    means: str = ""

    def __call__(self, bits: int | None = None) -> Recipe:
        """The recipe.

        Raises:
            InputError: the recipe is not defined for these bits.
        """
        if bits is not None and bits not in self.bits:
            known = f"known: {', '.join(map(str, self.bits))} ({self.means})" if self.bits else "it has none to choose"
            raise InputError(f"recipe {self.name!r} is not defined for {bits} bits; {known}")
        chosen = self.default if bits is None else bits
        return replace(self.build(chosen or 0), name=self.name, source=self.source, bits=chosen)


STATQUANT = "J. Chen et al. (arXiv 2010.14298)"
ONE_BIT = "C. Gao et al. (arXiv 2408.14267)"
LSQ = "S. Esser et al. (arXiv 1902.08153)"
EFFECTIVE = "B. Zhuang et al. (arXiv 1908.04680)"
LUQ = "B. Chmiel et al. (arXiv 2112.10769)"
DOREFA = "S. Zhou et al. (arXiv 1606.06160)"

FULL = Policy(name="full precision")
EVERY_BITS = tuple(range(1, 9))


def _recipe(stages: Stage | Iterable[Stage], **others: object) -> Recipe:
    own = (stages,) if isinstance(stages, Stage) else tuple(stages)
    return Recipe("", "", None, own, **others)  # type: ignore[arg-type]


# --- StatQuant: the policies of fqtstats.policies -------------------------------------------------------------------


def _statquant(policy: str) -> Callable[[int], Recipe]:
    return lambda bits: _recipe(Stage("training", policies.get(policy, bits or 8)))


_GRADIENT_BITS = {"bits": EVERY_BITS, "default": 5, "means": "bits of the input gradient"}

_STATQUANT = [
    Definition("exact", "full precision", STATQUANT, _statquant("exact")),
    Definition("statquant-qat", "8-bit forward pass, exact gradients", STATQUANT, _statquant("statquant-qat")),
    *(
        Definition(
            f"statquant-{name}",
            f"the same, gradients by {told}",
            STATQUANT,
            _statquant(f"statquant-{name}"),
            **_GRADIENT_BITS,  # type: ignore[arg-type]
        )
        for name, told in (
            ("ptq", "one grid per tensor"),
            ("psq", "one grid per sample"),
            ("bhq", "block Householder quantization"),
        )
    ),
]


# --- 1-bit FQT: full precision, then a binary network, then 1-bit gradients -----------------------------------------


def _binary() -> Policy:
    return Policy(activation=quantizer("sign"), weight=quantizer("scaled_sign"), name="1bit-qat")


def _agp(bits: int) -> Policy:
    # Samples are pruned for the input gradient, channels for the weight gradient (SCQ), so that both products keep
    # their scales off the index that they sum over.
    return replace(
        _binary(),
        grad_input=quantizer("agp", bits=bits, groups="sample"),
        grad_weight=quantizer("agp", bits=bits, groups="channel"),
        name="1bit-agp",
    )


def _psq1(bits: int) -> Policy:
    return replace(
        _binary(), grad_input=quantizer("psq", bits=1), grad_weight=quantizer("pcq", bits=1), name="1bit-psq"
    )


SMALL_ADAM = Optimizer("adam", lr=5e-3, weight_decay=1e-5)
SMALL_SGD = Optimizer("sgd", lr=0.3, momentum=0.9, weight_decay=1e-5)


def _one_bit(policy: Callable[[int], Policy], optimizer: Optimizer) -> Callable[[int], Recipe]:
    def build(bits: int) -> Recipe:
        # Behind a ReLU every sign is +1, which says nothing. There 1 bit tells whether the number is above 1/2, as in
        # DoReFa; this is ours, the paper's networks have signs throughout.
        rules = LayerRules(FULL, FULL, FULL, nonnegative=quantizer("dorefa_act", bits=1))
        stages = (
            Stage("full precision", FULL, 0.3),
            Stage("binary", _binary(), 0.3),
            Stage("fine-tuning", policy(bits), 0.4, lr_scale=0.3),
        )
        return _recipe(stages, optimizer=optimizer, rules=rules)

    return build


_AGP_BITS = {"bits": (2, 4, 8), "default": 4, "means": "bits of the groups that are kept"}

_ONE_BIT = [
    Definition(
        f"1bit-{name}-{optimizer.name}",
        f"binary network, fine-tuned by {optimizer.name} with {told}",
        ONE_BIT,
        _one_bit(policy, optimizer),
        **options,  # type: ignore[arg-type]
    )
    for name, policy, told, options in (
        ("qat", lambda bits: _binary(), "exact gradients", {}),
        ("psq", _psq1, "1-bit gradients, one grid per sample", {}),
        ("agp", _agp, "pruned gradients of 1 bit on average", _AGP_BITS),
    )
    for optimizer in (SMALL_ADAM, SMALL_SGD)
]


# --- LSQ --------------------------------------------------------------------------------------------------------------


def _lsq_policy(bits: int) -> Policy:
    return Policy(
        activation=quantizer("lsq", bits=bits, on="activation"),
        weight=quantizer("lsq", bits=bits, on="weight"),
        name=f"lsq{bits}",
    )


def _lsq(bits: int) -> Recipe:
    edge = _lsq_policy(8)
    return _recipe(
        Stage("fine-tuning", _lsq_policy(bits)),
        optimizer=Optimizer(lr=0.01),
        starts_from="full-precision",
        rules=LayerRules(edge, edge),
    )


_LSQ = [
    Definition(
        "lsq",
        "weights and activations with learned steps, exact gradients",
        LSQ,
        _lsq,
        (2, 3, 4, 8),
        4,
        "bits of weights and activations",
    )
]


# --- Effective training: two-step, progressive, stochastic precision, joint distillation ------------------------------


def _zhuang(bits: int) -> Policy:
    name = f"dorefa{bits}"
    if bits == wide.BITS:
        return Policy(activation=wide.Wide("dorefa_act"), weight=wide.Wide("dorefa_weight"), name=name)
    return Policy(
        activation=quantizer("dorefa_act", bits=bits), weight=quantizer("dorefa_weight", bits=bits), name=name
    )


EDGES_FULL = LayerRules(FULL, FULL)
"""First and last layer in full precision; the usual choice, and ours where the paper's own is not known to us."""

EFFECTIVE_OPTIMIZER = Optimizer(lr=0.05)


def _two_step(bits: int) -> Recipe:
    both = _zhuang(bits)
    stages = (
        Stage("weights", replace(both, activation=None, name=f"{both.name}-weights"), 0.5),
        Stage("weights and activations", both, 0.5, lr_scale=0.3),
    )
    return _recipe(stages, optimizer=EFFECTIVE_OPTIMIZER, rules=EDGES_FULL, starts_from="full-precision")


def _progressive(bits: int) -> Recipe:
    widths = [width for width in (16, 8, 4, 2) if width >= bits]
    # The last stage is what remains: it gets the time. The others only prepare its weights.
    share = 0.6 / len(widths)
    stages = (
        Stage("32 bits", FULL, share),
        *(Stage(f"{width} bits", _zhuang(width), share) for width in widths[:-1]),
        Stage(f"{bits} bits", _zhuang(bits), 0.4),
    )
    return _recipe(stages, optimizer=EFFECTIVE_OPTIMIZER, rules=EDGES_FULL)


def _stochastic_precision(bits: int) -> Recipe:
    stage = Stage("training", _zhuang(bits), stochastic=StochasticPrecision())
    return _recipe(stage, optimizer=EFFECTIVE_OPTIMIZER, rules=EDGES_FULL)


def _joint(kind: Literal["kl", "logits"], *others: int) -> Callable[[int], Recipe]:
    def build(bits: int) -> Recipe:
        distillation = Distillation(kind, others=tuple(map(_zhuang, others)))
        return _recipe(
            Stage("training", _zhuang(bits)),
            optimizer=EFFECTIVE_OPTIMIZER,
            rules=EDGES_FULL,
            distillation=distillation,
        )

    return build


_FORWARD_BITS = {"bits": EVERY_BITS, "default": 4, "means": "bits of weights and activations"}

_EFFECTIVE = [
    Definition(
        "two-step",
        "weights are quantized first, activations later",
        EFFECTIVE,
        _two_step,
        **_FORWARD_BITS,  # type: ignore[arg-type]
    ),
    Definition(
        "progressive",
        "from 32 bits down by halves",
        EFFECTIVE,
        _progressive,
        (2, 4, 8),
        2,
        "bits of weights and activations at the end",
    ),
    Definition(
        "stochastic-precision",
        "more and more blocks are quantized; the rule of sampling is ours",
        EFFECTIVE,
        _stochastic_precision,
        **_FORWARD_BITS,  # type: ignore[arg-type]
    ),
    Definition(
        "joint-kl",
        "student and full-precision teacher learn from each other's predictions",
        EFFECTIVE,
        _joint("kl"),
        **_FORWARD_BITS,  # type: ignore[arg-type]
    ),
    Definition(
        "joint-logits",
        "student and full-precision teacher learn from each other's logits",
        EFFECTIVE,
        _joint("logits"),
        **_FORWARD_BITS,  # type: ignore[arg-type]
    ),
    Definition("joint-2-4", "the same with a 2-bit and a 4-bit student", EFFECTIVE, lambda bits: _joint("kl", 4)(2)),
]


# --- LUQ --------------------------------------------------------------------------------------------------------------


def _int4(name: str) -> Policy:
    return Policy(activation=quantizer("sawb", on="activation"), weight=quantizer("sawb", on="weight"), name=name)


def _luq_policy(samples: int = 1) -> Policy:
    name = "luq" if samples == 1 else "luq-smp"
    return replace(_int4(name), grad_input=quantizer("luq"), grad_weight=quantizer("luq", samples=samples))


def _luq_recipe(*stages: Stage) -> Recipe:
    # Activations that can be negative take the levels of the weights, which are symmetric about zero.
    rules = LayerRules(FULL, FULL, signed=quantizer("sawb", on="weight"))
    return _recipe(stages, rules=rules, optimizer=Optimizer(lr=0.05))


def _luq(samples: int) -> Callable[[int], Recipe]:
    return lambda bits: _luq_recipe(Stage("training", _luq_policy(samples)))


def _fnt(bits: int) -> Recipe:
    weights = replace(_int4("int4-weights"), activation=None)
    high = Stage("high precision", weights, 0.2, lr_scale=0.1, schedule="triangle")
    return _luq_recipe(Stage("4 bits", _luq_policy(), 0.8), high)


def _int4_sr(bits: int) -> Recipe:
    sr = quantizer("int4_sr")
    return _luq_recipe(Stage("training", replace(_int4("int4-sr"), grad_input=sr, grad_weight=sr)))


_LUQ = [
    Definition("luq", "4-bit integers forward, 4-bit logarithmic gradients", LUQ, _luq(1)),
    Definition("luq-smp", "the same, weight gradients from the mean of two samples", LUQ, _luq(2)),
    Definition("luq-fnt", "LUQ, then a while with everything but the weights in high precision", LUQ, _fnt),
    Definition("int4-sr", "4-bit integers throughout: LUQ's baseline", LUQ, _int4_sr),
]


# --- DoReFa -----------------------------------------------------------------------------------------------------------


def _dorefa(bits: int) -> Recipe:
    policy = replace(
        _zhuang(bits),
        grad_input=quantizer("dorefa", bits=bits),
        grad_weight=quantizer("dorefa", bits=bits),
        name=f"dorefa{bits}-gradients",
    )
    return _recipe(Stage("training", policy), rules=EDGES_FULL, optimizer=Optimizer(lr=0.05))


_DOREFA = [
    Definition(
        "dorefa",
        "weights, activations and gradients of equal width",
        DOREFA,
        _dorefa,
        EVERY_BITS,
        6,
        "bits of all three",
    )
]

RECIPES: dict[str, Definition] = {
    definition.name: definition
    for definitions in (_STATQUANT, _ONE_BIT, _LSQ, _EFFECTIVE, _LUQ, _DOREFA)
    for definition in definitions
}
"""By name; every value is called with the bits, or None."""


def get(name: str, bits: int | None = None) -> Recipe:
    """A recipe by name.

    Args:
        name: one of :data:`RECIPES`.
        bits: its free number of bits; None: its default.

    Raises:
        InputError: unknown name (lists the known ones), or bits that the recipe is not defined for.
    """
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name](bits)

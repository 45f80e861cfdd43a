"""Do better gradient quantizers train to lower loss, as the papers claim?

Every variant of every family below is trained once per seed, on one thread. A run that diverges is a row, too.

Every run has its own file, which appears when the run is over and stays. What is there is not repeated: a study that
was ended goes on where it was, and processes share the work if each runs some of ``--families`` or ``--seeds`` with its
own ``--out``, and the last of them all. A run is taken for another if model, epochs, recipe, batch size or data are
others.

Families:

* ``statquant``: a lower loss with block Householder quantization (BHQ) than with one grid per sample (PSQ), and with
  this than with one grid per tensor (PTQ), at 2, 3 and 4 bits of the input gradient (arXiv 2010.14298);
* ``1bit``: a lower loss with activation gradient pruning (AGP, b = 4) than with 1-bit PSQ when a network trained in
  full precision is made binary and then fine-tuned with 1-bit gradients, with Adam and with SGD (arXiv 2408.14267): the
  recipes as they are registered, whose first stages are those in full precision and binary;
* ``rotated``: the same claim where a binary network that was trained on digits with exact gradients is fine-tuned on
  digits turned by 90 degrees;
* ``luq``: a lower loss with LUQ than with each of its ablations, nearest rounding with underflow flushed to zero,
  stochastic rounding alone, stochastic underflow alone, and than with 4-bit integers (arXiv 2112.10769).

Variants of one seed start from the same weights and see the same batches. The loss of a run is its mean cross entropy
over the minibatches of the last epoch, through the recipe's own forward quantizers, when the learning rate has nearly
come to 0. A run that diverged counts with the loss of guessing, the entropy of the classes.

A claim is tested on the differences of the logarithms of the two losses over the seeds by one-sided paired t tests in
both directions. P-values of each direction are adjusted over all claims of the study by Holm's method, and each
direction is held to 2.5 %: the probability of any false statement is at most 5 %. Every claim has two intervals: the
95 % interval of this claim alone, and the one that all claims have together at 95 %, whose ends are the bounds that
belong to Holm's method (:func:`analysis.estimates.holm_bounds`): it has 1 inside just where no ordering is shown, and
ends at 1 where one is. Of the text a part is taken, in small batches (:mod:`analysis.tasks`).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from analysis.axes import ratio_axis
from analysis.estimates import holm, holm_bounds, mean_interval, p_greater
from analysis.study import Claim, Parts, Row, Study, Tables, interval, main, with_interval
from analysis.tasks import TASKS, guessing, records
from fqtstats import models
from fqtstats.data.base import InMemory
from fqtstats.errors import InputError, TrainingDiverged
from fqtstats.policy import QuantizerLike
from fqtstats.quantizers import quantizer
from fqtstats.report import style
from fqtstats.schema import Column
from fqtstats.training import loop, runs
from fqtstats.training.description import recipe_as_json
from fqtstats.training.recipes import Recipe
from fqtstats.trainings import Training

BACKEND = "native"
LEVEL = 0.025
"""Of the tests of one direction."""
FINE_TUNING = 5
"""Epochs on the rotated digits."""


# --- what is trained --------------------------------------------------------------------------------------------------


def as_registered(recipe: Recipe) -> Recipe:
    """The recipe."""
    return recipe


def fine_tuning(recipe: Recipe) -> Recipe:
    """The last stage alone."""
    return replace(recipe, stages=(replace(recipe.stages[-1], share=1.0),), starts_from="full-precision")


def with_gradients(q: QuantizerLike | None) -> Callable[[Recipe], Recipe]:
    """Gives the recipe of one stage with ``q`` on the incoming gradient, in both backward products."""

    def change(recipe: Recipe) -> Recipe:
        (stage,) = recipe.stages
        return replace(recipe, stages=(replace(stage, policy=replace(stage.policy, grad_input=q, grad_weight=q)),))

    return change


@dataclass(frozen=True)
class Variant:
    """A recipe that is trained.

    Attributes:
        name: within the family.
        recipe, bits: of :mod:`fqtstats.training.runs`.
        change: makes of it what is trained.
        start: the recipe that makes the first weights, on digits; None: as initialized.
    """

    name: str
    recipe: str
    bits: int | None = None
    change: Callable[[Recipe], Recipe] = as_registered
    start: str | None = None


@dataclass(frozen=True)
class Family:
    """Variants that are compared.

    Attributes:
        name: of the family.
        task: one of :data:`TASKS`.
        reference: the variant without gradient noise.
        variants: the others.
        claims: pairs of them, the first with the lower loss.
    """

    name: str
    task: str
    reference: Variant
    variants: tuple[Variant, ...]
    claims: tuple[tuple[str, str], ...]


def statquant(task: str) -> Family:
    """PTQ, PSQ and BHQ at low bits."""
    low = (2, 3, 4)
    return Family(
        f"statquant-{task}",
        task,
        Variant("exact", "statquant-qat"),
        tuple(Variant(f"{q}@{bits}", f"statquant-{q}", bits) for bits in low for q in ("ptq", "psq", "bhq")),
        tuple(
            (f"{better}@{bits}", f"{worse}@{bits}")
            for bits in low
            for better, worse in (("bhq", "psq"), ("psq", "ptq"), ("bhq", "ptq"))
        ),
    )


def one_bit(optimizer: str) -> Family:
    """AGP and PSQ as registered."""
    return Family(
        f"1bit-{optimizer}",
        "digits",
        Variant("exact", f"1bit-qat-{optimizer}"),
        (Variant("psq@1", f"1bit-psq-{optimizer}"), Variant("agp@4", f"1bit-agp-{optimizer}", 4)),
        (("agp@4", "psq@1"),),
    )


def rotated(optimizer: str) -> Family:
    """AGP and PSQ in the fine-tuning of a binary network for other data."""
    family = one_bit(optimizer)

    def fine_tuned(variant: Variant) -> Variant:
        return replace(variant, change=fine_tuning, start=family.reference.recipe)

    return replace(
        family,
        name=f"rotated-{optimizer}",
        task="rotated",
        reference=fine_tuned(family.reference),
        variants=tuple(map(fine_tuned, family.variants)),
    )


def luq(task: str) -> Family:
    """LUQ, its ablations, and 4-bit integers."""
    ablations = {
        "nearest, flush": quantizer("luq", rounding="nearest", underflow="flush"),
        "rounding alone": quantizer("luq", underflow="flush"),
        "underflow alone": quantizer("luq", rounding="nearest"),
    }
    others = tuple(Variant(name, "luq", change=with_gradients(q)) for name, q in ablations.items())
    return Family(
        f"luq-{task}",
        task,
        Variant("exact", "luq", change=with_gradients(None)),
        (Variant("luq", "luq"), *others, Variant("int4", "int4-sr")),
        tuple(("luq", name) for name in (*ablations, "int4")),
    )


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        statquant("digits"),
        *(one_bit(optimizer) for optimizer in ("adam", "sgd")),
        *(rotated(optimizer) for optimizer in ("adam", "sgd")),
        luq("digits"),
        statquant("text"),
        luq("text"),
    )
}
"""By name."""


@cache
def source(task: str) -> InMemory:
    """The data of one of the tasks."""
    found = records("text" if task == "text" else "digits")
    if task == "rotated":
        return replace(
            found,
            name="digits, rotated",
            inputs={split: torch.rot90(images, dims=(2, 3)) for split, images in found.inputs.items()},
        )
    return found


@dataclass(frozen=True)
class Settings:
    """Of the study; no model and 0 epochs are the runs' own."""

    families: tuple[str, ...] = tuple(FAMILIES)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    model: str = ""
    epochs: int = 0


COLUMNS = (
    Column("family", "str", "", "of variants that are compared"),
    Column("variant", "str", "", "within the family"),
    Column("seed", "int64", "1", "of initialization, batch order and rounding"),
    Column("model", "str", "", "network"),
    Column("epochs", "int64", "1", "of the run"),
    Column("trained_sha256", "str", "", "of recipes, batch size and data; empty where it was not recorded"),
    Column("loss", "float64", "nats", "training loss of the last epoch; NaN if the run diverged, as what follows"),
    Column("accuracy", "float64", "1", "training accuracy of the last epoch"),
    Column("test_loss", "float64", "nats", "at the end"),
    Column("test_accuracy", "float64", "1", "at the end"),
    Column("diverged", "str", "", "where and why the run diverged; empty if it did not"),
    Column("guessing", "float64", "nats", "loss of the best answer that does not look at the input"),
    Column("cpu_seconds", "float64", "s", "that the run took"),
)
MEASURED = ("loss", "accuracy", "test_loss", "test_accuracy")
"""Columns of a run that are unknown if it diverged."""


def measure(settings: Settings, parts: Parts) -> Tables:
    """A row per run."""
    if unknown := sorted(set(settings.families) - set(FAMILIES)):
        raise InputError(f"unknown family {unknown[0]!r}; known: {', '.join(FAMILIES)}")
    cases = [
        case(FAMILIES[name], variant, seed, settings)
        for name in settings.families
        for seed in settings.seeds
        for variant in (FAMILIES[name].reference, *FAMILIES[name].variants)
    ]
    return {"runs": parts.every("runs", cases, outcome)}


def case(family: Family, variant: Variant, seed: int, settings: Settings) -> dict[str, Any]:
    """All that a run depends on."""
    run = _run(variant, family.task)
    own = FINE_TUNING if family.task == "rotated" else TASKS[family.task].epochs or run.epochs
    recipes = [variant.change(run.recipe)]
    if variant.start is not None:
        recipes.append(runs.run(f"{variant.start}/digits").recipe)
    trained = [*map(recipe_as_json, recipes), _batch_size(variant, family.task), _fingerprint(family.task)]
    return {
        "family": family.name,
        "variant": variant.name,
        "seed": seed,
        "model": settings.model or run.model,
        "epochs": settings.epochs or own,
        "trained_sha256": hashlib.sha256(json.dumps(trained, sort_keys=True).encode()).hexdigest(),
    }


def outcome(family: str, variant: str, seed: int, model: str, epochs: int, trained_sha256: str) -> Row:
    """The row of one run; of one that diverged, its numbers are NaN, and the reason is told."""
    began = time.process_time()
    of = FAMILIES[family]
    (own,) = [each for each in (of.reference, *of.variants) if each.name == variant]
    row: dict[str, object] = dict.fromkeys(MEASURED, math.nan) | {"diverged": ""}
    try:
        _, training = trained(own, of.task, seed, model, epochs)
    except TrainingDiverged as error:
        row["diverged"] = f"epoch {error.diagnosis['epoch']}: {error.diagnosis['reason']}"
    else:
        row |= {name: float(training.final[name]) for name in MEASURED}
    return row | {"guessing": guessing(source(of.task)), "cpu_seconds": time.process_time() - began}


def trained(variant: Variant, task: str, seed: int, model: str, epochs: int) -> tuple[nn.Module, Training]:
    """The model after one run, and the run.

    Raises:
        TrainingDiverged: the run, or that of its first weights, diverged.
    """
    network = models.build(model, source(task), seed)
    if variant.start is not None:
        network.load_state_dict(first_weights(variant.start, seed, model))
    training = loop.train(
        network,
        source(task),
        variant.change(_run(variant, task).recipe),
        epochs=epochs,
        batch_size=_batch_size(variant, task),
        seed=seed,
        backend=BACKEND,
        pretrained=variant.start is not None,
    )
    return network, training


@cache
def first_weights(recipe: str, seed: int, model: str) -> dict[str, torch.Tensor]:
    """The weights that a recipe's run on digits ends with; of its quantizers, nothing."""
    variant = Variant(recipe, recipe)
    network, _ = trained(variant, "digits", seed, model, _run(variant, "digits").epochs)
    return network.state_dict()


def _run(variant: Variant, task: str) -> runs.Run:
    return runs.run(f"{variant.recipe}/{'text' if task == 'text' else 'digits'}", variant.bits)


def _batch_size(variant: Variant, task: str) -> int:
    return (task in TASKS and TASKS[task].batch_size) or _run(variant, task).batch_size


@cache
def _fingerprint(task: str) -> str:
    return source(task).fingerprint()


# --- what is said -----------------------------------------------------------------------------------------------------


def losses(rows: pd.DataFrame) -> pd.DataFrame:
    """Final losses, seeds by variants, of one family; of runs that diverged, that of guessing."""
    return rows.assign(loss=rows["loss"].fillna(rows["guessing"])).pivot(index="seed", columns="variant", values="loss")


def compare(rows: pd.DataFrame, families: Sequence[Family]) -> pd.DataFrame:
    """A row per claim; differences are those of the variant claimed to be worse from the better one.

    ``log`` is the mean logarithm of the ratio of their losses, ``log_low`` and ``log_high`` are its 95 % interval
    alone, ``log_least`` and ``log_most`` that of all claims together.
    """
    found, samples = [], []
    for family in families:
        own = rows[rows["family"] == family.name]
        table = losses(own)
        for better, worse in family.claims:
            both = table.reindex(columns=[better, worse]).dropna()
            ratio = np.log(both[worse] / both[better]).to_numpy(dtype=np.float64)
            ended = own[own["seed"].isin(both.index) & (own["diverged"] != "")]["variant"]
            row: dict[str, object] = {
                "family": family.name,
                "better": better,
                "worse": worse,
                "seeds": len(both),
                "diverged_better": int((ended == better).sum()),
                "diverged_worse": int((ended == worse).sum()),
            }
            of = {"difference": (both[worse] - both[better]).to_numpy(dtype=np.float64), "log": ratio}
            for name, values in of.items():
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), mean_interval(values), strict=True))
            found.append({**row, "p": p_greater(ratio), "p_other": p_greater(-ratio)})
            samples.append(ratio)
    table = pd.DataFrame(found)
    table["log_least"] = holm_bounds(samples, LEVEL)
    table["log_most"] = [-bound for bound in holm_bounds([-ratio for ratio in samples], LEVEL)]
    for name in ("p", "p_other"):
        table[f"{name}_holm"] = holm(list(table[name]))
    table["verdict"] = [verdict(row) for row in table.to_dict("records")]
    return table


def verdict(row: dict[str, float]) -> str:
    """What a row of :func:`compare` says of its claim."""
    if math.isnan(row["p"]):
        return "not tested: less than two seeds"
    if row["p_holm"] < LEVEL:
        return "ordered"
    if row["p_other_holm"] < LEVEL:
        return "ordered the other way"
    low, high = (100 * math.expm1(row[f"log_{end}"]) for end in ("least", "most"))
    return f"no ordering shown (difference within {low:+.3g} % to {high:+.3g} %)"


def means(rows: pd.DataFrame, families: Sequence[Family]) -> pd.DataFrame:
    """A row per variant: mean loss, and the logarithm of its ratio to the reference's, with its 95 % interval."""
    found = []
    for family in families:
        table = losses(rows[rows["family"] == family.name])
        for variant in (family.reference, *family.variants):
            if variant.name not in table:
                continue
            own = rows[(rows["family"] == family.name) & (rows["variant"] == variant.name)]
            both = table.reindex(columns=[variant.name, family.reference.name]).dropna().to_numpy(dtype=np.float64)
            row: dict[str, object] = {"family": family.name, "variant": variant.name, "seeds": len(own)}
            row |= {"diverged": int((own["diverged"] != "").sum()), "loss": table[variant.name].mean()}
            row |= {name: own[name].mean() for name in ("test_loss", "test_accuracy")}
            excess = mean_interval(np.log(both[:, 0] / both[:, 1]))
            found.append(row | dict(zip(("excess", "excess_low", "excess_high"), excess, strict=True)))
    return pd.DataFrame(found)


def families_of(rows: pd.DataFrame) -> list[Family]:
    """Those with runs, in the order of the rows."""
    return [FAMILIES[name] for name in dict.fromkeys(rows["family"])]


def read(tables: Tables) -> pd.DataFrame:
    """A row per claim."""
    rows = tables["runs"]
    return pd.DataFrame(
        {
            "family": row["family"],
            "claim": f"{row['better']} < {row['worse']}",
            "seeds": f"{row['seeds']}",
            "diverged": f"{row['diverged_better']}, {row['diverged_worse']}",
            "difference [nats]": ranged(row, "difference"),
            "ratio, alone": _ratio(row, "low", "high"),
            "ratio, together": _ratio(row, "least", "most"),
            "p": "" if math.isnan(row["p_holm"]) else f"{row['p_holm']:.2g}",
            "p, other way": "" if math.isnan(row["p_holm"]) else f"{row['p_other_holm']:.2g}",
            "verdict": row["verdict"],
        }
        for row in compare(rows, families_of(rows)).to_dict("records")
    )


def ranged(row: dict[str, float], name: str) -> str:
    """A mean with its interval; "" for none."""
    return (
        "" if math.isnan(row[name]) else with_interval(*(row[f"{name}{end}"] for end in ("", "_low", "_high")), "+.3g")
    )


def _ratio(row: dict[str, float], low: str, high: str) -> str:
    """The ratio of the losses with one of its intervals; "" for none."""
    if math.isnan(row["log"]):
        return ""
    ratio, *ends = (math.exp(row[name]) for name in ("log", f"log_{low}", f"log_{high}"))
    return with_interval(ratio, *ends, ".3f" if 0.5 < ends[0] < ends[1] < 2 else ".3g")


def claims(tables: Tables) -> list[Claim]:
    """One per claim of the papers: shown, shown the other way round, or open."""
    rows = tables["runs"]
    table = compare(rows, families_of(rows))
    counts = table["verdict"].value_counts()
    ordered, other = int(counts.get("ordered", 0)), int(counts.get("ordered the other way", 0))
    untested = int(table["p"].isna().sum())
    told = [
        Claim(
            f"Of {len(table) - untested} claims that were tested, {ordered} are shown in training, {other} the other "
            f"way round, {len(table) - untested - ordered - other} neither (each direction at {LEVEL:.1%}, p-values "
            f"adjusted over all claims by Holm's method)."
        )
    ]
    for row in table.to_dict("records"):
        if math.isnan(row["p"]):
            told.append(Claim(f"{row['family']}, {row['better']} < {row['worse']}: not tested, less than two seeds."))
            continue
        lost = row["diverged_better"] + row["diverged_worse"]
        told.append(
            Claim(
                f"{row['family']}, {row['better']} < {row['worse']}: the second's loss is {_ratio(row, 'low', 'high')} "
                f"times the first's over {row['seeds']} seeds (95 % interval of this claim alone; of all "
                f"{len(table) - untested} together {_together(row)}"
                + (f"; {lost} runs diverged" if lost else "")
                + f"; p = {row['p_holm']:.2g} as claimed, {row['p_other_holm']:.2g} the other way round, Holm): "
                f"{row['verdict'].partition(' (')[0]}.",
                *_VERDICTS[row["verdict"].partition(" (")[0]],
            )
        )
    return told


def _together(row: dict[str, float]) -> str:
    """The interval of all claims together, whose end at 1 does not belong to it."""
    low, high = math.exp(row["log_least"]), math.exp(row["log_most"])
    form = ".3f" if 0.5 < low < high < 2 else ".3g"
    if low == 1:
        return f"above 1, to {high:{form}}"
    return f"below 1, from {low:{form}}" if high == 1 else interval(low, high, form)


_VERDICTS: dict[str, tuple[bool | None, str]] = {
    "ordered": (True, ""),
    "ordered the other way": (False, "not examined"),
    "no ordering shown": (None, ""),
}
"""Whether what was expected is so, and the reason where it is not."""

_COLORS = {"ordered": style.GREEN, "ordered the other way": style.VERMILION}


def draw(tables: Tables) -> dict[str, Figure]:
    """Ratios of the losses by claim, and of every variant's loss to that without gradient noise."""
    rows = tables["runs"]
    families = families_of(rows)
    return {
        "claims": _panels(families, lambda family: _claims_of(rows, family, compare(rows, families)), _CLAIMS),
        "variants": _panels(families, lambda family: _variants_of(rows, family, means(rows, families)), _VARIANTS),
    }


_CLAIMS = (
    "ratio of the final training losses: points are seeds, diamonds geometric means; thick lines are 95 % intervals of "
    "one claim alone,\nthin ones of all claims together, which end at 1 where an ordering is shown "
    "(green: as claimed, orange: the other way, black: none)"
)
_VARIANTS = (
    "ratio of the final training loss to that without gradient noise: points are seeds, diamonds geometric means,\n"
    "lines their 95 % intervals, each alone"
)

Line = tuple[str, npt.NDArray[np.float64], tuple[float, ...], str]
"""What is drawn in one line of a panel: its name, a log ratio per seed, their mean and the ends of its intervals, from
the one alone to that of all, and a colour."""


def _claims_of(rows: pd.DataFrame, family: Family, table: pd.DataFrame) -> list[Line]:
    final = np.log(losses(rows[rows["family"] == family.name]))
    lines: list[Line] = []
    for row in table[table["family"] == family.name].to_dict("records"):
        both = final.reindex(columns=[row["better"], row["worse"]]).dropna()
        values = (both[row["worse"]] - both[row["better"]]).to_numpy()
        mean = tuple(row[name] for name in ("log", "log_low", "log_high", "log_least", "log_most"))
        lines.append((f"{row['worse']} / {row['better']}", values, mean, _COLORS.get(row["verdict"], style.INK)))
    return lines


def _variants_of(rows: pd.DataFrame, family: Family, table: pd.DataFrame) -> list[Line]:
    final = np.log(losses(rows[rows["family"] == family.name]))
    lines: list[Line] = []
    for row in table[table["family"] == family.name].to_dict("records"):
        if row["variant"] == family.reference.name or family.reference.name not in final:
            continue
        values = (final[row["variant"]] - final[family.reference.name]).dropna().to_numpy()
        mean = (row["excess"], row["excess_low"], row["excess_high"])
        lines.append((f"{row['variant']} / {family.reference.name}", values, mean, style.INK))
    return lines


def _panels(families: Sequence[Family], lines_of: Callable[[Family], list[Line]], legend: str) -> Figure:
    """A panel per family: ratios on a log axis, a point per seed, and the geometric mean with its intervals."""
    drawn = sorted(((family.name, lines_of(family)) for family in families), key=lambda item: -len(item[1]))
    heights = [0.5 + 0.17 * len(lines) for _, lines in drawn[::2]]
    figure = style.new_figure(2 * style.COLUMN_WIDTH, 0.3 + sum(heights))
    panels = list(figure.subplots(len(heights), 2, squeeze=False, height_ratios=heights).flat)
    for ax, (name, lines) in zip(panels, drawn, strict=False):
        for place, (_, values, mean, color) in enumerate(lines):
            ax.plot(np.exp(values), [place + 0.2] * len(values), ".", color=style.GREY)
            center, *ends = np.exp(mean)
            for index, width in zip(range(0, len(ends), 2), (1.3, 0.5), strict=False):
                ax.plot(ends[index : index + 2], [place - 0.12] * 2, color=color, linewidth=width)
            ax.plot([center], [place - 0.12], "D", color=color, markersize=2.5)
        ax.axvline(1, color=style.GREY, linewidth=0.5)
        ax.set(title=name, yticks=range(len(lines)), ylim=(len(lines) - 0.4, -0.6))
        ax.set_yticklabels([label for label, *_ in lines])
        ratio_axis(ax)
    for ax in panels[len(drawn) :]:
        ax.remove()
    figure.supxlabel(legend, fontsize=6.5)
    return figure


STUDY = Study(
    name="ordering",
    question="Do better gradient quantizers train to lower loss, as the papers claim?",
    full=Settings(),
    quick=Settings(("luq-digits",), (0, 1), "mlp", 1),
    columns={"runs": COLUMNS},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Claims: the first variant ends with the lower training loss. Difference, with its 95 % interval (paired "
    "t), and ratio are those of the second's loss to the first's, means over the seeds (of ratios: geometric). Ratio, "
    "alone: 95 % interval of this claim; together: of all claims, by the bounds that belong to Holm's method, which "
    "end at 1 where an ordering is shown. P: one-sided, of the logarithms, adjusted by Holm's method, and that of the "
    "other direction. Diverged: runs of the first and of the second, which count with the loss of guessing.",
    keeps_cases=True,
)

if __name__ == "__main__":
    main(STUDY)

"""Do better gradient quantizers train to lower loss, as the papers claim?

``python -m analysis.ordering`` trains every variant of every family below once per seed, on one thread, and writes to
``analysis/results/ordering/``:

* ``rows.csv``: a row per run. Runs that are there already are not repeated, so a study that was ended goes on where it
  was; a run that diverged is a row, too;
* ``means.csv``: of every variant the mean loss, and how far it is above that of the family's variant without gradient
  noise;
* ``comparisons.csv`` and ``table.md``: a row per claim;
* ``losses.png``: logarithms of the ratios of the losses by claim and seed, a panel for each family.

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
direction is held to 2.5 %: the probability of any false statement is at most 5 %. Intervals are those of single claims,
at 95 %. Of the text a part is taken, in small batches (:mod:`analysis.tasks`).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.special
import scipy.stats
import torch
from torch import nn

from analysis.tasks import TASKS, guessing, records
from fqtstats import models, ops
from fqtstats.data.base import InMemory
from fqtstats.errors import TrainingDiverged
from fqtstats.files import write_atomically
from fqtstats.policy import QuantizerLike
from fqtstats.provenance import provenance
from fqtstats.quantizers import quantizer
from fqtstats.report import style
from fqtstats.training import loop, runs
from fqtstats.training.recipes import Recipe
from fqtstats.trainings import Training

FOLDER = Path(__file__).parent / "results" / "ordering"
SEEDS = 6
BACKEND = "native"
LEVEL = 0.025
"""Of the tests of one direction."""
CONFIDENCE = 0.95
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


@cache
def first_weights(recipe: str, seed: int) -> dict[str, torch.Tensor]:
    """The weights that a recipe's run on digits ends with; of its quantizers, nothing."""
    model, _ = trained(Variant(recipe, recipe), "digits", seed)
    return model.state_dict()


def trained(variant: Variant, task: str, seed: int) -> tuple[nn.Module, Training]:
    """The model after one run, and the run.

    Raises:
        TrainingDiverged: the run, or that of its first weights, diverged.
    """
    run = runs.run(f"{variant.recipe}/{'text' if task == 'text' else 'digits'}", variant.bits)
    examples = source(task)
    model = models.build(run.model, examples, seed)
    if variant.start is not None:
        model.load_state_dict(first_weights(variant.start, seed))
    training = loop.train(
        model,
        examples,
        variant.change(run.recipe),
        epochs=FINE_TUNING if task == "rotated" else TASKS[task].epochs or run.epochs,
        batch_size=(task in TASKS and TASKS[task].batch_size) or run.batch_size,
        seed=seed,
        backend=BACKEND,
        pretrained=variant.start is not None,
    )
    return model, training


def outcome(family: Family, variant: Variant, seed: int) -> dict[str, object]:
    """The row of one run; of one that diverged, its numbers are NaN, and the reason is told."""
    began = time.process_time()
    row: dict[str, object] = {"family": family.name, "variant": variant.name, "seed": seed}
    try:
        _, training = trained(variant, family.task, seed)
        last = training.final
    except TrainingDiverged as error:
        last = pd.Series(dtype=float)
        row["diverged"] = f"epoch {error.diagnosis['epoch']}: {error.diagnosis['reason']}"
    for name in ("epoch", "loss", "accuracy", "test_loss", "test_accuracy"):
        row[name] = last.get(name, math.nan)
    row |= {"guessing": guessing(source(family.task)), "cpu_seconds": time.process_time() - began}
    return row


# --- what is said -----------------------------------------------------------------------------------------------------

COLUMNS = (
    *("family", "variant", "seed", "epoch", "loss", "accuracy", "test_loss", "test_accuracy"),
    *("diverged", "guessing", "cpu_seconds"),
)


def losses(rows: pd.DataFrame) -> pd.DataFrame:
    """Final losses, seeds by variants, of one family; of runs that diverged, that of guessing."""
    return rows.assign(loss=rows["loss"].fillna(rows["guessing"])).pivot(index="seed", columns="variant", values="loss")


def interval(differences: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """Their mean with the ends of its 95 % interval (Student t); NaN for the ends if there are less than two."""
    n = len(differences)
    mean = float(differences.mean()) if n else math.nan
    if n < 2:
        return mean, math.nan, math.nan
    half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * differences.std(ddof=1) / math.sqrt(n)
    return mean, float(mean - half), float(mean + half)


def p_greater(differences: npt.NDArray[np.float64]) -> float:
    """One-sided p-value of a mean of at most zero against a greater one; NaN for less than two differences."""
    if len(differences) < 2:
        return math.nan
    if np.ptp(differences) == 0:  # no spread to compare them with
        return 0.0 if differences[0] > 0 else 1.0
    n = len(differences)
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(n))
    return float(scipy.special.stdtr(n - 1, -t))


def holm(p: Sequence[float]) -> list[float]:
    """P-values adjusted by Holm's method; those that are NaN count for nothing and stay."""
    adjusted = np.array(p, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(adjusted))
    order = known[np.argsort(adjusted[known])]
    steps = adjusted[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return [float(value) for value in adjusted]


def compare(rows: pd.DataFrame, families: Sequence[Family]) -> pd.DataFrame:
    """A row per claim; differences are those of the variant claimed to be worse from the better one."""
    found = []
    for family in families:
        own = rows[rows["family"] == family.name]
        table = losses(own)
        for better, worse in family.claims:
            both = table.reindex(columns=[better, worse]).dropna()
            ratio = np.log(both[worse] / both[better]).to_numpy(dtype=np.float64)
            ended = own[own["seed"].isin(both.index) & own["diverged"].notna()]["variant"]
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
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), interval(values), strict=True))
            found.append({**row, "p": p_greater(ratio), "p_other": p_greater(-ratio)})
    table = pd.DataFrame(found)
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
    low, high = (100 * math.expm1(row[f"log_{end}"]) for end in ("low", "high"))
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
            row |= {"diverged": int(own["diverged"].notna().sum()), "loss": table[variant.name].mean()}
            row |= {name: own[name].mean() for name in ("test_loss", "test_accuracy")}
            excess = interval(np.log(both[:, 0] / both[:, 1]))
            found.append(row | dict(zip(("excess", "excess_low", "excess_high"), excess, strict=True)))
    return pd.DataFrame(found)


# --- what is saved ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each variant")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    given = parser.parse_args()
    rows = load(given.out)
    for name in given.families:
        for seed in range(given.seeds):
            rows = complete(rows, FAMILIES[name], seed, given.out)
    save(rows, given.out)


def load(folder: Path) -> pd.DataFrame:
    """The rows that are there."""
    path = folder / "rows.csv"
    known = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=COLUMNS)
    return known.astype({"diverged": object})


def complete(rows: pd.DataFrame, family: Family, seed: int, folder: Path) -> pd.DataFrame:
    """The rows with those of the family and seed that were missing; every one is saved when it is there."""
    done = set(rows[["family", "variant", "seed"]].itertuples(index=False, name=None))
    for variant in (family.reference, *family.variants):
        if (family.name, variant.name, seed) in done:
            continue
        row = outcome(family, variant, seed)
        print(f"{family.name}, {variant.name}, seed {seed}: loss {row['loss']:.4g}", flush=True)
        rows = pd.DataFrame([*rows.to_dict("records"), row], columns=COLUMNS)
        write(folder / "rows.csv", rows.to_csv(index=False, float_format="%.9g"))
    return rows


def save(rows: pd.DataFrame, folder: Path) -> None:
    """Everything that is made of the rows."""
    families = [family for family in FAMILIES.values() if (rows["family"] == family.name).any()]
    comparisons, own = compare(rows, families), means(rows, families)
    write(folder / "comparisons.csv", comparisons.to_csv(index=False, float_format="%.6g"))
    write(folder / "means.csv", own.to_csv(index=False, float_format="%.6g"))
    write(folder / "table.md", markdown(comparisons, own))
    about = {
        "backend": BACKEND,
        "level": LEVEL,
        "tasks": {name: asdict(task) for name, task in TASKS.items()},
        "fine_tuning_epochs": FINE_TUNING,
        **provenance(ops.isa()),
    }
    write(folder / "run.json", json.dumps(about, indent=2) + "\n")
    write(folder / "losses.png", draw(rows, families, comparisons))
    print((folder / "table.md").read_text())


def write(path: Path, content: str | bytes) -> None:
    """A file that is the new one or still the old one, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(content.encode() if isinstance(content, str) else content))


def markdown(comparisons: pd.DataFrame, own: pd.DataFrame) -> str:
    """Both tables in Markdown."""
    claims = [
        [
            row["family"],
            f"{row['better']} < {row['worse']}",
            f"{row['seeds']}",
            f"{row['diverged_better']}, {row['diverged_worse']}",
            ranged(row, "difference"),
            ranged(row, "log"),
            f"{row['p_holm']:.2g}",
            row["verdict"],
        ]
        for row in comparisons.to_dict("records")
    ]
    trained_to = [
        [
            row["family"],
            row["variant"],
            f"{row['seeds']}",
            f"{row['diverged']}",
            f"{row['loss']:.4g}",
            ranged(row, "excess"),
            f"{row['test_loss']:.3g}",
            f"{row['test_accuracy']:.3f}",
        ]
        for row in own.to_dict("records")
    ]
    heads = (
        ["family", "claim", "seeds", "diverged", "difference [nats]", "log ratio", "p (Holm)", "verdict"],
        ["family", "variant", "seeds", "diverged", "loss [nats]", "log ratio to exact", "test loss", "test accuracy"],
    )
    parts = []
    for head, lines in zip(heads, (claims, trained_to), strict=True):
        cells = [head, ["---"] * len(head), *lines]
        parts.append("".join(f"| {' | '.join(line)} |\n" for line in cells))
    return (
        "Claims: the first variant ends with the lower training loss. Differences and logarithms of ratios are those "
        "of the second\nto the first, means over the seeds with 95 % intervals (paired t); p is one-sided, of the "
        "logarithms.\n\n" + parts[0] + "\nVariants:\n\n" + parts[1]
    )


def ranged(row: dict[str, float], name: str) -> str:
    """A mean with its interval."""
    return f"{row[name]:+.3g} ({row[f'{name}_low']:+.3g} to {row[f'{name}_high']:+.3g})"


_COLORS = {"ordered": "#009E73", "ordered the other way": "#D55E00"}


def draw(rows: pd.DataFrame, families: Sequence[Family], comparisons: pd.DataFrame) -> bytes:
    """Logarithms of the ratios of the losses by claim: a point per seed, and the mean with its 95 % interval."""
    drawn = sorted(families, key=lambda family: -len(family.claims))
    heights = [0.45 + 0.17 * len(family.claims) for family in drawn[::2]]
    with style.applied():
        figure = style.new_figure(2 * style.COLUMN_WIDTH, 0.2 + sum(heights))
        panels = list(figure.subplots(len(heights), 2, squeeze=False, height_ratios=heights).flat)
        for ax, family in zip(panels, drawn, strict=False):
            table = losses(rows[rows["family"] == family.name])
            own = comparisons[comparisons["family"] == family.name].to_dict("records")
            for place, row in enumerate(own):
                both = np.log(table.reindex(columns=[row["better"], row["worse"]]).dropna())
                ax.plot(both[row["worse"]] - both[row["better"]], [place + 0.2] * len(both), ".", color=style.GREY)
                color = _COLORS.get(row["verdict"], style.INK)
                ax.plot([row["log_low"], row["log_high"]], [place - 0.12] * 2, color=color)
                ax.plot([row["log"]], [place - 0.12], "D", color=color, markersize=2.5)
            ax.axvline(0, color=style.GREY, linewidth=0.5)
            ax.set(title=family.name, yticks=range(len(own)), ylim=(len(own) - 0.4, -0.6))
            ax.set_yticklabels([f"{row['worse']} / {row['better']}" for row in own])
            ax.grid(axis="x")
        for ax in panels[len(drawn) :]:
            ax.remove()
        figure.supxlabel(
            "logarithm of the ratio of the final training losses, above 0 as claimed "
            "(green: ordered, orange: the other way, black: no ordering shown)",
            fontsize=6.5,
        )
        return style.png(figure)


if __name__ == "__main__":
    main()

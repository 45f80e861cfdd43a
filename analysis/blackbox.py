"""Do tests of callables of unknown grid, and of whole gradients, hold their size, and what do they find?

Size: null runs at levels .05, .01 and .001: quantizers as callables of unknown grid, an input of one row, and the
gradient of a small network whose backward pass is quantized. Each family of tests at 64 draws alone (independence: at
16), and the verdict as the package makes it (:meth:`fqtstats.verdicts.blackbox.BlackBox.judge`), on looks at 16, 32 and
64 draws. Elements of a gradient, and of BHQ's results, depend on each other: what the tests of independence find there
is no false alarm, and they are left out. Sign flips are calibrated by permutation and take part in verdicts of three
looks at the largest level alone, as in the package (``tests/test_bias.py`` has their own size). All draws of all runs
are fresh, and of one subject only: runs are independent and are counted together.

Power: planted defects in the quantizers of a network's backward pass, on its gradient, at a false-alarm rate of 1e-6:
in how many runs 16, 32 and 64 draws find each. Eight random bits are among them because draws do not find those;
probing the quantizer does. Expected of the others is to be found in at least 80 % of the runs. ``bias`` is measured on
more draws, as the squared length of the mean error over the mean squared length of one draw's error.

Intervals are Clopper-Pearson's, 95 % each; where a sentence is about several rates, they hold together with 95 %
(Bonferroni). Those of the bias are Student's t over blocks of draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

import fqtstats
from analysis.estimates import mean_interval
from analysis.known import Known
from analysis.nulls import (
    BITS,
    FALSE_ALARM,
    LEVELS,
    POWERFUL,
    QUANTIZERS,
    RATES,
    SHAPE,
    each_size,
    pooled,
    pooled_sizes,
    power_figure,
    streams,
)
from analysis.shares import at_least, at_most, bars, told
from analysis.study import Claim, Parts, Study, Tables, main, with_interval
from fqtstats.capture.session import Session
from fqtstats.determinism import seeded, single_thread
from fqtstats.report import style
from fqtstats.schema import Column
from fqtstats.verdicts import designs
from fqtstats.verdicts.battery import LOOKS as ALL_LOOKS
from fqtstats.verdicts.battery import looks
from fqtstats.verdicts.blackbox import DRAWS, BlackBox
from fqtstats.verdicts.probe import StreamFunction

SIZE = (
    Column("subject", "str", "", "what is unbiased"),
    Column("tests", "str", "", "family of tests"),
    *RATES,
)
LOOKS = [n for n in ALL_LOOKS if n <= DRAWS]
POWER = (
    Column("defect", "str", "", "of the quantizers of the backward pass"),
    Column("runs", "int64", "1", "runs"),
    *(Column(f"found_{n}", "int64", "1", f"of them in which {n} draws find it") for n in LOOKS),
    Column("tests", "str", "", "families of tests that find it"),
    Column("bias", "float64", "1", "squared mean error over the mean squared error of one draw"),
    Column("bias_low", "float64", "1", "lower end of its 95 % interval"),
    Column("bias_high", "float64", "1", "upper end of its 95 % interval"),
)

FEATURES = 16
SAMPLES = 64
VERDICT = "the verdict"


# --- subjects ---------------------------------------------------------------------------------------------------------


@contextmanager
def gradient(
    policy: fqtstats.Policy, heavy: bool = False, seed: int = 0
) -> Iterator[tuple[StreamFunction, torch.Tensor]]:
    """The gradient of a small network's weights and biases, ``[42, 17]``, and its draws as a callable.

    Args:
        policy: of the backward pass.
        heavy: whether one sample counts thirty times, which gives the gradients that arrive at layers a tail.
        seed: of the quantizers.
    """
    with seeded(1):
        hidden = [m for _ in range(2) for m in (nn.Linear(FEATURES, FEATURES), nn.ReLU())]
        model = nn.Sequential(*hidden, nn.Linear(FEATURES, 10))
        batch = torch.randn(SAMPLES, FEATURES), torch.randint(10, (SAMPLES,))
    weights = torch.ones(SAMPLES)
    weights[3] = 30.0 if heavy else 1.0

    def loss(m: nn.Module, b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (nn.functional.cross_entropy(m(b[0]), b[1], reduction="none") * weights).mean()

    def matrix(parts: list[torch.Tensor]) -> torch.Tensor:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return torch.cat([torch.cat([weight, bias[:, None]], 1) for weight, bias in pairs])

    with fqtstats.quantized(model, policy, seed=seed) as handle, Session(model, handle, batch, loss) as session:
        # A run's seed and its draw make one index of the session's draws.
        yield lambda x, s: matrix(session.draw(s.seed * DRAWS + s.draw)), matrix(session.qat())


@contextmanager
def opaque(name: str, shape: tuple[int, ...]) -> Iterator[tuple[StreamFunction, torch.Tensor]]:
    """A quantizer on a natural input."""
    yield fqtstats.quantizer(name, bits=BITS), designs.natural(shape)


def both(q: object) -> fqtstats.Policy:
    """One quantizer for both gradients of a layer."""
    return fqtstats.Policy(grad_input=q, grad_weight=q)  # type: ignore[arg-type]


SUBJECTS: Known[Callable[[], AbstractContextManager[tuple[StreamFunction, torch.Tensor]]]] = Known(
    "quantizer",
    {
        **{name: lambda name=name: opaque(name, SHAPE) for name in QUANTIZERS},
        "psq, one row": lambda: opaque("psq", (1, 64)),
        **{
            f"gradient, {name}": lambda name=name, seed=seed: gradient(
                both(fqtstats.quantizer(name, bits=BITS)), seed=seed
            )
            for seed, name in enumerate(("psq", "bhq"))
        },
    },
)


def _grid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest element and step of each row."""
    rows = x.reshape(len(x), -1)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    return low, ((high - low) / (2**BITS - 1)).clamp(min=1e-30)


def _right(x: torch.Tensor, s: fqtstats.Stream) -> torch.Tensor:
    low, step = _grid(x)
    y = (x - low) / step
    return (y.floor() + (s.uniform(x.shape) < y - y.floor())) * step + low


def _nearest(x: torch.Tensor, s: fqtstats.Stream) -> torch.Tensor:
    low, step = _grid(x)
    return ((x - low) / step).round() * step + low


def _zero_point_rounded(x: torch.Tensor, s: fqtstats.Stream) -> torch.Tensor:
    low, step = _grid(x)
    return _right(x, s) - low + (low / step).round() * step


def _clipped(x: torch.Tensor, s: fqtstats.Stream) -> torch.Tensor:
    keep = x.numel() - max(1, x.numel() // 1000)
    limit = x.abs().reshape(-1).kthvalue(keep).values
    return _right(x.clamp(-limit, limit), s)


def _channel_scaled(x: torch.Tensor, s: fqtstats.Stream) -> torch.Tensor:
    out = _right(x, s)
    out[:, 0] *= 1.1
    return out


def _rows_pruned(x: torch.Tensor, s: fqtstats.Stream) -> torch.Tensor:
    """Keeps a row with a probability that grows with its norm, and forgets to divide by it."""
    norms = x.norm(dim=1, keepdim=True)
    return _right(x, s) * (
        s.child("kept").uniform(norms.shape) < (norms / norms.median().clamp(min=1e-30)).clamp(max=1)
    )


def _one_layer(q: Callable[[torch.Tensor, fqtstats.Stream], torch.Tensor]) -> fqtstats.Policy:
    return fqtstats.Policy(grad_input=_right, grad_weight=_right, overrides={"2": both(q)})


DEFECTS: Known[tuple[fqtstats.Policy, bool]] = Known(
    "defect",
    {
        "none": (both(_right), False),
        "none, heavy-tailed": (both(_right), True),
        "rows pruned without 1/p": (both(_rows_pruned), False),
        "zero point rounded": (both(_zero_point_rounded), False),
        **{f"{r} random bits": (both(fqtstats.quantizer("psq", bits=BITS, random_bits=r)), False) for r in (2, 4, 8)},
        "largest .1 % clipped, heavy-tailed": (both(_clipped), True),
        "a channel of one layer scaled by 1.1": (_one_layer(_channel_scaled), False),
        "one layer rounds to nearest": (_one_layer(_nearest), False),
    },
)
"""Policies of the backward pass, and whether the loss is heavy-tailed."""


@dataclass(frozen=True)
class Settings:
    """Of the study: null runs per quantizer and per gradient, runs per defect, and blocks of draws for its bias."""

    subjects: tuple[str, ...] = tuple(SUBJECTS)
    nulls: int = 500
    gradient_nulls: int = 150
    defects: tuple[str, ...] = tuple(DEFECTS)
    seeds: int = 20
    blocks: int = 12


def measure(settings: Settings, parts: Parts) -> Tables:
    """Rejections per subject, family of tests and level, and findings per defect."""

    def of_subject(subject: str) -> list[dict[str, object]]:
        with single_thread():
            return null_runs(subject, settings.gradient_nulls if "gradient" in subject else settings.nulls)

    def of_defect(defect: str) -> dict[str, object]:
        with single_thread():
            return power(defect, settings.seeds, settings.blocks)

    return {
        "size": parts.every("null runs", [{"subject": subject} for subject in settings.subjects], of_subject),
        "power": parts.every("defects", [{"defect": defect} for defect in settings.defects], of_defect),
    }


# --- size -------------------------------------------------------------------------------------------------------------


def null_runs(subject: str, runs: int) -> list[dict[str, object]]:
    """Rejections of an unbiased subject."""
    depend = "gradient" in subject or subject == "bhq"
    rejected: dict[tuple[str, float], int] = {}
    with SUBJECTS[subject]() as (f, x):
        for run in range(runs):
            made = [f(x, s) for s, _ in zip(streams(subject, run), range(DRAWS), strict=False)]
            for name, level, refused in _refusals(made, x, run, elements_depend=depend):
                rejected[name, level] = rejected.get((name, level), 0) + refused
    return [
        {"tests": name, "level": level, "runs": runs, "rejected": count} for (name, level), count in rejected.items()
    ]


def _refusals(
    made: list[torch.Tensor], x: torch.Tensor, seed: int, elements_depend: bool
) -> Iterator[tuple[str, float, bool]]:
    """Of one run's draws, what every family of tests refuses at its one look, and what the verdict does."""

    def box() -> BlackBox:
        return BlackBox(lambda x, s: made[s.draw], x, seed)

    families: dict[str, float] = {}
    of_families, all_streams = box(), streams("", seed)
    for draws in looks(of_families, all_streams, DRAWS):
        if draws in (LOOKS[0], DRAWS):
            families.update({f.family: f.p_value for f in of_families.look(FALSE_ALARM)})
    for level in LEVELS:
        for family, p in families.items():
            if family != "independence" or not elements_depend:
                yield family, level, p <= level
        judged = box().judge(streams("", seed), DRAWS, level)
        dependent = judged.dependence is not None and not elements_depend
        yield VERDICT, level, judged.bias is not None or dependent


# --- power ------------------------------------------------------------------------------------------------------------


def power(defect: str, seeds: int, blocks: int) -> dict[str, object]:
    """In how many runs a defect is found, and how large its bias is."""
    policy, heavy = DEFECTS[defect]
    with gradient(policy, heavy) as (f, x):
        findings = [BlackBox(f, x, seed).judge(streams("", seed), DRAWS, FALSE_ALARM).bias for seed in range(seeds)]
        bias = bias_share(f, x, seeds, blocks)
    found = [finding for finding in findings if finding is not None]
    return {
        "runs": seeds,
        **{f"found_{draws}": sum(finding.draws <= draws for finding in found) for draws in LOOKS},
        "tests": ", ".join(sorted({finding.family for finding in found})),
        **dict(zip(("bias", "bias_low", "bias_high"), bias, strict=True)),
    }


def bias_share(f: StreamFunction, x: torch.Tensor, first: int, blocks: int) -> tuple[float, float, float]:
    """Squared length of the mean error over the mean squared length of one, without bias, with its 95 % interval.

    Args:
        f: the callable.
        x: its input.
        first: seed of the streams of the first block of draws.
        blocks: of as many draws as a verdict takes.
    """
    squares, noise = [], 0.0
    for block in range(blocks):
        e = torch.stack(
            [(f(x, s) - x).double() for s, _ in zip(streams("", first + block), range(DRAWS), strict=False)]
        )
        own = float(e.square().sum())
        # The sum over pairs of different draws: their products have the squared bias as mean.
        squares.append((float(e.sum(0).square().sum()) - own) / (DRAWS * (DRAWS - 1)))
        noise += own / DRAWS / blocks
    mean, low, high = mean_interval(squares)
    return mean / noise, low / noise, high / noise


# --- what is said of it -----------------------------------------------------------------------------------------------

BY_PROBING = ("8 random bits",)
"""What draws are not expected to find."""


def read(tables: Tables) -> pd.DataFrame:
    """A row per subject, family of tests and level, and one per defect."""
    shown = [
        {
            "subject or defect": row.subject,
            "tests": row.tests,
            "level": f"{row.level:g}",
            "runs": str(row.runs),
            "share refused": told(row.rejected, row.runs),
            "bias": "",
        }
        for row in tables["size"].itertuples()
    ]
    shown += [
        {
            "subject or defect": row.defect,
            "tests": VERDICT,
            "level": f"{FALSE_ALARM:g}",
            "runs": str(row.runs),
            "share refused": told(row.found_64, row.runs),
            "bias": with_interval(row.bias, row.bias_low, row.bias_high, ".2g"),
        }
        for row in tables["power"].itertuples()
    ]
    return pd.DataFrame(shown)


def claims(tables: Tables) -> list[Claim]:
    """Sizes of the verdict and of all tests; what is found, and what is not."""
    size, power = tables["size"], tables["power"]
    verdict = size["tests"] == VERDICT
    answer = [
        *pooled_sizes(size[verdict], VERDICT, "subjects"),
        *pooled_sizes(size[~verdict], "families of tests alone", "subjects", by="tests"),
        each_size(size[verdict], "The verdict on subjects", ["subject"]),
    ]
    sound = power["defect"].str.startswith("none")
    runs, refused = int(power.loc[sound, "runs"].sum()), int(power.loc[sound, f"found_{DRAWS}"].sum())
    answer.append(
        Claim(
            f"Unbiased gradients at a false-alarm rate of {FALSE_ALARM:g}: {refused} of {runs} runs are refused, a "
            f"share of {told(refused, runs)}{'' if refused else '; so few runs cannot show that rate'}.",
            at_most(refused, runs, FALSE_ALARM),
        )
    )
    expected = power[~sound & ~power["defect"].isin(BY_PROBING)]
    always = expected[expected[f"found_{DRAWS}"] == expected["runs"]]
    for row in power[~sound].itertuples():
        text = f"{row.defect}: {DRAWS} draws find it in {row.found_64} of {row.runs} runs, a share of "
        text += told(row.found_64, row.runs)
        if row.defect in BY_PROBING:
            answer.append(Claim(f"{text}; probing the quantizer is what finds it."))
            continue
        found = at_least(row.found_64, row.runs, POWERFUL)
        why = ""
        if found is False:
            why = "its squared bias is a share of "
            why += with_interval(row.bias, row.bias_low, row.bias_high, ".2g")
            why += " of the squared error of one draw"
            if len(always):
                least = always.loc[always["bias"].idxmin()]
                why += "; of those found in all runs the least has "
                why += with_interval(least["bias"], least["bias_low"], least["bias_high"], ".2g")
                why += f" ({least['defect']})"
        answer.append(Claim(f"{text} (expected: at least {POWERFUL:g}).", found, why))
    return answer


def draw(tables: Tables) -> dict[str, Figure]:
    """Rates of false alarms by family of tests; shares of runs that find each defect."""
    return {"size": _size(tables["size"]), "power": power_figure(tables["power"], LOOKS)}


ALL = "all together"


def _size(table: pd.DataFrame) -> Figure:
    subjects = [*dict.fromkeys(table["subject"]), ALL]
    families = list(dict.fromkeys(table["tests"]))
    figure = style.new_figure(style.COLUMN_WIDTH, 0.3 * len(subjects) + 0.8)
    panels = figure.subplots(1, len(LEVELS), sharey=True)
    colors = (style.BLUE, style.ORANGE, style.PURPLE, style.INK)
    for ax, level in zip(panels, LEVELS, strict=True):
        for index, (tests, color, marker) in enumerate(zip(families, colors, "o^vs", strict=False)):
            own = table[(table["level"] == level) & (table["tests"] == tests)]
            places = [subjects.index(subject) + 0.18 * (index - 1.5) for subject in (*own["subject"], ALL)]
            rejected, runs = pooled(own)
            counts = [*own["rejected"], rejected], [*own["runs"], runs]
            bars(ax, places, *counts, color, marker, tests, unit=level)
        ax.axvline(1, color=style.GREY, linestyle="--", linewidth=0.8)
        ax.axhline(len(subjects) - 1.5, color=style.GREY, linewidth=0.5)
        ax.set(title=f"level {level:g}")
        ax.set_xlim(left=-0.05 * ax.get_xlim()[1])
        ax.grid(True, axis="x")
    panels[0].set_yticks(range(len(subjects)), subjects)
    panels[0].set_ylim(len(subjects) - 0.5, -0.5)
    figure.supxlabel("rate of false alarms / level (95 % each)", fontsize=6.5)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


STUDY = Study(
    name="blackbox",
    question="Do tests of callables of unknown grid, and of whole gradients, hold their size, and what do they find?",
    full=Settings(),
    quick=Settings(("psq",), nulls=20, defects=("none", "rows pruned without 1/p"), seeds=2, blocks=2),
    columns={"size": SIZE, "power": POWER},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Shares of runs with 95 % intervals, each (Clopper-Pearson). Subjects at levels .05 to .001 are unbiased: "
    "these are rates of false alarms. At 1e-6 they are what 64 draws find in the gradient of a defective backward "
    "pass, whose bias is its squared length over the mean squared error of one draw.",
)

if __name__ == "__main__":
    main(STUDY)

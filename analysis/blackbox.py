"""Do tests of callables of unknown grid, and of whole gradients, hold their size, and what do they find?

Size: null runs at levels .01 and .001: quantizers as callables of unknown grid, an input of one row, and the gradient
of a small network whose backward pass is quantized. Each family of tests at 64 draws alone, and the verdict as it is
made, on looks at 16, 32 and 64 draws. Elements of a gradient, and of BHQ's results, depend on each other: what the
tests of independence find there is no false alarm, and they are left out. Sign flips are calibrated by permutation and
take no part in verdicts of three looks at these levels (``tests/test_bias.py`` has their size). The runs' draws are
taken from a pool: runs of one round through it share none, and each round shuffles it anew.

Power: planted defects in the quantizers of a network's backward pass, on its gradient, at a false-alarm rate of 1e-6:
in how many runs 32 and 64 draws find each. Eight random bits are among them because draws do not find those; probing
the quantizer does.

Intervals are Clopper-Pearson's, 95 % each; where a sentence is about several rates, they hold together with 95 %
(Bonferroni).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

import fqtstats
from analysis.shares import bars, share, told
from analysis.study import Claim, Parts, Study, Tables, main
from fqtstats.capture.session import Session
from fqtstats.determinism import seeded, single_thread
from fqtstats.report import style
from fqtstats.schema import Column
from fqtstats.verdicts import designs
from fqtstats.verdicts.battery import LOOKS as ALL_LOOKS
from fqtstats.verdicts.blackbox import DRAWS, FAMILIES, BlackBox
from fqtstats.verdicts.probe import StreamFunction

SIZE = (
    Column("subject", "str", "", "what is unbiased"),
    Column("tests", "str", "", "family of tests"),
    Column("level", "float64", "1", "nominal rate of false alarms"),
    Column("runs", "int64", "1", "null runs"),
    Column("rejected", "int64", "1", "of them"),
)
POWER = (
    Column("defect", "str", "", "of the quantizers of the backward pass"),
    Column("runs", "int64", "1", "runs"),
    Column("found_32", "int64", "1", "of them in which 32 draws find it"),
    Column("found_64", "int64", "1", "of them in which 64 draws find it"),
    Column("tests", "str", "", "families of tests that find it"),
)

QUANTIZERS = ("ptq", "psq", "pcq", "bhq")
BITS = 4
LOOKS = [n for n in ALL_LOOKS if n <= DRAWS]
SHAPE = (16, 64)
FEATURES = 16
SAMPLES = 64
LEVELS = (0.01, 0.001)
FALSE_ALARM = 1e-6


# --- subjects ---------------------------------------------------------------------------------------------------------


@contextmanager
def gradient(policy: fqtstats.Policy, heavy: bool = False) -> Iterator[tuple[StreamFunction, torch.Tensor]]:
    """The gradient of a small network's weights and biases, ``[42, 17]``, and its draws as a callable.

    Args:
        policy: of the backward pass.
        heavy: whether one sample counts thirty times, which gives the gradients that arrive at layers a tail.
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

    with fqtstats.quantized(model, policy, seed=0) as handle, Session(model, handle, batch, loss) as session:
        # A run's seed and its draw make one index of the session's draws.
        yield lambda x, s: matrix(session.draw(s.seed * DRAWS + s.draw)), matrix(session.qat())


@contextmanager
def opaque(name: str, shape: tuple[int, ...]) -> Iterator[tuple[StreamFunction, torch.Tensor]]:
    """A quantizer on a natural input."""
    yield fqtstats.quantizer(name, bits=BITS), designs.natural(shape)


def both(q: object) -> fqtstats.Policy:
    """One quantizer for both gradients of a layer."""
    return fqtstats.Policy(grad_input=q, grad_weight=q)  # type: ignore[arg-type]


SUBJECTS: dict[str, Callable[[], AbstractContextManager[tuple[StreamFunction, torch.Tensor]]]] = {
    **{name: lambda name=name: opaque(name, SHAPE) for name in QUANTIZERS},
    "psq, one row": lambda: opaque("psq", (1, 64)),
    **{
        f"gradient, {name}": lambda name=name: gradient(both(fqtstats.quantizer(name, bits=BITS)))
        for name in ("psq", "bhq")
    },
}


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


DEFECTS: dict[str, tuple[fqtstats.Policy, bool]] = {
    "none": (both(_right), False),
    "none, heavy-tailed": (both(_right), True),
    "rows pruned without 1/p": (both(_rows_pruned), False),
    "zero point rounded": (both(_zero_point_rounded), False),
    **{f"{r} random bits": (both(fqtstats.quantizer("psq", bits=BITS, random_bits=r)), False) for r in (2, 4, 8)},
    "largest .1 % clipped, heavy-tailed": (both(_clipped), True),
    "a channel of one layer scaled by 1.1": (_one_layer(_channel_scaled), False),
    "one layer rounds to nearest": (_one_layer(_nearest), False),
}
"""Policies of the backward pass, and whether the loss is heavy-tailed."""


@dataclass(frozen=True)
class Settings:
    """Of the study: null runs per subject, draws in the pool that they are made of, and runs per defect."""

    subjects: tuple[str, ...] = tuple(SUBJECTS)
    nulls: int = 2000
    pool: int = 8192
    defects: tuple[str, ...] = tuple(DEFECTS)
    seeds: int = 20


def measure(settings: Settings, parts: Parts) -> Tables:
    """Rejections per subject, family of tests and level, and findings per defect."""

    def of_subject(subject: str) -> list[dict[str, object]]:
        with single_thread():
            return null_runs(subject, settings.nulls, settings.pool)

    def of_defect(defect: str) -> dict[str, object]:
        with single_thread():
            return power(defect, settings.seeds)

    return {
        "size": parts.every("null runs", [{"subject": subject} for subject in settings.subjects], of_subject),
        "power": parts.every("defects", [{"defect": defect} for defect in settings.defects], of_defect),
    }


# --- size -------------------------------------------------------------------------------------------------------------


def null_runs(subject: str, runs: int, pool: int) -> list[dict[str, object]]:
    """Rejections of an unbiased subject."""
    with SUBJECTS[subject]() as (f, x):
        kept = torch.stack([f(x, fqtstats.stream(draw=draw)) for draw in range(pool)])
    depend = "gradient" in subject or subject == "bhq"
    found = [_p_values(_again(kept, seed), x, seed, elements_depend=depend) for seed in range(runs)]
    return [
        {"tests": tests, "level": level, "runs": runs, "rejected": sum(p[tests] <= level for p in found)}
        for tests in found[0]
        for level in LEVELS
    ]


def _again(kept: torch.Tensor, run: int) -> StreamFunction:
    """Draws that were made before. Runs of one round through the pool share none, and each round shuffles it anew."""
    turn, place = divmod(run, len(kept) // DRAWS)
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(turn))[place * DRAWS :]
    return lambda x, s: kept[order[s.draw]]


def _p_values(f: StreamFunction, x: torch.Tensor, seed: int, elements_depend: bool) -> dict[str, float]:
    """Of each family at the last look (independence: at the only one), and of the whole verdict."""
    box = BlackBox(f, x, seed)
    families: dict[str, float] = {}
    verdict = 1.0
    for look in LOOKS:
        while box.draws < look:
            box.draw(fqtstats.stream(seed=seed, draw=box.draws))
        for finding in box.look(FALSE_ALARM):
            if finding.about_independence and elements_depend:
                continue
            families[finding.family] = finding.p_value
            verdict = min(verdict, finding.p_value)
    return {**families, "the verdict": min(1.0, verdict * len(LOOKS) * FAMILIES)}


# --- power ------------------------------------------------------------------------------------------------------------


def power(defect: str, seeds: int) -> dict[str, object]:
    """In how many runs a defect is found."""
    policy, heavy = DEFECTS[defect]
    level = FALSE_ALARM / (len(LOOKS) * FAMILIES)
    with gradient(policy, heavy) as (f, x):
        found = [_found_after(f, x, seed, level) for seed in range(seeds)]
    return {
        "runs": seeds,
        **{f"found_{draws}": sum(after <= draws for after, _ in found) for draws in (32, 64)},
        "tests": ", ".join(sorted(set().union(*(families for _, families in found)))),
    }


def _found_after(f: StreamFunction, x: torch.Tensor, seed: int, level: float) -> tuple[float, set[str]]:
    box = BlackBox(f, x, seed)
    for look in LOOKS:
        while box.draws < look:
            box.draw(fqtstats.stream(seed=seed, draw=box.draws))
        families = {f.family for f in box.look(level) if f.p_value < level and not f.about_independence}
        if families:
            return look, families
    return np.inf, set()


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
            "share refused": told(row.rejected, row.runs),
        }
        for row in tables["size"].itertuples()
    ]
    shown += [
        {
            "subject or defect": row.defect,
            "tests": "the verdict",
            "level": f"{FALSE_ALARM:g}",
            "share refused": told(row.found_64, row.runs),
        }
        for row in tables["power"].itertuples()
    ]
    return pd.DataFrame(shown)


def claims(tables: Tables) -> list[Claim]:
    """Sizes of all tests and of the verdict; what is found, and what is not."""
    size, answer = tables["size"], []
    for verdict, who in ((True, "the verdict"), (False, "a single family of tests")):
        for level, own in size[(size["tests"] == "the verdict") == verdict].groupby("level", sort=False):
            n = len(own)
            worst = own.loc[(own["rejected"] / own["runs"]).idxmax()]
            within = all(share(row.rejected, row.runs, n)[1] <= level for row in own.itertuples())
            answer.append(
                Claim(
                    f"At level {level:g}, {who} refuses a share of at most "
                    f"{told(worst['rejected'], worst['runs'], n)} of {worst['runs']} null runs ({worst['subject']}"
                    f"{'' if verdict else ', ' + worst['tests']}); {'no' if within else 'an'} interval of {n} lies "
                    "above the level (95 % together, Bonferroni).",
                    bool(within),
                )
            )
    power = tables["power"]
    sound = power["defect"].str.startswith("none")
    for row in power[sound].itertuples():
        low = share(row.found_64, row.runs)[1]
        answer.append(
            Claim(
                f"Unbiased gradient ({row.defect}): refused in {row.found_64} of {row.runs} runs, a share of "
                f"{told(row.found_64, row.runs)}, at a false-alarm rate of {FALSE_ALARM:g}.",
                low <= FALSE_ALARM,
            )
        )
    for row in power[~sound].itertuples():
        text = f"{row.defect}: 64 draws find it in {row.found_64} of {row.runs} runs, a share of "
        text += f"{told(row.found_64, row.runs)}"
        if row.defect in BY_PROBING:
            answer.append(Claim(f"{text}; probing the quantizer is what finds it."))
        else:
            answer.append(Claim(f"{text}.", bool(row.found_64 == row.runs)))
    return answer


def draw(tables: Tables) -> dict[str, Figure]:
    """Rates of false alarms by family of tests; shares of runs that find each defect."""
    return {"size": _size(tables["size"]), "power": _power(tables["power"])}


def _size(table: pd.DataFrame) -> Figure:
    subjects = list(dict.fromkeys(table["subject"]))
    families = list(dict.fromkeys(table["tests"]))
    figure = style.new_figure(style.COLUMN_WIDTH, 0.3 * len(subjects) + 0.8)
    panels = figure.subplots(1, len(LEVELS), sharey=True)
    colors = ("#0072B2", "#E69F00", "#CC79A7", "#222222")
    for ax, level in zip(panels, LEVELS, strict=True):
        for index, (tests, color, marker) in enumerate(zip(families, colors, "o^vs", strict=False)):
            own = table[(table["level"] == level) & (table["tests"] == tests)]
            place = own["subject"].map(subjects.index) + 0.18 * (index - 1.5)
            bars(ax, list(place), list(own["rejected"]), list(own["runs"]), color, marker, tests)
        ax.axvline(level, color=style.GREY, linestyle="--", linewidth=0.8)
        ax.set(title=f"level {level:g}")
        ax.set_xlim(left=-0.05 * level)
        ax.grid(True, axis="x")
    panels[0].set_yticks(range(len(subjects)), subjects)
    panels[0].invert_yaxis()
    figure.supxlabel("rate of false alarms (95 %)", fontsize=6.5)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _power(table: pd.DataFrame) -> Figure:
    figure = style.new_figure(style.COLUMN_WIDTH, 0.2 * len(table) + 0.7)
    ax = figure.subplots()
    for draws, shift, color, marker in ((32, -0.15, "#56B4E9", "^"), (64, 0.15, "#0072B2", "o")):
        places = [place + shift for place in range(len(table))]
        bars(ax, places, list(table[f"found_{draws}"]), list(table["runs"]), color, marker, f"{draws} draws")
    ax.set(xlim=(-0.06, 1.06), xlabel="share of runs that find it (95 %)")
    ax.set_yticks(range(len(table)), table["defect"])
    ax.invert_yaxis()
    ax.grid(True, axis="x")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


STUDY = Study(
    name="blackbox",
    question="Do tests of callables of unknown grid, and of whole gradients, hold their size, and what do they find?",
    full=Settings(),
    quick=Settings(("psq",), nulls=20, pool=256, defects=("none", "rows pruned without 1/p"), seeds=1),
    columns={"size": SIZE, "power": POWER},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Shares of runs with 95 % intervals (Clopper-Pearson). Subjects at levels .01 and .001 are unbiased, and "
    "these are rates of false alarms; at 1e-6 they are what 64 draws find in the gradient of a defective backward "
    "pass.",
)

if __name__ == "__main__":
    main(STUDY)

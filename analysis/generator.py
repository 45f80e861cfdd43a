"""Do the random words look random, by standard tests, within streams and across them?

Every test runs on several families of 32-bit words. A family is either one stream read along its elements, or the first
words of many streams whose keys differ in one part only; the latter is how training uses the generator. The last
families are controls with a defect, which the tests have to refuse.

Each test splits its words into blocks and computes a p-value for each: uniform on [0, 1], up to the error of its limit
law, if the words are independent and uniform. The row's p-value is that of a Kolmogorov-Smirnov test of the blocks'
p-values against the uniform law, so that too good a fit counts as well as too bad a one. ``alarm`` is set where it is
below 1e-6 over the number of rows (Bonferroni): at most one study in a million raises one by chance.

Tests: frequency of ones, runs, serial pairs, birthday spacings, rank of binary matrices, spectral, and
autocorrelation. Sources: A. Rukhin et al., NIST SP 800-22 rev. 1a (2010), sections 2.1, 2.3 and 2.5; D. Knuth, The Art
of Computer Programming, volume 2, section 3.3.2 (serial test); G. Marsaglia and W. Tsang, "Some difficult-to-pass tests
of randomness", JSS 7 (2002) (birthday spacings).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.stats
from matplotlib.figure import Figure

from analysis.known import Known
from analysis.study import Claim, Parts, Study, Tables, main
from fqtstats.random import Stream, key_words, stream
from fqtstats.report import style
from fqtstats.schema import Column

COLUMNS = (
    Column("family", "str", "", "which words"),
    Column("test", "str", "", "which test"),
    Column("blocks", "int64", "1", "number of blocks"),
    Column("words", "int64", "1", "in a block"),
    Column("smallest", "float64", "1", "smallest p-value of a block"),
    Column("p_value", "float64", "1", "of the blocks' p-values against the uniform law"),
    Column("control", "bool", "", "whether the words have a defect"),
    Column("alarm", "bool", "", "whether p_value is below 1e-6 over the number of rows"),
)

FALSE_ALARM = 1e-6

Words = npt.NDArray[np.uint32]
Shape = tuple[int, int]
"""Number of blocks, and of words in a block."""


# --- words ------------------------------------------------------------------------------------------------------------


def within(shape: Shape) -> Words:
    """One stream, along its elements."""
    return _numbers(stream(seed=1), shape[0] * shape[1]).reshape(shape)


def half_words(shape: Shape) -> Words:
    """One stream of 16 bits per element, in pairs: the words of :func:`within` in another order."""
    halves = stream(seed=1).bits(2 * shape[0] * shape[1], 16).numpy().astype(np.uint16)
    return halves.view(np.uint32).reshape(shape)


def key_hashes(shape: Shape) -> Words:
    """The keys' own words, of consecutive draws."""
    keys = [key_words(stream(seed=2, draw=draw)) for draw in range(shape[0] * shape[1] // 4)]
    return np.array(keys, np.uint32).reshape(shape)


def across(part: str, shape: Shape) -> Words:
    """16 consecutive words of each of consecutive streams, interleaved: neighbours differ in one part of the key."""
    each = 16
    streams = shape[1] // each
    rows = [
        np.stack([_numbers(_changed(part, block * streams + i), each) for i in range(streams)], axis=1)
        for block in range(shape[0])
    ]
    return np.stack([row.reshape(-1) for row in rows])


def _changed(part: str, index: int) -> Stream:
    if part == "path":
        return stream(seed=3).child(str(index))
    value = f"layers.{index}" if part in ("layer", "site") else index
    return stream(**{"seed": 3, part: value})  # type: ignore[arg-type]


def _numbers(s: Stream, n: int) -> Words:
    return s.bits(n, 32).numpy().astype(np.uint32)


def biased(shape: Shape) -> Words:
    """A control: the lowest two bits of every 16th word are set."""
    words = within(shape)
    words[:, ::16] |= np.uint32(3)
    return words


def reused(shape: Shape) -> Words:
    """A control: the second half of every block repeats the first."""
    words = within(shape)
    half = shape[1] // 2
    words[:, half:] = words[:, :half]
    return words


def congruential(shape: Shape) -> Words:
    """A control: a linear congruential generator modulo 2^32, whose low bits have short periods."""
    n = shape[0] * shape[1]
    states = accumulate(range(n - 1), lambda x, _: (1664525 * x + 1013904223) % 2**32, initial=12345)
    return np.fromiter(states, np.uint32, n).reshape(shape)


PARTS = ("seed", "step", "layer", "site", "draw", "call", "replica", "path")
FAMILIES: dict[str, Callable[[Shape], Words]] = {
    "within a stream": within,
    "within a stream, 16 bits": half_words,
    "key words": key_hashes,
    **{f"across {part}": partial(across, part) for part in PARTS},
}
CONTROLS: dict[str, Callable[[Shape], Words]] = {
    "control: biased bits": biased,
    "control: reused": reused,
    "control: congruential": congruential,
}


# --- tests: words of a block -> p-value -------------------------------------------------------------------------------


def monobit(words: Words) -> float:
    """Number of ones; normal limit."""
    bits = words.size * 32
    ones = int(_bits(words).sum(dtype=np.int64))
    return float(scipy.stats.chi2.sf((2 * ones - bits) ** 2 / bits, 1))


def runs(words: Words) -> float:
    """Number of runs of equal bits, given the number of ones."""
    bits = _bits(words)
    n, share = bits.size, float(bits.mean())
    changes = int((bits[1:] != bits[:-1]).sum()) + 1
    mean = 2 * n * share * (1 - share)
    z = (changes - mean) / (2 * np.sqrt(n) * share * (1 - share))
    return float(2 * scipy.stats.norm.sf(abs(z)))


def serial(words: Words) -> float:
    """The top 6 bits of pairs of consecutive words (not overlapping), 4096 cells; chi-square."""
    top = (words >> 26).astype(np.int64)
    counts = np.bincount(64 * top[::2] + top[1::2], minlength=4096)
    return _chi_square(counts, np.full(4096, top.size / 2 / 4096))


def birthdays(words: Words) -> float:
    """Repeated spacings of n = 512 birthdays in a year of m = 2^24 days, a set of words after the other.

    The number per set is Poisson in the limit: n - 1 spacings make (n - 1)(n - 2) / 2 pairs, each of which is equal
    with probability n / 2m. Its p-value is spread over the atom by a fixed generator, and is then uniform.
    """
    n, m = 512, 2**24
    days = (words >> 8).astype(np.int64).reshape(-1, n)
    spacings = np.sort(np.diff(np.sort(days, axis=1), axis=1), axis=1)
    repeated = int((spacings[:, 1:] == spacings[:, :-1]).sum())
    law = scipy.stats.poisson(len(days) * (n - 1) * (n - 2) / 2 * n / (2 * m))
    u = np.random.default_rng([int(words[0]), int(words[-1])]).uniform()
    return float(law.sf(repeated) + u * law.pmf(repeated))


def rank(words: Words) -> float:
    """Ranks of 32 x 32 binary matrices: 32, 31, or less; chi-square with 2 degrees of freedom.

    A matrix holds one of the 32 bits of 1024 consecutive words, so that weak low bits cannot hide behind the others.
    """
    bits = words.reshape(-1, 1, 32, 32) >> np.arange(32, dtype=np.uint32).reshape(-1, 1, 1) & np.uint32(1)
    matrices = (bits << np.arange(32, dtype=np.uint32)).sum(-1, dtype=np.uint32).reshape(-1, 32)
    ranks = np.zeros(len(matrices), np.int64)
    everyone = np.arange(len(matrices))
    for bit in range(32):
        mask = (matrices >> np.uint32(bit)) & np.uint32(1)
        candidates = mask.astype(bool) & (np.arange(32) >= ranks[:, None])
        found = candidates.any(axis=1)
        who, place = everyone[found], candidates.argmax(axis=1)[found]
        top = ranks[found]
        pivot = matrices[who, place]
        matrices[who, place] = matrices[who, top]
        matrices[who, top] = pivot
        below = np.arange(32) > top[:, None]
        has = ((matrices[who] >> np.uint32(bit)) & np.uint32(1)).astype(bool) & below
        matrices[who] ^= np.where(has, pivot[:, None], np.uint32(0))
        ranks[found] += 1
    law = np.array([_rank_probability(32), _rank_probability(31), 0])
    law[2] = 1 - law.sum()
    counts = np.array([(ranks == 32).sum(), (ranks == 31).sum(), (ranks < 31).sum()])
    return _chi_square(counts, law * len(matrices))


def _rank_probability(r: int, n: int = 32) -> float:
    """That a random binary matrix ``n x n`` has rank ``r``."""
    i = np.arange(r)
    return float(2.0 ** (r * (2 * n - r) - n * n) * np.prod((1 - 2.0 ** (i - n)) ** 2 / (1 - 2.0 ** (i - r))))


def spectral(words: Words) -> float:
    """The largest of the periodogram's ordinates, which are exponential in the limit."""
    centred = words / 2.0**32 - 0.5 + 2.0**-33
    power = np.abs(np.fft.rfft(centred)[1:-1]) ** 2 / (centred.size / 12)
    return float(-np.expm1(power.size * np.log1p(-np.exp(-power.max()))))


def autocorrelation(words: Words) -> float:
    """Squared correlations at lags 1 to 64 and of tiles (128 to 1024), summed; chi-square."""
    centred = words / 2.0**32 - 0.5 + 2.0**-33
    lags = [*range(1, 65), *range(128, 1025, 64)]
    z = [12 * float(centred[lag:] @ centred[:-lag]) / np.sqrt(centred.size - lag) for lag in lags]
    return float(scipy.stats.chi2.sf(np.square(z).sum(), len(lags)))


def _bits(words: Words) -> npt.NDArray[np.uint8]:
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8))


def _chi_square(counts: npt.NDArray[np.int64], expected: npt.NDArray[np.float64]) -> float:
    return float(scipy.stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), counts.size - 1))


TESTS: dict[str, Callable[[Words], float]] = {
    "monobit": monobit,
    "runs": runs,
    "serial pairs": serial,
    "birthday spacings": birthdays,
    "matrix rank": rank,
    "spectral": spectral,
    "autocorrelation": autocorrelation,
}


EVERY = Known("family", {**FAMILIES, **CONTROLS})


@dataclass(frozen=True)
class Settings:
    """Of the study; the controls are always among the words."""

    families: tuple[str, ...] = tuple(FAMILIES)
    blocks: int = 32
    words: int = 2**16


def measure(settings: Settings, parts: Parts) -> Tables:
    """One row per family and test."""

    def of_family(family: str) -> Iterator[dict[str, object]]:
        blocks = EVERY[family]((settings.blocks, settings.words))
        for test, f in TESTS.items():
            found = np.array([f(block) for block in blocks])
            yield {
                "test": test,
                "blocks": settings.blocks,
                "words": settings.words,
                "smallest": found.min(),
                "p_value": scipy.stats.kstest(found, "uniform").pvalue,
                "control": family in CONTROLS,
            }

    table = parts.every("families", [{"family": family} for family in (*settings.families, *CONTROLS)], of_family)
    return {"tests": table.assign(alarm=table["p_value"] < FALSE_ALARM / len(table))}


# --- what is said of it -----------------------------------------------------------------------------------------------


def read(tables: Tables) -> pd.DataFrame:
    """P-values, a row per family and a column per test; alarms have an exclamation mark."""
    shown = []
    for family, own in tables["tests"].groupby("family", sort=False):
        shown.append({"words": family, **{_SHORT[row.test]: _told(row.p_value, row.alarm) for row in own.itertuples()}})
    return pd.DataFrame(shown)


_SHORT = {
    **{test: test for test in TESTS},
    "serial pairs": "serial",
    "birthday spacings": "birthdays",
    "matrix rank": "rank",
    "autocorrelation": "lags",
}


def _told(p: float, alarm: bool) -> str:
    number = f"{p:.2f}" if p >= 0.01 else f"{p:.0e}" if p > 0 else "0"
    return f"{number}{'!' if alarm else ''}"


def claims(tables: Tables) -> list[Claim]:
    """Whether anything was found, and whether the controls were."""
    table = tables["tests"]
    ours, controls = table[~table["control"]], table[table["control"]]
    least = ours.loc[ours["p_value"].idxmin()]
    refused = {family: list(own[own["alarm"]]["test"]) for family, own in controls.groupby("family", sort=False)}
    how = "; ".join(
        f"{family.removeprefix('control: ')} by {', '.join(tests) if tests else 'none'}"
        for family, tests in refused.items()
    )
    uniform = scipy.stats.kstest(ours["p_value"], "uniform").pvalue
    return [
        Claim(
            f"{int(ours['alarm'].sum())} of {len(ours)} tests refuse the generator's words (false-alarm rate 1e-6 over "
            f"all {len(table)} rows together, Bonferroni: p < {FALSE_ALARM / len(table):.2g}); the smallest p-value is "
            f"{least['p_value']:.2g} ({least['family']}, {least['test']}).",
            not ours["alarm"].any(),
        ),
        Claim(
            f"{sum(map(bool, refused.values()))} of {len(refused)} controls are refused at the same rate: {how}.",
            all(refused.values()),
        ),
        Claim(
            f"The p-values of the {len(ours)} tests of the generator's words agree with the uniform law: p = "
            f"{uniform:.2g} (Kolmogorov-Smirnov; not exact, as tests of one family share their words)."
        ),
    ]


_SMALLEST = 1e-12  # p-values below are drawn here


def draw(tables: Tables) -> dict[str, Figure]:
    """All p-values; those of the generator's words against the uniform law."""
    return {"p_values": _p_values(tables["tests"]), "uniform": _uniform(tables["tests"])}


def _p_values(table: pd.DataFrame) -> Figure:
    families = list(dict.fromkeys(table["family"]))
    figure = style.new_figure(style.COLUMN_WIDTH, 0.19 * len(families) + 1.0)
    ax = figure.subplots()
    colors = (style.VERMILION, style.ORANGE, style.BLUE, style.GREEN, style.PURPLE, style.SKY, style.INK)
    tests = table.groupby("test", sort=False)
    for (test, own), color, marker, shift in zip(tests, colors, "s^oDvpX", np.linspace(-0.3, 0.3, 7), strict=True):
        height = own["family"].map(families.index) + shift
        ax.plot(own["p_value"].clip(lower=_SMALLEST), height, marker, color=color, markersize=2.2, label=test)
    ax.axvline(FALSE_ALARM / len(table), color=style.INK, linestyle="--", linewidth=0.8, label="alarm below")
    ax.set(xscale="log", xlim=(_SMALLEST / 3, 3), xlabel=f"p-value (smaller ones at {_SMALLEST:g})")
    ax.set_yticks(range(len(families)), families)
    ax.invert_yaxis()
    ax.set_yticks(np.arange(len(families) + 1) - 0.5, minor=True)
    ax.tick_params(axis="y", which="minor", length=0)
    ax.grid(True, axis="x")
    ax.grid(True, axis="y", which="minor")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _uniform(table: pd.DataFrame) -> Figure:
    """Sorted p-values over their ranks, with the 95 % band of each one's order statistic."""
    values = np.sort(table[~table["control"]]["p_value"])
    n = len(values)
    ranks = np.arange(1, n + 1)
    expected = ranks / (n + 1)
    low, high = scipy.stats.beta.ppf([[0.025], [0.975]], ranks, n + 1 - ranks)
    figure = style.new_figure(style.COLUMN_WIDTH, 2.4)
    ax = figure.subplots()
    ax.fill_between(
        expected, low, high, color=style.tint(style.BLUE, 0.2), linewidth=0, label="95 % of each, if independent"
    )
    ax.plot((0, 1), (0, 1), color=style.GREY, linewidth=0.8)
    ax.plot(expected, values, "o", markersize=2, color=style.BLUE, label=f"p-values of {n} tests")
    ax.set(xlabel="uniform law", ylabel="p-value", xlim=(0, 1), ylim=(0, 1))
    ax.grid(True)
    ax.legend(loc="upper left")
    return figure


STUDY = Study(
    name="generator",
    question="Do the random words look random, within streams and across them?",
    full=Settings(),
    quick=Settings(("within a stream", "across step"), blocks=16, words=2**15),
    columns={"tests": COLUMNS},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="P-values of Kolmogorov-Smirnov tests of the blocks' p-values against the uniform law; !: below 1e-6 over "
    "the number of rows (Bonferroni). serial: of pairs; rank: of binary matrices; lags: autocorrelation.",
)

if __name__ == "__main__":
    main(STUDY)

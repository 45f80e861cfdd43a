"""Do the random words look random? A battery of standard tests, within streams and across them.

``python -m analysis.generator`` runs every test on several families of 32-bit words and saves one row per test and
family, and a table. A family is either one stream read along its elements, or the first words of many streams whose
keys differ in one part only; the latter is how training uses the generator. The last families are controls with a
defect, which the battery has to refuse.

Each test splits its words into ``BLOCKS`` blocks and computes a p-value for each: uniform on [0, 1], up to the error of
its limit law, if the words are independent and uniform. The row's p-value is that of a Kolmogorov-Smirnov test of the
blocks' p-values against the uniform law, so that too good a fit counts as well as too bad a one. ``alarm`` is set
where it is below 1e-6 over the number of rows.

Tests: frequency of ones, runs, serial pairs, birthday spacings, rank of binary matrices, spectral, and
autocorrelation. Sources: A. Rukhin et al., NIST SP 800-22 rev. 1a (2010), sections 2.1, 2.3 and 2.5; D. Knuth, The Art
of Computer Programming, volume 2, section 3.3.2 (serial test); G. Marsaglia and W. Tsang, "Some difficult-to-pass tests
of randomness", JSS 7 (2002) (birthday spacings).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.stats

from fqtstats import ops
from fqtstats.provenance import provenance
from fqtstats.random import Stream, key_words, stream

FOLDER = Path(__file__).parent / "results" / "generator"
BLOCKS = 32
BLOCK = 2**16
"""Words per block."""
FALSE_ALARM = 1e-6

Words = npt.NDArray[np.uint32]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    given = parser.parse_args()
    save(run(), given.out)


# --- words ------------------------------------------------------------------------------------------------------------


def within() -> Words:
    """One stream, along its elements: ``[BLOCKS, BLOCK]``."""
    return _numbers(stream(seed=1), BLOCKS * BLOCK).reshape(BLOCKS, BLOCK)


def half_words() -> Words:
    """One stream of 16 bits per element, in pairs: the words of :func:`within` in another order."""
    halves = stream(seed=1).bits(2 * BLOCKS * BLOCK, 16).numpy().astype(np.uint16)
    return halves.view(np.uint32).reshape(BLOCKS, BLOCK)


def key_hashes() -> Words:
    """The keys' own words, of consecutive draws."""
    keys = [key_words(stream(seed=2, draw=draw)) for draw in range(BLOCKS * BLOCK // 4)]
    return np.array(keys, np.uint32).reshape(BLOCKS, BLOCK)


def across(part: str) -> Words:
    """16 consecutive words of each of consecutive streams, interleaved: neighbours differ in one part of the key."""
    each = 16
    rows = [
        np.stack([_numbers(_changed(part, block * BLOCK // each + i), each) for i in range(BLOCK // each)], axis=1)
        for block in range(BLOCKS)
    ]
    return np.stack([row.reshape(-1) for row in rows])


def _changed(part: str, index: int) -> Stream:
    if part == "path":
        return stream(seed=3).child(str(index))
    value = f"layers.{index}" if part in ("layer", "site") else index
    return stream(**{"seed": 3, part: value})  # type: ignore[arg-type]


def _numbers(s: Stream, n: int) -> Words:
    return s.bits(n, 32).numpy().astype(np.uint32)


def biased() -> Words:
    """A control: the lowest two bits of every 16th word are set."""
    words = within()
    words[:, ::16] |= np.uint32(3)
    return words


def reused() -> Words:
    """A control: the second half of every block repeats the first."""
    words = within()
    words[:, BLOCK // 2 :] = words[:, : BLOCK // 2]
    return words


def congruential() -> Words:
    """A control: a linear congruential generator modulo 2^32, whose low bits have short periods."""
    states = accumulate(range(BLOCKS * BLOCK - 1), lambda x, _: (1664525 * x + 1013904223) % 2**32, initial=12345)
    return np.fromiter(states, np.uint32, BLOCKS * BLOCK).reshape(BLOCKS, BLOCK)


PARTS = ("seed", "step", "layer", "site", "draw", "call", "replica", "path")
FAMILIES: dict[str, Callable[[], Words]] = {
    "within a stream": within,
    "within a stream, 16 bits": half_words,
    "key words": key_hashes,
    **{f"across {part}": partial(across, part) for part in PARTS},
}
CONTROLS: dict[str, Callable[[], Words]] = {
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


def run() -> pd.DataFrame:
    """One row per family and test: ``family``, ``test``, ``blocks``, smallest block's ``smallest``, ``p_value``."""
    rows = []
    for family, make in (FAMILIES | CONTROLS).items():
        words = make()
        for test, f in TESTS.items():
            found = np.array([f(block) for block in words])
            p = float(scipy.stats.kstest(found, "uniform").pvalue)
            rows.append({"family": family, "test": test, "blocks": len(found), "smallest": found.min(), "p_value": p})
        print(family, {row["test"]: f"{row['p_value']:.3g}" for row in rows[-len(TESTS) :]}, flush=True)
    table = pd.DataFrame(rows)
    table["alarm"] = table["p_value"] < FALSE_ALARM / len(table)
    return table


def save(rows: pd.DataFrame, folder: Path) -> None:
    """``rows.csv``, ``table.md`` and ``run.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_csv(folder / "rows.csv", index=False, float_format="%.6g")
    ours = rows[~rows["family"].isin(CONTROLS)]
    told = {
        "blocks": BLOCKS,
        "words_per_block": BLOCK,
        "rows": len(ours),
        "alarms": int(ours["alarm"].sum()),
        "smallest_p_value": float(ours["p_value"].min()),
        "p_values_uniform": float(scipy.stats.kstest(ours["p_value"], "uniform").pvalue),
        "controls_refused": sorted(set(rows[rows["family"].isin(CONTROLS) & rows["alarm"]]["family"])),
    }
    (folder / "run.json").write_text(json.dumps({**told, **provenance(ops.isa())}, indent=2) + "\n")
    (folder / "table.md").write_text(markdown(rows, told))
    print(json.dumps(told, indent=2))


def markdown(rows: pd.DataFrame, told: dict[str, object]) -> str:
    """The p-values, a row per family and a column per test; alarms are bold."""
    about = (
        f"P-values of {told['rows']} tests of {BLOCKS} blocks of {BLOCK} words each; {told['alarms']} alarms, smallest "
        f"p-value {told['smallest_p_value']:.2g}. Uniformity of these p-values: p = {told['p_values_uniform']:.2g} "
        "(tests of one family share their words). Bold: below 1e-6 over the number of rows."
    )
    lines = [
        about,
        "",
        "| words | " + " | ".join(TESTS) + " |",
        "|---" * (len(TESTS) + 1) + "|",
    ]
    for family, group in rows.groupby("family", sort=False):
        cells = [
            f"**{p:.2g}**" if alarm else f"{p:.2g}" for p, alarm in zip(group["p_value"], group["alarm"], strict=True)
        ]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

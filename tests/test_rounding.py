"""Rounding: its exact law, by enumerating every random word."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import quantizers as oracle
from words import Word

from fqtstats.random import stream
from fqtstats.rounding import _PIECE, nearest, stochastic, up_probability

FRACTIONS = [0.0, 2**-24, 2**-12, 2**-5, 0.1, 0.25, 0.3, 0.5, 0.7, 1 - 2**-5, 1 - 2**-12]
COORDINATES = [base + f for base in (-3.0, -1.0, 0.0, 1.0, 7.0) for f in FRACTIONS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("random_bits", range(1, 13))
def test_law_by_enumeration(random_bits, dtype):
    y = torch.tensor(COORDINATES, dtype=dtype)
    before = y.clone()
    outcomes = torch.stack([stochastic(y, Word(word), random_bits) for word in range(2**random_bits)]).double()
    assert torch.equal(y, before)
    for place, coordinate in enumerate(y.tolist()):
        for word in range(0, 2**random_bits, max(1, 2**random_bits // 64)):
            assert outcomes[word, place] == oracle.round_stochastically(coordinate, word, random_bits)
    low, up = up_probability(y, random_bits)
    assert low.dtype == dtype
    assert up.dtype == torch.float64
    assert torch.equal(low, y.floor())
    # Counts and probabilities are dyadic: equality is exact.
    assert torch.equal(outcomes.mean(0), low.double() + up)
    # The few-bit bias is exactly the truncated part of the fraction.
    truncated = torch.remainder((y.double() - y.double().floor()), 2.0**-random_bits)
    assert torch.equal(y.double() - outcomes.mean(0), truncated)


@pytest.mark.parametrize("random_bits", [16, 17, 24, 25, 31, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_switch_word_with_many_random_bits(random_bits, dtype):
    """Up for every word below ``floor(f 2^n)``, down from there on: checked on both sides of the switch."""
    y = torch.tensor(COORDINATES, dtype=dtype)
    for coordinate in y:
        threshold = math.floor(Fraction(coordinate.item() % 1) * 2**random_bits)
        assert up_probability(coordinate, random_bits)[1].item() == threshold / 2**random_bits
        for word in {0, threshold - 1, threshold, threshold + 1, 2**random_bits - 1}:
            if 0 <= word < 2**random_bits:
                got = stochastic(coordinate, Word(word), random_bits).item()
                assert got == oracle.round_stochastically(coordinate.item(), word, random_bits)


@given(st.lists(st.floats(-255, 255, width=32), min_size=1, max_size=50), st.integers(1, 32), st.integers(0, 2**32 - 1))
def test_stays_on_the_neighbours(values, random_bits, seed):
    y = torch.tensor(values)
    rounded = stochastic(y, stream(seed=seed), random_bits)
    assert rounded.dtype == y.dtype
    assert bool(((rounded == y.floor()) | (rounded == y.floor() + 1)).all())
    integers = y == y.floor()
    assert torch.equal(rounded[integers], y[integers])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_ties_to_even(dtype):
    y = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997, 0.50000006, 2.2, 2.8], dtype=dtype)
    assert torch.equal(nearest(y), torch.from_numpy(np.rint(y.numpy())))
    assert nearest(y).tolist() == [-2, -2, 0, 0, 2, 2, 0, 1, 2, 3]


def test_coupled_to_the_stream_element_by_element():
    """Element i uses number i of the stream, in row-major order, whatever the shape."""
    y = torch.rand(6, 50, 3, generator=torch.Generator().manual_seed(0)) * 9
    for random_bits in (4, 16, 24, 32):
        s = stream(seed=3, layer="a")
        words = s.bits(y.numel(), random_bits).tolist()
        expected = [
            oracle.round_stochastically(c, w, random_bits) for c, w in zip(y.flatten().tolist(), words, strict=True)
        ]
        assert stochastic(y, s, random_bits).flatten().tolist() == expected
        assert stochastic(y.flatten(), s, random_bits).tolist() == expected


@pytest.mark.parametrize("random_bits", [8, 16, 17, 24, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pieces_join(random_bits, dtype):
    """Rounded in pieces, in place or not, element i uses number i: checked on sizes around a piece's."""
    for numel in (_PIECE - 1, _PIECE, 2 * _PIECE + 77):
        s = stream(seed=4, draw=numel)
        y = torch.linspace(0, 15, numel, dtype=dtype)
        bits = s.bits(numel, random_bits)
        low = y.floor()
        expected = low + (bits < ((y - low) * 2.0**random_bits).floor().long())
        assert torch.equal(stochastic(y, s, random_bits), expected)
        assert torch.equal(stochastic(y.view(1, -1), s, random_bits), expected.view(1, -1))
        assert stochastic(y, s, random_bits, out=y) is not None
        assert torch.equal(y, expected)

"""Packing of codes into bytes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import quantizers as oracle

from fqtstats.errors import InputError
from fqtstats.formats import INTEGER_FORMATS, IntFormat, pack, uint, unpack

WIDTHS = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


@st.composite
def codes_and_format(draw):
    fmt = draw(st.sampled_from(INTEGER_FORMATS))
    return draw(st.lists(st.integers(0, fmt.levels), min_size=0, max_size=70)), fmt


@given(codes_and_format())
def test_pack_matches_the_oracle_and_round_trips(case):
    codes, fmt = case
    packed = pack(torch.tensor(codes, dtype=torch.uint8), fmt)
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == oracle.pack(codes, fmt.storage_bits)
    assert unpack(packed, fmt, len(codes)).tolist() == codes


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 1000, 1001])
def test_one_bit_codes_are_numpys_little_endian_packbits(numel):
    codes = np.random.default_rng(numel).integers(0, 2, numel, dtype=np.uint8)
    expected = np.packbits(codes, bitorder="little")
    assert np.array_equal(pack(torch.from_numpy(codes), uint(1)).numpy(), expected)


@pytest.mark.parametrize("name", ["uint1", "uint2", "uint4"])
def test_narrow_formats_are_those_of_ml_dtypes(name):
    foreign = ml_dtypes.iinfo(getattr(ml_dtypes, name))
    (ours,) = (fmt for fmt in INTEGER_FORMATS if fmt.name == name)
    assert (ours.bits, ours.levels) == (foreign.bits, foreign.max)
    # A value outside the format wraps in the foreign one; all of ours are inside.
    codes = np.arange(ours.levels + 1)
    assert np.array_equal(codes.astype(getattr(ml_dtypes, name)).astype(int), codes)


@pytest.mark.parametrize("fmt", INTEGER_FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (2, 3, 5), (0,)])
def test_any_shape_packs_in_row_major_order(fmt, shape):
    codes = torch.randint(0, fmt.levels + 1, shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    packed = pack(codes, fmt)
    assert packed.numel() == -(-codes.numel() * fmt.storage_bits // 8)
    assert torch.equal(unpack(packed, fmt, codes.numel()), codes.reshape(-1))
    transposed = codes.movedim(0, -1)
    assert torch.equal(pack(transposed, fmt), pack(transposed.contiguous(), fmt))


def test_byte_layout():
    codes = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert pack(codes, uint(2)).tolist() == [0b00_11_10_01]
    assert pack(codes, uint(3)).tolist() == [0x21, 0x03]
    assert pack(codes, uint(8)).tolist() == [1, 2, 3]


def test_packing_copies():
    codes = torch.tensor([1, 2, 3], dtype=torch.uint8)
    packed = pack(codes, uint(8))
    packed.zero_()
    assert codes.tolist() == [1, 2, 3]


@pytest.mark.parametrize("bits", range(1, 9))
def test_catalog(bits):
    fmt = uint(bits)
    assert (fmt.bits, fmt.levels, fmt.storage_bits, fmt.name) == (bits, 2**bits - 1, WIDTHS[bits], f"uint{bits}")


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, 4.0, True, "4", None])
def test_width_out_of_range(bits):
    with pytest.raises(InputError, match="1 to 8"):
        uint(bits)


@pytest.mark.parametrize("bits", [0, 9])
def test_a_format_checks_its_width(bits):
    with pytest.raises(InputError, match="1 to 8"):
        IntFormat("odd", bits)

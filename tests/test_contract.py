"""Pairs of methods that give the same numbers: no check trusts the faster one where the other was replaced.

Every verdict on a fault is certain: nothing is sampled.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch

import fqtstats
from fqtstats.errors import NotExact
from fqtstats.quantizers import AGP, BHQ, LUQ, PSQ, QUANTIZERS, storage
from fqtstats.quantizers.base import UniformQuantizer
from fqtstats.verdicts import claims
from fqtstats.verdicts.expectation import exact_mean
from fqtstats.verdicts.unbiasedness import check_unbiased

X = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 16).view(-1, 1)


def scaled(call):
    return lambda self, x, stream: 1.5 * call(self, x, stream)


def off_by_one(encode):
    """The same codes, of which the first is another."""

    def wrong(self, x, stream):
        found = encode(self, x, stream)
        payload = found.payload.clone()
        payload[0] ^= 1
        return replace(found, payload=payload)

    return wrong


@dataclass(frozen=True)
class Called(PSQ):
    name: ClassVar[str] = "called"

    def __call__(self, x, stream):
        return 1.5 * super().__call__(x, stream)


@dataclass(frozen=True)
class Encoded(PSQ):
    def encode(self, x, stream):
        return off_by_one(PSQ.encode)(self, x, stream)


class Mixed:
    def __call__(self, x, stream):
        return 1.5 * PSQ.__call__(self, x, stream)


@dataclass(frozen=True)
class WithMixin(Mixed, PSQ):
    pass


@dataclass(frozen=True)
class Untransformed(BHQ):
    def transform(self, x):
        return None


@pytest.mark.parametrize("q", [Called(4), Encoded(4), WithMixin(4), Untransformed(4)], ids=lambda q: type(q).__name__)
def test_what_a_subclass_overrides_is_what_it_does_on_one_input(q):
    drawn, encoded = q.for_input(X), q.encode_input(X)
    for draw in range(2):
        s = fqtstats.stream(draw=draw)
        assert torch.equal(drawn(s), q(X, s))
        assert torch.equal(encoded(s).payload, q.encode(X, s).payload)
    assert torch.equal(Called(4)(X, s), 1.5 * PSQ(4)(X, s))


def test_classes_that_override_nothing_keep_the_faster_way():
    @dataclass(frozen=True)
    class Same(LUQ):
        pass

    for q in (Same(4), LUQ(4), PSQ(4), BHQ(4)):
        assert not isinstance(q.for_input(X), partial)
        assert not isinstance(q.encode_input(X), partial)
    assert not isinstance(AGP(4).for_input(X), partial)
    assert "_transformed" in vars(BHQ)


def test_a_transform_that_is_overridden_is_the_one_that_is_applied():
    s = fqtstats.stream(seed=1)
    assert torch.equal(Untransformed(4)(X, s), PSQ(4)(X, s))
    assert not torch.equal(BHQ(4)(X, s), PSQ(4)(X, s))
    assert check_unbiased(Untransformed(4), X).method == "exact"


@pytest.mark.parametrize("cls", [PSQ, AGP, LUQ, BHQ, UniformQuantizer], ids=lambda cls: cls.__name__)
def test_a_call_that_was_replaced_is_no_unbiased_quantizer(monkeypatch, cls):
    q = (PSQ if cls is UniformQuantizer else cls)(4)
    assert check_unbiased(q, X).ok
    monkeypatch.setattr(cls, "__call__", scaled(cls.__call__))
    verdict = check_unbiased(q, X)
    assert not verdict.ok
    assert not verdict.unbiased
    assert not verdict.consistent
    assert str(verdict).startswith("INCONSISTENT")
    assert "its codes decode to other numbers than it gives when it is called: element 0 to" in verdict.evidence
    if cls is BHQ:
        with pytest.raises(NotExact, match="its codes decode to other numbers"):
            exact_mean(q, X)
    else:
        torch.testing.assert_close(exact_mean(q, X), 1.5 * X.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", [PSQ, AGP, LUQ, BHQ], ids=lambda cls: cls.__name__)
def test_codes_that_were_replaced_are_no_unbiased_quantizer(monkeypatch, cls):
    monkeypatch.setattr(cls, "encode", off_by_one(cls.encode))
    q = cls(8 if cls is AGP else 4)  # every payload byte of which is a code
    verdict = check_unbiased(q, X)
    assert not verdict.unbiased
    assert not verdict.consistent


def test_where_call_and_codes_are_replaced_alike_the_call_is_judged(monkeypatch):
    # What is kept for one input is then the only one that is right.
    def encode(self, x, stream):
        found = plain(self, x, stream)
        grid = found.frame.grid
        grid = replace(grid, step=1.5 * grid.step, offset=None if grid.offset is None else 1.5 * grid.offset)
        return replace(found, frame=replace(found.frame, grid=grid))

    plain = PSQ.encode
    monkeypatch.setattr(PSQ, "encode", encode)
    monkeypatch.setattr(PSQ, "__call__", lambda self, x, stream: self.encode(x, stream).decode())
    verdict = check_unbiased(PSQ(4), X)
    assert verdict.consistent
    assert not verdict.unbiased
    assert verdict.method == "exact"


def test_a_class_that_was_added_to_the_registry(monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "called", Called)
    q = fqtstats.quantizer("called", bits=4)
    assert not check_unbiased(q, X).unbiased
    torch.testing.assert_close(exact_mean(q, X), 1.5 * X.double(), rtol=1e-5, atol=1e-5)

    # Layers take its own codes, and not those of the class that it is derived from.
    @dataclass(frozen=True)
    class Zeros(PSQ):
        def _round(self, y, stream):
            return torch.zeros_like(y)

    monkeypatch.setitem(QUANTIZERS, "zeros", Zeros)
    s = fqtstats.stream()
    stored = storage.store(Zeros(4), X, s)
    assert torch.equal(stored.decode(), Zeros(4)(X, s))


@pytest.mark.parametrize("name", ["bhq", "nearest"])
def test_what_contradicts_itself_does_not_keep_the_claim_of_a_bias_either(monkeypatch, name):
    cls = QUANTIZERS[name]
    monkeypatch.setattr(cls, "__call__", scaled(cls.__call__))
    q = cls(4, 8) if name == "bhq" else cls(4)
    assert q.claim == "biased"
    (checked,) = claims.check_all([claims.subject(name, q)], 1e-6, (16, 64))
    assert not checked.holds

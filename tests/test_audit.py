"""The audit of random streams: a clean run has no reuse, and every planted one is found. Nothing here is left to chance
but collisions of 128-bit hashes."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace

import pytest
import small
import torch
from layer_cases import filled, gaussian
from torch import nn
from torch.utils.checkpoint import checkpoint

import fqtstats
from fqtstats import Policy, listening, quantizer, random
from fqtstats.capture import Session
from fqtstats.errors import InputError
from fqtstats.layers.state import Call
from fqtstats.verdicts import audit

PSQ = quantizer("psq", bits=4)
STOCHASTIC = Policy(activation=PSQ, weight=quantizer("ptq", bits=4), grad_input=PSQ, grad_weight=quantizer("bhq"))


class Twice(nn.Module):
    """A layer that is called twice, once within a checkpoint, and another one."""

    def __init__(self, kind):
        super().__init__()
        self.shared, self.last = filled(nn.Linear(6, 6)), filled(nn.Linear(6, 3), 3)
        self.kind = kind

    def segment(self, x):
        return torch.tanh(self.shared(x))

    def forward(self, x):
        if self.kind == "none":
            return self.last(self.segment(self.segment(x)))
        y = checkpoint(self.segment, x, use_reentrant=self.kind == "reentrant")
        return self.last(self.segment(y))


def train(model, handle, steps=(0, 1), micro_batches=2):
    for step in steps:
        handle.step = step
        for part in range(micro_batches):
            x = gaussian(8, 6, seed=100 * step + part).requires_grad_()
            model(x).square().mean().backward()


def kinds(report):
    return dict(Counter(reuse.kind for reuse in report.reuses))


def changed(q, **parts):
    """A quantizer that takes parts of the key for something else."""
    return lambda x, s: q(x, replace(s, **parts))


def audited(policy, run, **options):
    model = Twice("none")
    handle = fqtstats.prepare_(model, policy, **options)
    with audit.recording() as found:
        run(model, handle)
    return found.report()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", ["none", "reentrant", "non-reentrant"])
def test_training_reuses_nothing(kind):
    model = Twice(kind)
    handle = fqtstats.prepare_(model, STOCHASTIC, seed=3)
    with audit.recording() as found:
        train(model, handle)
    report = found.report()
    assert not report.reuses, str(report)
    # 2 steps of 2 micro-batches with 3 calls at 4 sites
    assert report.streams == 2 * 2 * 3 * 4
    again = 0 if kind == "none" else 2 * 2 * 2
    assert report.uses == report.streams + again
    assert report.repetitions == again, "activation and weight of the recomputed call"


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", ["none", "reentrant", "non-reentrant"])
def test_draws_from_one_graph_reuse_nothing(kind):
    model = Twice(kind)
    handle = fqtstats.prepare_(model, STOCHASTIC)
    # The checkpoint's input needs a gradient, or nothing behind it gets one.
    batch = gaussian(8, 6).requires_grad_()
    with audit.recording() as found, Session(model, handle, batch, lambda m, x: m(x).square().mean()) as session:
        session.qat()
        for index in (0, 1, 2, 0):
            session.draw(index)
            session.draw(index, ("grad_input",))
            session.draw(index, ("grad_weight",))
    assert not found.report().reuses, str(found.report())
    draws = {r.use.purpose.draw for r in found.requests if r.use.purpose.site.startswith("grad")}
    assert draws == {0, 1, 2}


def test_measuring_reuses_nothing():
    with audit.recording() as found:
        fqtstats.measure(small.mlp(), small.batch(), small.loss, small.psq(), draws=8)
    report = found.report()
    assert report.uses >= 8 * 5
    assert not report.reuses, str(report)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("q", [PSQ, quantizer("bhq")], ids=["psq", "bhq"])
def test_both_backends_ask_for_the_same_numbers(q):
    layer = nn.Conv2d(4, 4, 3)
    fqtstats.prepare_(layer, Policy(activation=quantizer("minmax", bits=8), grad_weight=q))
    with audit.recording() as found:
        layer(gaussian(3, 4, 8, 8)).sum().backward()
    (request,) = found.requests
    assert (request.first, request.end, request.n) == (0, -(-3 * 4 * 6 * 6 // 64), 24)
    assert request.words == request.stream.words()
    assert request.use.purpose.site == request.stream.site == "grad_weight"


def draws(model, handle):
    with Session(model, handle, gaussian(8, 6), lambda m, x: m(x).square().mean()) as session:
        for index in range(3):
            session.draw(index)


@pytest.mark.usefixtures("backend")
def test_a_quantizer_that_ignores_the_draw_is_found():
    report = audited(Policy(grad_weight=changed(PSQ, draw=0)), draws)
    assert kinds(report) == {"another use": 3 * 2}
    assert {reuse.differing for reuse in report.reuses} == {("draw",)}
    assert "another use (draw): ['last' grad_weight step 0" in str(report)


@pytest.mark.usefixtures("backend")
def test_a_site_used_for_both_products_is_found():
    report = audited(
        Policy(grad_weight=PSQ, grad_input=changed(PSQ, site="grad_weight")), lambda m, h: train(m, h, (0,), 1)
    )
    assert {reuse.differing for reuse in report.reuses} == {("site",)}
    # The first call's input gradient is that of the input, which is asked for.
    assert kinds(report) == {"another use": 3}


@pytest.mark.usefixtures("backend")
def test_an_ignored_step_is_found():
    report = audited(Policy(grad_weight=changed(PSQ, step=0)), train)
    assert kinds(report) == {"another use": 6}
    assert {reuse.differing for reuse in report.reuses} == {("step",)}


@pytest.mark.usefixtures("backend")
def test_a_step_that_is_not_advanced_is_found():
    def run(model, handle):
        for batch in range(2):
            handle.step = 0
            model(gaussian(8, 6, seed=batch)).square().mean().backward()

    assert kinds(audited(Policy(grad_weight=PSQ), run)) == {"another input": 3}
    # If it is never set, the calls go on counting.
    never = audited(Policy(grad_weight=PSQ), lambda m, h: [m(gaussian(8, 6)).sum().backward() for _ in range(2)])
    assert not never.reuses


@pytest.mark.usefixtures("backend")
def test_an_ignored_call_is_found():
    report = audited(Policy(grad_weight=changed(PSQ, call=0)), lambda m, h: train(m, h, (0,), 1))
    (reuse,) = report.reuses
    assert (reuse.kind, reuse.differing) == ("another use", ("call",))


@pytest.mark.usefixtures("backend")
def test_two_layers_with_one_name_are_found():
    report = audited(Policy(grad_weight=changed(PSQ, layer="fc")), lambda m, h: train(m, h, (0,), 1))
    (reuse,) = report.reuses
    assert (reuse.kind, reuse.differing) == ("another use", ("layer", "instance"))

    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    for layer in (first, second):
        fqtstats.prepare_(layer, Policy(grad_weight=PSQ))
    with audit.recording() as found:
        second(first(gaussian(5, 4))).sum().backward()
    (reuse,) = found.report().reuses
    assert (reuse.kind, reuse.differing) == ("another model", ("model",))


@pytest.mark.usefixtures("backend")
def test_an_ignored_replica_is_found():
    def run(model, handle):
        for replica in range(2):
            handle.shared.replica = replica
            train(model, handle, (0,), 1)

    assert not audited(Policy(grad_weight=PSQ), run).reuses
    report = audited(Policy(grad_weight=changed(PSQ, replica=0)), run)
    assert kinds(report) == {"another use": 3}
    assert {reuse.differing for reuse in report.reuses} == {("replica",)}


def test_records_of_several_ranks_are_compared():
    def record(replica):
        model = Twice("none")
        handle = fqtstats.prepare_(model, STOCHASTIC)
        handle.shared.replica = replica
        with audit.recording() as found:
            random.stream(site="order").bits(10)
            train(model, handle)
        return pickle.loads(pickle.dumps(found.requests))

    assert not audit.report([record(0), record(1)]).reuses
    report = audit.report([record(0), record(0)])
    assert kinds(report) == {"another model": 48}
    assert {reuse.differing for reuse in report.reuses} == {("process",)}


@pytest.mark.usefixtures("backend")
def test_a_forgotten_child_stream_is_found():
    def forgetful(x, s):
        return PSQ(x * torch.where(s.bits(x.shape, 1) == 1, 1, -1), s)

    def careful(x, s):
        return PSQ(x * torch.where(s.child("signs").bits(x.shape, 1) == 1, 1, -1), s)

    report = audited(Policy(grad_weight=forgetful), lambda m, h: train(m, h, (0,), 1))
    assert kinds(report) == {"twice in one use": 3}
    assert [(r.first.n, r.second.n) for r in report.reuses] == [(1, 24)] * 3
    assert not audited(Policy(grad_weight=careful), lambda m, h: train(m, h, (0,), 1)).reuses


@pytest.mark.usefixtures("backend")
def test_a_quantizer_that_takes_the_key_itself_is_heard():
    def own_kernel(x, s):
        s.words()
        return x

    def run(model, handle):
        train(model, handle, (0, 1), 1)

    assert audited(Policy(grad_weight=own_kernel), run).uses == 6
    assert kinds(audited(Policy(grad_weight=lambda x, s: own_kernel(x, replace(s, step=0))), run)) == {"another use": 3}


def test_a_broken_key_is_found(monkeypatch):
    def without_call(s):
        return random.key_words.__wrapped__(replace(s, call=0))

    monkeypatch.setattr(audit, "key_words", without_call)
    report = audited(Policy(grad_weight=PSQ), lambda m, h: train(m, h, (0,), 1))
    (reuse,) = report.reuses
    assert (reuse.kind, reuse.differing) == ("collision", ("call",))


def test_overlap_is_that_of_words_of_the_generator():
    s = random.stream(seed=9)

    def overlapping(*requests):
        def f(x, stream):
            for numel, n, start in requests:
                s.bits(numel, n, start=start)
            return x

        layer = nn.Linear(4, 4)
        fqtstats.prepare_(layer, Policy(weight=f))
        with audit.recording() as found:
            layer(torch.ones(1, 4))
        return bool(found.report().reuses)

    assert not overlapping((128, 24, 0), (128, 24, 128))
    assert overlapping((129, 24, 0), (128, 24, 128))
    assert not overlapping((256, 16, 0), (10, 16, 256))
    # 256 half words are 2 tiles, 128 whole words as well.
    assert not overlapping((256, 16, 0), (128, 17, 128))
    assert overlapping((257, 16, 0), (128, 17, 128))
    assert overlapping((1, 1, 0), (1, 32, 0))
    assert not overlapping((0, 24, 0), (64, 24, 0))


def test_requests_outside_of_layers_may_repeat_their_key():
    with audit.recording() as found:
        for _ in range(2):
            random.stream(site="order").bits(100)
            random.stream(site="order").child("a").words()
    report = found.report()
    assert (report.requests, report.streams, report.repetitions, report.uses) == (4, 2, 2, 0)
    assert not report.reuses


def test_recordings_nest_and_end():
    with audit.recording() as outer:
        with audit.recording() as inner:
            random.stream().bits(1)
        random.stream().bits(1)
    random.stream().bits(1)
    assert (len(outer.requests), len(inner.requests)) == (2, 1)
    with pytest.raises(ZeroDivisionError), audit.recording():
        raise ZeroDivisionError
    assert not listening.LISTENERS


@pytest.mark.usefixtures("backend")
def test_recording_changes_no_number():
    def gradients():
        model = Twice("non-reentrant")
        train(model, fqtstats.prepare_(model, STOCHASTIC))
        return [p.grad for p in model.parameters()]

    plain = gradients()
    with audit.recording():
        recorded = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


def test_a_plan_has_a_stream_for_every_use():
    handle = fqtstats.prepare_(small.mlp(), small.psq())
    planned = audit.plan(handle, steps=range(4), draws=range(5), calls=range(2), replicas=range(3))
    assert planned.uses == planned.streams == 3 * 2 * 4 * 5 * 2 * 3
    assert not planned.clashes


def test_a_plan_is_what_a_run_uses():
    model = Twice("none")
    handle = fqtstats.prepare_(model, STOCHASTIC, seed=5)
    planned = set()

    def noted(call, site, draw):
        planned.add(call.stream(site, draw))
        return call.stream(site, draw)

    audit.plan(handle, steps=(0, 1), calls=range(4), stream_of=noted)
    with audit.recording() as found:
        train(model, handle)
    assert {r.stream for r in found.requests} <= planned


@pytest.mark.parametrize("part", ["step", "draw", "call", "replica", "site", "layer"])
def test_a_plan_shows_a_part_that_is_missing_from_the_key(part):
    handle = fqtstats.prepare_(small.mlp(), small.psq())
    constant = "" if part in ("site", "layer") else 0
    planned = audit.plan(
        handle,
        steps=range(2),
        draws=range(2),
        calls=range(2),
        replicas=range(2),
        stream_of=lambda call, site, draw: replace(Call.stream(call, site, draw), **{part: constant}),
    )
    values = 3 if part == "layer" else 2
    assert planned.streams == planned.uses // values
    assert len(planned.clashes) == planned.uses - planned.streams


def test_plans_of_several_models():
    handles = [fqtstats.prepare_(small.mlp(), small.psq(), seed=seed) for seed in (0, 1, 0)]
    assert not audit.plan(handles[:2]).clashes
    clashes = audit.plan(handles).clashes
    assert [(a[0], b[0]) for a, b in clashes] == [(0, 2)] * 6
    with pytest.raises(InputError, match="stochastic quantizers"):
        audit.plan([])

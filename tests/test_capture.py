"""The session: one forward pass, many backward passes, and a model that is left as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fqtstats
from fqtstats import Policy, policies, quantizer
from fqtstats.capture import IncomingGradients, Session, trainable_parameters
from fqtstats.errors import InputError, NonFiniteError
from fqtstats.layers.state import Source
from fqtstats.quantizers import PSQ

POLICY = policies.get("statquant-psq", bits=3)


class Net(nn.Module):
    """Convolution, batch norm, dropout; ``unused`` takes no part and ``ema`` is replaced, not written to."""

    def __init__(self, segment=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.4)
        self.out = nn.Linear(8, 3)
        self.unused = nn.Linear(3, 3)
        self.register_buffer("ema", torch.zeros(()))
        self.register_buffer("late", None)
        self.wrap = segment or (lambda f, x: f(x))

    def body(self, x):
        return self.drop(torch.relu(self.middle(torch.relu(self.norm(self.conv(x))))))

    def forward(self, x):
        x = self.wrap(self.body, x).mean((2, 3))
        self.ema = 0.9 * self.ema + x.detach().mean()
        self.late = x.detach().sum()
        return self.out(x)


def data(n=16, size=8):
    g = torch.Generator().manual_seed(5)
    return torch.randn(n, 2, size, size, generator=g), torch.randint(0, 3, (n,), generator=g)


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def session_of(model, policy=POLICY, batch=None, loss=cross_entropy, seed=0):
    handle = fqtstats.prepare_(model, policy, seed=seed)
    return Session(model, handle, data() if batch is None else batch, loss, seed)


def test_gradients_come_in_the_order_of_the_parameters_and_zeros_where_unused():
    model = Net()
    with session_of(model) as session:
        assert list(session.parameters) == list(trainable_parameters(model)) == [n for n, _ in model.named_parameters()]
        for gradients in (session.qat(), session.draw(0)):
            for (name, p), g in zip(session.parameters.items(), gradients, strict=True):
                assert (g.shape, g.dtype, g.requires_grad) == (p.shape, p.dtype, False)
                assert bool(g.any()) == (not name.startswith("unused"))
        assert math.isclose(session.loss, math.log(3), rel_tol=0.5)


@pytest.mark.parametrize("repeated", [False, True])
def test_an_injected_error_does_what_its_quantizer_does(repeated):
    """Equal up to the rounding of float64; an earlier call of the layer gets its part, the call itself none."""
    model, (x, y) = Net().double(), data()
    if repeated:
        model.body = lambda x, body=model.body, f=model.middle: body(x) + f(f(model.conv(x)))
    handle = fqtstats.prepare_(model, POLICY)
    found = {}

    def observe(call, site, q, g):
        source = Source(*call.key, site)
        if site == "grad_input":
            found[source] = q(g, call.stream(site, 7)) - g

    with Session(model, handle, (x.double(), y), cross_entropy, injectable=True) as session:
        qat = session.qat()
        session.draw(7, only=(), observe=observe)
        assert {(layer, call) for layer, call, _ in found} == {key for key in session.calls() if key[0] != "conv"}
        assert len(found) == (4 if repeated else 2)
        for source, error in found.items():
            draw = session.draw(7, only=[source])
            injected = session.inject((source.layer, source.call), error)
            seen = dict(zip(session.parameters, injected, strict=True))
            assert seen["out.weight"] is None
            assert (seen["middle.weight"] is None) == (source.layer == "middle" and source.call < 2)
            for d, g, e in zip(draw, qat, injected, strict=True):
                torch.testing.assert_close(d - g, torch.zeros_like(g) if e is None else e, rtol=1e-9, atol=1e-12)
            assert not same(draw, qat)
    with session_of(Net()) as session, pytest.raises(RuntimeError, match="injectable"):
        session.inject(("out", 0), torch.zeros(16, 3))


def test_frozen_and_tied_parameters():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    with session_of(model, batch=torch.randn(4, 3), loss=lambda m, x: m(x).square().sum()) as session:
        assert list(session.parameters) == ["0.weight", "0.bias", "1.bias", "2.bias"]
        assert len(session.draw(0)) == 4


def test_the_qat_gradient_is_that_of_the_model_without_gradient_quantizers():
    with session_of(Net()) as session:
        got = session.qat()
    model = Net()
    fqtstats.prepare_(model, POLICY.qat())
    torch.manual_seed(0)  # the session's seed: the same dropout mask
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cross_entropy(model, data()).backward()
    torch.set_num_threads(threads)
    assert same(got, [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()])


def test_one_forward_pass_is_shared_by_all_backward_passes():
    calls = []

    def loss(model, batch):
        calls.append(True)
        return cross_entropy(model, batch)

    with session_of(Net(), loss=loss) as session:
        first, draws = session.qat(), [session.draw(i) for i in range(3)]
        assert same(session.qat(), first), "dropout mask and batch statistics are shared"
        assert same(session.draw(1), draws[1]), "the same index gives the same numbers"
        assert not same(draws[0], draws[1])
        assert not same(draws[0], first)
        assert not same(session.draw(-1), draws[1])
    assert len(calls) == 1


def test_draws_depend_on_seed_and_index_alone():
    def draws(seed, order):
        with session_of(Net(), seed=seed) as session:
            return {i: session.draw(i) for i in order}

    a, b = draws(1, [0, 1, 2]), draws(1, [2, 0])
    assert same(a[0], b[0])
    assert same(a[2], b[2])
    assert not same(draws(2, [0])[0], a[0])


def test_a_draw_with_fewer_sites_shares_the_numbers_of_the_others():
    with session_of(Net()) as session:
        qat, whole = session.qat(), session.draw(4)
        upstream, own = session.draw(4, ("grad_input",)), session.draw(4, ("grad_weight",))
        assert same(session.draw(4, ()), qat)
        names = list(session.parameters)
    for name, g, w, u, o in zip(names, qat, whole, upstream, own, strict=True):
        if name.startswith("out."):  # the last layer sees the exact gradient: Q2 cannot reach it
            assert torch.equal(u, g)
            assert torch.equal(o, w)
        if name.startswith("norm."):  # not quantized: only Q2 of the layers above reaches it
            assert torch.equal(u, w)
            assert torch.equal(o, g)
        if name == "conv.weight":
            assert not torch.equal(u, g)
            assert not torch.equal(u, w)
            assert not torch.equal(o, w)


@pytest.mark.parametrize("sites", ["grad_input", ("weight",), ["grad_input", "nope"]])
def test_unknown_sites_are_refused(sites):
    with session_of(Net()) as session, pytest.raises(InputError, match="grad_input, grad_weight"):
        session.draw(0, sites)


@pytest.mark.parametrize("threads", [1, 2])
def test_thread_count_neither_changes_the_numbers_nor_is_changed(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with session_of(Net(), batch=data(32, 12)) as session:
            result = [*session.qat(), *session.draw(0)]
        assert torch.get_num_threads() == threads
        torch.set_num_threads(3 - threads)
        with session_of(Net(), batch=data(32, 12)) as session:
            assert same(result, [*session.qat(), *session.draw(0)])
        with pytest.raises(ZeroDivisionError), session_of(Net()):
            raise ZeroDivisionError
        assert torch.get_num_threads() == 3 - threads
    finally:
        torch.set_num_threads(before)


# --- what is left behind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["not", "in the loss", "in the body", "in backward"])
def test_buffers_gradients_random_state_and_modes_are_restored(fails):
    model = Net()
    model.drop.eval()
    for i, p in enumerate(model.parameters()):
        p.grad = None if i == 1 else torch.full_like(p, float(i))
    grads = [p.grad for p in model.parameters()]
    values = [None if g is None else g.clone() for g in grads]
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()

    def loss(model, batch):
        out = cross_entropy(model, batch)
        if fails == "in the loss":
            raise ZeroDivisionError
        if fails == "in backward":
            out.register_hook(lambda g: 1 / 0)
        return out

    def body():
        with session_of(model, loss=loss) as session:
            assert float(model.norm.num_batches_tracked) == 1
            session.qat()
            session.draw(0)
            if fails == "in the body":
                raise ZeroDivisionError

    if fails == "not":
        body()
    else:
        with pytest.raises(ZeroDivisionError):
            body()
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert dict(model.named_buffers()).keys() == buffers.keys()
    assert model.late is None
    for name, b in model.named_buffers():
        assert b is buffers[name][0]
        assert torch.equal(b, buffers[name][1])
    for p, grad, value in zip(model.parameters(), grads, values, strict=True):
        assert p.grad is grad
        assert grad is None or torch.equal(grad, value)


def test_a_session_between_training_steps_does_not_change_them():
    def step(measure):
        model = Net()
        handle = fqtstats.prepare_(model, POLICY)
        handle.step = 3
        torch.manual_seed(1)
        cross_entropy(model, data()).backward()
        if measure:
            with Session(model, handle, data(8), cross_entropy) as session:
                session.draw(0)
        cross_entropy(model, data()).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert same(step(True), step(False))


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_repeated_draws_work_under_checkpointing(kind):
    def wrap(f, x):
        return checkpoint(f, x, use_reentrant=kind == "reentrant")

    def run(segment):
        x, labels = data()
        x.requires_grad_()
        x.grad = marker = torch.ones_like(x)
        with session_of(Net(segment), batch=(x, labels)) as session:
            out = [session.qat(), session.draw(0), session.draw(1), session.draw(0), session.qat()]
        assert x.grad is marker, "the batch's gradient is restored, too"
        assert bool((marker == 1).all())
        return out

    plain, checkpointed = run(None), run(wrap)
    assert all(same(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert same(checkpointed[1], checkpointed[3])
    assert same(checkpointed[0], checkpointed[4])


def test_a_layer_called_twice_draws_two_sets_of_numbers_in_every_draw():
    seen = []

    def note(x, stream):
        seen.append((stream.draw, stream.call))
        return x

    model = nn.Linear(3, 3)
    policy = Policy(grad_weight=note)
    with session_of(model, policy, torch.randn(4, 3), lambda m, x: m(m(x)).sum()) as session:
        session.qat()
        assert seen == []
        session.draw(0)
        session.draw(7)
    assert seen == [(0, 1), (0, 0), (7, 1), (7, 0)]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(b[0]), r"scalar tensor, got shape \[16, 3\].*mean"),
        (lambda m, b: 1.0, "scalar tensor, got float"),
        (lambda m, b: m(b[0]).sum().detach(), "does not depend on any trainable parameter"),
        (lambda m, b: torch.zeros((), requires_grad=True) * 1, "does not depend on any trainable parameter"),
        (lambda m, b: m(b[0]).sum() * math.nan, "finite loss, got nan.*checkpoint"),
        (lambda m, b: m(b[0]).sum() / 0, "finite loss, got -?inf"),
    ],
)
def test_bad_losses_say_what_was_expected(loss, message):
    with pytest.raises(InputError, match=message), session_of(Net(), loss=loss) as session:
        session.qat()


def test_a_loss_of_one_element_is_a_scalar():
    with session_of(Net(), loss=lambda m, b: cross_entropy(m, b).view(1, 1)) as session:
        assert math.isfinite(session.loss)
        session.qat()


@pytest.mark.parametrize(
    "batch", [(torch.zeros(0, 2, 8, 8), torch.zeros(0, dtype=torch.long)), {"x": [torch.zeros(0, 3)]}, torch.zeros(0)]
)
def test_an_empty_batch_is_refused(batch):
    with (
        pytest.raises(InputError, match=r"expected a batch with samples, got a tensor of shape \[0"),
        session_of(Net(), batch=batch),
    ):
        pass


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(InputError, match="trainable"), session_of(Net().requires_grad_(False)):
        pass


def test_a_session_must_be_open():
    session = session_of(Net())
    for use in (session.qat, lambda: session.draw(0), lambda: session.loss):
        with pytest.raises(RuntimeError, match="not open"):
            use()
    with session:
        session.qat()
    with pytest.raises(RuntimeError, match="not open"):
        session.qat()


def test_a_gradient_with_nan_names_layer_site_and_count():
    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            g = g.clone()
            g.view(-1)[:2] = math.nan
            return g

    def loss(model, batch):
        return nn.functional.cross_entropy(Break.apply(model(batch[0])), batch[1])

    with session_of(Net(), loss=loss) as session:
        with pytest.raises(NonFiniteError, match=r"'out', grad_weight.* 2 NaN or Inf among 48"):
            session.draw(0)
        with pytest.raises(NonFiniteError, match="'out', grad_weight"):
            session.qat(IncomingGradients())


# --- the record of incoming gradients ---------------------------------------------------------------------------------


def test_the_record_holds_exact_variances_and_bounds_of_every_layer_and_site():
    incoming = IncomingGradients()
    seen = {}

    def observe(call, site, q, g):
        seen[call.layer.name, site] = (q, g.clone())
        incoming(call, site, q, g)

    with session_of(Net()) as session:
        assert same(session.qat(observe), session.qat())
    assert set(incoming.laws) == {
        (layer, site) for layer in ("conv", "middle", "out") for site in ("grad_input", "grad_weight")
    } - {
        ("conv", "grad_input")  # the input needs no gradient
    }
    for key, law in incoming.laws.items():
        q, g = seen[key]
        assert math.isclose(law.variance, float(q.variance(g).sum()))
        assert law.variance <= law.bound == q.bound(g)
        assert math.isclose(law.grad_norm_sq, float(g.double().square().sum()), rel_tol=1e-6)


def test_the_roundings_of_a_weight_gradient_are_looked_at_once(monkeypatch):
    looked = []
    original = PSQ.noise
    monkeypatch.setattr(PSQ, "noise", lambda q, x: looked.append(x) or original(q, x))
    policy = Policy(grad_weight=quantizer("psq", bits=3))
    with session_of(Net(), policy) as session:
        incoming, apart = IncomingGradients(), IncomingGradients()
        session.qat(incoming, incoming.weight_gradient)
        assert len(looked) == len(incoming.laws) == 3
        session.qat(None, apart.weight_gradient)
    assert apart.own == incoming.own
    assert apart.few == incoming.few


def test_the_record_adds_up_calls_and_admits_what_it_does_not_know():
    incoming = IncomingGradients()
    model = nn.Sequential(nn.Linear(3, 3))
    policy = Policy(grad_input=lambda x, s: x, grad_weight=quantizer("psq", bits=3))
    with session_of(model, policy, torch.randn(4, 3), lambda m, x: m(m(x)).square().sum()) as session:
        session.qat(incoming)
    assert math.isnan(incoming.laws["0", "grad_input"].variance)
    assert math.isnan(incoming.laws["0", "grad_input"].bound)
    law = incoming.laws["0", "grad_weight"]
    assert 0 < law.variance <= law.bound

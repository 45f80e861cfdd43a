"""Theorems 1 and 2 of StatQuant (arXiv 2010.14298) on whole networks.

Theorem 1: the mean of the quantized gradients is the QAT gradient. Theorem 2: their variance is the sum of one part per
quantizer, each passed on by the exact backward pass of the layers below it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fqtstats import Policy, policies, prepare_, quantizer
from fqtstats.capture import Session

FALSE_ALARM = 1e-6


def rng(seed):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=rng(seed))


def mlp(widths, seed=0):
    """Tanh network; square weights are near the identity, so that noise of one layer stays visible in the next."""
    layers = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        layer = nn.Linear(fan_in, fan_out)
        with torch.no_grad():
            layer.weight.copy_(
                torch.eye(fan_out, fan_in) + 0.5 * gaussian(fan_out, fan_in, seed=seed + i) / fan_in**0.5
            )
            layer.bias.zero_()
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def labels(n, classes):
    return torch.randint(0, classes, (n,), generator=rng(7))


CASES = {
    "mlp": lambda: (mlp([12, 12, 12, 12, 6]), (gaussian(24, 12, seed=3), labels(24, 6))),
    "conv": lambda: (convolutional(), (gaussian(12, 2, 8, 8, seed=3), labels(12, 4))),
}


def flat(gradients):
    return torch.cat([g.double().view(-1) for g in gradients])


# --- Theorem 1 --------------------------------------------------------------------------------------------------------


def bias_test(case, policy, draws):
    """Unbiased estimate of ``||E[error]||^2``, its critical value, and ``||QAT gradient||^2``.

    With a Gaussian sum of the errors (hundreds of draws), the estimate is ``sum_i lambda_i (chi2_i - 1) / n`` for the
    eigenvalues of the covariance, and P(above (2 ||lambda|| sqrt t + 2 max lambda t) / n) <= exp(-t) (Laurent
    and Massart, 2000, lemma 1). ``||lambda||^2`` is estimated by the mean squared product of two different errors.
    """
    model, batch = CASES[case]()
    with Session(model, prepare_(model, policy), batch, cross_entropy) as session:
        gradient = flat(session.qat())
        errors = torch.stack([flat(session.draw(i)) - gradient for i in range(draws)])
    gram = errors @ errors.T
    norms = gram.diagonal()
    estimate = float(gram.sum() - norms.sum()) / (draws * (draws - 1))
    size = math.sqrt(float(gram.square().sum() - norms.square().sum()) / (draws * (draws - 1)))
    t = -math.log(FALSE_ALARM)
    return estimate, (2 * math.sqrt(t) + 2 * t) * size / draws, float(gradient @ gradient)


@pytest.mark.parametrize("name", ["ptq", "psq", "bhq"])
@pytest.mark.parametrize("case", CASES)
def test_theorem_1_the_mean_of_the_draws_is_the_qat_gradient(case, name):
    # 400 draws, false alarms <= 1e-6. A bias^2 of twice the critical value is at least 2.1 standard errors above it
    # (caught in 98 % of cases); that is a bias of at most 3.2 % of the gradient's norm, at 4 bits for both products.
    q = quantizer(name, bits=4)
    policy = replace(policies.get("statquant-qat"), grad_input=q, grad_weight=q)
    estimate, critical, gradient = bias_test(case, policy, 400)
    assert estimate <= critical, f"bias^2 {estimate:.3g} above {critical:.3g}"
    assert 2 * critical <= 1e-3 * gradient, f"smallest bias^2 caught: {2 * critical / gradient:.3g} of the gradient's"


@pytest.mark.parametrize("site", ["grad_input", "grad_weight"])
@pytest.mark.parametrize("case", CASES)
def test_rounding_gradients_to_nearest_is_caught(case, site):
    policy = replace(policies.get("statquant-qat"), **{site: quantizer("minmax", bits=3)})
    estimate, critical, gradient = bias_test(case, policy, 60)
    assert estimate > critical
    assert estimate > 1e-3 * gradient


def test_few_random_bits_are_caught():
    few = quantizer("psq", bits=4, random_bits=2)
    assert few.claim == "biased"
    estimate, critical, _ = bias_test("mlp", Policy(grad_input=few, grad_weight=few), 400)
    assert estimate > critical


def aligned(shape, axis_sum):
    """Integers -7..8 such that every row, every column and every channel holds all of them."""
    index = sum(
        k * torch.arange(size).view(-1, *[1] * (len(shape) - 1 - i))
        for i, (size, k) in enumerate(zip(shape, axis_sum, strict=True))
    )
    return ((index % 16) - 7).float()


@pytest.mark.parametrize("name", ["ptq", "psq", "pcq"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_theorem_1_exactly_on_the_grid(kind, name):
    # Layers that only move numbers around keep the gradient on the 4-bit grid of step 1 all the way down.
    torch.manual_seed(0)
    if kind == "linear":
        layers = [nn.Linear(16, 16) for _ in range(4)]
        for layer in layers:
            layer.weight.data = torch.eye(16)[torch.randperm(16)]
        model, x, g = nn.Sequential(*layers), gaussian(16, 16, seed=1), aligned((16, 16), (1, 1))
    else:
        layers = [nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular") for _ in range(4)]
        for layer in layers:
            layer.weight.data.zero_()
            for o, i in enumerate(torch.randperm(4).tolist()):
                layer.weight.data[o, i, o % 3, i % 3] = 1
        model, x, g = nn.Sequential(*layers), gaussian(16, 4, 4, 4, seed=1), aligned((16, 4, 4, 4), (1, 3, 4, 1))
    q = quantizer(name, bits=4)
    policy = replace(policies.get("statquant-qat"), grad_input=q, grad_weight=q)
    x.requires_grad_()
    handle = prepare_(model, policy)

    def loss(model, x):
        return (model(x) * g).sum()

    with Session(model, handle, x, loss) as session:
        gradient = session.qat()
        assert all(bool(p.any()) for p in gradient)
        for i in range(3):
            assert all(torch.equal(a, b) for a, b in zip(session.draw(i), gradient, strict=True))
    for layer in model:
        layer.fqt_state = replace(layer.fqt_state, policy=replace(policy, grad_weight=quantizer(name, bits=3)))
    with Session(model, handle, x, loss) as session:  # 7 bins of 15/7: off the grid
        assert not any(torch.equal(a, b) for a, b in zip(session.draw(0), session.qat(), strict=True))


# --- Theorem 2 --------------------------------------------------------------------------------------------------------


class Switched:
    """A gradient quantizer that acts only where and when ``on`` says: a set of (layer, site); copies share it.

    With ``shared_noise`` all layers and sites of a draw use the same numbers.
    """

    def __init__(self, q, on, shared_noise=False):
        self.q, self.on, self.shared_noise = q, on, shared_noise

    def __call__(self, x, stream):
        if (stream.layer, stream.site) not in self.on:
            return x
        return self.q(x, replace(stream, layer="", site="") if self.shared_noise else stream)

    def __deepcopy__(self, memo):
        return self


LAYERS = ("0", "2", "4", "6")


def decompose(name, draws, shared_noise=False):
    """Per draw, the squared error of each weight's gradient ``[n, 4]``, and the parts that it is the sum of.

    The part of source l is E || D_l ||^2, where D_l is the gradient with the quantizers from the top down to l switched
    on minus that without l: given what the layers above drew, Q2(g_l) is the only thing that is random, and all layers
    below are exact, so this is E[ Var[ J_{l->k} Q2(g_l) | g_l ] ] (and E Var[Q1(g_k)] for the layer's own Q1).
    """
    on = set()
    switched = Switched(quantizer(name, bits=3), on, shared_noise)
    forward = policies.get("statquant-qat")
    model = mlp([32, 32, 32, 32, 32], seed=10)
    handle = prepare_(model, replace(forward, grad_input=switched, grad_weight=switched))
    batch = gaussian(48, 32, seed=3), labels(48, 32)
    weights = [0, 2, 4, 6]  # positions of the weights among the parameters
    whole, parts = [], []
    with Session(model, handle, batch, cross_entropy) as session:
        exact = [session.qat()[w].double() for w in weights]
        for i in range(draws):
            on.clear()
            before, rows = exact, []
            # Source by source from the top; the last one is every layer's own Q1, which reaches its own weight only.
            for source in [
                *({(layer, "grad_input")} for layer in LAYERS[:0:-1]),
                {(layer, "grad_weight") for layer in LAYERS},
            ]:
                on |= source
                after = [session.draw(i)[w].double() for w in weights]
                rows.append([float((a - b).square().sum()) for a, b in zip(after, before, strict=True)])
                before = after
            whole.append([float((a - b).square().sum()) for a, b in zip(before, exact, strict=True)])
            parts.append(rows)
    return torch.tensor(whole).double(), torch.tensor(parts).double()  # [n, 4], [n, source, 4]


def sum_over_whole(whole, parts):
    """Per weight: the sum of the parts over the variance of the draws, and the standard error of that ratio."""
    total = parts.sum(1)
    ratio = total.mean(0) / whole.mean(0)
    return ratio, (total - ratio * whole).std(0) / (whole.mean(0) * len(whole) ** 0.5)


SIGMAS = 4.9  # two-sided Gaussian tail 9.6e-7


@pytest.mark.parametrize("name", ["ptq", "psq", "bhq"])
def test_theorem_2_the_parts_add_up_to_the_whole(name):
    # Errors are taken from the QAT gradient, which is their mean by theorem 1. The 3 % are more than 4.9 standard
    # errors: false alarms <= 1e-6 per weight. A missing source of 6 % of a weight's variance is caught as surely.
    whole, parts = decompose(name, 160)
    ratio, error = sum_over_whole(whole, parts)
    share = parts.mean(0) / whole.mean(0)
    assert bool((SIGMAS * error <= 0.03).all()), f"not precise enough: {error}"
    assert bool(((ratio - 1).abs() <= 0.03).all()), f"sum of parts over whole: {ratio}"
    for source in range(3):
        # Leaving a source out must show in every weight that it reaches; the top one reaches the three below it.
        reached = 3 - source
        assert bool((share[source, :reached] > 0.06).all()), f"source {source}: {share[source]}"
        assert bool((share[source, reached:] == 0).all())
    # Negative control: without the second source.
    ratio, _ = sum_over_whole(whole, parts[:, [0, 2, 3]])
    assert bool((ratio[:2] < 0.97).all())


def test_theorem_2_fails_where_layers_share_their_noise():
    ratio, error = sum_over_whole(*decompose("psq", 100, shared_noise=True))
    assert bool(((ratio - 1).abs() > 0.03 + SIGMAS * error).any()), f"{ratio} +- {error}"

"""Joint distillation: losses and gradients against formulas written out by hand, and the networks as one module."""

from __future__ import annotations

import threading

import pytest
import torch
from layer_cases import gaussian
from torch import nn

import fqtstats
from fqtstats import Policy, quantizer
from fqtstats.errors import InputError
from fqtstats.training.distillation import Distillation, Joint

TARGETS = torch.tensor([0, 2, 1, 2, 0])
TWO, FOUR = (Policy(weight=quantizer("symmetric", bits=bits), name=f"w{bits}") for bits in (2, 4))


def logits(count):
    return [gaussian(5, 3, seed=seed, dtype=torch.float64).requires_grad_() for seed in range(count)]


def by_hand(own, z_t, z, targets):
    """Gradients of the losses by the logits, without autograd, mean over N samples and K classes.

    p = softmax(z), p' = softmax(z / T). CE: (p - y) / N. As a function of its second argument q, T^2 KL(p' || q'):
    T (q' - p') / N. Mean squared difference: 2 (z_q - z_p) / (N K).
    """
    n, k = z_t.shape
    y = torch.nn.functional.one_hot(targets, k).double()
    t = own.temperature

    def distance(of, to):
        if own.kind == "logits":
            return 2 * (to - of) / (n * k)
        return t * ((to / t).softmax(1) - (of / t).softmax(1)) / n

    student = [own.task * (z_j.softmax(1) - y) / n + own.student * distance(z_t, z_j) for z_j in z]
    back = sum(distance(z_j, z_t) for z_j in z) / len(z)
    return [(z_t.softmax(1) - y) / n + own.teacher * back, *student]


@pytest.mark.parametrize("students", [1, 2, 3])
@pytest.mark.parametrize(
    "own", [Distillation(), Distillation(temperature=4.0, task=0.3), Distillation("logits")], ids=str
)
def test_gradients_are_those_by_hand_and_nobody_reaches_the_others(own, students):
    z_t, *z = logits(1 + students)
    losses = own.losses(z_t, z, TARGETS)
    expected = by_hand(own, z_t.detach(), [z_j.detach() for z_j in z], TARGETS)
    assert len(losses.students) == students
    for loss, owner, wanted in zip([losses.teacher, *losses.students], [z_t, *z], expected, strict=True):
        found = torch.autograd.grad(loss, [z_t, *z], retain_graph=True, allow_unused=True)
        for logits_of, gradient in zip([z_t, *z], found, strict=True):
            if logits_of is owner:
                torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)
            else:
                assert gradient is None
    together = torch.autograd.grad(losses.total, [z_t, *z])
    for gradient, wanted in zip(together, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)


def test_a_forgotten_detach_would_show():
    # Negative control: with the teacher's logits attached, the student's loss reaches the teacher.
    z_t, z_s = logits(2)
    kl = torch.nn.functional.kl_div(z_s.log_softmax(1), z_t.log_softmax(1), reduction="batchmean", log_target=True)
    assert torch.autograd.grad(kl, z_t)[0].abs().max() > 1e-3


def test_values_of_the_losses():
    own = Distillation(temperature=2.0)
    z_t, z_s = (z.detach() for z in logits(2))
    p, q = ((z / 2).softmax(1) for z in (z_t, z_s))
    ce = [-z.log_softmax(1)[range(5), TARGETS].mean() for z in (z_t, z_s)]
    losses = own.losses(z_t, [z_s], TARGETS)
    forward, back = (4 * (a * (a / b).log()).sum(1).mean() for a, b in ((p, q), (q, p)))
    torch.testing.assert_close(losses.students[0], 0.7 * ce[1] + 0.7 * forward)
    torch.testing.assert_close(losses.teacher, ce[0] + 0.5 * back)
    smooth = own.losses(z_t, [z_s], TARGETS, label_smoothing=0.3)
    expected = [0.7 * c - 0.3 * z.log_softmax(1).mean() for c, z in zip(ce, (z_t, z_s), strict=True)]
    torch.testing.assert_close(smooth.teacher, expected[0] + 0.5 * back)
    torch.testing.assert_close(smooth.students[0], 0.7 * expected[1] + 0.7 * forward)


def test_tokens_are_samples():
    z = [gaussian(2, 4, 3, seed=seed) for seed in range(2)]
    targets = torch.zeros(2, 4, dtype=torch.long)
    for own in (Distillation(), Distillation("logits")):
        flat = own.losses(z[0].flatten(0, 1), [z[1].flatten(0, 1)], targets.flatten())
        torch.testing.assert_close(own.losses(z[0], [z[1]], targets).total, flat.total)


def test_what_does_not_fit():
    z_t, z_s = logits(2)
    own = Distillation()
    for wrong in (
        lambda: own.losses(z_t, [z_s[:, :2]], TARGETS),
        lambda: own.losses(z_t[:4], [z_s], TARGETS),
        lambda: own.losses(z_t, [z_s], TARGETS.double()),
    ):
        with pytest.raises(InputError, match="expected teacher and students to give logits of one shape"):
            wrong()
    with pytest.raises(InputError, match="at least one student"):
        own.losses(z_t, [], TARGETS)
    for options, told in (
        ({"kind": "nope"}, "kl or logits"),
        ({"task": -1.0}, "weight task"),
        ({"teacher": float("nan")}, "weight teacher"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(InputError, match=told):
            Distillation(**options)


def network():
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def test_networks_of_a_joint_training():
    model = network()
    joint = Joint(model, students=2)
    assert joint.students[0] is model
    x = gaussian(5, 6)
    teacher, students = joint(x)
    assert torch.equal(teacher, students[0])
    assert torch.equal(teacher, students[1])
    edges = Policy(weight=TWO.weight, overrides={"0": Policy(), "4": FOUR}, name="edges")
    with fqtstats.quantized(joint, joint.policy([edges, FOUR])) as handle:
        assert {name: layer.fqt_state.policy.weight.bits for name, layer in handle.layers.items()} == {
            "students.0.2": 2,
            "students.0.4": 4,
            "students.1.0": 4,
            "students.1.2": 4,
            "students.1.4": 4,
        }
        teacher_again, students = joint(x)
        assert torch.equal(teacher_again, teacher)
        assert not torch.equal(students[0], students[1])
        Distillation().losses(teacher_again, students, TARGETS).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in joint.parameters())
    assert len({id(p) for p in joint.parameters()}) == 3 * 6


@pytest.mark.parametrize(
    ("skip", "left"),
    [("0", ["2", "4"]), (["0", "[4-9]"], ["2"]), (lambda name, module: name == "0", ["2", "4"])],
    ids=["pattern", "patterns", "predicate"],
)
def test_what_is_skipped_is_named_as_in_a_student(skip, left):
    joint = Joint(network(), students=2)
    with fqtstats.quantized(joint, joint.policy([TWO, FOUR]), joint.skip(skip)) as handle:
        assert list(handle.layers) == [f"students.{j}.{name}" for j in range(2) for name in left]
    assert joint.skip(None) is None
    with pytest.raises(InputError, match=r"skip pattern 'students\.0\.nope' matches no layer"):
        fqtstats.prepare_(joint, joint.policy([TWO, FOUR]), joint.skip("nope"))


def test_a_step_moves_every_network_by_its_own_loss():
    own, x = Distillation(), gaussian(5, 6)
    joint = Joint(network(), students=1, teacher=network())
    before = joint.teacher[0].weight.clone()
    z_t, (z_s,) = joint(x)
    alone = torch.autograd.grad(own.losses(z_t, [z_s], TARGETS).teacher, joint.teacher[0].weight, retain_graph=True)[0]
    optimizer = torch.optim.SGD(joint.parameters(), lr=0.5)
    own.losses(z_t, [z_s], TARGETS).total.backward()
    optimizer.step()
    torch.testing.assert_close(joint.teacher[0].weight, before - 0.5 * alone)


def test_networks_that_do_not_fit():
    model = network()
    with (
        fqtstats.quantized(model, TWO),
        pytest.raises(InputError, match="the student of a distillation as a plain model"),
    ):
        Joint(model)
    with pytest.raises(InputError, match="at least one student"):
        Joint(model, students=0)
    with pytest.raises(InputError, match="expected a policy for each of 2 students, got 1"):
        Joint(model, students=2).policy([TWO])
    model.lock = threading.Lock()  # cannot be copied
    with pytest.raises(InputError, match="there is no teacher, and Sequential cannot be copied to be one"):
        Joint(model)
    assert Joint(model, teacher=network()).students[0] is model

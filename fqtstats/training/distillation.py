"""Joint distillation: a full-precision teacher and low-precision students learn together, from each other.

Source: B. Zhuang et al. (arXiv 1908.04680), the guided training of section 3; notation: ``z_t`` and ``z_j`` are the
logits of the teacher and of student j, CE is the cross entropy with the targets.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fqtstats.errors import InputError
from fqtstats.layers.swap import Skip
from fqtstats.policy import Policy

__all__ = ["Distillation", "Joint", "Losses"]


class Losses(NamedTuple):
    """Scalars of one batch.

    Attributes:
        teacher: what the teacher minimizes; its gradient reaches no student.
        students: what each student minimizes; their gradients do not reach the teacher.
    """

    teacher: Tensor
    students: tuple[Tensor, ...]

    @property
    def total(self) -> Tensor:
        """The sum: its gradient gives every network its own loss's."""
        return self.teacher + torch.stack(self.students).sum()


@dataclass(frozen=True)
class Distillation:
    """Who learns what from whom.

    A student minimizes ``task CE + student D(z_t, z_j)`` with the teacher's logits as constants; the teacher ``CE +
    teacher mean_j D(z_j, z_t)`` with the students' as constants.

    Attributes:
        kind: the distance D(from, to): ``"kl"``, ``T^2 KL(softmax(from / T) || softmax(to / T))``, mean over the
            samples; or ``"logits"``, the mean squared difference of the logits.
        task, student, teacher: the weights l_c, l_s and l_t.
        temperature: T, of ``"kl"`` alone.
        others: policies of further students that are trained beside the model.

    Raises:
        InputError: an attribute is out of range.
    """

    kind: Literal["kl", "logits"] = "kl"
    task: float = 0.7
    student: float = 0.7
    teacher: float = 0.5
    temperature: float = 1.0
    others: tuple[Policy, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("kl", "logits"):
            raise InputError(f"expected the distance of a distillation as kl or logits, got {self.kind!r}")
        for name in ("task", "student", "teacher"):
            weight = getattr(self, name)
            if not 0 <= weight < math.inf:
                raise InputError(f"expected the weight {name} of a distillation to be finite and >= 0, got {weight}")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"expected a positive and finite temperature, got {self.temperature}")

    def losses(
        self, teacher: Tensor, students: Sequence[Tensor], targets: Tensor, label_smoothing: float = 0.0
    ) -> Losses:
        """The losses of one batch.

        Args:
            teacher: logits [N, classes] or [B, T, vocabulary].
            students: of each student, the same shape.
            targets: int64 [N] or [B, T].
            label_smoothing: of the cross entropies.

        Raises:
            InputError: there is no student, or logits and targets do not match.
        """
        if not students:
            raise InputError("expected at least one student to distil into, got none")
        for logits in (teacher, *students):
            if logits.shape != teacher.shape or logits.shape[:-1] != targets.shape or targets.is_floating_point():
                raise InputError(
                    f"expected teacher and students to give logits of one shape, {(*targets.shape, 'classes')}, got "
                    f"{tuple(teacher.shape)} and {tuple(logits.shape)} for {targets.dtype} targets; "
                    "let the teacher have the classes of the students"
                )
        z_t, *z = (logits.flatten(0, -2) for logits in (teacher, *students))
        flat = targets.flatten()
        own = [F.cross_entropy(logits, flat, label_smoothing=label_smoothing) for logits in (z_t, *z)]
        back = torch.stack([self._distance(z_j.detach(), z_t) for z_j in z]).mean()
        return Losses(
            own[0] + self.teacher * back,
            tuple(
                self.task * ce + self.student * self._distance(z_t.detach(), z_j)
                for ce, z_j in zip(own[1:], z, strict=True)
            ),
        )

    def _distance(self, of: Tensor, to: Tensor) -> Tensor:
        if self.kind == "logits":
            return F.mse_loss(to, of)
        log_of, log_to = ((logits / self.temperature).log_softmax(-1) for logits in (of, to))
        return self.temperature**2 * F.kl_div(log_to, log_of, reduction="batchmean", log_target=True)


class Joint(nn.Module):
    """The networks of a joint distillation as one module, so that one optimizer and one handle steer all of them.

    Args:
        model: the first student.
        students: how many there are; the others start as copies of it.
        teacher: the full-precision network; None: one more copy.

    Raises:
        InputError: no student, quantized layers in the teacher or the model, or a model that cannot be copied while
            there is no teacher.
    """

    def __init__(self, model: nn.Module, students: int = 1, teacher: nn.Module | None = None) -> None:
        super().__init__()
        if students < 1:
            raise InputError(f"expected at least one student to distil into, got {students}")
        for who, network in (("student", model), ("teacher", teacher)):
            if network is not None and any(hasattr(module, "fqt_state") for module in network.modules()):
                raise InputError(
                    f"expected the {who} of a distillation as a plain model, got one with quantized layers; "
                    "call remove() of its handle first"
                )
        try:
            self.students = nn.ModuleList([model, *(copy.deepcopy(model) for _ in range(students - 1))])
            self.teacher = copy.deepcopy(model) if teacher is None else teacher
        except (RuntimeError, TypeError) as error:  # what deepcopy raises of tensors in a graph and of locks, files, ..
            raise InputError(
                f"there is no teacher, and {type(model).__name__} cannot be copied to be one ({error}); give a teacher"
            ) from error

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The logits of the teacher, and those of every student."""
        return self.teacher(x), [student(x) for student in self.students]

    def policy(self, policies: Sequence[Policy]) -> Policy:
        """One policy for all networks: none for the teacher, ``policies[j]`` for student j.

        Raises:
            InputError: there is not one for each student.
        """
        if len(policies) != len(self.students):
            raise InputError(f"expected a policy for each of {len(self.students)} students, got {len(policies)}")
        overrides: dict[str, Policy] = {}
        for j, policy in enumerate(policies):
            for pattern, own in policy.overrides.items():
                overrides[f"students.{j}.{pattern}"] = own
            overrides[f"students.{j}.*"] = replace(policy, overrides={})
        return Policy(overrides=overrides, name="+".join(policy.name for policy in policies))

    def skip(self, skip: Skip | None) -> Skip | None:
        """Layers to leave in full precision: by their names in every student, made names in this module."""
        if skip is None:
            return None
        if callable(skip):
            chosen = skip
            own = {module: name for student in self.students for name, module in student.named_modules()}
            return lambda _, module: module in own and chosen(own[module], module)
        patterns = [skip] if isinstance(skip, str) else list(skip)
        return [f"students.{j}.{pattern}" for j in range(len(self.students)) for pattern in patterns]

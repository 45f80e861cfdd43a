"""Joint knowledge distillation: a full-precision teacher and students that learn from each other (arXiv 1908.04680)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fqtstats import models
from fqtstats.policy import Policy

__all__ = ["Distillation"]


@dataclass(frozen=True)
class Distillation:
    """Losses of a teacher and of students on the same batch.

    Attributes:
        kind: ``"kl"``: of softened predictions; ``"logits"``: mean squared difference of the logits.
        temperature: of the softmax.
        student_ce, student_distance: weights of a student's cross entropy and of its distance from the teacher.
        teacher_distance: weight of the teacher's mean distance from the students.
        others: policies of further students, which are trained beside the one of the stage's policy.
    """

    kind: Literal["kl", "logits"] = "kl"
    temperature: float = 1.0
    student_ce: float = 0.7
    student_distance: float = 0.7
    teacher_distance: float = 0.5
    others: tuple[Policy, ...] = ()

    def losses(
        self, teacher: Tensor, students: Sequence[Tensor], targets: Tensor, label_smoothing: float = 0.0
    ) -> tuple[Tensor, list[Tensor]]:
        """The teacher's loss, and each student's, from the logits of one batch."""
        found = []
        for z in students:
            ce = models.cross_entropy(z, targets, label_smoothing)
            found.append(self.student_ce * ce + self.student_distance * self._distance(teacher.detach(), z))
        apart = torch.stack([self._distance(z.detach(), teacher) for z in students]).mean()
        return models.cross_entropy(teacher, targets, label_smoothing) + self.teacher_distance * apart, found

    def _distance(self, fixed: Tensor, moving: Tensor) -> Tensor:
        if self.kind == "logits":
            return F.mse_loss(moving, fixed)
        p, q = ((z / self.temperature).flatten(0, -2).log_softmax(-1) for z in (fixed, moving))
        return self.temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)

"""A frozen float model shows the student what to say: distillation on the outputs of the heads.

    L_logits = T^2 * sum_i KL(softmax(t_i / T) || softmax(s_i / T)) / n
    L_boxes  = sum_i o_i * |d_i - e_i|_1 / n                       (smooth below a difference of 1)

over all places i (anchors, proposals, images), with the teacher's logits t and deltas e and the student's s
and d. o_i is the teacher's probability that place i holds an object, and n = sum_i o_i the number of places
that do, as it sees it. So the loss is one an object, as the detectors' own losses are, and boxes count where
there is something to box. A classifier has o_i = 1.

Reference:
    Hinton, Vinyals, Dean 2015, arXiv 1503.02531; Zhuang et al. 2018, arXiv 1711.00205 and 2022, arXiv
    1908.04680, guide a low-precision network by a full-precision one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbdet.guidance.heads import Scores, recorder_for


class FrozenTeacher:
    """Adds the losses above to a student's training.

    Args:
        student: watched from now on, until `close`.
        teacher: a float model of the same architecture and classes; frozen here, in eval mode.
        logits: weight of the loss on class scores.
        boxes: weight of the loss on deltas; nothing for a classifier.
        temperature: T.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        logits: float = 0.0,
        boxes: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.logits, self.boxes, self.temperature = logits, boxes, temperature
        self._recorder = recorder_for(student)

    def losses(self) -> dict[str, Tensor]:
        """Return the weighted losses `[]` of the student's last forward pass, by name."""
        said = self._recorder.student()
        with torch.no_grad():
            shown = self._recorder.ask(self.teacher)
        pairs = list(zip(said, shown, strict=True))
        losses = {}
        if self.logits:
            losses["hint_logits"] = self.logits * _sum(logits_loss(s, t, self.temperature) for s, t in pairs)
        if self.boxes and shown[0].boxes is not None:
            losses["hint_boxes"] = self.boxes * _sum(boxes_loss(s, t) for s, t in pairs)
        return losses

    def close(self) -> None:
        """Stop watching the student."""
        self._recorder.close()


def objects(teacher: Scores) -> Tensor:
    """Return the probability that each place holds an object, as the teacher sees it, `[N]`."""
    if teacher.logits.shape[1] == 1:
        return teacher.logits[:, 0].sigmoid()
    if teacher.background:
        return 1 - teacher.logits.softmax(1)[:, 0]
    return torch.ones_like(teacher.logits[:, 0])


def logits_loss(student: Scores, teacher: Scores, temperature: float) -> Tensor:
    """Return L_logits, `[]`; a single logit stands for two classes, of which the other one has logit 0."""
    s, t = (_log_probabilities(scores.logits.float() / temperature) for scores in (student, teacher))
    divergence = F.kl_div(s, t, reduction="sum", log_target=True)
    return temperature**2 * divergence / objects(teacher).sum().clamp_min(1)


def boxes_loss(student: Scores, teacher: Scores) -> Tensor:
    """Return L_boxes, `[]`; deltas of several classes count by the teacher's probability of each."""
    assert student.boxes is not None
    assert teacher.boxes is not None
    difference = F.smooth_l1_loss(student.boxes.float(), teacher.boxes.float(), reduction="none").sum(-1)
    if difference.ndim == 2:
        return (difference * _of_classes(teacher)).sum() / objects(teacher).sum().clamp_min(1)
    return (difference * objects(teacher)).sum() / objects(teacher).sum().clamp_min(1)


def _of_classes(teacher: Scores) -> Tensor:
    """Return the teacher's probability of each class, none of the background, `[N, C]`."""
    probabilities = teacher.logits.softmax(1).clone()
    probabilities[:, 0] = 0
    return probabilities


def _log_probabilities(logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    return logits.log_softmax(1)


def _sum(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()

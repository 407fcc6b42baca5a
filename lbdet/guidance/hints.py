"""How far is what one model says from what another one shows? Distillation on the outputs of the heads.

    L_logits = T^2 * sum_i KL(softmax(t_i / T) || softmax(s_i / T)) / n
    L_boxes  = sum_i o_i * |d_i - e_i|_1 / n                       (smooth below a difference of 1)

over all places i (anchors, proposals, images), with the teacher's logits t and deltas e and the student's s
and d. o_i is the teacher's probability that place i holds an object, and n = sum_i o_i, at least 1, the
number of objects that it expects. A small doubt at each of thousands of anchors adds up in n: a trained
SSDlite320 expects 2.8 times the anchors that its own loss counts, so a hint of weight 1 is 2.8 times weaker
than a task loss of as much divergence. A classifier has o_i = 1. In joint training each of the two models is
the other's teacher; one that sees objects everywhere divides what it has to say by their number.

Reference:
    Hinton, Vinyals, Dean 2015, arXiv 1503.02531.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lbdet.guidance.heads import Scores

Divisor = Callable[[Tensor, float], Tensor]
"""From n of the images at hand, `[]`, and its least value, to what their sum is divided by: the larger one.
Where several processes share a batch it takes all of its images into account."""


def objects(teacher: Scores) -> Tensor:
    """Return the probability that each place holds an object, as the teacher sees it, float32 `[N]`."""
    logits = teacher.logits.float()
    if logits.shape[1] == 1:
        return logits[:, 0].sigmoid()
    if teacher.background:
        return 1 - logits.softmax(1)[:, 0]
    return torch.ones_like(logits[:, 0])


def logits_loss(
    student: Scores, teacher: Scores, temperature: float, divisor: Divisor = torch.clamp_min
) -> Tensor:
    """Return L_logits, float32 `[]`; 0 without places.

    A single logit stands for two classes, of which the other one has logit 0.

    Gradient:
        The formula's, to both; detach the one that is not to learn.
    """
    s, t = (_log_probabilities(scores.logits.float() / temperature) for scores in (student, teacher))
    divergence = F.kl_div(s, t, reduction="sum", log_target=True)
    return temperature**2 * divergence / divisor(objects(teacher).sum(), 1)


def boxes_loss(student: Scores, teacher: Scores, divisor: Divisor = torch.clamp_min) -> Tensor:
    """Return L_boxes, float32 `[]`; 0 without places.

    Deltas of several classes count by the teacher's probability of each.

    Gradient:
        As in `logits_loss`.
    """
    assert student.boxes is not None
    assert teacher.boxes is not None
    difference = F.smooth_l1_loss(student.boxes.float(), teacher.boxes.float(), reduction="none").sum(-1)
    share = objects(teacher) if difference.ndim == 1 else _of_classes(teacher)
    return (difference * share).sum() / divisor(objects(teacher).sum(), 1)


def _of_classes(teacher: Scores) -> Tensor:
    """Return the teacher's probability of each class, none of the background, float32 `[N, C]`."""
    probabilities = teacher.logits.float().softmax(1).clone()
    probabilities[:, 0] = 0
    return probabilities


def _log_probabilities(logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    return logits.log_softmax(1)

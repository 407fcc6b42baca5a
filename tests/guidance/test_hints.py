"""The losses on the outputs of heads, against loops."""

from __future__ import annotations

import math

import pytest
import torch

from lbdet.guidance.heads import Scores
from lbdet.guidance.hints import boxes_loss, logits_loss


def test_the_losses_are_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    places, classes, temperature = 5, 3, 2.0
    t, s = (torch.randn(places, classes, generator=generator) * 2 for _ in range(2))
    e, d = (torch.randn(places, 4, generator=generator) for _ in range(2))
    objects, divergence, boxes = 0.0, 0.0, 0.0
    for i in range(places):
        o = 1 - math.exp(t[i, 0]) / sum(math.exp(v) for v in t[i])
        p, q = ([math.exp(v / temperature) for v in row[i]] for row in (t, s))
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        gaps = [abs(float(d[i, k] - e[i, k])) for k in range(4)]
        boxes += o * sum(0.5 * g * g if g < 1 else g - 0.5 for g in gaps)
        objects += o
    n = max(objects, 1.0)
    student, teacher = Scores(s, d, background=True), Scores(t, e, background=True)
    assert logits_loss(student, teacher, temperature).item() == pytest.approx(
        temperature**2 * divergence / n, rel=1e-5
    )
    assert boxes_loss(student, teacher).item() == pytest.approx(boxes / n, rel=1e-5)


def test_a_single_logit_is_a_yes_or_no() -> None:
    t, s = torch.tensor([[1.2], [0.9]]), torch.tensor([[0.3], [0.1]])
    p, q = t.sigmoid(), s.sigmoid()
    assert p.sum() > 1
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum() / p.sum()
    found = logits_loss(Scores(s, None, background=False), Scores(t, None, background=False), 1.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_less_than_one_object_counts_as_one() -> None:
    s, t = (
        Scores(torch.tensor([[logit]]), torch.full((1, 4), logit), background=False) for logit in (0, -3.0)
    )
    p = torch.tensor(-3.0).sigmoid().item()
    assert boxes_loss(s, t).item() == pytest.approx(p * 4 * 2.5, rel=1e-5)


def test_boxes_of_each_class_count_by_the_teachers_probability_and_none_for_background() -> None:
    logits = torch.tensor([[20.0, 0.0, 0.0], [0.0, 20.0, 0.0]])
    zero, one = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    student, teacher = Scores(logits, one, background=True), Scores(logits, zero, background=True)
    assert boxes_loss(student, teacher).item() == pytest.approx(2.0, rel=1e-3)  # 4 * .5, of one of one object


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_calculated_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(300, 3, generator=generator).to(dtype) * 8 for _ in range(2)]
    boxes = [torch.randn(300, 3, 4, generator=generator).to(dtype) for _ in range(2)]
    half = [Scores(a, b, background=True) for a, b in zip(logits, boxes, strict=True)]
    full = [Scores(a.float(), b.float(), background=True) for a, b in zip(logits, boxes, strict=True)]
    assert torch.equal(logits_loss(*half, 2.0), logits_loss(*full, 2.0))
    assert torch.equal(boxes_loss(*half), boxes_loss(*full))


def test_no_places_have_no_loss() -> None:
    empty = Scores(torch.zeros(0, 3), torch.zeros(0, 3, 4), background=True)
    assert logits_loss(empty, empty, 1.0).item() == boxes_loss(empty, empty).item() == 0.0

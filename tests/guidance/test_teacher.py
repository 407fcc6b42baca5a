"""A frozen teacher: what it says, the losses against loops, and what they pull on."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from lbdet.guidance import FrozenTeacher
from lbdet.guidance.heads import Scores, recorder_for
from lbdet.guidance.teacher import boxes_loss, logits_loss
from lbdet.models import MODELS
from lbdet.models.classifiers import CLASSIFIERS
from lbdet.models.detectors import set_image_size

DETECTORS = ("ssd_tiny", "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn")


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if name in CLASSIFIERS:
        return CLASSIFIERS[name](3)
    model = MODELS[name](4)
    if name.startswith("fasterrcnn"):
        set_image_size(model, 64)
    return model


def run(model: nn.Module, name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 64, 64, generator=generator) for _ in range(2)]
    if name in CLASSIFIERS:
        return {"logits": model(torch.stack(images))}
    box = torch.tensor([[8.0, 8.0, 40.0, 48.0]])
    targets = [{"boxes": box, "labels": torch.tensor([1 + i])} for i in range(2)]
    torch.manual_seed(0)
    return model(images, targets)


@pytest.mark.parametrize("name", [*DETECTORS, "resnet20_cifar"])
def test_a_copy_in_the_same_mode_says_what_the_student_said(name: str) -> None:
    student = build(name).eval()
    recorder = recorder_for(student)
    if name not in CLASSIFIERS:
        student.train()
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d | nn.Dropout):
                module.eval()
    run(student, name)
    said, shown = recorder.student(), recorder.ask(copy.deepcopy(student).eval())
    assert len(said) == len(shown) == (2 if name.startswith("faster") else 1)
    for mine, theirs in zip(said, shown, strict=True):
        torch.testing.assert_close(mine.logits, theirs.logits)
        if mine.boxes is not None:
            torch.testing.assert_close(mine.boxes, theirs.boxes)
            assert len(mine.boxes) == len(mine.logits)
        assert logits_loss(mine, theirs, 2.0).item() == pytest.approx(0, abs=1e-4)
    recorder.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


@pytest.mark.parametrize("name", [*DETECTORS, "resnet20_cifar"])
def test_hints_reach_the_student_alone_and_pull_it_to_the_teacher(name: str) -> None:
    student, teacher = build(name), build(name, seed=1)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    guidance = FrozenTeacher(student, teacher, logits=1.0, boxes=0.5)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    totals = []
    for _ in range(6):
        student.train()
        run(student, name)
        losses = guidance.losses()
        assert losses.keys() == ({"hint_logits"} if name in CLASSIFIERS else {"hint_logits", "hint_boxes"})
        total = torch.stack(list(losses.values())).sum()
        totals.append(total.item())
        optimizer.zero_grad()
        total.backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
        assert all(p.grad is None for p in teacher.parameters())
        optimizer.step()
    assert min(totals[-2:]) < totals[0]
    assert not teacher.training
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


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
    t, s = torch.tensor([[1.2], [-0.4]]), torch.tensor([[0.3], [0.1]])
    p, q = t.sigmoid(), s.sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum() / p.sum()
    found = logits_loss(Scores(s, None, background=False), Scores(t, None, background=False), 1.0)
    assert found.item() == pytest.approx(
        expected.item() if p.sum() > 1 else (expected * p.sum()).item(), rel=1e-5
    )


def test_boxes_of_each_class_count_by_the_teachers_probability_and_none_for_background() -> None:
    logits = torch.tensor([[20.0, 0.0, 0.0], [0.0, 20.0, 0.0]])
    zero, one = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    student, teacher = Scores(logits, one, background=True), Scores(logits, zero, background=True)
    assert boxes_loss(student, teacher).item() == pytest.approx(
        2.0, rel=1e-3
    )  # 4 * .5 of one class, one object

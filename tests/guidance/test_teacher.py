"""A frozen teacher: what it pulls on, and what leaves it alone."""

from __future__ import annotations

import pytest
import torch
from guidance.networks import NETWORKS, RESNET, TAPS, build, hooks, losses_of, total

from lbdet.guidance import GUIDANCE, FrozenTeacher


@pytest.mark.parametrize("name", NETWORKS)
def test_hints_reach_the_student_alone_and_pull_it_to_the_teacher(name: str) -> None:
    student, teacher, task_losses = build(name), build(name, seed=1), losses_of(name)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    guidance = FrozenTeacher(
        student, teacher, logits=1.0, boxes=0.5, features=0.5, taps=TAPS[name], tap_bits=4
    )
    assert guidance.trained == []
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    totals = []
    for _ in range(4):
        torch.manual_seed(0)
        task_losses(student)
        losses = guidance.losses(task_losses)
        boxes = set() if name == RESNET else {"hint_boxes"}
        assert losses.keys() == {"hint_logits", "hint_features"} | boxes
        totals.append(total(losses).item())
        optimizer.zero_grad()
        total(losses).backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
        assert all(p.grad is None for p in teacher.parameters())
        optimizer.step()
    assert totals[-1] < totals[0]
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    guidance.close()
    assert hooks(student) == hooks(teacher) == 0


def test_the_task_is_not_asked() -> None:
    student, task_losses = build(RESNET), losses_of(RESNET)
    guidance = FrozenTeacher(student, build(RESNET, seed=1), logits=1.0)
    task_losses(student)
    assert guidance.losses(lambda model: 1 / 0).keys() == {"hint_logits"}  # type: ignore[return-value]


@pytest.mark.parametrize("name", GUIDANCE)
def test_what_has_no_weight_is_no_loss(name: str) -> None:
    student, task_losses = build(RESNET), losses_of(RESNET)
    guidance = GUIDANCE[name](student, build(RESNET, seed=1), boxes=1.0, taps=["layer3"])
    task_losses(student)
    assert guidance.losses(task_losses).keys() == ({"teacher_classification"} if guidance.trained else set())

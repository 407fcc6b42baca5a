"""What is recorded of one model, and what another one says of the same places."""

from __future__ import annotations

import copy

import pytest
import torch
from guidance.networks import NETWORKS, RCNN, RESNET, build, hooks, losses_of
from torch import nn

from lbdet.guidance.heads import Scores, recorder_for
from lbdet.guidance.hints import logits_loss


def freeze_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def assert_same(mine: list[Scores], theirs: list[Scores]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.logits, b.logits)
        assert (a.boxes is None) == (b.boxes is None)
        if a.boxes is not None and b.boxes is not None:
            torch.testing.assert_close(a.boxes, b.boxes)
            assert len(a.boxes) == len(a.logits)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_in_the_same_mode_says_what_the_student_said(name: str) -> None:
    student = build(name)
    freeze_statistics(student)
    other = copy.deepcopy(student).eval()
    recorder = recorder_for(student)
    losses_of(name)(student)
    said, shown = recorder.said(), recorder.ask(other)
    assert len(said) == (2 if name == RCNN else 1)
    assert [s.boxes is None for s in said] == [name == RESNET] * len(said)
    assert_same(said, shown)
    assert logits_loss(said[0], shown[0], 2.0).item() == pytest.approx(0, abs=1e-4)
    recorder.close()
    assert hooks(student) == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_after_a_pass_of_its_own_a_model_says_of_the_students_places_what_it_says_when_asked(
    name: str,
) -> None:
    student, teacher = build(name), build(name, seed=1)
    freeze_statistics(teacher)
    recorder, answers = recorder_for(student), recorder_for(teacher)
    task_losses = losses_of(name)
    torch.manual_seed(0)
    task_losses(student)
    task_losses(teacher)  # its own proposals are others
    asked = recorder.ask(teacher)
    task_losses(teacher)
    assert_same(answers.said_of(recorder), asked)
    if name == RCNN:
        assert not torch.allclose(answers.said()[1].logits, recorder.said()[1].logits)


def test_a_detector_without_proposals_has_no_places_to_compare() -> None:
    student = build(RCNN)
    student.roi_heads.fg_bg_sampler.batch_size_per_image = 0
    recorder = recorder_for(student)
    losses_of(RCNN)(student)
    said, shown = recorder.said()[1], recorder.ask(build(RCNN, seed=1).eval())[1]
    assert said.boxes is not None
    assert said.boxes.shape == (0, 4, 4)
    assert logits_loss(said, shown, 1.0).item() == 0.0

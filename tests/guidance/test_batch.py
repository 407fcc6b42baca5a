"""One transformed batch for two detectors."""

from __future__ import annotations

import pytest
import torch
from guidance.networks import RCNN, RESNET, SSD, build, hooks, losses_of

from lbdet.guidance.batch import SameBatch


@pytest.mark.parametrize("name", [SSD, RCNN])
def test_the_other_detector_takes_the_very_pixels_and_boxes(name: str) -> None:
    student, teacher = build(name), build(name, seed=1)
    if name == RCNN:
        for model in (student, teacher):
            model.transform.min_size = (48, 56, 64, 72, 80, 88)
    batch, seen = SameBatch(student), []
    student.transform.register_forward_hook(lambda _, __, output: seen.append(output))
    for model in (student, teacher):
        model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    keys, transform, shapes = list(teacher.state_dict()), teacher.transform, set()
    for seed in range(4):
        torch.manual_seed(seed)
        losses_of(name)(student)
        with batch.given_to(teacher):
            losses_of(name)(teacher)
            given = teacher.transform([], [])
            assert list(teacher.state_dict()) == keys
        made, mine, theirs = seen[-3:]
        assert theirs is mine
        assert given is made
        assert given[0].tensors is mine
        assert len(given[1]) == 2
        shapes.add(mine.shape)
    assert len(shapes) == 1 if name == SSD else len(shapes) > 1  # several sizes were drawn
    assert teacher.transform is transform
    batch.close()


def test_a_failing_pass_leaves_the_transform_where_it_was() -> None:
    student, teacher = build(SSD), build(SSD, seed=1)
    batch, transform = SameBatch(student), teacher.transform
    losses_of(SSD)(student)
    modules = [name for name, _ in teacher.named_modules()]
    with pytest.raises(ZeroDivisionError), batch.given_to(teacher):
        raise ZeroDivisionError
    assert teacher.transform is transform
    assert [name for name, _ in teacher.named_modules()] == modules
    batch.close()
    assert hooks(student) == 0


def test_a_classifier_takes_its_input_as_it_is() -> None:
    student, teacher = build(RESNET), build(RESNET, seed=1)
    batch = SameBatch(student)
    expected = losses_of(RESNET)(teacher)
    with batch.given_to(teacher):
        found = losses_of(RESNET)(teacher)
    assert torch.equal(found["classification"], expected["classification"])

"""Joint training: each model gets its own losses, and nothing else of the other."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from guidance.networks import NETWORKS, RCNN, RESNET, SSD, TAPS, build, hooks, losses_of, total
from torch import Tensor, nn

from lbdet.convert import quantize_model, set_float
from lbdet.guidance import Joint
from lbdet.guidance.heads import recorder_for
from lbdet.guidance.hints import boxes_loss, logits_loss

WEIGHTS = {"logits": 1.0, "boxes": 0.5, "temperature": 2.0, "features": 0.25}


@pytest.fixture(autouse=True)
def one_thread() -> Iterable[None]:
    """Sums in one order, to compare them bit by bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def part(losses: dict[str, Tensor], teachers: bool) -> dict[str, Tensor]:
    return {name: loss for name, loss in losses.items() if name.startswith("teacher_") == teachers}


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_each_model_gets_the_gradients_of_its_own_losses_alone(name: str) -> None:
    student, teacher, task_losses = build(name), build(name, seed=1), losses_of(name)
    guidance = Joint(student, teacher, **WEIGHTS, taps=TAPS[name], tap_bits=4)
    torch.manual_seed(0)
    own = task_losses(student)
    losses = own | guidance.losses(task_losses)
    hints = {"hint_logits", "hint_features"} | (set() if name == RESNET else {"hint_boxes"})
    assert part(losses, False).keys() == own.keys() | hints
    assert part(losses, True).keys() == {f"teacher_{loss}" for loss in own.keys() | hints}
    for mine, other, teachers in ((student, teacher, False), (teacher, student, True)):
        assert all(gradient is None for gradient in gradients(total(part(losses, teachers)), other))
        assert all(loss.requires_grad for loss in losses.values())
        found = gradients(total({hint: losses["teacher_" * teachers + hint] for hint in hints}), mine)
        assert sum(g.abs().sum().item() for g in found if g is not None) > 0
    expected = [g for side, model in ((False, student), (True, teacher))
                for g in gradients(total(part(losses, side)), model)]  # fmt: skip
    total(losses).backward()
    found = [p.grad for model in (student, teacher) for p in model.parameters()]
    for a, b in zip(found, expected, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_losses_are_those_of_two_models_that_are_asked_one_after_the_other(name: str) -> None:
    student, teacher, task_losses = build(name), build(name, seed=1), losses_of(name)
    twin, recorder = copy.deepcopy(teacher), recorder_for(student)  # batch norm of both by the batch
    if name == RCNN:
        twin.transform.torch_choice = lambda sizes: sizes[0]  # and no number drawn for it
    guidance = Joint(student, teacher, **WEIGHTS)
    torch.manual_seed(0)
    task_losses(student)
    state = torch.get_rng_state()
    losses = guidance.losses(task_losses)
    assert torch.equal(torch.get_rng_state(), state)
    for loss, value in task_losses(twin).items():
        torch.testing.assert_close(losses.pop(f"teacher_{loss}"), value)
    pairs = list(zip(recorder.said(), recorder.ask(twin), strict=True))
    for prefix, sides in (("", pairs), ("teacher_", [(t, s) for s, t in pairs])):
        expected = sum(logits_loss(s, t, 2.0) for s, t in sides)
        torch.testing.assert_close(losses.pop(f"{prefix}hint_logits"), expected)
        if name != RESNET:
            expected = 0.5 * sum(boxes_loss(s, t) for s, t in sides)
            torch.testing.assert_close(losses.pop(f"{prefix}hint_boxes"), expected)
    assert not losses


@pytest.mark.parametrize("name", [SSD, RCNN, RESNET])
def test_the_teacher_runs_once_a_batch_and_learns(name: str) -> None:
    student, teacher, task_losses = build(name), build(name, seed=1), losses_of(name)
    guidance = Joint(student, teacher, **WEIGHTS, taps=TAPS[name])
    assert guidance.trained == [teacher]
    optimizer = torch.optim.SGD(teacher.parameters(), lr=1e-3)
    before = copy.deepcopy(teacher.state_dict())
    runs: list[object] = []
    first = teacher.conv1 if name == RESNET else teacher.backbone
    handle = first.register_forward_hook(lambda *_: runs.append(None))
    totals = []
    for update in range(2 if name == RCNN else 3):
        torch.manual_seed(0)
        task_losses(student)
        losses = part(guidance.losses(task_losses), True)
        assert len(runs) == update + 1
        totals.append(total(losses).item())
        optimizer.zero_grad()
        total(losses).backward()
        optimizer.step()
    assert totals[-1] < totals[0]
    moved = {key for key, value in teacher.state_dict().items() if not torch.equal(before[key], value)}
    assert moved >= {key for key in before if key.endswith(("conv1.weight", "bn1.running_mean"))}
    assert moved >= {key for key, parameter in teacher.named_parameters() if parameter.ndim > 1}
    handle.remove()
    guidance.close()
    assert hooks(student) == hooks(teacher) == 0


def train(name: str, student: nn.Module, guidance: Joint | None) -> tuple[dict[str, Tensor], Tensor]:
    """Make some updates of two batches each; return the student's state and the generator's."""
    models = [student, *(guidance.trained if guidance else [])]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9) for model in models]
    for step in range(1 if name == RCNN else 2):
        torch.manual_seed(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for sizes in ((64, 48), (48, 64)):
            task_losses = losses_of(name, sizes)
            losses = task_losses(student)
            losses |= guidance.losses(task_losses) if guidance else {}
            (total(losses) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
    return student.state_dict(), torch.get_rng_state()


@pytest.mark.parametrize("name", [SSD, RCNN, RESNET])
def test_without_weights_the_student_trains_as_without_guidance_bit_for_bit(name: str) -> None:
    def student() -> nn.Module:
        model = build(name)
        if name == RESNET:
            model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
        elif name == RCNN:
            model.transform.min_size = (48, 64, 80)
        return model

    alone, state_alone = train(name, student(), None)
    guided, teacher = student(), student()
    found, state = train(name, guided, Joint(guided, teacher))
    assert all(torch.equal(alone[key], value) for key, value in found.items())
    assert torch.equal(state, state_alone)
    assert any(not torch.equal(alone[key], value) for key, value in student().state_dict().items())


def test_the_teacher_learns_where_the_student_does_and_quantizers_of_it_are_left_alone() -> None:
    student = build(SSD)
    for parameter in student.backbone.stem.parameters():
        parameter.requires_grad_(False)
    quantize_model(student, "W4")
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    extra = nn.Parameter(torch.zeros(()))
    teacher.head.classification_head.module_list[0].weight_quantizer.register_parameter("scale", extra)
    set_float(teacher)
    guidance, task_losses = Joint(student, teacher, logits=1.0, boxes=1.0), losses_of(SSD)
    assert all(module.training for module in teacher.modules())
    learns = {key: p.requires_grad for key, p in student.named_parameters()}
    assert {key for key, value in learns.items() if not value} == {
        key for key in learns if key.startswith("backbone.stem.")
    }
    for key, parameter in teacher.named_parameters():
        assert parameter.requires_grad == learns.get(key, True)
    task_losses(student)
    total(guidance.losses(task_losses)).backward()
    assert extra.grad is None
    for key, parameter in teacher.named_parameters():
        assert parameter is extra or (parameter.grad is not None) == learns[key]


@pytest.mark.parametrize("name", [SSD, RCNN])
def test_a_batch_without_any_object_has_finite_losses(name: str) -> None:
    student, task_losses = build(name), losses_of(name, objects=0)
    guidance = Joint(student, build(name, seed=1), **WEIGHTS, taps=TAPS[name], tap_bits=2)
    losses = task_losses(student) | guidance.losses(task_losses)
    assert total(losses).isfinite()
    total(losses).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("name", [SSD, RESNET])
def test_under_autocast_each_model_has_its_gradients_too(name: str) -> None:
    student, teacher, task_losses = build(name), build(name, seed=1), losses_of(name)
    guidance = Joint(student, teacher, **WEIGHTS, taps=TAPS[name], tap_bits=4)
    with torch.autocast("cpu", torch.bfloat16):
        losses = task_losses(student) | guidance.losses(task_losses)
    for mine, other, teachers in ((student, teacher, False), (teacher, student, True)):
        loss = total(part(losses, teachers))
        assert loss.dtype == torch.float32
        assert all(gradient is None for gradient in gradients(loss, other))
        assert all(g is not None and g.isfinite().all() for g in gradients(loss, mine))


def test_a_teacher_in_eval_mode_is_a_mistake_of_the_loop() -> None:
    student, teacher, task_losses = build(SSD), build(SSD), losses_of(SSD)
    guidance = Joint(student, teacher)
    task_losses(student)
    teacher.eval()
    with pytest.raises(AssertionError):
        guidance.losses(task_losses)

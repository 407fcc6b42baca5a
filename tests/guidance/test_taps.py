"""Hints on feature maps."""

from __future__ import annotations

import pytest
import torch
from guidance.networks import NETWORKS, RCNN, RESNET, SSD, TAPS, build, hooks, losses_of
from torch import Tensor

from lbdet.errors import NumericsError, UserError
from lbdet.guidance import FrozenTeacher, Joint
from lbdet.guidance.taps import Taps, features_loss, rounded
from lbdet.quant.activations import direct_range


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def by_loops(s: Tensor, t: Tensor) -> float:
    gap = power = 0.0
    for a, b in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True):
        gap += (a - b) ** 2
        power += (a * a + b * b) / 2
    return gap / power if power else 0.0


def test_the_loss_is_its_formula_and_has_no_unit() -> None:
    s, t = randn(2, 3, 4, 5), randn(2, 3, 4, 6)[..., 1:].relu()
    assert features_loss(s, t).item() == pytest.approx(by_loops(s, t), rel=1e-5)
    assert features_loss(s * 2.0**20, t * 2.0**20).item() == pytest.approx(by_loops(s, t), rel=1e-5)
    for other, expected in ((t, 0), (2 * t, 0.4), (0 * t, 2), (-t, 4)):
        assert features_loss(t, other).item() == features_loss(other, t).item() == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (0, 8), ()])
def test_maps_of_zeros_or_nothing_have_neither_a_loss_nor_a_gradient(shape: tuple[int, ...]) -> None:
    s = torch.zeros(shape, requires_grad=True)
    loss = features_loss(s, torch.zeros(shape))
    assert loss.item() == 0.0
    assert torch.equal(torch.autograd.grad(loss, s)[0], torch.zeros(shape))


def test_the_gradient_leads_to_the_hint_and_takes_the_denominator_as_constant() -> None:
    s, t = randn(2, 3, 4, 4).requires_grad_(), randn(4, 3, 4, 4)[2:]
    (found,) = torch.autograd.grad(features_loss(s, t), s)
    power = (s.detach().square().sum() + t.square().sum()) / 2
    torch.testing.assert_close(found, 2 * (s.detach() - t) / power)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_calculated_in_float32(dtype: torch.dtype) -> None:
    s, t = (randn(2, 8, 60, 60) * 40).to(dtype), torch.ones(2, 8, 60, 60, dtype=dtype)  # squares over 65504
    assert features_loss(s, t).dtype == torch.float32
    assert torch.equal(features_loss(s, t), features_loss(s.float(), t.float()))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(2, 3, 40, 41), (50, 30), (300,), ()])
def test_a_rounded_map_has_few_values_of_the_best_range(bits: int, shape: tuple[int, ...]) -> None:
    for x in (randn(*shape), randn(*shape).relu(), randn(*shape).to(torch.bfloat16)):
        q = rounded(x, bits)
        assert (q.dtype, q.shape) == (x.dtype, x.shape)
        assert len(q.unique()) <= 2**bits
        if len(shape) < 4:  # all of it is the sample
            scale, low = direct_range(x, bits, "mse", -1)
            levels = (torch.arange(2**bits) + low) * scale
            nearest = levels[(x.float().flatten()[:, None] - levels).abs().argmin(1)].view(shape)
            torch.testing.assert_close(q, nearest.to(x.dtype))
        else:
            assert (q - x).square().sum() <= [0, 0, 0.15, 0, 0.015, 0, 0, 0, 1e-4][bits] * x.square().sum()


def test_a_map_stays_as_it_is_without_bits_and_zeros_stay_zeros() -> None:
    x = randn(2, 3, 8, 8).requires_grad_()
    before = x.detach().clone()
    assert torch.equal(rounded(x, None), before)
    assert not rounded(x, None).requires_grad
    assert not rounded(x, 4).requires_grad
    assert torch.equal(x.detach(), before)
    for zeros in (torch.zeros(2, 3, 4, 4), torch.zeros(0, 7)):
        assert torch.equal(rounded(zeros, 4), zeros)


def test_a_map_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NumericsError, match="not finite"):
        rounded(torch.tensor([[1.0, float("nan")]]), 4)


def test_a_tap_that_does_not_exist_is_refused_with_the_closest_name() -> None:
    student, teacher = build(RESNET), build(RESNET, seed=1)
    for guidance in (FrozenTeacher, Joint):
        with pytest.raises(UserError) as error:
            guidance(student, teacher, features=1.0, taps=["layer2", "layer33"])
        assert str(error.value) == (
            "guidance.taps: must name modules of the model, got 'layer33'; closest: 'layer3'"
        )
    with pytest.raises(UserError, match=r"got ''$"):
        Taps(student, teacher, [""])
    assert hooks(student) == hooks(teacher) == 0


def test_a_tap_without_maps_in_both_models_is_refused_at_first_use() -> None:
    task_losses = losses_of(RCNN)
    for tap, fault in (
        (
            "rpn.anchor_generator",
            "must name modules that both models run, got 'rpn.anchor_generator'; name one",
        ),
        ("rpn", "must name modules that both models run, got 'rpn'"),
    ):
        student = build(RCNN)
        guidance = FrozenTeacher(student, build(RCNN, seed=1), features=1.0, taps=[tap])
        task_losses(student)
        with pytest.raises(UserError, match=f"^guidance.taps: {fault}"):
            guidance.losses(task_losses)
    student = build(RCNN)
    guidance = Joint(student, build(RCNN, seed=1), features=1.0, taps=["transform"])
    task_losses(student)
    with pytest.raises(UserError, match="must name modules that both models run, got 'transform'"):
        guidance.losses(task_losses)


def test_an_output_without_float_tensors_is_refused_at_first_use() -> None:
    class Strange(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.inner(x)
            return x

    models = []
    for _ in range(2):
        model = Strange()
        model.inner = torch.nn.Identity()
        models.append(model)
    taps = Taps(*models, ["inner"])
    for output in ("text", [1], {"a": torch.tensor([1])}, None):
        for model in models:
            model(output)
        kind = type(output).__name__
        with pytest.raises(UserError, match=f"must hold float tensors, got {kind} of 'inner'; name a layer"):
            taps.pairs()
    models[0](torch.zeros(2, 3))
    models[1]([torch.zeros(2, 3), torch.zeros(1)])
    with pytest.raises(
        UserError, match=r"one shape in both models, got \[\[2, 3\]\] and \[\[2, 3\], \[1\]\]"
    ):
        taps.pairs()
    taps.close()


def test_dicts_lists_and_tuples_of_maps_count_in_order() -> None:
    models = [torch.nn.Sequential(torch.nn.Identity()) for _ in range(2)]
    taps = Taps(*models, ["0"])
    maps = [torch.full((1,), float(i)) for i in range(5)]
    for model in models:
        model({"a": maps[0], "b": [maps[1], (maps[2], maps[3])], "c": torch.tensor([1]), "d": maps[4]})
    assert [(s.item(), t.item()) for s, t in taps.pairs()] == [(i, i) for i in range(5)]


@pytest.mark.parametrize("name", NETWORKS)
def test_equal_networks_have_no_loss_and_others_that_of_their_maps(name: str) -> None:
    student, task_losses = build(name).eval(), losses_of(name)
    twin, other = build(name), build(name, seed=1)
    frozen = [FrozenTeacher(student, teacher, features=0.5, taps=TAPS[name]) for teacher in (twin, other)]
    if name != RESNET:  # only a detector in training mode computes losses; batch norm as the teacher's
        student.training = student.transform.training = True
        for part in ("rpn", "roi_heads") if name == RCNN else ():
            getattr(student, part).training = True
    task_losses(student)
    zero, some = (guidance.losses(task_losses)["hint_features"] for guidance in frozen)
    assert zero.item() == pytest.approx(0, abs=1e-9)
    pairs = frozen[1]._taps.pairs()
    assert len(pairs) == {SSD: 5, RCNN: 4}.get(name, len(pairs)) > 1
    expected = sum(features_loss(s, t).item() for s, t in pairs) / len(pairs)
    assert some.item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_the_teachers_map_is_rounded_and_the_students_is_not() -> None:
    student, teacher, task_losses = build(RESNET), build(RESNET, seed=1), losses_of(RESNET)
    guidance = Joint(student, teacher, features=1.0, taps=["layer3"], tap_bits=2)
    task_losses(student)
    losses = guidance.losses(task_losses)
    ((s, t),) = guidance._taps.pairs()
    assert losses["hint_features"].item() == pytest.approx(features_loss(s, rounded(t, 2)).item())
    assert losses["teacher_hint_features"].item() == pytest.approx(features_loss(t, s).item())
    assert losses["hint_features"].item() != pytest.approx(losses["teacher_hint_features"].item(), rel=1e-3)

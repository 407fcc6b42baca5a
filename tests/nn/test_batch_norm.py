"""Batch norm is trained or frozen as asked, and recalibrated to the statistics of the images."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lbdet.errors import UserError
from lbdet.models import MODELS
from lbdet.nn.batch_norm import freeze_batch_norm, recalibrate_bn, set_training_mode


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5),
    ).eval()


def images(n: int) -> Tensor:
    """Images of different brightness, so that batches have different means."""
    generator = torch.Generator().manual_seed(n)
    return torch.rand(n, 3, 8, 8, generator=generator) * torch.linspace(0.1, 3, n).view(n, 1, 1, 1)


def oracle(model: nn.Sequential, batches: list[Tensor]) -> dict[str, Tensor]:
    """Pooled statistics by definition: both layers keep all they have seen, and normalise with that."""
    conv1, bn1, _, _, conv2, _ = model
    seen1, seen2 = [], []
    for batch in batches:
        x = conv1(batch)
        seen1.append(x.transpose(0, 1).flatten(1))
        pooled = torch.cat(seen1, 1)
        mean, var = pooled.mean(1), pooled.var(1)
        x = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + bn1.eps).sqrt()
        seen2.append(conv2(x.relu()).transpose(0, 1).flatten(1))
    all1, all2 = torch.cat(seen1, 1), torch.cat(seen2, 1)
    return {"1.mean": all1.mean(1), "1.var": all1.var(1), "5.mean": all2.mean(1), "5.var": all2.var(1)}


def statistics(model: nn.Sequential) -> dict[str, Tensor]:
    found = {}
    for i in (1, 5):
        found |= {f"{i}.mean": model[i].running_mean.clone(), f"{i}.var": model[i].running_var.clone()}
    return found


@pytest.mark.parametrize("sizes", [[12], [4, 4, 4], [1, 2, 9], [1] * 12])
def test_recalibrated_statistics_are_those_of_all_inputs_seen(sizes: list[int]) -> None:
    model = net()
    batches = list(images(12).split(sizes))
    with torch.no_grad():
        expected = oracle(model, batches)
    assert recalibrate_bn(model, batches) == 12
    found = statistics(model)
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_one_batch_gives_what_training_on_it_alone_would() -> None:
    by_training, by_recalibration = net(), net()
    by_training[3].p = 0.0
    for i in (1, 5):
        by_training[i].momentum = None
    with torch.no_grad():
        by_training.train()(images(64))
    recalibrate_bn(by_recalibration, [images(64)])
    expected, found = statistics(by_training), statistics(by_recalibration)
    for key in expected:  # training normalises with the biased variance: a difference of 1 / (64 * 36)
        torch.testing.assert_close(found[key], expected[key], rtol=2e-3, atol=1e-3)


def test_the_first_layer_does_not_depend_on_the_split_into_batches() -> None:
    whole, split = net(), net()
    recalibrate_bn(whole, [images(12)])
    recalibrate_bn(split, images(12).split([5, 1, 6]))
    torch.testing.assert_close(split[1].running_mean, whole[1].running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(split[1].running_var, whole[1].running_var, rtol=1e-6, atol=1e-6)


def test_old_statistics_have_no_influence() -> None:
    fresh, used = net(), net()
    for i in (1, 5):
        used[i].running_mean.fill_(30.0)
        used[i].running_var.fill_(900.0)
    for model in (fresh, used):
        recalibrate_bn(model, images(12).split(4))
    assert all(
        torch.equal(a, b) for a, b in zip(statistics(fresh).values(), statistics(used).values(), strict=True)
    )


def test_one_pixel_maps_of_one_image_are_recalibrated() -> None:
    """Where batch norm in training mode would refuse."""
    model = nn.Sequential(nn.BatchNorm2d(3))
    batches = [torch.randn(1, 3, 1, 1) for _ in range(6)]
    recalibrate_bn(model, batches)
    torch.testing.assert_close(model[0].running_var, torch.cat(batches).flatten(1).var(0))


def test_modes_parameters_and_hooks_are_as_before_also_when_a_batch_fails() -> None:
    def failing() -> Iterator[Tensor]:
        yield images(4)
        raise OSError("a damaged image")

    model = net()
    set_training_mode(model, "frozen")
    modes = [module.training for module in model.modules()]
    parameters = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(OSError, match="a damaged image"):
        recalibrate_bn(model, failing())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
    after = statistics(model)
    model.eval()(images(2))
    assert all(torch.equal(a, b) for a, b in zip(after.values(), statistics(model).values(), strict=True))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_batch_norm_reads_no_images() -> None:
    def unread() -> Iterator[Tensor]:
        raise AssertionError("read")
        yield

    assert recalibrate_bn(nn.Sequential(nn.Conv2d(3, 4, 3)), unread()) == 0


def test_no_batches_change_nothing() -> None:
    model = net()
    assert recalibrate_bn(model, []) == 0
    assert torch.equal(model[1].running_var, torch.ones(4))


@pytest.mark.parametrize("name", ["ssd_tiny", "fasterrcnn_resnet18_fpn"])
def test_a_detector_is_recalibrated_on_lists_of_images(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name](4)
    if name.startswith("fasterrcnn"):
        model.transform.min_size = (64,)
    assert (
        recalibrate_bn(model, [[torch.rand(3, 64, 80), torch.rand(3, 80, 64)], [torch.rand(3, 70, 70)]]) == 3
    )
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(not torch.equal(m.running_mean, torch.zeros_like(m.running_mean)) for m in layers)
    assert all((m.running_var >= 0).all() and m.running_var.isfinite().all() for m in layers)


def test_frozen_batch_norm_keeps_its_statistics_while_the_rest_trains() -> None:
    model = net()
    before = statistics(model)
    set_training_mode(model, "frozen")
    model(images(4))
    assert model.training
    assert model[3].training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), statistics(model).values(), strict=True))
    set_training_mode(model, "train")
    model(images(4))
    assert not torch.equal(before["1.mean"], model[1].running_mean)


def test_another_mode_is_refused() -> None:
    with pytest.raises(
        UserError, match="batch_norm: must be 'train' or 'frozen', got 'freeze'; choose one of them"
    ):
        set_training_mode(net(), "freeze")


def test_freezing_excludes_gamma_and_beta_and_nothing_else() -> None:
    model = net()
    freeze_batch_norm(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["0.weight", "0.bias", "4.weight", "4.bias"]

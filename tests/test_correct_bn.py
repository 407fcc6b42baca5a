"""Batch norm corrected for the error of the weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lbdet.convert import correct_bn, quantize_model, set_scheduled_precision
from lbdet.errors import UserError
from lbdet.nn.batch_norm import recalibrate_bn


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2.0)
    model[1].weight.data.uniform_(0.5, 2.0)
    return model.eval()


def _moments(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    output = model(images).double()
    return output.mean((0, 2, 3)), output.var((0, 2, 3))


@torch.no_grad()
@pytest.mark.parametrize("precision", ["W2", "W4"])
def test_a_channel_leaves_the_first_batch_norm_with_the_floats_mean_and_variance(precision: str) -> None:
    model, images = _network(), torch.rand(8, 3, 16, 16)
    mean, var = _moments(model, images)
    quantize_model(model, precision)
    assert not torch.allclose(_moments(model, images)[1], var, rtol=1e-3)

    assert correct_bn(model, lambda: [images[:4], images[4:]]) == 8

    torch.testing.assert_close(_moments(model, images), (mean, var), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_at_float_it_changes_nothing() -> None:
    model, images = _network(), torch.rand(4, 3, 16, 16)
    quantize_model(model, "float")
    before = [b.clone() for b in model.buffers()]
    correct_bn(model, lambda: [images])
    for old, new in zip(before, model.buffers(), strict=True):
        torch.testing.assert_close(old, new)


@torch.no_grad()
def test_with_statistics_of_the_same_images_it_is_recalibration() -> None:
    model, images = _network(), torch.rand(4, 3, 16, 16)
    quantize_model(model, "float")
    recalibrate_bn(model, [images])
    set_scheduled_precision(model, "W2")
    correct_bn(model, lambda: [images])
    corrected = model[1].running_mean.clone(), model[1].running_var.clone()
    recalibrate_bn(model, [images])
    torch.testing.assert_close(corrected, (model[1].running_mean, model[1].running_var), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_precision_of_every_layer_is_as_before() -> None:
    model = _network()
    quantize_model(model, "W3")
    correct_bn(model, lambda: [torch.rand(2, 3, 16, 16)])
    assert str(model[0].precision) == "W3"


@pytest.mark.parametrize("whole", [0, 1, 3])
def test_an_interrupt_leaves_widths_and_statistics_as_they_were(whole: int) -> None:
    def interrupted() -> Iterator[torch.Tensor]:
        for batch in torch.rand(2, 2, 3, 16, 16):
            if next(given) == whole:
                raise KeyboardInterrupt
            yield batch

    model, given = _network(), itertools.count()
    quantize_model(model, "W3")
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(KeyboardInterrupt):
        correct_bn(model, interrupted)
    assert str(model[0].precision) == "W3"
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_a_spent_iterator_is_refused_and_changes_nothing() -> None:
    model, spent = _network(), iter([torch.rand(2, 3, 16, 16)])
    quantize_model(model, "W3")
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(UserError, match="batches: must give the same images at each call, got 2 then 0"):
        correct_bn(model, lambda: spent)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))

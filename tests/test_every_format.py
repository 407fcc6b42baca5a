"""Every format trains every model: one step of the whole loop's parts, for detectors and classifiers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from lbdet.convert import (
    ActivationFormat,
    WeightFormat,
    calibrate_activations,
    quantization_losses,
    quantize_model,
    settle,
)
from lbdet.engine.optim import build_optimizer
from lbdet.engine.task import ClassificationTask, DetectionTask, Task
from lbdet.errors import UserError
from lbdet.models import MODELS
from lbdet.models.classifiers import CLASSIFIERS
from lbdet.models.detectors import set_image_size
from lbdet.nn import FORMATS
from lbdet.nn.batch_norm import set_training_mode

QUICK_MODELS = ("ssd_tiny", "resnet20_cifar")
WIDTHS = {"lbw": "W2A2", "uniform": "W2A2", "dorefa": "W2A2", "binary": "W1A1", "learned_levels": "W2A2"}
CLASSES = 3
CASES = [
    pytest.param(
        model,
        weight,
        inputs,
        marks=[] if model in QUICK_MODELS else pytest.mark.slow,
        id=f"{model}-{weight}-{inputs}",
    )
    for model, (weight, inputs) in itertools.product(
        [*MODELS, *CLASSIFIERS],
        [(name, "dorefa" if name == "dorefa" else "uniform") for name in FORMATS],
    )
]


def build(name: str) -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    if name in CLASSIFIERS:
        return CLASSIFIERS[name](CLASSES), ClassificationTask()
    model = MODELS[name](CLASSES + 1)
    if name.startswith("fasterrcnn"):
        set_image_size(model, 64)
    return model, DetectionTask()


def batch(task: Task, name: str) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of noise with an object each."""
    size = 64 if name == "alexnet" or isinstance(task, DetectionTask) else 32
    generator = torch.Generator().manual_seed(1)
    images = list(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator))
    box = torch.tensor([[8.0, 8.0, 40.0, 48.0]])
    if isinstance(task, DetectionTask):
        return images, [{"boxes": box, "labels": torch.tensor([1 + i])} for i in range(2)]
    return images, [{"label": torch.tensor(i)} for i in range(2)]


@pytest.mark.parametrize(("name", "weight", "inputs"), CASES)
def test_every_format_trains_every_model_for_a_step(name: str, weight: str, inputs: str) -> None:
    model, task = build(name)
    quantize_model(model, WIDTHS[weight], WeightFormat(weight), ActivationFormat(inputs))
    images, targets = batch(task, name)
    floats = [image.float() / 255 for image in images]
    calibrate_activations(
        model, lambda: [floats if isinstance(task, DetectionTask) else torch.stack(floats)], True
    )
    optimizer = build_optimizer(model, "sgd", 1e-4, 0.0, 0.9)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    set_training_mode(model, "train")
    losses = task.losses(model, images, targets) | quantization_losses(model)
    loss = torch.stack(list(losses.values())).sum()
    loss.backward()
    optimizer.step()
    settle(model)
    assert math.isfinite(loss.item())
    assert all(value.isfinite().all() for value in model.state_dict().values())
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert any(key.endswith("weight") for key in moved)
    if weight == "learned_levels":
        assert any(key.endswith("levels_2") for key in moved)
    if inputs == "uniform":
        assert any("activation_quantizer.log_scale" in key for key in moved)


def test_binary_activations_train_where_the_sign_comes_before_the_convolution() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(800, 3),
    )
    quantize_model(model, "W1A1", WeightFormat("binary"), ActivationFormat("binary"), keep_float=["0", "5"])
    x = torch.randn(4, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    calibrate_activations(model, lambda: [x], True)
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
    assert all(0 < p.grad.abs().max() < 100 for p in model.parameters() if p.grad is not None and p.ndim > 1)


def test_binary_activations_behind_a_relu_are_refused() -> None:
    model, _ = build("resnet20_cifar")
    quantize_model(model, "W1A1", WeightFormat("binary"), ActivationFormat("binary"), keep_float=["conv1"])
    with pytest.raises(UserError) as caught:
        calibrate_activations(model, lambda: [torch.rand(2, 3, 32, 32)])
    assert str(caught.value) == (
        "layer1.0.conv1 and 18 other layers: format 'binary' keeps the sign of inputs, but these are never "
        "negative (behind a ReLU); use format 'uniform', which has 1 bit too"
    )


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_converted_classifier_at_full_precision_is_the_original_bit_for_bit(name: str) -> None:
    model, task = build(name)
    model.eval()
    images = torch.stack(batch(task, name)[0]).float()
    with torch.no_grad():
        expected = model(images)
        quantize_model(model, "float")
        assert torch.equal(model(images), expected)

"""How much longer does a training step take at low precision than in float32?

    OMP_NUM_THREADS=1 python benchmarks/step.py                                   # all models and formats
    python benchmarks/step.py --models resnet18_b2 --formats lbw uniform_w4a4 --output step.json

One process holds a model in float and once more for each format: same weights, images and targets, all of a
fixed seed (random weights do, as no time depends on them). They take one step each in turn, so that a change
of clock slows all of them; the ratio to the float step is taken within a turn, and its median over turns is
printed. A step is forward, backward, SGD with momentum, and what the format does after an update. The peak
memory is that of the tensors that a step has alive at the same time, beside those that outlive it.

Brevitas (`brevitas`, `brevitas_w4a4`) and torchao's PARQ are measured in the same model where they are
installed. They find their scales in other ways; compared is only the time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import lbdet
from lbdet.convert import ActivationFormat, WeightFormat, hold_weights
from lbdet.convert.layers import settle
from lbdet.engine.memory import keep_freed_memory
from lbdet.models import build_detector
from lbdet.models.detectors import set_image_size

CLASSES = [f"class{i}" for i in range(20)]


@dataclass(frozen=True)
class Case:
    """A model and the size of its batch."""

    build: Callable[[], nn.Module]
    batch_size: int
    side: int
    """of the images, in pixels"""


@dataclass(frozen=True)
class Contender:
    """What makes a float model one of low precision."""

    convert: Callable[[nn.Module, Any], nn.Module]
    """from the model and its images"""
    optimizer: Callable[[nn.Module], Any]
    after_update: Callable[[nn.Module], None]
    needs: str | None = None
    """a package that may be missing"""


def fasterrcnn() -> nn.Module:
    """Build Faster R-CNN for images of 320 pixels, where the weights are a large part of the work."""
    model = build_detector("fasterrcnn_resnet18_fpn", CLASSES)
    set_image_size(model, 320)
    return model


def resnet18() -> nn.Module:
    """Build torchvision's ResNet-18."""
    return torchvision.models.resnet18(num_classes=len(CLASSES))


CASES = {
    "ssdlite320_b8": Case(lambda: build_detector("ssdlite320_mobilenet_v3_large", CLASSES), 8, 320),
    "ssd300_b4": Case(lambda: build_detector("ssd300_vgg16", CLASSES), 4, 300),
    "fasterrcnn_r18_b2": Case(fasterrcnn, 2, 320),
    "resnet18_b16": Case(resnet18, 16, 224),
    "resnet18_b2": Case(resnet18, 2, 224),
}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of all but PARQ; its steps are too small to change a loss."""
    return torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)


def nothing(model: nn.Module) -> None:
    """Do nothing after an update."""


def keep_float(model: nn.Module, images: Any) -> nn.Module:
    """Return the model as it is."""
    return model


def ours(precision: str, name: str = "lbw", **options: object) -> Contender:
    """Return lbdet's layers with a format of weights; inputs are uniform."""

    def convert(model: nn.Module, images: Any) -> nn.Module:
        with contextlib.redirect_stdout(None):
            lbdet.quantize_model(model, precision, WeightFormat(name, options), ActivationFormat())
        lbdet.calibrate_activations(model, lambda: [images], use_batch_statistics=True)
        return model

    return Contender(convert, sgd, settle)


def brevitas(**options: int) -> Contender:
    """Return Brevitas' layers: 4-bit weights of one scale a channel, without or with 4-bit inputs."""

    def convert(model: nn.Module, images: Any) -> nn.Module:
        from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

        weights = {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": 4}
        replace_layers(model, input_quant=Int8ActPerTensorFloat if options else None, **weights, **options)
        return model

    return Contender(convert, sgd, nothing, "brevitas")


def twin(layer: nn.Conv2d | nn.Linear, **options: Any) -> nn.Module:
    """Return Brevitas' layer with the parameters of `layer`, copied."""
    from brevitas.nn import QuantConv2d, QuantLinear

    shape: Any = layer
    options |= {"bias": layer.bias is not None}
    if isinstance(layer, nn.Linear):
        found = QuantLinear(layer.in_features, layer.out_features, **options)
    else:
        found = QuantConv2d(
            shape.in_channels, shape.out_channels, shape.kernel_size, shape.stride, shape.padding,
            shape.dilation, shape.groups, **options,
        )  # fmt: skip
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            found.get_parameter(name).copy_(parameter)
    return found


def replace_layers(model: nn.Module, **options: Any) -> int:
    """Put `twin`s into the place of all convolutions and linear layers; return their number."""
    found = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    for parent, name, layer in found:
        setattr(parent, name, twin(layer, **options))
    return len(found)


def parq_optimizer(model: nn.Module) -> Any:
    """Make torchao's PARQ around SGD: 4-bit weights, one scale a tensor."""
    from torchao.prototype.parq import ProxPARQ, QuantOptimizer, UnifQuantizer

    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    chosen = {id(weight) for weight in weights}
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": weights, "quant_bits": 4}, {"params": others}]
    inner = torch.optim.SGD(groups, lr=1e-9, momentum=0.9)
    return QuantOptimizer(inner, UnifQuantizer(), ProxPARQ(anneal_start=0, anneal_end=10_000), quant_period=1)


FLOAT = Contender(keep_float, sgd, nothing)
CONTENDERS = {
    "lbw": ours("W4"),
    "lbw_semi": ours("W4", solver="semi"),
    "uniform": ours("W4", "uniform"),
    "learned_levels": ours("W4", "learned_levels"),
    "lbw_w4a4": ours("W4A4"),
    "uniform_w4a4": ours("W4A4", "uniform"),
    "brevitas": brevitas(),
    "brevitas_w4a4": brevitas(input_bit_width=4, input_collect_stats_steps=1),
    "parq": Contender(keep_float, parq_optimizer, nothing, "torchao"),
}


def make_inputs(case: Case) -> tuple[Any, Any]:
    """Return images and targets of a fixed seed: boxes for a detector, class numbers for a classifier."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(case.batch_size, 3, case.side, case.side, generator=generator)
    if case.build is resnet18:
        return images, torch.randint(len(CLASSES), (case.batch_size,), generator=generator)
    corner, size = (case.side * torch.rand(case.batch_size, 4, 2, generator=generator) / 2 for _ in range(2))
    boxes = torch.cat([corner, corner + size + 8], -1)
    return list(images), [{"boxes": each, "labels": torch.tensor([1, 2, 3, 4])} for each in boxes]


def training_step(case: Case, contender: Contender, layout: torch.memory_format) -> Callable[[], None]:
    """Build a model and return what does one step of its training."""
    torch.manual_seed(0)
    images, targets = make_inputs(case)
    model = contender.convert(case.build(), images).train().to(memory_format=layout)
    optimizer = contender.optimizer(model)

    def step() -> None:
        torch.manual_seed(0)  # Faster R-CNN draws proposals
        loss = sum_of_losses(model, images, targets)
        loss.backward()
        optimizer.step()
        contender.after_update(model)
        optimizer.zero_grad(set_to_none=True)

    return step


def sum_of_losses(model: nn.Module, images: Any, targets: Any) -> Tensor:
    """Return the loss of a detector or a classifier."""
    if isinstance(targets, Tensor):
        return nn.functional.cross_entropy(model(images), targets)
    with hold_weights(model):  # as `lbdet.engine.task` does
        return torch.stack(list(model(images, targets).values())).sum()


def seconds(work: Callable[[], None]) -> float:
    """Return the wall-clock time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(
    case: Case, names: Sequence[str], repeats: int, layout: torch.memory_format
) -> dict[str, dict[str, float]]:
    """Return the median step time and the median, least and largest ratio to float of each contender."""
    steps = {"float": training_step(case, FLOAT, layout)}
    for name in names:
        steps[name] = training_step(case, CONTENDERS[name], layout)
    for _ in range(2):  # memory is allocated, Brevitas finds its ranges
        for step in steps.values():
            step()
    turns = [{name: seconds(step) for name, step in steps.items()} for _ in range(repeats)]
    found = {}
    for name in steps:
        ratios = [turn[name] / turn["float"] for turn in turns]
        times = [turn[name] for turn in turns]
        found[name] = {
            "seconds": median(times),
            "ratio": median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    return found


def peak_megabytes(case: Case, names: Sequence[str], layout: torch.memory_format) -> dict[str, float]:
    """Return the memory of the tensors that a step has alive at the same time, beside those that stay."""
    found = {}
    for name in ("float", *names):
        step = training_step(case, FLOAT if name == "float" else CONTENDERS[name], layout)
        for _ in range(2):
            step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step()
        events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        found[name] = max(accumulate(event.nbytes() for event in events)) / 1e6
    return found


def installed(names: Sequence[str]) -> list[str]:
    """Return the contenders that can run here, and say why the others are left out."""
    for name in names:
        package = CONTENDERS[name].needs
        if package and find_spec(package) is None:
            print(f"{name}: left out, {package} is not installed")
    return [name for name in names if not (need := CONTENDERS[name].needs) or find_spec(need)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one line a model and contender."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), metavar="MODEL")
    parser.add_argument(
        "--formats", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="FORMAT"
    )
    parser.add_argument("--repeats", type=int, default=7, help="turns (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own)")
    parser.add_argument("--channels-last", action="store_true", help="as lbdet trains; faster on most CPUs")
    parser.add_argument("--output", type=Path, metavar="JSON")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()  # as training does
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    names = installed(options.formats)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {options.repeats} turns")
    print("model              format          step [ms]  ratio   lowest..highest  peak [MB]")
    results: dict[str, Any] = {}
    for model in options.models:
        results[model] = measure(CASES[model], names, options.repeats, layout)
        gc.collect()
        peaks = peak_megabytes(CASES[model], names, layout)
        for name, row in results[model].items():
            row["peak_megabytes"] = peaks[name]
            spread = f"{row['lowest']:.3f}..{row['highest']:.3f}"
            print(
                f"{model:17}  {name:14}  {1e3 * row['seconds']:9.1f}  {row['ratio']:.3f}"
                f"   {spread:15}  {peaks[name]:9.0f}",
                flush=True,
            )
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

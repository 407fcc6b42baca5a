"""Several processes are one training: equal gradients, weights and metrics, one voice, one set of files."""

from __future__ import annotations

import builtins
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

import lbdet.engine.train as loop
from lbdet.build import build, load_run
from lbdet.cli import eval_det, evaluation, train_det
from lbdet.config import load_config
from lbdet.convert import ActivationFormat, WeightFormat, quantize_model, quantized_layers
from lbdet.data.augment import build_augmentation, derive_seed
from lbdet.data.labelled import LabelledData
from lbdet.data.loader import TrainSet
from lbdet.data.shapes import SHAPE_CLASSES
from lbdet.data.voc import read_voc
from lbdet.engine import distributed, run_folder
from lbdet.engine.evaluate import evaluate
from lbdet.engine.optim import average_start, build_optimizer
from lbdet.engine.run_folder import RunFolder
from lbdet.engine.settings import TrainSettings
from lbdet.engine.task import ClassificationTask, DetectionTask
from lbdet.errors import UserError
from lbdet.guidance import GUIDANCE
from lbdet.models.ssd_tiny import ssd_tiny
from lbdet.nn.batch_norm import freeze_batch_norm, set_training_mode
from tests.conftest import CONFIG
from tests.engine import test_strategies
from tests.engine.ranks import Ended, processes, ranks

ROOT = Path(__file__).resolve().parents[2]
CLASSES = len(SHAPE_CLASSES) + 1
HINTS = {"logits": 1.0, "boxes": 1.0, "features": 0.5, "taps": ["backbone"]}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


# --- gradients: two processes with half a batch each, against one with the batch ---


def classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, CLASSES),
    )  # fmt: skip


class Backbone(nn.Sequential):
    out_channels = 8


def faster_rcnn() -> FasterRCNN:
    """A small one whose samplers keep every anchor and proposal but those that touch objects a little."""
    return FasterRCNN(
        Backbone(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8), nn.ReLU()), min_size=64, max_size=64,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
        rpn_batch_size_per_image=100_000, rpn_fg_iou_thresh=0.6, rpn_bg_iou_thresh=0.01,
        box_batch_size_per_image=100_000, box_fg_iou_thresh=0.6, box_bg_iou_thresh=0.01,
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2), box_head=TwoMLPHead(72, 16),
        box_predictor=Predictor(16),
    )  # fmt: skip


class Predictor(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cls_score, self.bbox_pred = nn.Linear(channels, CLASSES), nn.Linear(channels, 4 * CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "classifier": classifier, "ssd": partial(ssd_tiny, CLASSES), "faster_rcnn": faster_rcnn,
}  # fmt: skip


def batch(kind: str) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Four images: two halves with very different numbers of objects; the last image has none."""
    chance = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (3, 64, 64), generator=chance, dtype=torch.uint8) for _ in range(4)]
    if kind == "classifier":
        return images, [{"label": torch.tensor(i)} for i in range(4)]
    targets = []
    for count in (5, 3, 1, 0):
        corners = torch.rand(count, 2, generator=chance) * 40
        boxes = torch.cat([corners, corners + 8 + 15 * torch.rand(count, 2, generator=chance)], 1)
        labels = torch.randint(1, CLASSES, (count,), generator=chance)
        targets.append({"boxes": boxes, "labels": labels})
    return images, targets


def gradients(kind: str, guided: str | None, folder: Path, half: int | None = None) -> dict[str, Any]:
    """Make an update at learning rate 0 with this rank's share of the batch; return losses and gradients.

    Args:
        half: one half of the batch instead.
    """
    torch.manual_seed(0)
    model, _ = quantize_model(NETWORKS[kind](), "W4")
    teacher = deepcopy(model)
    for parameter in teacher.parameters():
        parameter.data += 0.1 * parameter.data.abs().mean() * torch.randn_like(parameter)
    hints = {**HINTS, "taps": ["4" if kind == "classifier" else "backbone"]}
    guide = GUIDANCE[guided](model, teacher, **hints, divisor=distributed.divisor) if guided else None
    networks = []
    for network in (model, *(guide.trained if guide else ())):
        freeze_batch_norm(network)
        set_training_mode(network, "frozen")
        networks.append(loop.Trained(network, build_optimizer(network, "sgd", 0.1, 0.0, 0.0)))
    size, number = (2, half) if half is not None else (distributed.world_size(), distributed.rank())
    mine = slice(4 // size * number, 4 // size * (number + 1))
    images, targets = batch(kind)
    task = ClassificationTask() if kind == "classifier" else DetectionTask()
    batches, settings = iter([(images[mine], targets[mine])]), TrainSettings(batch_size=4, workers=0)
    losses = loop._update(networks, task, guide, 0.0, batches, settings, 0, RunFolder(folder))
    found = {
        f"{i}.{name}": p.grad
        for i, network in enumerate(networks)
        for name, p in network.model.named_parameters()
        if p.grad is not None
    }
    return {"losses": losses, "gradients": found}


@pytest.mark.parametrize("guided", [None, "joint"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_two_processes_with_half_a_batch_have_the_gradients_of_one_with_the_batch(
    kind: str, guided: str | None, tmp_path: Path
) -> None:
    whole = gradients(kind, guided, tmp_path)
    shared = ranks(2, tmp_path, gradients, kind, guided, tmp_path)
    assert shared[0]["losses"] == shared[1]["losses"]
    assert shared[0]["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    assert shared[0]["gradients"].keys() == shared[1]["gradients"].keys() == whole["gradients"].keys()
    assert len(whole["gradients"]) >= 4
    for name, gradient in whole["gradients"].items():
        assert torch.equal(shared[0]["gradients"][name], shared[1]["gradients"][name])
        close = partial(torch.testing.assert_close, rtol=0, atol=1e-4 * gradient.abs().max().item())
        close(shared[0]["gradients"][name], gradient)
    if kind != "classifier":  # this batch can tell: the mean of its halves is something else
        halves = [gradients(kind, guided, tmp_path, half)["losses"]["loss"] for half in (0, 1)]
        assert sum(halves) / 2 != pytest.approx(whole["losses"]["loss"], rel=2e-3)


# --- the vocabulary ---


def some_gradients() -> dict[str, Tensor | None]:
    """Average gradients that all, one or no rank has, and a statistic that each has for itself."""
    names = ("all", "one", "none", "fixed")
    parameters = {name: nn.Parameter(torch.zeros(2), requires_grad=name != "fixed") for name in names}
    parameters["all"].grad = torch.full((2,), float(distributed.rank()))
    if distributed.rank() == 1:
        parameters["one"].grad = torch.full((2,), 6.0)
    statistic = torch.tensor(float(distributed.rank()))
    distributed.average_gradients(parameters.values(), [statistic])
    return {name: parameter.grad for name, parameter in parameters.items()} | {"statistic": statistic}


def test_a_gradient_that_one_rank_has_counts_as_zero_on_the_others_and_one_that_none_has_stays_none(
    tmp_path,
) -> None:
    for found in ranks(3, tmp_path, some_gradients):
        assert found["all"].tolist() == [1.0, 1.0]
        assert found["one"].tolist() == [2.0, 2.0]
        assert found["none"] is found["fixed"] is None
        assert found["statistic"].item() == 1.0


def everything() -> dict[str, Any]:
    number = distributed.rank()
    model = nn.BatchNorm1d(1)
    nn.init.constant_(model.running_mean, number + 5)
    distributed.same_state(model)
    return {
        "average": distributed.average([number, float("nan") if number else 0.0]),
        "largest": distributed.largest(number),
        "gather": distributed.gather(f"rank {number}"),
        "first": distributed.first(distributed.rank),
        "divisor": [
            distributed.divisor(torch.tensor(n), least).item() for n, least in ((number, 1.0), (0.0, 6.0))
        ],
        "state": model.running_mean.item(),
        "error": refused(),
    }


def refused() -> str:
    def refuse() -> None:
        assert distributed.rank() == 0
        raise UserError("x: must be y")

    try:
        distributed.first(refuse)
    except UserError as error:
        return str(error)
    return "nothing"


def test_all_ranks_hear_the_same(tmp_path) -> None:
    for found in ranks(3, tmp_path, everything):
        mean, not_finite = found.pop("average")
        assert mean == 1
        assert np.isnan(not_finite)
        assert found == {
            "largest": 2, "gather": ["rank 0", "rank 1", "rank 2"], "first": 0, "divisor": [1.0, 2.0],
            "state": 5.0, "error": "x: must be y",
        }  # fmt: skip


def test_one_process_forms_no_group_and_changes_nothing(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    values, data = [1.0], LabelledData(("a",), np.zeros(3, np.int64), np.zeros((3, 1, 1, 3), np.uint8))
    with distributed.process_group():
        assert not dist.is_initialized()
        assert distributed.average(values) is values
        assert distributed.own_batches(data, 2) is data
        assert distributed.divisor(torch.tensor(0.5), 1).item() == 1.0
        assert (distributed.rank(), distributed.world_size(), distributed.largest(3)) == (0, 1, 3)


@pytest.mark.parametrize(("images", "batch_size"), [(10, 2), (7, 3), (5, 4), (1, 4), (9, 1)])
def test_the_batches_of_an_evaluation_are_those_of_one_process(
    images: int, batch_size: int, monkeypatch
) -> None:
    data = LabelledData(("a",), np.arange(images), np.zeros((images, 1, 1, 3), np.uint8))
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    batches = []
    for number in range(3):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        mine = distributed.own_batches(data, batch_size).labels.tolist()
        batches += [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    whole = list(range(images))
    assert batches == [whole[i : i + batch_size] for i in range(0, images, batch_size)]


def forwarded() -> list[dict[str, Tensor]]:
    """Make an update with trained batch norm and ranges that follow the data; return before, here, after."""
    torch.manual_seed(0)
    follows = ActivationFormat("uniform", {"update": "average"})
    model, _ = quantize_model(classifier(), "W4A4", WeightFormat("lbw"), follows)
    for layer in quantized_layers(model).values():
        layer.activation_quantizer.set_range(4, 0.01, -8)
    set_training_mode(model, "train")
    images, targets = batch("classifier")
    mine = slice(2 * distributed.rank(), 2 * distributed.rank() + 2)
    found = [average_start(model)]

    def seen(parameters, statistics):
        found.append(average_start(model))
        average_gradients(parameters, statistics)

    average_gradients, distributed.average_gradients = distributed.average_gradients, seen
    network = loop.Trained(model, build_optimizer(model, "sgd", 0.1, 0.0, 0.0))
    batches, settings = iter([(images[mine], targets[mine])]), TrainSettings(batch_size=4, workers=0)
    loop._update([network], ClassificationTask(), None, 0.0, batches, settings, 0, RunFolder(Path("none")))
    return [*found, average_start(model)]


def test_statistics_that_follow_the_data_follow_those_of_all_ranks(tmp_path) -> None:
    (before, mine, after), (_, theirs, also_after) = ranks(2, tmp_path, forwarded)
    moved = [name for name in before if not torch.equal(before[name], mine[name])]
    assert {name.rpartition(".")[2] for name in moved} == {
        "running_mean", "running_var", "num_batches_tracked", "log_scale_4",
    }  # fmt: skip
    for name in before:
        assert torch.equal(after[name], also_after[name])
        if name in moved and before[name].is_floating_point():
            torch.testing.assert_close(after[name], (mine[name] + theirs[name]) / 2)
    assert not torch.equal(mine["1.running_mean"], theirs["1.running_mean"])


def test_each_rank_has_random_numbers_of_its_own_and_the_first_those_of_one_process(monkeypatch) -> None:
    seeds = []
    for number in range(3):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        seeds += [loop._model_seed(1, step) for step in (0, 1)]
    assert len(set(seeds)) == 6
    assert seeds[:2] == [derive_seed("model", 1, 0), derive_seed("model", 1, 1)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_synchronised_batch_norm_sees_the_whole_batch(tmp_path) -> None:
    one, two = synchronised(), ranks(2, tmp_path, synchronised)
    for name, value in one.items():
        assert torch.equal(two[0][name], two[1][name])
        torch.testing.assert_close(two[0][name], value, rtol=1e-3, atol=1e-5)


def synchronised() -> dict[str, Tensor]:
    """Make an update on GPUs with batch norm over all ranks; return gradients and statistics, on the CPU."""
    torch.manual_seed(0)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(classifier()).to("cuda")
    set_training_mode(model, "train")
    size = 4 // distributed.world_size()
    mine = slice(size * distributed.rank(), size * distributed.rank() + size)
    images, targets = batch("classifier")
    network = loop.Trained(model, build_optimizer(model, "sgd", 0.1, 0.0, 0.0))
    batches, settings = iter([(images[mine], targets[mine])]), TrainSettings(batch_size=4, workers=0)
    loop._update([network], ClassificationTask(), None, 0.0, batches, settings, 0, RunFolder(Path("none")))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.cpu() for name, value in (model.state_dict() | found).items()}


# --- whole trainings ---


def fitted(folder: Path, devkit: Path, cases: list[tuple[str, str]]) -> list[dict[str, Tensor]]:
    """Train under each schedule and guidance; every step is checked to move only what it uses."""
    data = read_voc(devkit, ["2012:train"], SHAPE_CLASSES)
    train_set = TrainSet(data, build_augmentation("flip"), 0)
    settings = TrainSettings(**{**vars(test_strategies.SETTINGS), "batch_size": 4})
    states, update = [], loop._update
    for schedule, guidance in cases:
        loop._update = partial(watched, update)
        run = folder / f"{schedule}_{guidance}"
        model = test_strategies.fit(
            train_set, run, test_strategies.SCHEDULES[schedule], settings, guidance, distributed.rank() == 0
        )
        states.append(model.state_dict())
    return states


def watched(update: Callable[..., Any], networks: Any, *rest: Any) -> Any:
    """Make an update; parameters of widths that are not in use, and what is frozen, must not move."""
    model = networks[0].model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = update(networks, *rest)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    for name, layer in quantized_layers(model).items():
        bits = (layer.precision.weight_bits, layer.precision.act_bits)
        used = {f"weight_quantizer.levels_{bits[0]}", f"activation_quantizer.log_scale_{bits[1]}"}
        own = {n.removeprefix(f"{name}.") for n in moved if n.startswith(f"{name}.")}
        assert {n for n in own if "quantizer" in n} <= used
    return losses


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([("stochastic", "joint")], id="some"),
        *(
            pytest.param(
                [(schedule, guidance) for schedule in test_strategies.SCHEDULES],
                id=guidance,
                marks=pytest.mark.slow,
            )
            for guidance in ("none", "teacher", "joint")
        ),
    ],
)
def test_every_schedule_and_guidance_leaves_all_ranks_with_the_same_weights(cases, devkit, tmp_path) -> None:
    one, other = ranks(2, tmp_path, fitted, tmp_path, devkit, cases)
    for case, first, second in zip(cases, one, other, strict=True):
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == [], case


def write(folder: Path, devkit: Path, **sections: dict[str, object]) -> Path:
    """Write a config of batches of 4, with frozen batch norm: what several processes do exactly as one."""
    config: dict[str, Any] = CONFIG | {
        "model": {"name": "ssd_tiny", "batch_norm": "frozen"},
        "data": {**CONFIG["data"], "root": str(devkit)},
        "train": {
            **CONFIG["train"], "max_steps": 6, "epochs": 99, "lr": 1e-3, "optimizer": "sgd",
            "checkpoint_steps": 1,
        },
        "eval": {"batch_size": 2},
    }  # fmt: skip
    for name, section in sections.items():
        config[name] = config[name] | section if name in config else section
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run_main(main: Callable[..., int], *arguments: object) -> int:
    """Call a tool."""
    return main([str(argument) for argument in arguments])


def train_once(config: Path, output: Path, *more: object) -> None:
    assert run_main(train_det.main, "--config", config, "--output", output, *more) == 0


def train_in(size: int, folder: Path, config: Path, output: Path, *more: object) -> list[Ended]:
    return processes(size, folder, run_main, train_det.main, "--config", config, "--output", output, *more)


def assert_close(one: Path, other: Path) -> None:
    """Two runs have moved from their start to the same place, but for rounding."""
    config = load_config(one / "config.yaml")
    start = build(config).model.state_dict()
    first, second = (load_run(path).model.state_dict() for path in (one, other))
    assert first.keys() == second.keys()
    moved, apart = (
        torch.stack([(a[name].double() - b[name].double()).square().sum() for name in a]).sum().sqrt().item()
        for a, b in ((first, start), (first, second))
    )
    assert apart < 1e-3 * moved, f"{apart} of {moved}"


def test_training_leaves_the_weights_and_files_of_one_process(devkit, finished_run, tmp_path) -> None:
    config = write(tmp_path, devkit, model={"weights": str(finished_run / "model.safetensors")})
    train_once(config, tmp_path / "one")
    ended = train_in(2, tmp_path / "said", config, tmp_path / "two")
    assert [e.code for e in ended] == [0, 0]
    assert "6 of 6 classes keep their rows" in ended[0].out
    assert "6 images" in ended[0].out
    assert (ended[1].out, ended[0].err, ended[1].err) == ("", "", "")
    assert_close(tmp_path / "one", tmp_path / "two")
    files = [sorted(p.name for p in (tmp_path / run).iterdir()) for run in ("one", "two")]
    assert files[0] == files[1]
    logs = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("one", "two")]
    assert len(logs[0]) == len(logs[1])
    one, two = (json.loads(log[-1]) for log in logs)
    assert two == pytest.approx(one, rel=1e-4)
    assert len(list((tmp_path / "two" / "tensorboard").glob("*"))) <= 1
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["machine"]["processes"] == 2


def without_writing(main: Callable[..., int], *arguments: object) -> int:
    """Call a tool; rank 1 fails if it writes a file or makes a folder."""
    if os.environ["RANK"] == "1":

        def fail(*arguments: object, **more: object) -> None:
            raise AssertionError(f"rank 1 writes {arguments}")

        run_folder.write_atomically = run_folder.write_text = run_folder.save_checkpoint = fail
        evaluation.write_text = Path.mkdir = fail
        opened = open
        builtins.open = lambda file, mode="r", *a, **b: (
            opened(file, mode, *a, **b) if mode in ("r", "rb") or file == os.devnull else fail(file)
        )
    return run_main(main, *arguments)


def test_no_rank_but_the_first_writes(devkit, finished_run, tmp_path) -> None:
    config = write(tmp_path, devkit, train={"workers": 0})
    said, file = tmp_path / "said", tmp_path / "metrics.json"
    for main, arguments in (
        (train_det.main, ("--config", config, "--output", tmp_path / "run")),
        (eval_det.main, ("--run", finished_run, "--output", file)),
    ):
        ended = processes(2, said, without_writing, main, *arguments)
        assert [e.code for e in ended] == [0, 0], ended[1].err
    assert file.exists()


def losing(config: Path, output: Path, step: int, value: float) -> int:
    """Train; from `step` on the losses of rank 1 are `value`."""
    losses = DetectionTask.losses

    def changed(self, model, images, targets):
        found = losses(self, model, images, targets)
        changed.calls += 1
        late = os.environ["RANK"] == "1" and changed.calls > step
        return {name: loss * value if late else loss for name, loss in found.items()}

    changed.calls = 0
    DetectionTask.losses = changed
    return run_main(train_det.main, "--config", config, "--output", output)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_code_3(devkit, tmp_path) -> None:
    config = write(tmp_path, devkit)
    ended = processes(2, tmp_path / "said", losing, config, tmp_path / "run", 2, float("nan"))
    assert [e.code for e in ended] == [3, 3]
    assert one_message(ended).startswith("error: step 2: loss is nan")
    assert RunFolder(tmp_path / "run").load_checkpoint()["step"] == 2


def one_message(ended: list[Ended]) -> str:
    """Return what all processes wrote to stderr: one line."""
    said = "".join(e.err for e in ended)
    assert said.count("\n") == 1, said
    return said


def stopped(config: Path, output: Path, resume: bool, signum: int, step: int) -> int:
    """Train; rank 1 alone gets a signal in `step`."""
    update = loop._update

    def interrupted(*arguments):
        losses = update(*arguments)
        if arguments[-2] == step and os.environ.get("RANK", "1") == "1":
            signal.raise_signal(signum)
        return losses

    loop._update = interrupted
    try:
        more = ["--resume"] if resume else []
        return run_main(train_det.main, "--config", config, "--output", output, *more)
    finally:
        loop._update = update


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(sizes, devkit, tmp_path) -> None:
    config = write(tmp_path, devkit, train={"ema": 0.5})
    train_once(config, tmp_path / "one")
    said, parts = tmp_path / "said", tmp_path / "parts"
    if sizes[0] == 1:
        assert stopped(config, parts, False, signal.SIGTERM, 2) == 143
        assert [e.code for e in train_in(2, said, config, parts, "--resume")] == [0, 0]
    else:
        ended = processes(2, said, stopped, config, parts, False, signal.SIGTERM, 2)
        assert [e.code for e in ended] == [143, 143]
        assert "interrupted at step 3, saved" in one_message(ended)
        train_once(config, parts, "--resume")
    assert_close(tmp_path / "one", parts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.batch_size=3"], "train.batch_size: must be a multiple of the 2 processes"),
        (["train.batch_size=2", "model.batch_norm=train"], "train.batch_size: must be at least 4 for an SSD"),
        (["train.sync_bn=true"], "train.sync_bn: must be false on CPUs"),
        (["train.epochz=3"], "train.epochz: unknown key"),
    ],
)
def test_what_is_wrong_is_told_once_and_stops_all_with_code_2(settings, message, devkit, tmp_path) -> None:
    if "sync_bn" in settings[0] and torch.cuda.is_available():
        pytest.skip("GPUs have it")
    config = write(tmp_path, devkit)
    ended = train_in(2, tmp_path / "said", config, tmp_path / "run", "--set", *settings)
    assert [e.code for e in ended] == [2, 2]
    assert message in one_message(ended)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_and_a_locked_one_are_refused_once(devkit, finished_run, tmp_path) -> None:
    config = write(tmp_path, devkit)
    ended = train_in(2, tmp_path / "said", config, finished_run)
    assert [e.code for e in ended] == [2, 2]
    assert "holds a run already" in one_message(ended)
    with RunFolder(tmp_path / "run").lock():
        ended = train_in(2, tmp_path / "said", config, tmp_path / "run")
    assert [e.code for e in ended] == [2, 2]
    assert "another process is writing this run" in one_message(ended)


def test_an_unknown_option_is_refused_once(devkit, tmp_path) -> None:
    ended = train_in(2, tmp_path / "said", write(tmp_path, devkit), tmp_path / "run", "--bogus")
    assert [e.code for e in ended] == [2, 2]
    assert ended[1].err == ""
    assert "unrecognized arguments: --bogus" in ended[0].err


def damaged(config: Path, output: Path, killed: bool) -> int:
    """Train; in its second step rank 1 finds a damaged image, or is killed."""
    batches = loop.train_batches

    def broken(*arguments):
        found = batches(*arguments)
        yield next(found)
        if os.environ["RANK"] == "1":
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("x.jpg: must be an image")
        yield from found

    loop.train_batches = broken
    return run_main(train_det.main, "--config", config, "--output", output)


def test_an_image_that_one_rank_cannot_read_stops_all(devkit, tmp_path) -> None:
    ended = processes(2, tmp_path / "said", damaged, write(tmp_path, devkit), tmp_path / "run", False)
    assert [e.code for e in ended] == [2, 2]
    assert one_message(ended) == "error: x.jpg: must be an image\n"


def test_a_rank_that_is_killed_stops_the_others(devkit, tmp_path) -> None:
    ended = processes(2, tmp_path / "said", damaged, write(tmp_path, devkit), tmp_path / "run", True)
    assert [e.code for e in ended] == [2, -signal.SIGKILL]
    assert "another process of this command was killed" in one_message(ended)


# --- evaluation ---


def evaluated(run: Path, images: int | None) -> dict[str, Any]:
    built = load_run(run)
    data = read_voc(built.config.data.root, ["2012:val"], SHAPE_CLASSES)
    result = evaluate(built.model, data if images is None else data.take(range(images)), batch_size=2)
    return {"metrics": result.metrics, "detections": result.detections}


@pytest.mark.parametrize("images", [None, 3])
def test_metrics_and_detections_are_those_of_one_process_bit_for_bit(images, finished_run, tmp_path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the others
    one = evaluated(finished_run, images)
    torch.set_num_threads(threads)
    assert sum(len(found["boxes"]) for found in one["detections"]) > images if images else 10
    for size in (2, 3):
        for found in ranks(size, tmp_path, evaluated, finished_run, images):
            assert found["metrics"] == one["metrics"]
            for mine, theirs in zip(found["detections"], one["detections"], strict=True):
                assert all(np.array_equal(mine[key], theirs[key]) for key in theirs)


def classified() -> dict[str, Any]:
    torch.manual_seed(0)
    chance = np.random.default_rng(0)
    labels, images = chance.integers(CLASSES, size=20), chance.integers(0, 256, (20, 9, 9, 3), np.uint8)
    data = LabelledData(tuple("abcdefg"), labels, images)
    return ClassificationTask().evaluate(classifier(), data, 8)[0]


def test_a_classifier_has_the_metrics_of_one_process(tmp_path) -> None:
    assert ranks(2, tmp_path, classified) == [classified()] * 2


def test_the_tools_that_evaluate_write_what_one_process_writes(finished_run, tmp_path) -> None:
    for size, name in ((1, "one"), (3, "three")):
        arguments = ("--run", finished_run, "--precision", "W4A4", "--output")
        ended = processes(
            size, tmp_path / name, run_main, eval_det.main, *arguments, tmp_path / f"{name}.json"
        )
        assert [e.code for e in ended] == [0] * size, ended[0].err
        assert [bool(e.out) for e in ended] == [True] + [False] * (size - 1)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "three.json").read_bytes()


# --- torchrun itself ---


def torchrun(*arguments: object) -> subprocess.Popen[str]:
    """Start two processes of a tool."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(argument) for argument in arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_and_stops_all(signum, devkit, tmp_path) -> None:
    config = write(tmp_path, devkit, train={"max_steps": 5000, "checkpoint_steps": 2000})
    process = torchrun("tools/train_det.py", "--config", config, "--output", tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signum)
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert said.count("saved; continue with --resume") == 1
    state = RunFolder(tmp_path / "run").load_checkpoint()
    assert state is not None
    assert f"interrupted at step {state['step']}" in said


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["sweep_bits.py", "sensitivity.py"])
def test_a_tool_that_works_in_one_process_refuses_torchrun(tool, devkit, tmp_path) -> None:
    config = write(tmp_path, devkit)
    arguments = ("--config", config, "--precisions", "W4", "--output", tmp_path / "out")
    said = torchrun(f"tools/{tool}", *arguments).communicate(timeout=120)[1]
    assert said.count(f"error: {tool}: works in one process, got 2; start it without torchrun") == 1
    assert not (tmp_path / "out").exists()

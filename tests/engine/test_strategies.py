"""Training under every schedule: it ends at its target, and resuming at any step changes nothing."""

from __future__ import annotations

import math
import signal

import pytest
import torch

import lbdet.engine.train as loop
from lbdet.convert import Override, WeightFormat, find_blocks, quantize_model, quantized_layers
from lbdet.data.augment import build_augmentation
from lbdet.data.loader import TrainSet
from lbdet.data.shapes import SHAPE_CLASSES
from lbdet.data.voc import read_voc
from lbdet.engine.phases import PhaseChange
from lbdet.engine.run_folder import RunFolder
from lbdet.engine.settings import TrainSettings
from lbdet.engine.task import DetectionTask
from lbdet.engine.train import Interrupted, train
from lbdet.guidance import FrozenTeacher, Joint
from lbdet.models.ssd_tiny import ssd_tiny
from lbdet.precision import FLOAT, Precision
from lbdet.schedules import Constant, Cyclic, Progressive, Schedule, Stochastic, TwoStage

STEPS = 6
W3A3, W2A2 = Precision(3, 3), Precision(2, 2)
SCHEDULES: dict[str, Schedule] = {
    "constant": Constant(W2A2),
    "two_stage": TwoStage(W2A2),
    "progressive": Progressive((FLOAT, W3A3, W2A2)),
    "nested": Progressive((W3A3, W2A2), two_stage=True),
    "cyclic": Cyclic(W3A3, W2A2),
    "stochastic": Stochastic(Cyclic(W3A3, W2A2), 0.2, 0.7),
}
CHANGE = PhaseChange(ranges="rescale", reset_momentum=True, restart_lr=True)
SETTINGS = TrainSettings(
    max_steps=STEPS, batch_size=3, warmup_steps=2, workers=0, lr=0.01, optimizer="sgd", ema=0.5,
    calibration_images=4, checkpoint_steps=1, phase_change=CHANGE,
)  # fmt: skip


@pytest.fixture(scope="module")
def train_set(devkit) -> TrainSet:
    data = read_voc(devkit, ["2012:train"], SHAPE_CLASSES)
    return TrainSet(data, build_augmentation("flip"), 0)


def network(weight: str = "learned_levels") -> torch.nn.Module:
    torch.manual_seed(0)
    head = [Override("head.*", Precision(4, 8))]
    return quantize_model(ssd_tiny(len(SHAPE_CLASSES) + 1), "W2A2", WeightFormat(weight), None, head)[0]


def guided(kind: str, student: torch.nn.Module):
    torch.manual_seed(1)
    teacher = ssd_tiny(len(SHAPE_CLASSES) + 1)
    options = {"logits": 0.5, "boxes": 0.5, "features": 0.1, "taps": ["backbone"], "tap_bits": 4}
    return {"none": None, "teacher": FrozenTeacher, "joint": Joint}[kind], teacher, options


def fit(
    train_set, folder, schedule: Schedule, settings=SETTINGS, guidance: str = "none", writes: bool = True
) -> torch.nn.Module:
    model = network()
    make, teacher, options = guided(guidance, model)
    guide = make(model, teacher, **options) if make else None
    run = RunFolder(folder, writes)
    if not folder.exists():
        run.start("")
    blocks = find_blocks(model)
    train(model, DetectionTask(), train_set, train_set.data, schedule, settings, run, 3, guide, blocks)
    return model


def stop_after(step: int, monkeypatch) -> None:
    """Interrupt the training that comes at the end of a step."""
    update = loop._update

    def interrupted(*arguments):
        losses = update(*arguments)
        if arguments[-2] == step:
            signal.raise_signal(signal.SIGTERM)
        return losses

    monkeypatch.setattr(loop, "_update", interrupted)


def assert_equal(one: torch.nn.Module, other: torch.nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize(
    ("name", "guidance"),
    [(name, "none") for name in SCHEDULES]
    + [("stochastic", "joint"), ("cyclic", "teacher")]
    + [pytest.param(name, "joint", marks=pytest.mark.slow) for name in SCHEDULES if name != "stochastic"],
)
def test_resuming_within_and_between_phases_equals_the_uninterrupted_run(
    name: str, guidance: str, train_set, tmp_path, monkeypatch
) -> None:
    whole = fit(train_set, tmp_path / "whole", SCHEDULES[name], guidance=guidance)
    for step in (0, 2, 3):
        with monkeypatch.context() as patch:
            stop_after(step, patch)
            with pytest.raises(Interrupted):
                fit(train_set, tmp_path / "parts", SCHEDULES[name], guidance=guidance)
    assert_equal(fit(train_set, tmp_path / "parts", SCHEDULES[name], guidance=guidance), whole)
    assert {str(x.precision) for x in quantized_layers(whole).values()} == {"W2A2", "W4A8"}


@pytest.mark.parametrize("name", SCHEDULES)
def test_parameters_that_a_step_does_not_use_do_not_move_in_it(
    name: str, train_set, tmp_path, monkeypatch
) -> None:
    update, seen = loop._update, []

    def watch(networks, *rest):
        model = networks[0].model
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        losses = update(networks, *rest)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        for layer_name, layer in quantized_layers(model).items():
            bits = (layer.precision.weight_bits, layer.precision.act_bits)
            own = {n.removeprefix(f"{layer_name}.") for n in moved if n.startswith(f"{layer_name}.")}
            used = {f"weight_quantizer.levels_{bits[0]}", f"activation_quantizer.log_scale_{bits[1]}"}
            assert {n for n in own if "quantizer" in n} <= used
            seen.extend(own & used)
        return losses

    monkeypatch.setattr(loop, "_update", watch)
    fit(train_set, tmp_path / "run", SCHEDULES[name])
    widths = {p for p in SCHEDULES[name].precisions() if p != FLOAT}
    expected = {f"weight_quantizer.levels_{p.weight_bits}" for p in widths}
    assert expected <= set(seen)


def test_state_and_optimizer_have_the_same_shape_from_the_first_step_to_the_last(
    train_set, tmp_path, monkeypatch
) -> None:
    shapes, update = [], loop._update

    def watch(networks, *rest):
        shapes.append({name: value.shape for name, value in networks[0].model.state_dict().items()})
        shapes.append([len(group["params"]) for group in networks[0].optimizer.param_groups])
        return update(networks, *rest)

    monkeypatch.setattr(loop, "_update", watch)
    fit(train_set, tmp_path / "run", SCHEDULES["cyclic"])
    assert shapes == shapes[:2] * STEPS


@pytest.mark.parametrize("restart", [False, True])
def test_the_learning_rate_curve_begins_again_with_each_phase_or_goes_on(restart: bool) -> None:
    settings = TrainSettings(lr=1.0, warmup_steps=0, phase_change=PhaseChange(restart_lr=restart))
    schedule = TwoStage(W2A2)
    rates = [settings.lr_at(step, 20, schedule.plan(step, 20, [], {}).span) for step in range(20)]
    whole = [0.5 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    half = [0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert rates == pytest.approx(half * 2 if restart else whole)


def test_stochastic_precision_without_a_float_share_is_what_it_wraps(train_set, tmp_path) -> None:
    plain = fit(train_set, tmp_path / "plain", SCHEDULES["cyclic"])
    assert_equal(fit(train_set, tmp_path / "all", Stochastic(SCHEDULES["cyclic"], 1.0)), plain)


def test_an_evaluation_on_the_way_is_at_the_target_of_the_phase(train_set, tmp_path, monkeypatch) -> None:
    seen = []

    class Watching(DetectionTask):
        def evaluate(self, model, data, batch_size):
            seen.append({str(x.precision) for n, x in quantized_layers(model).items() if x.scheduled})
            return {"voc07_map": 0.0, "voc_area_map": 0.0, "coco_map": 0.0, "images": 1}, {}

    model, run = network(), RunFolder(tmp_path / "run")
    run.start("")
    settings = TrainSettings(**{**vars(SETTINGS), "eval_every_epochs": 1, "epochs": 99})
    train(model, Watching(), train_set, train_set.data, Stochastic(Constant(W2A2), 0.0, 1.0), settings, run,
          0, None, find_blocks(model))  # fmt: skip
    assert seen
    assert all(found == {"W2A2"} for found in seen)

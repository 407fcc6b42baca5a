"""The loop by itself: what one update is, and that the average and the precision are those at the end."""

from __future__ import annotations

import signal

import pytest
import torch

import lbdet.engine.train as loop
from lbdet.convert import quantize_model, quantized_layers
from lbdet.data.augment import build_augmentation
from lbdet.data.loader import TrainSet
from lbdet.data.shapes import SHAPE_CLASSES
from lbdet.data.voc import read_voc
from lbdet.engine.optim import average_start, average_update, build_optimizer
from lbdet.engine.run_folder import RunFolder
from lbdet.engine.settings import TrainSettings
from lbdet.engine.task import DetectionTask
from lbdet.engine.train import Interrupted, train
from lbdet.errors import NumericsError, UserError
from lbdet.models.ssd_tiny import ssd_tiny
from lbdet.nn.batch_norm import freeze_batch_norm, set_training_mode
from lbdet.precision import Precision
from lbdet.schedules import Constant, Progressive

QUICK = TrainSettings(max_steps=2, batch_size=4, warmup_steps=0, workers=0, lr=0.01)


@pytest.fixture(scope="module")
def data(devkit):
    return read_voc(devkit, ["2012:train"], SHAPE_CLASSES)


@pytest.fixture
def train_set(data):
    return TrainSet(data, build_augmentation("flip"), 0)


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.start("")
    return folder


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return ssd_tiny(len(SHAPE_CLASSES) + 1)


def settings(**changes) -> TrainSettings:
    return TrainSettings(**{**vars(QUICK), **changes})


def fit(model, train_set, run, chosen, target="W4") -> int:
    schedule = Constant(Precision.parse(target))
    return train(model, DetectionTask(), train_set, train_set.data, schedule, chosen, run, 0)


def update_once(model, batches, run, **changes) -> None:
    """Make an update at learning rate 0: the gradients stay to be looked at."""
    network = loop.Trained(model, build_optimizer(model, "sgd", 0.1, 0.0, 0.0))
    loop._update([network], DetectionTask(), None, 0.0, iter(batches), settings(**changes), 0, run)


def test_the_steps_of_a_training_are_counted_in_updates():
    assert TrainSettings(epochs=3, batch_size=4).total_steps(13) == 9
    assert TrainSettings(epochs=3, batch_size=4, accumulate=2).total_steps(13) == 3
    assert TrainSettings(epochs=3, batch_size=4, max_steps=5).total_steps(13) == 5
    assert TrainSettings(epochs=3, batch_size=4, max_steps=50).total_steps(13) == 9
    assert TrainSettings(epochs=0, batch_size=4).total_steps(13) == 0
    assert TrainSettings(epochs=2, batch_size=99).total_steps(13) == 2
    with pytest.raises(
        UserError, match=r"train\.accumulate: must be at most the 3 batches of an epoch, got 9"
    ):
        TrainSettings(epochs=3, batch_size=4, accumulate=9).total_steps(13)


def test_accumulated_halves_have_the_gradient_of_the_whole_batch(train_set, run):
    """SSD divides by the objects of a batch, so the halves must have equally many: they are the same."""
    items = [train_set[0, index] for index in range(3)]
    images, targets = [image for image, _ in items], [target for _, target in items]
    gradients = []
    for batches, accumulate in (([(images * 2, targets * 2)], 1), ([(images, targets)] * 2, 2)):
        model, _ = quantize_model(tiny(), "W4")
        freeze_batch_norm(model)
        set_training_mode(model, "frozen")
        update_once(model, batches, run, accumulate=accumulate)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-4 * scale)


def test_clipping_bounds_the_norm_of_the_gradient(train_set, run):
    norms = []
    for clip in (None, 0.01):
        model = tiny()
        set_training_mode(model, "train")
        images, targets = zip(*(train_set[0, index] for index in range(3)), strict=True)
        update_once(model, [(images, targets)], run, clip_norm=clip)
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_the_model_is_left_with_the_averaged_weights(train_set, run, monkeypatch):
    seen = []

    def record(average, model, decay, step):
        average_update(average, model, decay, step)
        seen.append((average_start(model), {key: value.clone() for key, value in average.items()}))

    monkeypatch.setattr(loop, "average_update", record)
    model, _ = quantize_model(tiny(), "W4")
    fit(model, train_set, run, settings(ema=0.5, max_steps=3))
    trained, average = seen[-1]
    assert len(seen) == 3
    state = model.state_dict()
    assert all(torch.equal(state[key], average[key]) for key in state)
    assert not torch.equal(state["backbone.stem.0.weight"], trained["backbone.stem.0.weight"])


def test_the_average_of_each_phase_forgets_its_start_as_soon_as_that_of_the_first(
    train_set, run, monkeypatch
):
    steps = []
    monkeypatch.setattr(loop, "average_update", lambda *rest: steps.append(rest[-1]))
    model, _ = quantize_model(tiny(), "W4")
    schedule = Progressive((Precision(6), Precision(4)))
    chosen = settings(ema=0.5, max_steps=6)
    train(model, DetectionTask(), train_set, train_set.data, schedule, chosen, run, 0)
    assert steps == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("target", ["W2", "float"])
def test_the_schedule_sets_the_precision_in_training_and_at_the_end(train_set, run, target, monkeypatch):
    model, _ = quantize_model(tiny(), "W6")
    seen = []
    update = loop._update
    monkeypatch.setattr(
        loop,
        "_update",
        lambda networks, *rest: (seen.append(precisions(networks[0].model)), update(networks, *rest))[1],
    )
    fit(model, train_set, run, QUICK, target)
    assert seen == [{target}, {target}]
    assert precisions(model) == {target}


def precisions(model) -> set[str]:
    return {str(layer.precision) for layer in quantized_layers(model).values()}


def test_training_lowers_the_loss(train_set, run, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    losses = []
    monkeypatch.setattr(RunFolder, "log", lambda self, record: losses.append(record["loss"]))
    model, _ = quantize_model(tiny(), "W4")
    fit(model, train_set, run, settings(max_steps=20, epochs=99, optimizer="adamw", lr=2e-3))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_no_randomness_of_the_process_comes_in(train_set, tmp_path):
    states = []
    for seed in (1, 2):
        model, _ = quantize_model(tiny(), "W4")
        model.backbone.stem.append(torch.nn.Dropout(0.3))
        torch.manual_seed(seed)
        folder = RunFolder(tmp_path / str(seed))
        folder.start("")
        fit(model, train_set, folder, QUICK)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.fixture
def interruptible():
    """Let SIGINT raise KeyboardInterrupt; a shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_is_the_usual_one(train_set, run, monkeypatch, interruptible):
    before = signal.getsignal(signal.SIGINT)
    update = loop._update

    def twice(*arguments):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return update(*arguments)

    monkeypatch.setattr(loop, "_update", twice)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_w4(), train_set, run, QUICK)
    assert signal.getsignal(signal.SIGINT) is before


def test_one_signal_saves_and_gives_the_handlers_back(train_set, run, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    update = loop._update

    def once(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return update(*arguments)

    monkeypatch.setattr(loop, "_update", once)
    with pytest.raises(Interrupted, match="interrupted at step 1, saved; continue with --resume") as caught:
        fit(tiny_w4(), train_set, run, QUICK)
    assert caught.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    state = run.load_checkpoint()
    assert state is not None
    assert state["step"] == 1


def tiny_w4() -> torch.nn.Module:
    return quantize_model(tiny(), "W4")[0]


def test_an_overflow_keeps_the_last_good_checkpoint(train_set, run, monkeypatch):
    update = loop._update

    def overflow(networks, *rest):
        losses = update(networks, *rest)
        if rest[-2] == 2:
            with torch.no_grad():
                networks[0].model.backbone.stem[0].weight[0, 0, 0, 0] = float("inf")
        return losses

    monkeypatch.setattr(loop, "_update", overflow)
    with pytest.raises(
        NumericsError, match=r"step 3: backbone.stem.0.weight .* last good checkpoint: .*checkpoint.pt"
    ):
        fit(tiny_w4(), train_set, run, settings(max_steps=3, checkpoint_steps=1))
    state = run.load_checkpoint()
    assert state is not None
    assert state["step"] == 2


def test_weights_that_are_not_finite_are_told_with_the_step(train_set, run):
    model = tiny_w4()
    with torch.no_grad():
        model.backbone.stem[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(
        NumericsError, match=r"step 0: .* not finite; no checkpoint yet; a smaller train.lr may help"
    ):
        fit(model, train_set, run, QUICK)


def test_resuming_with_another_optimizer_or_average_is_refused(train_set, run):
    fit(tiny_w4(), train_set, run, settings(checkpoint_steps=1))
    for changes in ({"ema": 0.5}, {"max_steps": 3}):
        with pytest.raises(UserError, match=r"checkpoint\.pt: "):
            fit(tiny_w4(), train_set, run, settings(**changes))

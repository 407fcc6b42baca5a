"""From a config to objects: every published config can be built, and what a config names is checked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from fuzz.guards import in_time
from safetensors.torch import load_file, save_file
from torch import nn

import lbdet.build.task as build_task_module
from lbdet.build import (
    build,
    build_settings,
    build_train_set,
    check_batch_norm,
    check_processes,
    is_classification,
    load_run,
    named_classes,
    read_data,
)  # fmt: skip
from lbdet.classes import VOC20
from lbdet.config import Config, load_config
from lbdet.convert import quantized_layers
from lbdet.data.records import DetectionData
from lbdet.engine import distributed
from lbdet.errors import UserError
from lbdet.precision import Precision

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_its_classes_are_known(path):
    config = load_config(path)
    if not is_classification(config):
        assert config.data.classes is not None
        classes = named_classes(config.data.classes, "data.classes")
        assert set(config.data.score_classes or ()) <= set(classes)
    config.schedule.build(config.seed)
    assert build_settings(config).batch_size == config.train.batch_size


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    for weights in (config.model.weights, config.model.weights_backbone):
        if weights is not None and not Path(weights).is_file():
            pytest.skip(f"{weights} is not there or would be downloaded; see `make data`")
    built = build(config, ["of", "the", "data"])
    check_batch_norm(config, built.model)
    widths = {layer.precision for layer in quantized_layers(built.model).values() if layer.scheduled}
    assert widths == {config.schedule.target}
    assert len(built.coverage) >= len(quantized_layers(built.model)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_data_of_every_config_can_be_read(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    if not Path(config.data.root).exists():
        pytest.skip(f"{config.data.root} is not there; see `make data`")
    train, val = build_train_set(config).data, read_data(config.data, config.data.val)
    assert train.classes == val.classes
    if config.data.classes is not None:
        assert train.classes == named_classes(config.data.classes, "data.classes")
    if isinstance(train, DetectionData):
        assert {record.id for record in train.records}.isdisjoint(record.id for record in val.records)


@pytest.fixture
def tiny(config) -> Config:
    return load_config(config)


def test_a_built_model_has_its_precisions_and_the_rest_is_float(config):
    built = build(
        load_config(
            config,
            ["quantizer.keep_float=[backbone.stem.*]", "quantizer.overrides={head.*: {precision: W2}}"],
        )
    )
    bits = {layer.name: layer.bits for layer in built.coverage}
    assert bits["backbone.stem.0"] is None
    assert {width for name, width in bits.items() if name.startswith("head.")} == {2}
    assert {width for name, width in bits.items() if name.startswith("backbone.stage")} == {4}


def test_the_weights_of_a_build_depend_on_the_seed_alone(config):
    torch.manual_seed(1)
    first = build(load_config(config)).model.state_dict()
    torch.manual_seed(2)
    second = build(load_config(config)).model.state_dict()
    other = build(load_config(config, ["seed=1"])).model.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["backbone.stem.0.weight"], other["backbone.stem.0.weight"])


def test_a_pattern_that_matches_no_layer_is_told_with_its_section(config):
    broken = load_config(config, ["quantizer.keep_float=[backbone.stm*]"])
    with pytest.raises(
        UserError,
        match=r"quantizer: keep_float: pattern 'backbone\.stm\*' matches none of the 18 layers; closest",
    ):
        build(broken)


def test_classes_are_a_list_a_name_or_a_file(tmp_path):
    assert named_classes(["a", "b"], "here") == ("a", "b")
    assert named_classes("voc20", "here") == VOC20
    path = tmp_path / "names.txt"
    path.write_text("\ufeffred cell\n\n  platelet \n", encoding="utf-8")
    assert named_classes(str(path), "here") == ("red cell", "platelet")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "here: must be different names, at least one, got none"),
        (["a", "b", "a"], "here: must be different names, at least one, got 'a' twice"),
        ("voc2O", "one of voc20, coco80, coco90, shapes, got 'voc2O'; closest: 'voc20'"),
        ("{tmp}/empty", "here: must be different names, at least one, got none"),
        ("{tmp}/image", "image: must be a text file with a class name a line, got 'utf-8' codec"),
        ("{tmp}/huge", "must be a text file with a class name a line, got a file of more than 1024 KiB"),
        ("{tmp}/long", "long: line 2: must be a class name of at most 200 characters, got 201"),
        ("{tmp}/many", "here: must be different names, at least one, got '0' twice"),
        ("{tmp}/pipe", "here: must be a list, a file or one of voc20, coco80, coco90, shapes, got '"),
        ("{tmp}", "here: must be a list, a file or one of voc20, coco80, coco90, shapes, got '"),
        ("x" * 5000, "here: must be a list, a file or one of voc20, coco80, coco90, shapes, got 'xxx"),
        ("x\0", "here: must be a list, a file or one of voc20, coco80, coco90, shapes, got 'x\\x00'"),
        (["x" * 5000] * 2, "here: must be different names, at least one, got 'xxx"),
    ],
)  # fmt: skip
def test_classes_that_are_none_are_told(tmp_path, value, message):
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "image").write_bytes(b"\xff\xd8\xff\xe0")
    (tmp_path / "huge").write_bytes(b"a" * ((1 << 20) + 1))
    (tmp_path / "long").write_text("x" * 200 + "\n" + "x" * 201)
    (tmp_path / "many").write_text("\n".join(map(str, [*range(100_000), 0])))
    os.mkfifo(tmp_path / "pipe")
    value = value.format(tmp=tmp_path) if isinstance(value, str) else value
    with in_time(5), pytest.raises(UserError) as caught:
        named_classes(value, "here")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_class_to_score_that_is_none_is_told(tiny):
    data = tiny.data.model_copy(update={"score_classes": ["disc", "squere"]})
    with pytest.raises(
        UserError, match=r"data\.score_classes: 'squere' is none of the 6 classes; closest: 'square'"
    ):
        read_data(data, data.val)


def test_objects_of_other_classes_can_be_left_out(tiny):
    data = tiny.data.model_copy(update={"classes": ["star"], "other_classes": "ignore"})
    every, some = read_data(tiny.data, data.train), read_data(data, data.train)
    assert len(every.records) == len(some.records)
    stars = sum(int((record.labels == every.classes.index("star") + 1).sum()) for record in every.records)
    assert sum(len(record.labels) for record in some.records) == stars > 0


@pytest.mark.parametrize(
    ("name", "splits", "message"),
    [
        (
            "vco",
            ["2012:train"],
            "data.name: must be one of voc, coco, shapes, imagefolder, cifar10, cifar100, npz, "
            "tiny_imagenet, got 'vco'; closest: 'voc'",
        ),
        ("coco", ["a", "b"], "data: a coco split is one images_folder:annotations.json, got ['a', 'b']"),
        ("coco", ["a"], "data: a coco split is one images_folder:annotations.json, got ['a']"),
    ],
)
def test_data_of_another_kind_is_told(tiny, name, splits, message):
    with pytest.raises(UserError) as caught:
        read_data(tiny.data.model_copy(update={"name": name}), splits)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("model", "batch_norm", "refused"),
    [("ssd_tiny", "train", True), ("ssd_tiny", "frozen", False)],
)
def test_batch_norm_of_single_images_is_refused(config, model, batch_norm, refused):
    single = load_config(
        config, ["train.batch_size=1", f"model.batch_norm={batch_norm}", f"model.name={model}"]
    )
    built = build(single)
    if refused:
        with pytest.raises(UserError, match=r"train\.batch_size: must be at least 2 for an SSD"):
            check_batch_norm(single, built.model)
    else:
        check_batch_norm(single, built.model)


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        (["train.batch_size=4"], 2, None),
        (["train.batch_size=4"], 1, None),
        (
            ["train.batch_size=4"],
            3,
            "train.batch_size: must be a multiple of the 3 .*got 4; 6 is one",
        ),
        (["train.batch_size=15"], 5, "train.batch_size: must not exceed the 12 images where 5 processes"),
        (["train.sync_bn=true"], 2, "train.sync_bn: must be false on CPUs"),
        (["train.sync_bn=true"], 1, None),
    ],
)
def test_what_several_processes_cannot_share_is_told(settings, processes, message, config, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    monkeypatch.setattr(build_task_module, "device", lambda: torch.device("cpu"))
    loaded = load_config(config, settings)
    if message is None:
        check_processes(loaded, 12)
        return
    with pytest.raises(UserError, match=message):
        check_processes(loaded, 12)


def test_synchronised_batch_norm_has_the_state_of_the_usual_one_and_is_for_several(config, monkeypatch):
    wanted = load_config(config, ["train.sync_bn=true"])
    alone = build(wanted).model
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in alone.modules())
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    model = build(wanted).model
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == sum(
        isinstance(m, nn.BatchNorm2d) for m in alone.modules()
    )
    state = model.state_dict()
    assert state.keys() == alone.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in alone.state_dict().items())


def test_a_run_is_built_with_its_weights_and_widths(finished_run):
    built = load_run(finished_run)
    saved = load_file(finished_run / "model.safetensors")
    state = built.model.state_dict()
    assert all(torch.equal(state[key].cpu(), value) for key, value in saved.items())
    assert {layer.precision for layer in quantized_layers(built.model).values()} == {Precision(4)}
    assert built.classes[0] == "disc"


def test_what_is_no_run_is_told(tmp_path, finished_run):
    with pytest.raises(UserError, match=r"must be the folder of a run, got no config\.yaml in it"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text((finished_run / "config.yaml").read_text())
    with pytest.raises(
        UserError, match=r"has no model\.safetensors yet; finish it with tools/train_det\.py --resume"
    ):
        load_run(tmp_path)
    save_file(load_file(finished_run / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"model\.safetensors: must name its classes as a run's model does, got none"
    ):
        load_run(tmp_path)


def test_the_settings_of_the_loop_are_those_of_the_config(config):
    settings = build_settings(
        load_config(
            config, ["train.lr=0.3", "model.batch_norm=frozen", "eval.every_epochs=2", "train.accumulate=3"]
        )
    )
    assert (settings.lr, settings.batch_norm, settings.eval_every_epochs, settings.accumulate) == (
        0.3,
        "frozen",
        2,
        3,
    )

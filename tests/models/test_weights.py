"""Weights are read without running code, refused with one line, and loaded strictly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, WeightsEnum

from lbdet.errors import UserError
from lbdet.models.weights import Weights, load_into, load_weights

TENSORS = {"0.weight": torch.arange(6.0).view(2, 3), "0.bias": torch.zeros(2)}


@dataclass
class NotATensor:
    """Something whose unpickling would run code."""

    value: int = 1


def weights(tensors: dict[str, Tensor]) -> Weights:
    return Weights(tensors, "w.pth", None, {})


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: {"model": t, "step": 3}, lambda t: {"state_dict": t}]
)
def test_a_pickle_is_read_and_unwrapped(wrap: Callable[[dict], dict], tmp_path: Path) -> None:
    path = str(tmp_path / "w.pth")
    torch.save(wrap(TENSORS), path)
    read = load_weights(path)
    assert read.source == path
    assert read.classes is None
    assert read.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(read.tensors[key], tensor) for key, tensor in TENSORS.items())


def test_a_safetensors_file_brings_its_classes_and_metadata(tmp_path: Path) -> None:
    path = str(tmp_path / "w.safetensors")
    metadata = {"classes": '["cat", "dog"]', "architecture": "ssd_tiny"}
    save_file(TENSORS, path, metadata)
    read = load_weights(path)
    assert torch.equal(read.tensors["0.weight"], TENSORS["0.weight"])
    assert read.classes == ("cat", "dog")
    assert read.metadata == metadata


@pytest.mark.parametrize("classes", ["cat, dog", '{"cat": 1}', "[1, 2]"])
def test_classes_that_are_no_list_of_names_are_refused(classes: str, tmp_path: Path) -> None:
    path = str(tmp_path / "w.safetensors")
    save_file(TENSORS, path, {"classes": classes})
    with pytest.raises(UserError) as error:
        load_weights(path)
    assert str(error.value).startswith(f"{path}: metadata 'classes' must be a JSON list of names, got ")


def write_text(path: Path) -> None:
    path.write_text("this is no weights file")


def write_empty(path: Path) -> None:
    path.touch()


def write_truncated(path: Path) -> None:
    save_file(TENSORS, path) if path.suffix == ".safetensors" else torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-40])


def write_objects(path: Path) -> None:
    torch.save({"0.weight": NotATensor()}, path)


def write_numbers(path: Path) -> None:
    torch.save({"0.weight": 1.5}, path)


def write_tensor(path: Path) -> None:
    torch.save(torch.zeros(3), path)


def write_nothing(path: Path) -> None:
    torch.save({}, path)


DAMAGED = "weights must hold tensors only, got a damaged file or one with code or objects"


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("w.pth", write_text, DAMAGED),
        ("w.pt", write_empty, DAMAGED),
        ("w.pth", write_truncated, DAMAGED),
        ("w.pth", write_objects, DAMAGED),
        ("w.pth", write_numbers, "weights must be a state dict of tensors, got float at '0.weight'"),
        ("w.pth", write_tensor, "weights must be a state dict, got Tensor"),
        ("w.pth", write_nothing, "weights must hold tensors, got none"),
        ("w.safetensors", write_text, "must be a safetensors file, got a damaged or other file"),
        ("w.safetensors", write_empty, "must be a safetensors file, got a damaged or other file"),
        ("w.safetensors", write_truncated, "must be a safetensors file, got a damaged or other file"),
        ("w.onnx", write_text, "weights must be one of .safetensors, .pth, .pt, got '.onnx'"),
        ("folder.pth", Path.mkdir, "weights must be a file, got a directory"),
        ("absent.pth", lambda path: None, "weights must be a file, got no such file"),
    ],
)
def test_a_file_that_holds_no_weights_is_refused_in_one_line_that_names_it(
    name: str, write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(UserError) as error:
        load_weights(str(path))
    assert str(error.value).startswith(f"{path}: {message}; ")
    assert "\n" not in str(error.value)


def test_a_name_that_torchvision_does_not_have_is_answered_with_those_it_has() -> None:
    with pytest.raises(UserError) as error:
        load_weights("COCO_V9", "ssd300_vgg16")
    assert str(error.value) == (
        "COCO_V9: weights must be a file, got no such file; "
        "give its path or one of torchvision's: COCO_V1, DEFAULT"
    )


def test_weights_by_name_come_from_torchvision_with_their_hash_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def get_state_dict(entry: WeightsEnum, progress: bool, check_hash: bool) -> dict[str, Tensor]:
        asked.append((entry, check_hash))
        return TENSORS

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    read = load_weights("DEFAULT", "resnet18")
    assert asked == [(ResNet18_Weights.IMAGENET1K_V1, True)]
    assert read.source == ResNet18_Weights.IMAGENET1K_V1.url
    assert read.tensors.keys() == TENSORS.keys()


def test_a_download_that_fails_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_state_dict(entry: WeightsEnum, progress: bool, check_hash: bool) -> dict[str, Tensor]:
        raise URLError("no route to host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    with pytest.raises(UserError) as error:
        load_weights("IMAGENET1K_V1", "resnet18")
    assert str(error.value) == (
        f"{ResNet18_Weights.IMAGENET1K_V1.url}: weights ResNet18_Weights.IMAGENET1K_V1 must be downloaded, "
        "got URLError; fetch the file elsewhere and give its path"
    )


def test_older_names_of_torchvisions_layers_are_brought_up_to_date(tmp_path: Path) -> None:
    old = ["backbone.fpn.inner_blocks.0.weight", "backbone.fpn.layer_blocks.3.bias", "rpn.head.conv.weight"]
    new = [
        "backbone.fpn.inner_blocks.0.0.weight",
        "backbone.fpn.layer_blocks.3.0.bias",
        "rpn.head.conv.0.0.weight",
    ]
    for i, names in enumerate((old, new)):
        path = str(tmp_path / f"{i}.pth")
        torch.save({name: torch.zeros(1) for name in names}, path)
        assert list(load_weights(path).tensors) == new


def test_half_precision_is_loaded_in_the_models_dtype() -> None:
    model = small_model()
    load_into(model, weights({key: t.half() for key, t in small_model().state_dict().items()}))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_only_the_batch_counter_may_be_missing() -> None:
    tensors = small_model().state_dict()
    expected = tensors["0.weight"].clone()
    del tensors["1.num_batches_tracked"]
    model = small_model()
    load_into(model, weights(tensors))
    assert torch.equal(model[0].weight, expected)
    del tensors["1.running_var"]
    with pytest.raises(
        UserError, match=r"keys missing: 1 \(1.running_var\), unexpected: 0, of other shape: 0"
    ):
        load_into(model, weights(tensors))


def test_a_checkpoint_of_another_model_is_described_by_at_most_three_examples_a_kind() -> None:
    tensors = {"0.weight": torch.zeros(5, 3), **{f"x{i}": torch.zeros(1) for i in range(5)}}
    with pytest.raises(UserError) as error:
        load_into(small_model(), weights(tensors))
    assert str(error.value) == (
        "w.pth: weights must be those of the model, got a checkpoint of another model: keys missing: "
        "5 (0.bias, 1.weight, 1.bias, ...), unexpected: 5 (x0, x1, x2, ...), "
        "of other shape: 1 (0.weight [5, 3] for [2, 3]); choose the architecture it was saved from"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_with_its_tensor_named(value: float) -> None:
    tensors = small_model().state_dict()
    tensors["0.bias"] = torch.tensor([0.0, value])
    model = small_model()
    before = model[0].weight.clone()
    with pytest.raises(UserError, match=r"w\.pth: weights must be finite, got nan or inf in '0\.bias'; "):
        load_into(model, weights(tensors))
    assert torch.equal(model[0].weight, before)


def test_a_part_of_a_model_is_loaded_and_the_rest_left_alone() -> None:
    model = small_model()
    model[1].bias.data.fill_(7.0)
    load_into(model, weights(TENSORS), keys=TENSORS.keys())
    assert torch.equal(model[0].weight, TENSORS["0.weight"])
    assert (model[1].bias == 7.0).all()


def refusal_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_weights(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1).expand(1 << 20, 1 << 20),
        torch.eye(3).to_sparse(),
        torch.empty(9, device="meta"),
    ],
    ids=["repeated", "sparse", "without values"],
)
def test_only_tensors_whose_elements_lie_in_the_file_are_read(value: Tensor, tmp_path: Path) -> None:
    torch.save({"a": value}, tmp_path / "w.pth")
    assert refusal_of(tmp_path / "w.pth").startswith(
        "weights must be a state dict of tensors, got Tensor at 'a'"
    )


@pytest.mark.parametrize("classes", ["[" * 100_000, "[" + "9" * 9000, '["\\ud800"]'])
def test_classes_that_json_cannot_say_are_refused(classes: str, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "w.safetensors", {"classes": classes})
    assert refusal_of(tmp_path / "w.safetensors").startswith(
        "metadata 'classes' must be a JSON list of names"
    )


def test_keys_of_another_model_are_shown_in_one_printable_line() -> None:
    with pytest.raises(UserError) as caught:
        load_into(small_model(), weights({"a\nb" + "x" * 1000: torch.zeros(1)}))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500

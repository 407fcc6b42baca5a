"""Whatever is changed in a packed file, by accident or on purpose, is refused in one line or understood."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from deploy.toys import float_model, packed, quantized
from torch import Tensor, nn

from lbdet.convert import (
    Override,
    WeightFormat,
    calibrate_activations,
    quantize_model,
)
from lbdet.deploy import container
from lbdet.deploy.pack import pack_model
from lbdet.deploy.packed import digest, load_packed
from lbdet.deploy.rebuild import rebuild
from lbdet.errors import UserError
from lbdet.nn import QuantConv2d
from lbdet.precision import Precision


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.lbw"


def refusal(path: Path) -> str:
    """Return the message with which a file is refused, without its path."""
    with pytest.raises(UserError) as error:
        load_packed(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 800
    return message.removeprefix(f"{path}: ")


def small_file(path: Path) -> bytes:
    """Pack a model of a few weights, so that tests can go through all bytes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)).eval()
    quantize_model(model, "W4A4", overrides=[Override("2", Precision(2, 4), WeightFormat("uniform"))])
    calibrate_activations(model, lambda: [torch.rand(1, 1, 4, 4)])
    pack_model(model, path, "toy", ["a"], "W4A4", fold_batch_norm=True)
    return path.read_bytes()


RUNS = pytest.mark.parametrize(
    "run", [0, *(pytest.param(run, marks=pytest.mark.slow) for run in range(1, 9))]
)


def flipped(content: bytes, run: int) -> Iterator[tuple[int, bytearray]]:
    """Yield contents with one bit flipped: in run 0 of some bytes, in runs 1 to 8 all bits of all bytes."""
    for i in range(0, len(content), 1 if run else 7):
        changed = bytearray(content)
        changed[i] ^= 1 << (run + i) % 8
        yield i, changed


@RUNS
def test_a_flipped_bit_anywhere_is_noticed(run: int, path: Path) -> None:
    for _, changed in flipped(small_file(path), run):
        path.write_bytes(changed)
        refusal(path)


def test_a_file_cut_short_is_refused(path: Path) -> None:
    content = small_file(path)
    for size in [*range(0, len(content), 31), len(content) - 1]:
        path.write_bytes(content[:size])
        refusal(path)


@RUNS
def test_a_bit_flipped_under_a_hash_made_to_fit_is_refused_or_understood(run: int, path: Path) -> None:
    content = small_file(path)
    data = 8 + int.from_bytes(content[:8], "little")
    ranges = len(load_packed(path).inputs) * (4 + 2)  # bytes: ranges of inputs have no digest of their own
    unseen = 0
    for i, changed in flipped(content[:-32], run):
        path.write_bytes(changed + sha256(changed).digest())
        with contextlib.suppress(UserError):
            load_packed(path)
            unseen += i >= data
    assert unseen <= ranges


Change = Callable[[dict[str, str], dict[str, Tensor]], object]


def forged(path: Path, change: Change) -> str:
    """Change text and tensors of a file, give it a right hash, and return how it is refused."""
    packed(quantized("W4A8", overrides=(Override("7", Precision(8, 8), WeightFormat("uniform")),)), path)
    text, tensors = container.read(path)
    change(text, tensors)
    container.write(path, tensors, text)
    return refusal(path)


def layers(text: dict[str, str], change: Callable[[Any], object]) -> None:
    value = json.loads(text["layers"])
    change(value)
    text["layers"] = json.dumps(value)


def set_(mapping: Any, key: Any, value: Any) -> None:
    mapping[key] = value


FORGERIES: dict[str, tuple[Change, str]] = {
    "codes missing": (
        lambda text, t: t.pop("3.codes"),
        "tensor '3.codes' must be U8 [130], got none; pack the model anew",
    ),
    "scales missing": (
        lambda text, t: t.pop("packed.exponents"),
        "tensor 'packed.exponents' must be I8 [16], got n",
    ),
    "digests missing": (
        lambda text, t: t.pop("packed.digests"),
        "tensor 'packed.digests' must be U8 [15, 32], got ",
    ),
    "own tensor missing": (
        lambda text, t: t.pop("1.bias"),
        "tensor 'packed.digests' must be U8 [14, 32], got U8 [1",
    ),
    "own tensor renamed": (
        lambda text, t: set_(t, "1.other", t.pop("1.bias")),
        "'1.other' must have the digest it was packed with, got another; pack the model anew",
    ),
    "unexpected": (
        lambda text, t: set_(t, "packed.more", torch.zeros(1)),
        "tensor 'packed.more' must be absent, got F32 [1]; pack the model anew",
    ),
    "weight twice": (
        lambda text, t: set_(t, "3.weight", torch.zeros(1)),
        "a tensor must be stored once, got a weight twice; pack the model anew",
    ),
    "too few codes": (
        lambda text, t: set_(t, "3.codes", t["3.codes"][:-1]),
        "tensor '3.codes' must be U8 [130], got U8 [129]; pack the model anew",
    ),
    "codes of another dtype": (
        lambda text, t: set_(t, "3.codes", t["3.codes"].char()),
        "tensor '3.codes' must be U8 [130], got I8 [130]; pack the model anew",
    ),
    "a word that is no group": (
        lambda text, t: t["3.codes"][:2].fill_(255),
        "codes of '3': a word of 5 symbols must be at most 59048, got 65535; pack the model anew",
    ),
    "a symbol too many": (
        lambda text, t: t["7.codes"][:1].fill_(255),
        "codes of '7': a word of 1 symbols must be at most 254, got 255; pack the model anew",
    ),
    "another code": (
        lambda text, t: t["3.codes"][:2].fill_(1),
        "'3.weight' must have the digest it was packed with, got another; pack the model anew",
    ),
    "another scale": (
        lambda text, t: t["packed.exponents"][0].add_(1),
        "'0.weight' must have the digest it was packed with, got another; pack the model anew",
    ),
    "another float": (
        lambda text, t: t["1.running_mean"].add_(1),
        "'1.running_mean' must have the digest it was packed with, got another; pack the model anew",
    ),
    "a scale of inputs that is none": (
        lambda text, t: t["packed.input_scales"][0].fill_(math.nan),
        "input of '0' must have a positive scale and 0 in its range, got nan from ",
    ),
    "a range without zero": (
        lambda text, t: t["packed.input_lows"][0].fill_(1),
        "input of '0' must have a positive scale and 0 in its range, got ",
    ),
    "absurd shape": (
        lambda text, t: layers(text, lambda v: set_(v[0]["shapes"], "3", [2**31 - 1] * 5)),
        "tensor '3.codes' must be U8 [",
    ),
    "shape beyond": (
        lambda text, t: layers(text, lambda v: set_(v[0]["shapes"], "3", [2**31, 1])),
        "layers in the header: must be as lbdet writes it, got a mistake at '0.shapes.3.0': Input shou",
    ),
    "empty shape": (
        lambda text, t: layers(text, lambda v: set_(v[0]["shapes"], "3", [0, 1])),
        "layers in the header: must be as lbdet writes it, got a mistake at '0.shapes.3.0': Input shou",
    ),
    "other shape": (
        lambda text, t: layers(text, lambda v: set_(v[0]["shapes"], "3", [6, 3, 6, 3])),
        "'3.weight' must have the digest it was packed with, got another; pack the model anew",
    ),
    "other granularity": (
        lambda text, t: layers(text, lambda v: set_(v[0], "granularity", "per_tensor")),
        "tensor 'packed.exponents' must be I8 [3], got I8 [16]; pack the model anew",
    ),
    "unknown granularity": (
        lambda text, t: layers(text, lambda v: set_(v[0], "granularity", "per_weight")),
        "layers in the header: must be as lbdet writes it, got a mistake at '0.granularity': Input should be",
    ),
    "unknown key": (
        lambda text, t: layers(text, lambda v: set_(v[0], "x", 1)),
        "layers in the header: must be as lbdet writes it, got a mistake at '0.x': Unexpected",
    ),
    "layer twice": (
        lambda text, t: layers(text, lambda v: set_(v[1]["shapes"], "3", [1, 1])),
        "layers must stand once in the header, got one twice; pack the model anew",
    ),
    "layers that are no list": (
        lambda text, t: set_(text, "layers", "{}"),
        "layers in the header: must be as lbdet",
    ),
    "layers that are no JSON": (
        lambda text, t: set_(text, "layers", "["),
        "layers in the header: must be JSON, got o",
    ),
    "layers nested deeply": (
        lambda text, t: set_(text, "layers", "[" * 99999),
        "layers in the header: must be JSON",
    ),
    "classes that are no names": (
        lambda text, t: set_(text, "classes", "[1]"),
        "classes in the header: must be as",
    ),
    "precision": (
        lambda text, t: set_(text, "precision", "W0"),
        "precision must be like W4A8, got 'W0'; pack it ane",
    ),
    "long precision": (
        lambda text, t: set_(text, "precision", "W" + "9" * 9999),
        "precision must be like W4A8, got",
    ),
    "missing text": (
        lambda text, t: text.pop("config"),
        "header must have architecture, classes, config, layers, lb",
    ),
    "more text": (
        lambda text, t: set_(text, "x", ""),
        "header must have architecture, classes, config, layers, lbde",
    ),
    "names tied to nothing": (
        lambda text, t: set_(text, "tied", '{"a":"b"}'),
        "'a' must be a second name, got none of 'b'; pack it anew",
    ),
    "names tied to themselves": (
        lambda text, t: set_(text, "tied", '{"1.bias":"1.weight"}'),
        "'1.bias' must be a second name, got none of '1.weight'; pack it anew",
    ),
}
KINDS: dict[str, dict[str, Any]] = {
    "width": {"bits": 7},
    "no width": {"bits": None},
    "format": {"format": "zip"},
    "float with a width": {"format": None},
    "coder": {"coder": None},
    "per tensor only": {"format": "dorefa"},
    "halves": {"symmetric": True},
    "width of inputs": {"input_bits": 9},
    "format of inputs": {"input_format": "lbw"},
    "no format of inputs": {"input_format": None},
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_file_that_lies_is_refused_whatever_its_hash(name: str, path: Path) -> None:
    change, message = FORGERIES[name]
    assert forged(path, change).startswith(message)


@pytest.mark.parametrize("name", KINDS)
def test_layers_of_an_impossible_kind_are_refused(name: str, path: Path) -> None:
    message = forged(path, lambda text, t: layers(text, lambda v: v[0].update(KINDS[name])))
    assert message.startswith("layer '0' must be of a kind that lbdet has, got {")


def test_values_that_are_not_finite_are_refused_even_with_their_digest(path: Path) -> None:
    def change(text: dict[str, str], tensors: dict[str, Tensor]) -> None:
        names = sorted(
            [
                *(f"{i}.weight" for i in (0, 3, 5, 7)),
                *(n for n in tensors if n[0] != "p" and "codes" not in n),
            ]
        )
        tensors["1.bias"][0] = math.nan
        row = torch.tensor(list(digest("1.bias", tensors["1.bias"])), dtype=torch.uint8)
        tensors["packed.digests"][names.index("1.bias")] = row

    assert forged(path, change) == "'1.bias' must be finite, got nan or inf; pack another checkpoint"


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: float_model(channels=8),
            "weights must be those of the model, got a checkpoint of another model",
        ),
        (
            lambda: nn.Sequential(*float_model()[:5]),
            "weights must be those of the model, got a checkpoint of another",
        ),
        (
            lambda: nn.Sequential(nn.Linear(2, 2)),
            "weights must be those of the model, got a checkpoint of another mo",
        ),
        (
            lambda: nn.Sequential(*float_model(), nn.BatchNorm1d(2)),
            "must have the batch norms of the model, got 0 fol",
        ),
    ],
)
def test_another_model_is_not_given_the_weights(
    build: Callable[[], nn.Module], message: str, path: Path
) -> None:
    packed(quantized(), path)
    with pytest.raises(UserError) as error:
        rebuild(load_packed(path), build())
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_folded_model_is_only_given_to_one_with_as_many_batch_norms(path: Path) -> None:
    packed(quantized(), path, fold_batch_norm=True)
    model = float_model()
    model.set_submodule("1", nn.Identity())
    with pytest.raises(
        UserError, match="must have the batch norms of the model, got 2 folded and 1 not stored"
    ):
        rebuild(load_packed(path), model)


def test_a_layer_whose_input_is_rounded_must_be_a_float_layer_of_the_model(path: Path) -> None:
    packed(quantized("W4A8"), path)
    model = float_model()
    quantize_model(model, "float")
    with pytest.raises(
        UserError, match="'0' must be a float layer of the model, got QuantConv2d; build the archi"
    ):
        rebuild(load_packed(path), model)


def test_a_rebuilt_layer_without_rounded_inputs_is_an_ordinary_one(path: Path) -> None:
    packed(quantized(), path)
    model = rebuild(load_packed(path), float_model(1))
    assert not any(isinstance(module, QuantConv2d) for module in model.modules())
    assert not model.training


@pytest.mark.parametrize("bits", range(2, 7))
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_the_reader_that_the_documentation_shows_finds_the_weights(path, bits, granularity) -> None:
    text = (Path(__file__).parents[2] / "docs/packed.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    packed(quantized(f"W{bits}", WeightFormat("lbw", {"granularity": granularity})), path)
    found, expected = names["read_lbw"](path), load_packed(path).tensors
    assert found.keys() == {"0", "3", "5", "7"}
    for name, weight in found.items():
        assert torch.equal(torch.from_numpy(weight), expected[f"{name}.weight"])

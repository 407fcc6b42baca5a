"""What is packed comes back bit for bit, from a file that depends on nothing else."""

from __future__ import annotations

import json
import math
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from deploy.toys import CLASSES, float_model, images, packed, quantized, randomize
from safetensors import safe_open
from torch import Tensor, nn

from lbdet.classes import VOC20
from lbdet.convert import (
    ActivationFormat,
    Override,
    WeightFormat,
    calibrate_activations,
    quantize_model,
    quantized_layers,
    set_precision,
    set_scheduled_precision,
)
from lbdet.deploy import container
from lbdet.deploy.pack import pack_model
from lbdet.deploy.packed import PackedInput, load_packed, read_packed
from lbdet.deploy.rebuild import rebuild
from lbdet.errors import NumericsError, UserError
from lbdet.models import MODELS
from lbdet.models.classifiers import CLASSIFIERS
from lbdet.nn import FORMATS
from lbdet.precision import Precision

FORMS: dict[str, WeightFormat] = {
    f"{name}{'' if not options else ' ' + ' '.join(map(str, options.values()))}": WeightFormat(name, options)
    for name, options in (
        *(("lbw", {"granularity": g}) for g in ("per_channel", "per_tensor")),
        ("lbw", {"solver": "semi"}),
        *(
            ("uniform", {"granularity": g, "symmetric": s})
            for g in ("per_channel", "per_tensor")
            for s in (True, False)
        ),
        ("uniform", {"scale": "max"}),
        ("dorefa", {}),
        *(("binary", {"granularity": g}) for g in ("per_channel", "per_tensor")),
        *(
            ("learned_levels", {"granularity": g, "symmetric": s})
            for g in ("per_channel", "per_tensor")
            for s in (True, False)
        ),
    )
}
CASES = [(form, bits) for form, found in FORMS.items() for bits in FORMATS[found.name].weight.widths]  # type: ignore[union-attr]


def evaluated_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what each quantized layer computes with."""
    return {
        f"{name}.weight": layer.weight_quantizer.quantize(layer.weight, bits).dequantize()
        for name, layer in quantized_layers(model).items()
        if (bits := layer.precision.weight_bits) is not None
    }


def assert_comes_back(model: nn.Module, path: Path) -> None:
    """Check a file, packed without folding, against the model."""
    expected = {
        key: value
        for key, value in model.state_dict().items()
        if "_quantizer." not in key and not key.endswith("num_batches_tracked")
    } | evaluated_weights(model)
    found = load_packed(path).tensors
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype == torch.float32
        assert torch.equal(found[key], value), key
        assert torch.equal(found[key].view(torch.int32), value.contiguous().view(torch.int32)), key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.lbw"


def test_no_format_is_forgotten() -> None:
    assert {form.name for form in FORMS.values()} == {name for name, found in FORMATS.items() if found.weight}


@pytest.mark.parametrize("form, bits", CASES)
def test_every_format_and_width_comes_back_bit_for_bit(form: str, bits: int, path: Path) -> None:
    torch.manual_seed(bits)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(3, 4))
    sizes = torch.tensor([1.0, 0.0, 1e-3, 50.0, 3.0])
    model.get_parameter("0.weight").data *= sizes.view(5, 1, 1, 1)
    quantize_model(model, f"W{bits}", FORMS[form])
    packed(model, path)
    assert_comes_back(model, path)


@pytest.mark.parametrize("form, bits", [case for case in CASES if case[1] in (1, 2, 4)])
def test_every_format_keeps_its_function_with_batch_norm_folded(form: str, bits: int, path: Path) -> None:
    model = quantized(f"W{bits}", FORMS[form])
    assert packed(model, path, fold_batch_norm=True).folded == {"0": "1", "3": "4"}
    rebuilt = rebuild(load_packed(path), float_model(seed=1))
    with torch.no_grad():
        expected, found = model(images()), rebuilt(images())
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    for name in ("1", "4"):
        assert isinstance(rebuilt.get_submodule(name), nn.Identity)


@pytest.mark.parametrize("bits", range(2, 7))
def test_folding_leaves_lbw_codes_as_they_are_but_for_the_sign_of_gamma(bits: int, path: Path) -> None:
    model = quantized(f"W{bits}")
    packed(model, path, fold_batch_norm=True)
    read, n = read_packed(path), 2 ** (bits - 2)
    for conv, norm in (("0", "1"), ("3", "4")):
        layer, bn = quantized_layers(model)[conv], model.get_submodule(norm)
        assert isinstance(bn, nn.BatchNorm2d)
        assert bn.running_var is not None
        q = layer.weight_quantizer.quantize(layer.weight, bits)
        sign = torch.where(bn.weight < 0, -1, 1).view(-1, 1, 1, 1)
        symbols = read.stored(conv).symbols.view(q.codes.shape)
        assert torch.equal(symbols.long() - n, (q.level_index - n) * sign)
        exponents = q.scale_exponent.double()  # type: ignore[attr-defined]
        scale = (
            2.0 ** (exponents - n + 1)
            * (bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()).abs()
        )
        assert torch.equal(read.vectors[conv]["scales"], scale.float())


@pytest.mark.parametrize("name", ["ssd_tiny", "ssdlite320_mobilenet_v3_large", "resnet20_cifar"])
@pytest.mark.parametrize("fold", [False, True])
def test_a_model_of_lbdet_runs_as_before(name: str, fold: bool, path: Path) -> None:
    assert_runs_as_before(name, fold, "W4", path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["W4", "W8A8"])
@pytest.mark.parametrize("name", [*MODELS, *CLASSIFIERS])
@pytest.mark.parametrize("fold", [False, True])
def test_every_model_of_lbdet_runs_as_before(name: str, fold: bool, precision: str, path: Path) -> None:
    assert_runs_as_before(name, fold, precision, path)


def assert_runs_as_before(name: str, fold: bool, precision: str, path: Path) -> None:
    """Compare a detector's feature maps, or a classifier's logits; bit for bit where nothing is folded."""
    torch.manual_seed(0)
    build = (MODELS | CLASSIFIERS)[name]
    model = build(4).eval()
    randomize(model)
    quantize_model(model, precision, WeightFormat("uniform" if "A" in precision else "lbw"))
    x = images(size=300 if name == "ssd300_vgg16" else 96)[:2].sigmoid()
    if "A" in precision:
        calibrate_activations(model, lambda: [list(x[:1]) if name in MODELS else x[:1]])
    summary = pack_model(model, path, name, CLASSES, precision, fold_batch_norm=fold)
    if not fold:
        assert_comes_back(model, path)
    assert summary.kept == [] if fold else summary.folded == {}
    assert summary.size == path.stat().st_size
    rebuilt = rebuild(load_packed(path), build(4))
    with torch.no_grad():
        for before, after in zip(outputs(model, x), outputs(rebuilt, x), strict=True):
            if not fold:
                assert torch.equal(after, before)
            else:  # where inputs are rounded, a few of them fall to the other side of a border
                tolerance = 5e-2 if "A" in precision else 1e-5
                assert (after - before).abs().max() <= tolerance * before.abs().max()


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    if isinstance(getattr(model, "backbone", None), nn.Module):
        return list(model.get_submodule("backbone")(x).values())
    return [model(x)]


def test_layers_of_other_widths_and_formats_and_float_ones_come_back(path: Path) -> None:
    overrides = (
        Override("0", Precision(8, 8), WeightFormat("uniform"), ActivationFormat("uniform")),
        Override("5", Precision(None, 4)),
    )
    model = quantized("W2A2", WeightFormat("dorefa"), ActivationFormat("dorefa"), overrides, ("3",))
    packed(model, path)
    assert_comes_back(model, path)
    layers = read_packed(path).header.layers
    assert {name: (layer.format, str(layer.precision)) for name, layer in layers.items()} == {
        "0": ("uniform", "W8A8"),
        "5": (None, "A4"),
        "7": ("dorefa", "W2A2"),
    }
    found = rebuild(load_packed(path), float_model(seed=1))
    with torch.no_grad():
        assert torch.equal(found(images(1)), model(images(1)))


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(
    "precision, weight, activation",
    [
        ("W4A8", "lbw", ActivationFormat("uniform")),
        ("W2A1", "uniform", ActivationFormat("uniform", {"update": "average", "objective": "channel_aware"})),
        ("W3A3", "dorefa", ActivationFormat("dorefa", {"clip": 0.7})),
        ("W3A3", "dorefa", ActivationFormat("dorefa", {"clip": "learned"})),
        ("A8", "lbw", ActivationFormat("uniform")),
    ],
)
def test_ranges_of_inputs_come_back_bit_for_bit(
    precision: str, weight: str, activation: ActivationFormat, fold: bool, path: Path
) -> None:
    model = quantized(precision, WeightFormat(weight), activation, keep_float=("0",))
    for layer in quantized_layers(model).values():  # training leaves scales whose logarithm has no short form
        for parameter in layer.activation_quantizer.parameters():
            parameter.data.add_(0.1234567)
    summary = packed(model, path, fold_batch_norm=fold)
    assert len(summary.folded) == (2 if fold else 0)
    found = rebuild(load_packed(path), float_model(seed=1))
    assert {name: str(layer.precision) for name, layer in quantized_layers(found).items()} == {
        name: precision[2:] if precision[0] == "W" else precision for name in ("3", "5", "7")
    }
    with torch.no_grad():
        expected = model(images(1))
        if fold:
            torch.testing.assert_close(found(images(1)), expected, rtol=0.3, atol=0.3)
        else:
            assert torch.equal(found(images(1)), expected)


def test_binary_inputs_come_back(path: Path) -> None:
    model = quantized("W1A1", WeightFormat("binary"), ActivationFormat("binary"), keep_float=("0", "3", "7"))
    packed(model, path)
    loaded = load_packed(path)
    assert loaded.inputs == {"5": PackedInput("binary", 1)}
    with torch.no_grad():
        assert torch.equal(rebuild(loaded, float_model(1))(images()), model(images()))


def test_a_rebuilt_model_packs_its_inputs_again(path: Path) -> None:
    model = quantized("W4A8")
    packed(model, path)
    first = load_packed(path)
    packed(rebuild(first, float_model(1)), path)
    assert load_packed(path).inputs == first.inputs
    assert all(torch.equal(load_packed(path).tensors[key], value) for key, value in first.tensors.items())


def test_inputs_have_the_range_that_the_quantizer_tells(path: Path) -> None:
    model = quantized("W4A8")
    packed(model, path)
    for name, found in load_packed(path).inputs.items():
        scale, low, _ = quantized_layers(model)[name].activation_quantizer.range(8) or (0, 0, 0)
        assert found == PackedInput("uniform", 8, scale, low)


def test_a_layer_with_two_names_is_stored_once_and_has_both_again(path: Path) -> None:
    def build() -> nn.Module:
        part = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        return nn.Sequential(part, nn.ReLU(), part)

    model = build().eval()
    quantize_model(model, "W4")
    packed(model, path, fold_batch_norm=True)
    assert "2.0.codes" not in read_packed(path).tensors
    assert read_packed(path).header.tied["2.1.running_mean"] == "0.1.running_mean"
    tensors = load_packed(path).tensors
    assert tensors.keys() == {key for key in build().state_dict() if not key.endswith("num_batches_tracked")}
    assert all(tensors[f"2.{key[2:]}"] is tensors[key] for key in tensors if key.startswith("0."))
    assert torch.equal(rebuild(load_packed(path), build())(images()), model(images()))


def test_tensors_of_every_dtype_come_back(path: Path) -> None:
    model = quantized()
    for i, dtype in enumerate(container.DTYPES.values()):
        model.register_buffer(f"extra_{i}", torch.tensor([[0, 1], [1, 0]]).to(dtype))
    packed(model, path)
    for i, dtype in enumerate(container.DTYPES.values()):
        found = load_packed(path).tensors[f"extra_{i}"]
        assert (found.dtype, found.tolist()) == (dtype, [[0, 1], [1, 0]])


def test_the_header_tells_what_the_file_is(path: Path) -> None:
    pack_model(quantized(), path, "ssd_tiny", CLASSES, Precision(4), config="model:\n  name: x\n")
    header = read_packed(path).header
    assert (header.architecture, header.classes, str(header.precision)) == ("ssd_tiny", CLASSES, "W4")
    assert (header.config, header.lbdet) == ("model:\n  name: x\n", "0.1.0")
    layer = header.layers["3"]
    assert (layer.format, layer.bits, layer.granularity, layer.shape) == (
        "lbw",
        4,
        "per_channel",
        (6, 6, 3, 3),
    )
    with safe_open(path, framework="pt") as file:
        text = file.metadata()
        assert {"0.codes", "0.bias", "1.weight", "packed.exponents", "packed.digests"} < set(file.keys())
    assert json.loads(text["classes"]) == list(CLASSES)
    assert json.loads(text["layers"])[0]["shapes"]["3"] == [6, 6, 3, 3]


def test_digests_can_be_recomputed_from_the_words_of_their_description(path: Path) -> None:
    model = quantized()
    packed(model, path)
    rows = read_packed(path).tensors["packed.digests"]
    names = sorted(load_packed(path).tensors)
    weight = evaluated_weights(model)["3.weight"]
    described = b'["3.weight","F32",[6,6,3,3]]'
    expected = sha256(described + weight.numpy().astype("<f4").tobytes()).digest()
    assert bytes(rows[names.index("3.weight")].tolist()) == expected


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for fold in (False, True):
        for name in ("a", "b"):
            packed(quantized("W4A8"), tmp_path / name, fold_batch_norm=fold)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "form", ["lbw per_channel", "uniform per_tensor False", "learned_levels per_tensor True", "dorefa"]
)
def test_widths_that_were_visited_before_leave_no_trace(form: str, tmp_path: Path) -> None:
    direct, visited = (quantized("W4", FORMS[form]) for _ in range(2))
    for width in ("W2", "W3", "float", "W4"):
        set_scheduled_precision(visited, width)
    set_precision(visited, {"3": Precision(4, 8)})
    set_precision(visited, {"3": Precision(4)})
    packed(direct, tmp_path / "a")
    packed(visited, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_memory_layout_and_mode_leave_no_trace_and_the_model_stays(tmp_path: Path) -> None:
    model = quantized()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    packed(model, tmp_path / "a", fold_batch_norm=True)
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    packed(model, tmp_path / "b", fold_batch_norm=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_summary_is_a_line_to_print(path: Path) -> None:
    text = str(packed(quantized(), path, fold_batch_norm=True))
    size, full = (
        path.stat().st_size,
        sum(t.numel() * t.element_size() for t in float_model().state_dict().values()),
    )
    assert text == (
        f"{path}: {size} bytes, 1/{full / size:.2f} of the float state dict; 2 batch norms folded, 0 kept"
    )


@pytest.mark.parametrize("fold, ratio", [(False, 7), (True, 8.5)])
def test_ssdlite_at_four_bits_has_the_size_that_was_promised(fold: bool, ratio: float, path: Path) -> None:
    name = "ssdlite320_mobilenet_v3_large"
    assert size_ratio(name, fold, path) >= ratio


@pytest.mark.slow
def test_ssd300_at_four_bits_has_the_size_that_was_promised(path: Path) -> None:
    assert size_ratio("ssd300_vgg16", False, path) >= 9


def size_ratio(name: str, fold: bool, path: Path) -> float:
    torch.manual_seed(0)
    model = MODELS[name](21)
    quantize_model(model, "W4")
    summary = pack_model(model, path, name, VOC20, "W4", "x" * 1500, fold)
    return summary.float_size / summary.size


@torch.no_grad()
def scaled(factor: float) -> nn.Sequential:
    model = float_model()
    model.get_parameter("0.weight")[2] = torch.tensor([1.0, -1.5, 0.5]).view(3, 1, 1) * factor
    quantize_model(model, "W4")
    return model


@pytest.mark.parametrize("factor", [2.0**127, 2.0**-125, 2.0**-128])
def test_scales_at_the_ends_of_a_byte_come_back(factor: float, path: Path) -> None:
    model = scaled(factor)
    packed(model, path)
    assert_comes_back(model, path)


def test_a_scale_below_a_byte_is_refused_by_name_unless_it_is_folded(path: Path) -> None:
    with pytest.raises(UserError) as error:
        packed(scaled(2.0**-140), path)
    assert str(error.value) == (
        "0: scale exponents must be at least -128 to be stored in a byte, got -139; "
        "set the weights of that channel to 0"
    )
    assert not path.exists()
    packed(scaled(2.0**-140), path, fold_batch_norm=True)
    load_packed(path)


def test_a_scale_that_folding_makes_infinite_is_refused_by_name(path: Path) -> None:
    model = scaled(2.0**100)
    with torch.no_grad():
        model.get_parameter("1.weight")[2] = 1e30
    with pytest.raises(
        UserError, match="0: scales must be finite with batch norm folded into them, got infinite"
    ):
        packed(model, path, fold_batch_norm=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["3.weight", "5.bias", "4.running_var"])
def test_numbers_that_are_not_finite_are_refused_by_name(key: str, bad: float, path: Path) -> None:
    model = quantized()
    model.state_dict()[key].view(-1)[0] = bad
    with pytest.raises(NumericsError, match=rf"^{key.removesuffix('.weight')}"):
        packed(model, path)
    assert not path.exists()


def test_activations_without_a_range_are_refused(path: Path) -> None:
    model = float_model()
    quantize_model(model, "W4A8")
    with pytest.raises(
        UserError, match="0: activations must be calibrated before packing, got no range there and in"
    ):
        packed(model, path)


def test_a_tensor_with_a_name_of_the_format_is_refused(path: Path) -> None:
    for name in ("packed", "0"):
        model = quantized()
        holder = nn.Module() if name == "packed" else model.get_submodule(name)
        holder.register_buffer("codes", torch.zeros(1))
        if name == "packed":
            model.add_module(name, holder)
        with pytest.raises(UserError, match=rf"{name}\.codes: must not have a name of the file format"):
            packed(model, path)


def test_what_safetensors_cannot_hold_is_refused_by_name(path: Path) -> None:
    model = quantized()
    model.register_buffer("phase", torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(UserError, match=r"phase: must be one of F64, .* got torch\.complex64; convert it"):
        packed(model, path)


def test_an_unknown_coder_is_refused(path: Path) -> None:
    with pytest.raises(UserError, match="coder: must be one of radix, ans, got 'zip'; choose one of them"):
        packed(quantized(), path, coder="zip")

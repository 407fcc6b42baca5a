"""Streams of the entropy coder are as short as can be, come back, and unpack to no more than they may."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from deploy.toys import float_model, images, packed, quantized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lbdet.convert import WeightFormat, quantize_model, quantized_layers
from lbdet.deploy import container, entropy
from lbdet.deploy.entropy import TOTAL, CodeSize, code_sizes, decode, encode, size_summary
from lbdet.deploy.packed import load_packed, read_packed
from lbdet.deploy.radix import radix_of
from lbdet.deploy.rebuild import rebuild
from lbdet.errors import UserError

pytest.importorskip("constriction", reason="entropy coding needs constriction")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.lbw"


def skewed(count: int, alphabet: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.minimum(rng.geometric(0.4, count) - 1, alphabet - 1).astype(np.uint8)


def entropy_by_counting(symbols: list[int]) -> float:
    counts = Counter(symbols)
    return math.fsum(-math.log2(counts[symbol] / len(symbols)) for symbol in symbols)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(2, 256))
def test_any_symbols_come_back_or_are_too_few_bytes(data: st.DataObject, alphabet: int) -> None:
    symbols = np.array(data.draw(st.lists(st.integers(0, alphabet - 1), max_size=200)), np.uint8)
    stream, frequencies = encode(symbols, alphabet)
    assert frequencies.sum(dtype=np.int64) == TOTAL
    assert ((frequencies > 0) | (np.bincount(symbols, minlength=alphabet) == 0)).all()
    if len(symbols) <= entropy.MAX_SYMBOLS_A_BYTE * len(stream):
        assert decode(stream, frequencies, len(symbols)).tolist() == symbols.tolist()


@pytest.mark.parametrize("alphabet", [2, 3, 5, 9, 17, 33, 255, 256])
def test_a_stream_is_as_long_as_the_entropy_and_a_word(alphabet: int) -> None:
    symbols = skewed(20_000, alphabet)
    stream, frequencies = encode(symbols, alphabet)
    expected = entropy.zeroth_order_entropy(symbols) / 8
    assert expected <= len(stream) <= 1.002 * expected + 8
    assert decode(stream, frequencies, len(symbols)).tolist() == symbols.tolist()


@pytest.mark.parametrize("symbols", [[], [3], [0, 0, 0], [0, 1, 1, 2], [5, 5, 5, 1]])
def test_the_entropy_is_that_of_counting(symbols: list[int]) -> None:
    found = entropy.zeroth_order_entropy(np.array(symbols, np.uint8))
    assert found == pytest.approx(entropy_by_counting(symbols), abs=1e-12)


@pytest.mark.parametrize("counts", [[1, 0, 10**9], [1] * 256, [10**6] + [1] * 255, [0, 7], [0, 0]])
def test_frequencies_add_up_and_forget_nothing_that_occurs(counts: list[int]) -> None:
    found = entropy._frequencies(np.array(counts))
    assert found.dtype == np.int16
    assert found.sum(dtype=np.int64) == TOTAL
    assert all(f > 0 for f, count in zip(found, counts, strict=True) if count)


def test_a_stream_that_encode_does_not_make_is_refused() -> None:
    symbols = skewed(1000, 9)
    stream, frequencies = encode(symbols, 9)
    with pytest.raises(ValueError, match="symbols must take at least 1/32 byte each in whole words"):
        decode(stream, frequencies, 10**12)
    with pytest.raises(ValueError, match="in whole words"):
        decode(stream[:-1], frequencies, 1000)
    with pytest.raises(ValueError, match="500 symbols must use up the stream, got some more of it"):
        decode(stream, frequencies, 500)
    for wrong in (frequencies * 0, -frequencies, frequencies + np.int16(1)):
        with pytest.raises(ValueError, match=f"must be whole numbers that add up to {TOTAL}"):
            decode(stream, wrong, 1000)


def test_noise_decodes_to_symbols_or_is_refused() -> None:
    rng = np.random.default_rng(0)
    frequencies = encode(skewed(1000, 9), 9)[1]
    for size in (4, 8, 400):
        for _ in range(50):
            noise = rng.integers(0, 256, size, dtype=np.uint8)
            noise[-4:] *= rng.integers(
                0, 2, dtype=np.uint8
            )  # a last word of zero is one that no coder writes
            try:
                found = decode(noise, frequencies, 3 * size)
            except ValueError:
                continue
            assert found.max() < 9


def test_the_same_file_otherwise(path: Path, tmp_path: Path) -> None:
    model = large()
    packed(model, path, coder="radix")
    packed(model, tmp_path / "ans.lbw", coder="ans")
    radix, ans = load_packed(path), load_packed(tmp_path / "ans.lbw")
    assert all(torch.equal(ans.tensors[key], value) for key, value in radix.tensors.items())
    digests = [read_packed(p).tensors["packed.digests"] for p in (path, tmp_path / "ans.lbw")]
    assert torch.equal(*digests)
    assert (tmp_path / "ans.lbw").stat().st_size < path.stat().st_size
    assert {layer.coder for layer in ans.header.layers.values()} == {"ans", "radix"}


def large() -> nn.Module:
    """Layers that gain by entropy coding, one that is too small, and one whose weights are all zero."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 40, 3), nn.Conv2d(40, 40, 3), nn.Conv2d(40, 2, 1), nn.Conv2d(2, 900, 3)
    )
    model.get_parameter("3.weight").data.zero_()
    quantize_model(model, "W4")
    return model


def test_a_layer_that_gains_nothing_or_too_much_stays_radix_packed(path: Path) -> None:
    packed(large(), path, coder="ans")
    coders = {name: layer.coder for name, layer in read_packed(path).header.layers.items()}
    assert coders == {"0": "radix", "1": "ans", "2": "radix", "3": "radix"}


@pytest.mark.parametrize(
    "form, bits", [("lbw", 2), ("lbw", 6), ("uniform", 8), ("learned_levels", 3), ("binary", 1)]
)
def test_every_alphabet_comes_back(form: str, bits: int, path: Path) -> None:
    model = quantized(f"W{bits}", WeightFormat(form))
    packed(model, path, coder="ans", fold_batch_norm=True)
    packed(model, path.with_name("radix"), fold_batch_norm=True)
    expected = load_packed(path.with_name("radix")).tensors
    assert all(torch.equal(value, expected[key]) for key, value in load_packed(path).tensors.items())


def test_a_rebuilt_model_runs_as_before(path: Path) -> None:
    model = quantized("W4A8")
    packed(model, path, coder="ans")
    with torch.no_grad():
        assert torch.equal(rebuild(load_packed(path), float_model(1))(images()), model(images()))


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        packed(large(), tmp_path / name, coder="ans")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def forge(path: Path, name: str, value: Tensor) -> str:
    """Replace a tensor of a packed file, and return how it is refused."""
    packed(large(), path, coder="ans")
    text, tensors = container.read(path)
    container.write(path, tensors | {name: value}, text)
    with pytest.raises(UserError) as error:
        load_packed(path)
    return str(error.value).removeprefix(f"{path}: ")


def test_a_stream_that_is_too_short_for_its_symbols_is_refused_before_it_is_decoded(path: Path) -> None:
    message = forge(path, "1.codes", torch.zeros(4, dtype=torch.uint8))
    assert message == "tensor '1.codes' must be U8 [450], got U8 [4]; pack the model anew"


@pytest.mark.parametrize("value", [0, 1, 255])
def test_a_stream_of_other_symbols_is_refused(value: int, path: Path) -> None:
    message = forge(path, "1.codes", torch.full((6000,), value, dtype=torch.uint8))
    assert message.startswith(
        ("codes of '1': ", "'1.weight' must have the digest it was packed with, got another")
    )


def test_frequencies_of_another_sum_are_refused(path: Path) -> None:
    message = forge(path, "packed.frequencies", torch.ones(9, dtype=torch.int16))
    assert (
        message
        == f"codes of '1': frequencies must be whole numbers that add up to {TOTAL}; pack the model anew"
    )


def test_code_sizes_compare_entropy_ans_and_radix() -> None:
    model = large()
    layers, sizes = quantized_layers(model), {size.name: size for size in code_sizes(model)}
    for name, size in sizes.items():
        symbols = layers[name].weight_quantizer.quantize(layers[name].weight, 4).level_index
        assert size.entropy == pytest.approx(entropy_by_counting(symbols.flatten().tolist()) / 8)
        assert size.radix == radix_of("lbw", 4, True).size(size.weights)
        assert size.entropy <= size.ans <= size.radix
    assert sizes["3"].entropy == 0
    assert sizes["3"].ans == sizes["3"].radix


def test_code_sizes_are_those_of_the_file(path: Path) -> None:
    model = large()
    packed(model, path, coder="ans")
    file = read_packed(path)
    for size in code_sizes(model):
        vectors = file.vectors[size.name]
        frequencies = 2 * len(vectors["frequencies"]) if "frequencies" in vectors else 0
        assert size.ans == len(file.tensors[f"{size.name}.codes"]) + frequencies


def test_layers_at_full_precision_have_no_codes() -> None:
    model = quantized(keep_float=("0",))
    assert [size.name for size in code_sizes(model)] == ["3", "5", "7"]


def test_a_summary_adds_up() -> None:
    sizes = [CodeSize("a", 60, 10.25, 24, 20), CodeSize("b", 20, 2.5, 8, 8)]
    assert size_summary(sizes) == (
        "codes of 80 weights: entropy 13 bytes (1.300 bits), ans 28 bytes (2.800 bits), "
        "radix 32 bytes (3.200 bits)"
    )
    assert size_summary([]).startswith("codes of 0 weights: ")


def test_without_the_library_the_remedy_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed(large(), path, coder="ans")

    def refuse(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(entropy, "import_module", refuse)
    for call in (lambda: load_packed(path), lambda: packed(large(), path, coder="ans")):
        with pytest.raises(
            UserError, match=r"entropy coding: needs the library constriction, got none; install it"
        ):
            call()
    packed(large(), path)
    load_packed(path)


def test_streams_stay_readable_by_later_versions_of_the_library() -> None:
    stream, frequencies = encode(np.array([0, 1, 2, 1, 0, 0, 3, 0] * 4, np.uint8), 4)
    assert (stream.tobytes().hex(), frequencies.tolist()) == (
        "6b401e111be105b69e090000",
        [16384, 8191, 4096, 4096],
    )

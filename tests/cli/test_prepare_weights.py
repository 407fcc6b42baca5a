"""`prepare_weights.py`: torchvision's weights as an 8-bit model has them, computing what they did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lbdet.cli import prepare_weights
from lbdet.cli.prepare_weights import EPS, fold_batch_norm, round_rows
from lbdet.models.weights import PREPARED, load_weights

SHARED = Path("datasets/weights", PREPARED)


@pytest.fixture
def model() -> nn.Sequential:
    """A convolution with batch norm that has seen data, as `0.0` and `0.1`, and a predictor with a bias."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8, eps=EPS)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm), nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, 8))
        norm.bias.normal_()
    for _ in range(3):
        model(2 + 3 * torch.randn(4, 3, 9, 9))
    return model.eval()


def moments(model: nn.Sequential, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the first convolution's output, a value a channel."""
    block = model[0]
    assert isinstance(block, nn.Sequential)
    out = block[0](images)
    return out.mean((0, 2, 3)), out.var((0, 2, 3))


def test_folding_changes_nothing_that_is_computed_and_leaves_a_gain_of_one(model):
    images = torch.randn(2, 3, 9, 9)
    before, old = model(images), model.state_dict()
    folded = fold_batch_norm({key: tensor.clone() for key, tensor in old.items()})
    gain = folded["0.1.weight"] / (folded["0.1.running_var"] + EPS).sqrt()
    torch.testing.assert_close(gain, torch.ones(8))
    assert folded.keys() == old.keys()
    model.load_state_dict(folded)
    torch.testing.assert_close(model(images), before)


def test_the_statistics_of_folded_batch_norm_are_those_of_what_comes_in(model):
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    images = torch.randn(2, 3, 9, 9)
    state["0.1.running_mean"], state["0.1.running_var"] = moments(model, images)
    folded = fold_batch_norm(state)
    model.load_state_dict(folded)
    mean, var = moments(model, images)
    torch.testing.assert_close(folded["0.1.running_mean"], mean)
    torch.testing.assert_close(folded["0.1.running_var"], var)


def test_rows_have_codes_of_8_bits_nearest_to_what_was_there():
    weight = torch.randn(20, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    weight[3], weight[4], weight[5] = 0, weight[4].abs(), -weight[5].abs()
    rounded = round_rows(weight)
    for row, old in zip(rounded.flatten(1).double(), weight.flatten(1).double(), strict=True):
        step = max(old.max() / 127, -old.min() / 128)
        codes = row / step if step else row
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert -128.001 < codes.min() <= codes.max() < 127.001
        assert (row - old).abs().max() <= step * 0.5001
    torch.testing.assert_close(round_rows(rounded), rounded, rtol=1e-6, atol=0)


def test_a_file_is_written_that_loads_with_only_convolutions_rounded(call, model, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_weights, "ssdlite320_mobilenet_v3_large", lambda **_: model)
    torch.save(model.state_dict(), tmp_path / "float.pth")
    output = tmp_path / "new" / PREPARED
    result = call(prepare_weights.main, "--weights", tmp_path / "float.pth", "--output", output)
    assert (result.code, result.out) == (0, f"{output}: written, 2 convolutions rounded\n")
    tensors, old = load_weights(str(output)).tensors, model.state_dict()
    assert {key: (t.dtype, t.shape) for key, t in tensors.items()} == {
        key: (t.dtype, t.shape) for key, t in old.items()
    }
    assert torch.equal(tensors["1.bias"], old["1.bias"])
    torch.testing.assert_close(tensors["1.weight"], round_rows(old["1.weight"]))
    assert not torch.equal(tensors["1.weight"], old["1.weight"])
    again = call(prepare_weights.main, "--weights", tmp_path / "float.pth", "--output", output)
    assert again.err == f"error: --output: {output} must not exist yet; remove it or name another file\n"


def test_weights_of_another_model_are_refused(call, model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "other.pth")
    output = tmp_path / "new.pth"
    result = call(prepare_weights.main, "--weights", tmp_path / "other.pth", "--output", output)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "other.pth: weights must be those of the model, got a checkpoint of another model" in result.err
    assert not output.exists()


@pytest.mark.skipif(not SHARED.is_file(), reason=f"{SHARED} is absent: see `make data`")
def test_the_published_copy_is_folded_already_and_nearly_on_these_steps():
    tensors = load_weights(str(SHARED)).tensors
    folded = fold_batch_norm(tensors)
    for key, tensor in tensors.items():
        torch.testing.assert_close(folded[key], tensor, rtol=1e-6, atol=1e-7)
        if tensor.ndim == 4:
            largest = tensor.flatten(1).abs().amax(1)[:, None, None, None]
            assert ((round_rows(tensor) - tensor).abs() <= largest / 250).all()

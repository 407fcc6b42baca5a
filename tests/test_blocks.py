"""The blocks of a model: every scheduled layer is in exactly one."""

from __future__ import annotations

import pytest
from torch import nn

from lbdet.convert import Override, find_blocks, quantize_model, scheduled_layers
from lbdet.errors import UserError
from lbdet.models import MODELS
from lbdet.models.classifiers import CLASSIFIERS
from lbdet.precision import Precision


@pytest.mark.parametrize("name", ["ssd_tiny", "ssdlite320_mobilenet_v3_large", "ssd300_vgg16",
                                  "fasterrcnn_resnet18_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn",
                                  "resnet20_cifar"])  # fmt: skip
def test_every_scheduled_layer_is_in_exactly_one_block(name: str) -> None:
    model = CLASSIFIERS[name](3) if name in CLASSIFIERS else MODELS[name](4)
    model, _ = quantize_model(model, "W4")
    blocks = find_blocks(model)
    assert sorted(layer for names in blocks.values() for layer in names) == sorted(scheduled_layers(model))
    assert all(layer == block or layer.startswith(f"{block}.") for block in blocks for layer in blocks[block])


def test_a_residual_block_is_one_and_a_layer_with_its_own_width_in_none() -> None:
    own = [Override(name, Precision(6, 8)) for name in ("conv1", "fc")]
    model, _ = quantize_model(CLASSIFIERS["resnet20_cifar"](10), "W2A2", overrides=own)
    blocks = find_blocks(model)
    assert list(blocks) == [f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(3)]
    assert blocks["layer1.0"] == ("layer1.0.conv1", "layer1.0.conv2")


def test_an_inverted_residual_is_one_block_and_plain_layers_are_their_own() -> None:
    blocks = find_blocks(quantize_model(MODELS["ssdlite320_mobilenet_v3_large"](4), "W4")[0])
    inverted = blocks["backbone.features.0.6"]
    assert len(inverted) == 3 + 2  # expand, depthwise, project; squeeze and excite
    assert blocks["backbone.features.0.0.0"] == ("backbone.features.0.0.0",)
    assert len(blocks["head.classification_head.module_list.0"]) == 2


def nested() -> nn.Module:
    inner = nn.ModuleDict({"a": nn.Conv2d(1, 1, 1), "b": nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())})
    return quantize_model(nn.ModuleDict({"first": inner, "last": nn.Conv2d(1, 1, 1)}), "W4")[0]


def test_patterns_name_the_blocks_and_the_outermost_wins() -> None:
    assert find_blocks(nested()) == {"first.a": ("first.a",), "first.b.0": ("first.b.0",), "last": ("last",)}
    expected = {"first": ("first.a", "first.b.0"), "last": ("last",)}
    assert find_blocks(nested(), ["first"]) == expected
    assert find_blocks(nested(), ["first.b", "first*"]) == expected
    assert find_blocks(nested(), ["first.b"])["first.b"] == ("first.b.0",)


def test_a_pattern_that_matches_nothing_names_the_closest() -> None:
    with pytest.raises(UserError, match=r"pattern 'frist' matches no module .*closest: 'first'"):
        find_blocks(nested(), ["first", "frist"])

"""Granularity as a view."""

from __future__ import annotations

import pytest
import torch

from lbdet.quant.rows import as_rows, per_row


@pytest.mark.parametrize("granularity, shape", [("per_tensor", (1, 24)), ("per_channel", (4, 6))])
def test_a_contiguous_weight_becomes_rows_without_a_copy(granularity: str, shape: tuple[int, int]) -> None:
    weight = torch.arange(24.0).view(4, 1, 2, 3)
    rows = as_rows(weight, granularity)
    assert rows.shape == shape
    assert rows.data_ptr() == weight.data_ptr()
    assert torch.equal(rows.flatten(), weight.flatten())


def test_a_row_holds_one_channel_whatever_the_strides_are() -> None:
    weight = torch.rand(4, 2, 3, 3)
    rows = as_rows(weight.to(memory_format=torch.channels_last), "per_channel")
    assert torch.equal(rows, weight.view(4, 18))


def test_an_unknown_granularity_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="granularity must be one of per_tensor, per_channel, got 'per_row'"):
        as_rows(torch.rand(2, 2), "per_row")


@pytest.mark.parametrize("ndim", [2, 4])
def test_a_scale_multiplies_its_own_channel(ndim: int) -> None:
    weight = torch.ones(3, *[2] * (ndim - 1))
    scaled = weight * per_row(torch.tensor([1.0, 2.0, 3.0]), ndim)
    assert [channel.unique().tolist() for channel in scaled] == [[1.0], [2.0], [3.0]]
    assert torch.equal(weight * per_row(torch.tensor(5.0), ndim), 5 * weight)

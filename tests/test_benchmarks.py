"""The benchmarks run, on sizes that take no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import quantize


def test_quantize_prints_a_ratio_for_every_width_and_granularity_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quantize.main(["--weights", "10000", "--repeats", "2"])
    title, _, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("13824 weights in 1 layers")  # whole channels of 4608
    rows = [line.split() for line in lines]
    assert [(granularity, int(bits)) for granularity, bits, *_ in rows] == [
        (granularity, bits) for granularity in ("per_channel", "per_tensor") for bits in range(2, 7)
    ]
    assert all(float(quantizing) > 0 and float(ratio) > 0 for _, _, quantizing, _, ratio in rows)
    assert list(tmp_path.iterdir()) == []


def test_quantize_splits_the_weights_into_layers_of_512_channels() -> None:
    weights = quantize.make_weights(600 * 4608)
    assert [tuple(weight.shape) for weight in weights] == [(512, 512, 3, 3), (88, 512, 3, 3)]


@pytest.mark.parametrize("option", ["--weights", "--repeats"])
def test_quantize_refuses_to_measure_nothing(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        quantize.main([option, "0"])
    assert stop.value.code == 2
    assert "--weights and --repeats must be at least 1" in capsys.readouterr().err

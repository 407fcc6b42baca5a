"""`prepare_cifar10_10k.py`: a tenth of CIFAR-10, as the published configs read it."""

from __future__ import annotations

import numpy as np
import pytest

from lbdet.cli import prepare_cifar10_10k
from lbdet.cli.prepare_cifar10_10k import OUTPUT, first_of_each
from lbdet.data.classification import read_npz
from lbdet.data.labelled import LabelledData

CLASSES = ("airplane", "dog")


@pytest.fixture
def cifar(monkeypatch) -> dict[str, LabelledData]:
    """Both splits of a CIFAR-10 of two classes, which are read instead of the official one."""
    random = np.random.default_rng(0)
    splits = {
        split: LabelledData(
            CLASSES, random.integers(0, 2, count), random.integers(0, 256, (count, 32, 32, 3), np.uint8)
        )
        for split, count in (("train", 2500), ("test", 600))
    }
    monkeypatch.setattr(prepare_cifar10_10k, "read_cifar", lambda root, name, split, download: splits[split])
    return splits


def test_the_first_images_of_each_class_are_written_as_the_reader_wants_them(call, cifar, tmp_path):
    output = tmp_path / "new" / OUTPUT.name
    result = call(prepare_cifar10_10k.main, "--cifar", tmp_path, "--output", output)
    assert (result.code, result.out) == (0, f"{output}: 2000 images to train on, 400 to test\n")
    for split, count in (("train", 1000), ("test", 200)):
        data, source = read_npz(output, split), cifar[split]
        assert data.classes == CLASSES
        for label in range(2):
            first = np.flatnonzero(source.labels == label)[:count]
            theirs = [source.image(int(k)) for k in first]
            ours = [data.image(int(k)) for k in np.flatnonzero(data.labels == label)]
            np.testing.assert_array_equal(ours, theirs)
    again = call(prepare_cifar10_10k.main, "--cifar", tmp_path, "--output", output)
    assert again.err == f"error: --output: {output} must not exist yet; remove it or name another file\n"


def test_the_order_of_the_images_stays():
    assert first_of_each(np.array([2, 0, 2, 2, 0, 0, 1]), 2).tolist() == [0, 1, 2, 4, 6]


def test_a_folder_without_cifar_is_told(call, tmp_path):
    result = call(prepare_cifar10_10k.main, "--cifar", tmp_path, "--output", tmp_path / "a.npz")
    assert result.code == 2
    assert f"error: {tmp_path}: must hold cifar-10-batches-py with the official files" in result.err
    assert not (tmp_path / "a.npz").exists()

"""Batches are a function of (seed, step): the same with any number of workers and from any first step."""

from __future__ import annotations

import multiprocessing
import random
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lbdet.data import loader
from lbdet.data.augment import build_augmentation
from lbdet.data.loader import EvalSet, TrainSet, epoch_batches, eval_batches, steps_per_epoch, train_batches
from lbdet.data.records import DetectionData, ImageRecord
from lbdet.errors import UserError

N = 7


def make_data(folder: Path, train_on_difficult: bool = True) -> DetectionData:
    records = []
    for k in range(N):
        pixels = np.random.default_rng(k).integers(0, 256, (40, 50 + k, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        boxes = np.float32([[5, 5, 30, 30], [10, 10, 40, 35]])[: k % 3]
        records.append(
            ImageRecord(
                id=str(k),
                path=str(folder / f"{k}.png"),
                width=50 + k,
                height=40,
                boxes=boxes,
                labels=np.arange(1, len(boxes) + 1),
                difficult=np.array([True, False])[: len(boxes)],
            )
        )
    return DetectionData(("a", "b"), tuple(records), train_on_difficult)


@pytest.fixture
def data(tmp_path) -> DetectionData:
    return make_data(tmp_path)


@pytest.fixture
def train_set(data) -> TrainSet:
    return TrainSet(data, build_augmentation("ssd"), seed=5)


def flat(batches) -> list[tuple]:
    """Make batches comparable."""
    return [
        [(image.shape, image.numpy().tobytes(), {key: value.tolist() for key, value in target.items()})
         for image, target in zip(images, targets, strict=True)]
        for images, targets in batches
    ]  # fmt: skip


def test_an_epoch_has_every_index_once_but_for_the_dropped_rest():
    batches = epoch_batches(10, 3, seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [3, 3, 3]
    indices = [index for batch in batches for index in batch]
    assert len(set(indices)) == 9
    assert set(indices) <= set(range(10))
    assert epoch_batches(10, 3, seed=0, epoch=0) == batches
    assert epoch_batches(10, 3, seed=0, epoch=1) != batches
    assert epoch_batches(10, 3, seed=1, epoch=0) != batches


def test_fewer_images_than_a_batch_are_one_batch_of_all():
    assert [sorted(batch) for batch in epoch_batches(3, 8, seed=0, epoch=0)] == [[0, 1, 2]]
    assert steps_per_epoch(3, 8) == 1
    assert steps_per_epoch(17, 8) == 2


def test_an_item_is_an_image_and_a_target(train_set):
    image, target = train_set[0, 2]
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    assert {key: value.dtype for key, value in target.items()} == {
        "boxes": torch.float32, "labels": torch.int64, "image_id": torch.int64,
    }  # fmt: skip
    assert target["image_id"].shape == ()
    assert target["image_id"] == 2
    assert train_set[0, 0][1]["boxes"].shape == (0, 4)


def test_the_pixels_are_rgb_planes(data):
    image, index = EvalSet(data)[3]
    assert index == 3
    expected = np.random.default_rng(3).integers(0, 256, (40, 53, 3), np.uint8)
    np.testing.assert_array_equal(image.numpy(), expected.transpose(2, 0, 1))


def test_each_epoch_augments_anew_and_each_image_differently(train_set):
    assert not torch.equal(train_set[0, 2][0], train_set[1, 2][0])
    assert torch.equal(train_set[1, 2][0], train_set[1, 2][0])


@pytest.mark.parametrize(("kept", "labels"), [(True, [1, 2]), (False, [2])])
def test_difficult_objects_are_trained_on_only_where_the_data_says_so(tmp_path, kept, labels):
    dataset = TrainSet(make_data(tmp_path, train_on_difficult=kept), build_augmentation("none"), 0)
    assert dataset[0, 2][1]["labels"].tolist() == labels


def test_the_sequence_is_the_same_for_every_number_of_workers(train_set):
    sequences = [flat(train_batches(train_set, 2, 1, 0, 8, workers)) for workers in (0, 1, 2)]
    assert len(sequences[0]) == 8  # two epochs of three, and a part of the third
    assert sequences[1] == sequences[0]
    assert sequences[2] == sequences[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_arrives_is_the_item_itself_and_the_receivers_own(train_set, workers):
    for images, targets in train_batches(train_set, 3, 1, 0, 2, workers):
        for image, target in zip(images, targets, strict=True):
            expected_image, expected = train_set[0, int(target["image_id"])]
            arrived, sent = target | {"image": image}, expected | {"image": expected_image}
            assert set(arrived) == set(sent)
            assert all(torch.equal(arrived[key], sent[key]) for key in sent)
            assert all(arrived[key].dtype == sent[key].dtype for key in sent)
            assert image.is_contiguous()
            before = [other.clone() for other in images]
            image.zero_()  # writeable, and no other image's memory
            assert sum(not torch.equal(*pair) for pair in zip(images, before, strict=True)) == 1


@pytest.mark.parametrize("first", [1, 3, 5, 8])
def test_starting_later_gives_the_tail_of_the_whole(train_set, first):
    whole = flat(train_batches(train_set, 2, 1, 0, 8, 0))
    assert flat(train_batches(train_set, 2, 1, first, 8, 0)) == whole[first:]


def test_batches_follow_the_shuffled_epochs(train_set):
    ids = [
        [int(target["image_id"]) for target in targets]
        for _, targets in train_batches(train_set, 3, 9, 0, 4, 0)
    ]
    assert ids == epoch_batches(N, 3, 9, 0) + epoch_batches(N, 3, 9, 1)


@pytest.mark.parametrize("processes", [2, 3])
def test_the_shares_of_several_processes_are_the_batches_of_one(train_set, processes):
    def ids(*share):
        return [
            [int(target["image_id"]) for target in targets]
            for _, targets in train_batches(train_set, 6, 9, 0, 3, 0, *share)
        ]

    shares = [ids(rank, processes) for rank in range(processes)]
    assert {len(batch) for share in shares for batch in share} == {6 // processes}
    assert [list(chain(*batches)) for batches in zip(*shares, strict=True)] == ids()


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_states_are_neither_read_nor_changed(train_set, data, workers):
    torch.manual_seed(0)
    first = flat(train_batches(train_set, 2, 1, 0, 2, workers))
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    assert flat(train_batches(train_set, 2, 1, 0, 2, workers)) == first
    list(eval_batches(EvalSet(data), 2, workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once_in_order(data, workers):
    batches = list(eval_batches(EvalSet(data), 3, workers))
    assert [indices for _, indices in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [image.shape for images, _ in batches for image in images] == [(3, 40, 50 + k) for k in range(N)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_told_by_name_at_its_batch(data, workers):
    Path(data.records[4].path).write_bytes(b"broken")
    batches = eval_batches(EvalSet(data), 3, workers)
    assert next(batches)[1] == [0, 1, 2]
    with pytest.raises(UserError) as caught:
        next(batches)
    assert str(caught.value).startswith(f"{data.records[4].path}: must be a whole JPEG or PNG image, got ")
    assert "Traceback" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who sent a signal")
def test_a_worker_outlives_a_schedulers_sigterm_but_not_that_of_the_main_process(data):
    before = set(multiprocessing.active_children())
    batches = eval_batches(EvalSet(data), 1, workers=1)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    worker.join(0.3)
    assert worker.is_alive()
    assert next(batches)[1] == [1]
    worker.terminate()  # as Python does at exit, where it then waits without end
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError])
def test_a_connection_that_breaks_before_its_worker_is_seen_dead_is_told_as_a_dead_worker(
    data, monkeypatch, error
):
    def broken(loader):
        raise error

    monkeypatch.setattr(DataLoader, "__iter__", broken)
    monkeypatch.setattr(loader, "SECONDS_TO_BE_SEEN_DEAD", 0)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        next(eval_batches(EvalSet(data), 1, workers=1))


def test_an_image_of_another_size_than_annotated_is_refused(data, train_set):
    path = data.records[1].path
    Image.new("RGB", (25, 20)).save(path)
    with pytest.raises(UserError) as caught:
        train_set[0, 1]
    assert str(caught.value) == (
        f"{path}: image must be 51x40 as annotated, got 25x20; its boxes belong to another version of it"
    )

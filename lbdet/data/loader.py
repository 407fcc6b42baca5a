"""From records to batches. Every batch is a function of (seed, step), so that resuming needs no state.

The sampler sends the epoch along with the index: a worker lives for many epochs and sees no change made to
the data set of the main process.
"""

from __future__ import annotations

import io
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lbdet.data.augment import Augmentation, derive_seed
from lbdet.data.images import read_image
from lbdet.data.records import DetectionData, ImageRecord
from lbdet.errors import UserError

Target = dict[str, Tensor]
SECONDS_TO_BE_SEEN_DEAD = 5


class TrainItems(Protocol):
    """Augmented images and targets by `(epoch, index)`; an item depends on nothing else."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: tuple[int, int], /) -> tuple[Tensor, Target]:
        """Return the image, uint8 `[3, H, W]`, and its target."""
        ...


class EvalItems(Protocol):
    """Images as they are, each with its index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        """Return the image, uint8 `[3, H, W]`, and `index`."""
        ...


class TrainSet(Dataset[tuple[Tensor, Target]]):
    """Augmented images and targets; an item depends on the seed and its key `(epoch, index)` alone."""

    def __init__(self, data: DetectionData, augmentation: Augmentation, seed: int) -> None:
        self.data = data
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.data.records)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Target]:
        """Return the image, uint8 `[3, H, W]`, and its target.

        Returns:
            Image; `boxes` float32 `[N, 4]`, `labels` int64 `[N]`, `image_id` int64 `[]` = index. N may be 0.

        Raises:
            UserError: where the image file is missing, damaged or of another size than its annotation says.
        """
        epoch, index = key
        record = self.data.records[index]
        keep = np.ones(len(record.labels), bool) if self.data.train_on_difficult else ~record.difficult
        seed = derive_seed("augment", self.seed, epoch, index)
        image, boxes, labels = self.augmentation(
            _image(record), record.boxes[keep], record.labels[keep], seed
        )
        target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}
        return _to_tensor(image), {**target, "image_id": torch.tensor(index)}


class EvalSet(Dataset[tuple[Tensor, int]]):
    """Images as they are, indexed by their place in the data set; an item is (uint8 `[3, H, W]`, index)."""

    def __init__(self, data: DetectionData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.records)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return image and index. Raises UserError as `TrainSet` does."""
        return _to_tensor(_image(self.data.records[index])), index


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Return the number of whole batches in `n` images, at least one."""
    return max(1, n // batch_size)


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Shuffle the indices of an epoch into batches.

    The last incomplete batch is dropped: every image weighs the same, and the next epoch shuffles anew. Where
    there are fewer images than a batch holds, the one batch is all of them.
    """
    order = np.random.default_rng(derive_seed("shuffle", seed, epoch)).permutation(n).tolist()
    return [order[k * batch_size : (k + 1) * batch_size] for k in range(steps_per_epoch(n, batch_size))]


def train_batches(
    dataset: TrainItems,
    batch_size: int,
    seed: int,
    first_step: int,
    last_step: int,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[list[Tensor], list[Target]]]:
    """Yield the batches of the updates `first_step .. last_step - 1`, counted from 0 over all epochs.

    The result is the same for every number of workers and every way to cut the steps into calls; no global
    random state is read or changed.

    Args:
        rank, world_size: yield only the share of process `rank` of each batch; the shares of all, one behind
            the other, are the batch.

    Raises:
        UserError: a bad image, at the batch that needs it.
    """
    steps = _Steps(len(dataset), batch_size, seed, first_step, last_step, rank, world_size)
    for batch in _load(dataset, steps, seed, workers):
        images, targets = zip(*batch, strict=True)
        yield list(images), list(targets)


def eval_batches(
    dataset: EvalItems, batch_size: int, workers: int
) -> Iterator[tuple[list[Tensor], list[int]]]:
    """Yield images and their indices in order, the last batch shorter; guarantees as for `train_batches`."""
    n = len(dataset)
    batches = [list(range(k, min(k + batch_size, n))) for k in range(0, n, batch_size)]
    for batch in _load(dataset, batches, 0, workers):
        images, indices = zip(*batch, strict=True)
        yield list(images), list(indices)


@dataclass(frozen=True)
class _Steps:
    """The (epoch, index) pairs of each update, made as they are asked for."""

    n: int
    batch_size: int
    seed: int
    first_step: int
    last_step: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = steps_per_epoch(self.n, self.batch_size)
        step = self.first_step
        while step < self.last_step:
            epoch, start = divmod(step, per_epoch)
            batches = epoch_batches(self.n, self.batch_size, self.seed, epoch)
            batches = batches[start : start + self.last_step - step]
            yield from ([(epoch, index) for index in self._share(batch)] for batch in batches)
            step += len(batches)

    def _share(self, batch: list[int]) -> list[int]:
        start, end = (len(batch) * r // self.world_size for r in (self.rank, self.rank + 1))
        return batch[start:end]


class _Caught(Dataset[Any]):
    """Return a UserError as the item: DataLoader would raise it with a traceback for a message."""

    def __init__(self, dataset: TrainItems | EvalItems) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except UserError as error:
            return error


def _load(
    dataset: TrainItems | EvalItems, batches: Iterable[list[Any]], seed: int, workers: int
) -> Iterator[list[Any]]:
    loader = DataLoader(
        _Caught(dataset),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_pack,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(seed),  # or iter() draws from the global one
    )
    for packed in _received(loader):
        items = pickle.loads(packed.numpy())
        for item in items:
            if isinstance(item, UserError):
                raise item
        yield items


def _received(loader: DataLoader[Any]) -> Iterator[Any]:
    try:
        yield from loader
    except (EOFError, ConnectionError) as error:  # a killed worker closes its files before it is seen dead
        time.sleep(SECONDS_TO_BE_SEEN_DEAD)  # torch's handler of SIGCHLD raises in here
        raise RuntimeError("DataLoader worker is gone") from error


def _pack(items: list[Any]) -> Tensor:
    """Pickle a batch into one tensor: each tensor sent by a worker costs an open file until it is freed."""
    file = io.BytesIO()
    _Pickler(file, protocol=5).dump(items)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


class _Pickler(pickle.Pickler):
    """Pickle tensors as arrays: torch makes an archive of each, which takes longer than to decode a JPEG."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)  # the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one must save first
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey_parent, args=[os.getppid()], daemon=True).start()


def _obey_parent(parent: int) -> None:
    """End this worker on the SIGTERM that the main process sends as it exits; ignore that of a scheduler."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


def _image(record: ImageRecord) -> np.ndarray:
    image = read_image(record.path)
    height, width = image.shape[:2]
    if (width, height) != (record.width, record.height):
        annotated = f"{record.width}x{record.height}"
        raise UserError(
            f"{record.path}: image must be {annotated} as annotated, got {width}x{height}; "
            "its boxes belong to another version of it"
        )
    return image


def _to_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))

"""Labelled images reach batches: a function of (seed, epoch, index), whatever holds the images."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from lbdet.data.augment import build_augmentation
from lbdet.data.labelled import (
    EncodedImages,
    ImageFiles,
    Images,
    LabelledData,
    LabelledEvalSet,
    LabelledTrainSet,
    resize_and_crop,
    stack_images,
)
from lbdet.data.loader import epoch_batches, eval_batches, train_batches
from lbdet.errors import UserError

N = 7
LABELS = np.array([0, 1, 2, 0, 1, 2, 0])
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 24, 20, 3), np.uint8)


def jpeg(k: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS[k]).save(file, "JPEG", quality=95)
    return file.getvalue()


def in_memory(folder: Path) -> Images:
    return PIXELS.copy()


def in_a_memory_map(folder: Path) -> Images:
    np.save(folder / "pixels.npy", PIXELS)
    return np.load(folder / "pixels.npy", mmap_mode="r")


def as_channels_apart(folder: Path) -> Images:
    return np.ascontiguousarray(PIXELS.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)


def in_files(folder: Path) -> Images:
    for k, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return ImageFiles(tuple(str(folder / f"{k}.png") for k in range(N)))


def encoded(folder: Path) -> Images:
    files = [jpeg(k) for k in range(N)]
    data = np.frombuffer(b"".join(files), np.uint8)
    return EncodedImages(tuple(f"a.zip/{k}" for k in range(N)), data, np.cumsum([len(f) for f in files]))


HOLDERS = [in_memory, in_a_memory_map, as_channels_apart, in_files, encoded]


@pytest.fixture(params=HOLDERS, ids=lambda holder: holder.__name__)
def data(request: pytest.FixtureRequest, tmp_path: Path) -> LabelledData:
    return LabelledData(("a", "b", "c"), LABELS, request.param(tmp_path))


def arrays() -> LabelledData:
    return LabelledData(("a", "b", "c"), LABELS, PIXELS.copy())


def expected_pixels(data: LabelledData, k: int) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(jpeg(k)))) if isinstance(data.images, EncodedImages) else PIXELS[k]


def flat(batches) -> list[tuple]:
    """Make batches comparable."""
    pairs = [zip(*batch, strict=True) for batch in batches]
    return [[(image.shape, image.numpy().tobytes(), int(t["label"])) for image, t in pair] for pair in pairs]


def test_every_holder_gives_contiguous_rgb_images_with_their_labels(data):
    assert len(data) == len(data.images) == N
    for k in range(N):
        image = data.image(k)
        assert image.flags.c_contiguous
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, expected_pixels(data, k))


def test_a_train_item_is_an_image_and_a_label(data):
    image, target = LabelledTrainSet(data, build_augmentation("none"), seed=0)[3, 4]
    assert image.dtype == torch.uint8
    np.testing.assert_array_equal(image.numpy(), expected_pixels(data, 4).transpose(2, 0, 1))
    assert list(target) == ["label"]
    assert target["label"].dtype == torch.int64
    assert target["label"].shape == ()
    assert target["label"] == 1


def test_each_epoch_and_seed_augments_anew_and_each_image_differently():
    same = LabelledData(("a",), np.zeros(2, np.int64), np.stack([PIXELS[0], PIXELS[0]]))
    one, other = (LabelledTrainSet(same, build_augmentation("imagenet", 16), seed) for seed in (1, 2))
    items = [one[0, 0][0], one[1, 0][0], one[0, 1][0], other[0, 0][0]]
    assert len({item.numpy().tobytes() for item in items}) == 4
    assert torch.equal(one[0, 0][0], items[0])


@pytest.mark.parametrize("augment", ["cifar", "imagenet"])
def test_batches_are_the_same_for_every_number_of_workers_and_first_step(data, augment):
    dataset = LabelledTrainSet(data, build_augmentation(augment, 16), seed=5)
    whole = flat(train_batches(dataset, 3, 1, 0, 5, workers=0))
    size = (3, 16, 16) if augment == "imagenet" else (3, 24, 20)
    assert {image[0] for batch in whole for image in batch} == {size}
    assert flat(train_batches(dataset, 3, 1, 0, 5, workers=2)) == whole
    assert flat(train_batches(dataset, 3, 1, 3, 5, workers=1)) == whole[3:]
    order = [k for epoch in (0, 1, 2) for batch in epoch_batches(N, 3, 1, epoch) for k in batch]
    assert [label for batch in whole for _, _, label in batch] == LABELS[order[:15]].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once_in_order(data, workers):
    batches = list(eval_batches(LabelledEvalSet(data), 3, workers))
    assert [indices for _, indices in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    for k, image in enumerate(image for images, _ in batches for image in images):
        np.testing.assert_array_equal(image.numpy(), expected_pixels(data, k).transpose(2, 0, 1))


def test_data_sets_can_be_sent_to_another_process(data):
    again = pickle.loads(pickle.dumps(data))
    for k in range(N):
        np.testing.assert_array_equal(again.image(k), data.image(k))


@pytest.mark.parametrize("shape", [(24, 20), (1, 1)])
def test_items_are_copies_and_no_item_changes_the_data(shape):
    pixels = np.full((1, *shape, 3), 7, np.uint8)
    data = LabelledData(("a",), np.zeros(1, np.int64), pixels)
    LabelledTrainSet(data, build_augmentation("none"), 0)[0, 0][0].zero_()
    LabelledEvalSet(data)[0][0].zero_()
    LabelledTrainSet(data, build_augmentation("cifar"), 0)[0, 0][0].zero_()
    assert (pixels == 7).all()


def test_some_images_are_taken_in_the_given_order_also_twice(data):
    some = data.take([5, 4, 0, 1, 5]).take(range(1, 5))
    assert len(some) == len(some.images) == 4
    assert some.labels.tolist() == [1, 0, 1, 2]
    assert some.classes == data.classes
    for k, place in enumerate([4, 0, 1, 5]):
        np.testing.assert_array_equal(some.image(k), data.image(place))
    assert len(data.take([])) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_told_by_name_at_its_batch(tmp_path, workers):
    files = in_files(tmp_path)
    Path(files.paths[4]).write_bytes(b"broken")
    batches = eval_batches(LabelledEvalSet(LabelledData(("a", "b", "c"), LABELS, files)), 3, workers)
    assert next(batches)[1] == [0, 1, 2]
    with pytest.raises(UserError) as caught:
        next(batches)
    assert str(caught.value).startswith(f"{files.paths[4]}: must be a whole JPEG or PNG image, got ")


@pytest.mark.parametrize("damage", ["nothing", "truncated", "png", "text"])
def test_damaged_bytes_are_told_by_their_name(damage):
    png = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(png, "PNG")
    file = {"nothing": b"", "truncated": jpeg(0)[:-200], "png": png.getvalue(), "text": b"hello"}[damage]
    whole = jpeg(1)
    data = np.frombuffer(file + whole, np.uint8)
    images = EncodedImages(("a.zip/bad", "a.zip/good"), data, np.cumsum([len(file), len(whole)]))
    assert images[1].shape == (24, 20, 3)
    with pytest.raises(UserError, match=r"^a\.zip/bad: must be a whole JPEG image, got "):
        images[0]


def test_a_jpeg_that_claims_absurd_sizes_is_refused_before_it_is_decoded():
    file = bytearray(jpeg(0))
    at = file.index(b"\xff\xc0") + 5
    file[at : at + 4] = b"\xff\xff\xff\xff"
    images = EncodedImages(("a.zip/bomb",), np.frombuffer(bytes(file), np.uint8), np.array([len(file)]))
    with pytest.raises(UserError, match=r"a\.zip/bomb: image must have 1 to 89478485 pixels, got far more"):
        images[0]


def a_ramp(height: int, width: int) -> np.ndarray:
    """An image whose first two channels tell a pixel's place."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / width, 255 * y / height, 0 * x + 9], axis=2).round().astype(np.uint8)


@pytest.mark.parametrize("size", [16, 21, 64, 112])
@pytest.mark.parametrize("height, width", [(64, 64), (50, 73), (90, 41), (33, 200), (128, 128), (24, 25)])
def test_the_centre_is_the_one_that_torchvision_evaluates(height, width, size):
    image = a_ramp(height, width)
    tensor = torch.from_numpy(image.transpose(2, 0, 1).copy())
    expected = TF.center_crop(TF.resize(tensor, [round(size / 0.875)], antialias=True), [size, size])
    found = resize_and_crop(image, size)
    assert found.shape == (size, size, 3)
    difference = np.abs(found.astype(int) - expected.numpy().transpose(1, 2, 0).astype(int))
    one_pixel = 255 / min(round(size / 0.875), height, width)
    assert difference.max() <= max(2, 0.5 * one_pixel)
    assert abs(difference.mean()) < 1
    np.testing.assert_array_equal(image, a_ramp(height, width))


def test_shrinking_averages_all_pixels_and_does_not_sample_a_few():
    """One white column of four; between the middle two there is only black."""
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::4] = 252
    assert (resize_and_crop(stripes, 56) == 63).all()


def test_evaluation_crops_where_a_size_is_given():
    dataset = LabelledEvalSet(arrays(), image_size=14)
    image, index = dataset[2]
    assert (index, image.shape) == (2, (3, 14, 14))
    np.testing.assert_array_equal(image.numpy(), resize_and_crop(PIXELS[2], 14).transpose(2, 0, 1))
    assert len(dataset) == N


def test_images_of_one_size_are_stacked_and_others_refused_in_a_sentence():
    images = [torch.full((3, 4, 6), k, dtype=torch.uint8) for k in range(3)]
    assert torch.equal(stack_images(images), torch.stack(images))
    with pytest.raises(UserError) as caught:
        stack_images([*images, torch.zeros(3, 6, 4, dtype=torch.uint8)])
    assert str(caught.value) == (
        "images: must have one size in a batch, got 4x6 and 6x4; "
        "train with augment 'imagenet' and evaluate with an image_size"
    )

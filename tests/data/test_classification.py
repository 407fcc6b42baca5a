"""Readers of labelled images: against torchvision where it has one, and what is wrong in one sentence."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
import zipfile
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from lbdet.data import classification
from lbdet.data.classification import read_cifar, read_image_folder, read_npz
from lbdet.errors import UserError

CIFAR_10K = Path("datasets/cifar10_10k/cifar10_10k_2k.npz")


def write_image(path: Path, mode: str = "RGB", seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def message_of(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k, name in enumerate(
        ["dog/b.png", "dog/a.JPG", "dog/more/a.png", "cat/10.png", "cat/9.png", "Zebra/x.jpeg"]
    ):
        write_image(tmp_path / "train" / name, seed=k)
    (tmp_path / "train" / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "list.csv").write_text("not a class")
    return tmp_path


def test_a_folder_is_read_as_torchvision_reads_it(folder: Path) -> None:
    expected = ImageFolder(str(folder / "train"))
    data = read_image_folder(folder, "train")
    assert data.classes == tuple(expected.classes) == ("Zebra", "cat", "dog")
    assert [(p, int(k)) for p, k in zip(data.images.paths, data.labels, strict=True)] == expected.samples
    assert data.labels.dtype == np.int64
    for k, (image, _) in enumerate(expected):
        np.testing.assert_array_equal(data.image(k), np.asarray(image))


def test_folders_below_and_links_are_read_as_torchvision_reads_them(folder: Path) -> None:
    dog = folder / "train" / "dog"
    for name in ("a/x/1.png", "a/2.png", "a-b/1.png"):
        write_image(dog / name)
    (dog / "link").symlink_to(folder / "train" / "cat", target_is_directory=True)
    (folder / "train" / "wolf").symlink_to(dog, target_is_directory=True)
    data = read_image_folder(folder, "train")
    samples = [(path, int(label)) for path, label in zip(data.images.paths, data.labels, strict=True)]
    assert samples == ImageFolder(str(folder / "train")).samples
    assert len(samples) == 19


def test_given_classes_decide_the_labels_and_may_be_more_than_there_are(folder: Path) -> None:
    data = read_image_folder(folder, "train", ["dog", "fish", "cat", "Zebra"])
    assert data.classes == ("dog", "fish", "cat", "Zebra")
    names = [Path(p).relative_to(folder / "train").parts[0] for p in data.images.paths]
    assert [data.classes[k] for k in data.labels] == names


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_an_image_of_any_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    write_image(tmp_path / "val" / "a" / "x.png", mode)
    image = read_image_folder(tmp_path, "val").image(0)
    assert (image.shape, image.dtype) == ((8, 10, 3), np.uint8)


def test_a_missing_folder_is_told_with_the_closest(folder: Path) -> None:
    assert message_of(read_image_folder, folder, "trian") == (
        f"{folder}: must have a folder 'trian', got none; closest: 'train'"
    )
    assert message_of(read_image_folder, folder / "no", "train") == (
        f"{folder / 'no'}: must have a folder 'train', got none"
    )


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "x.png")
    assert message_of(read_image_folder, tmp_path, "train") == (
        f"{tmp_path / 'train'}: must hold a folder for each class, got none"
    )


def test_all_problems_of_a_folder_come_at_once(folder: Path) -> None:
    train = folder / "train"
    (train / "empty").mkdir()
    write_image(train / "dgo" / "x.png")
    (train / "cat" / "x.webp").touch()
    message = message_of(read_image_folder, folder, "train", ["dog", "cat", "Zebra", "empty"])
    assert message.splitlines() == [
        f"{train}: 3 problems",
        "  cat/x.webp: image must be JPEG or PNG, got .webp; convert it",
        "  dgo: must be one of the 4 classes, got a folder 'dgo'; closest: 'dog'",
        "  empty: class folder must hold an image, got none",
    ]


def test_classes_that_stand_twice_are_refused(folder: Path) -> None:
    assert "names must differ, got 'dog'" in message_of(read_image_folder, folder, "train", ["dog", "dog"])


def test_a_damaged_image_is_told_by_name_when_it_is_asked_for(folder: Path) -> None:
    path = folder / "train" / "cat" / "9.png"
    path.write_bytes(path.read_bytes()[:40])
    data = read_image_folder(folder, "train")
    index = data.images.paths.index(str(path))
    assert message_of(data.image, index).startswith(f"{path}: must be a whole JPEG or PNG image, got ")


class Bomb:
    """Its unpickling leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Write files in CIFAR's layout, three images each, and let their MD5 be the official ones."""
    reader = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    folder = root / reader.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels_key = "labels" if name == "cifar10" else "fine_labels"
    all_pixels, lists = [], {}
    for split in ("train_list", "test_list"):
        lists[split] = []
        for file, _ in getattr(reader, split):
            pixels = rng.integers(0, 256, (3, 3072), np.uint8)
            content = {"data": pixels, labels_key: [1, 0, 1], "coarse_labels": [9, 9, 9]}
            lists[split].append([file, write_pickle(folder / file, content)])
            all_pixels.append(pixels)
        monkeypatch.setattr(reader, split, lists[split])
    names = [f"class {k}" for k in range(10 if name == "cifar10" else 100)]
    md5 = write_pickle(folder / reader.meta["filename"], {reader.meta["key"]: names})
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": md5})
    return np.concatenate(all_pixels)


def write_pickle(path: Path, content: object) -> str:
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name, train_files", [("cifar10", 5), ("cifar100", 1)])
def test_cifar_has_its_pixels_labels_and_class_names(
    name: str, train_files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planes = write_cifar(tmp_path, name, monkeypatch).reshape(-1, 3, 32, 32)
    train, test = (read_cifar(tmp_path, name, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (3 * train_files, 3)
    assert train.labels.tolist() == [1, 0, 1] * train_files
    assert train.labels.dtype == np.int64
    assert train.classes == tuple(f"class {k}" for k in range(10 if name == "cifar10" else 100))
    for k in range(3 * train_files):
        np.testing.assert_array_equal(train.image(k), planes[k].transpose(1, 2, 0))
    np.testing.assert_array_equal(test.image(2), planes[-1].transpose(1, 2, 0))


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_no_pickle_of_cifar_is_opened_unless_its_md5_is_the_official_one(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, "cifar10", monkeypatch)
    write_pickle(tmp_path / "cifar-10-batches-py" / file, Bomb(tmp_path / "exploded"))
    message = message_of(read_cifar, tmp_path, "cifar10", "train")
    assert not (tmp_path / "exploded").exists()
    assert message == (
        f"{tmp_path}: must hold cifar-10-batches-py with the official files (by MD5), got missing or other "
        f"files; download it, or unpack {CIFAR10.url} there"
    )


def test_an_absent_cifar_says_how_to_get_it(tmp_path: Path) -> None:
    assert message_of(read_cifar, tmp_path, "cifar100", "test") == (
        f"{tmp_path}: must hold cifar-100-python with the official files (by MD5), got no such folder; "
        f"download it, or unpack {CIFAR100.url} there"
    )


@pytest.mark.parametrize(
    "error",
    [
        URLError("no network"),
        RuntimeError("File not found or corrupted."),
        IncompleteRead(b""),
        tarfile.ReadError(),
    ],
    ids=repr,
)
def test_a_download_of_cifar_that_fails_is_told(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: CIFAR10) -> None:
        raise error

    monkeypatch.setattr(CIFAR10, "download", fail)
    message = message_of(read_cifar, tmp_path, "cifar100", "train", download=True)
    assert message == (
        f"{tmp_path}: download of cifar100 failed, got {type(error).__name__}: {error}; "
        f"try again, or unpack {CIFAR100.url} there by hand"
    )


def test_another_name_or_split_of_cifar_is_refused(tmp_path: Path) -> None:
    assert message_of(read_cifar, tmp_path, "cifar", "train") == (
        "name: must be one of cifar10, cifar100, got 'cifar'; closest: 'cifar10'"
    )
    assert message_of(read_cifar, tmp_path, "cifar10", "val") == "split: must be train or test, got 'val'"


def some_arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "classes": np.array(["ant", "bee"]),
        "x_train": rng.integers(0, 256, (4, 6, 5, 3), np.uint8),
        "y_train": np.array([0, 1, 1, 0], np.uint8),
        "x_test": rng.integers(0, 256, (2, 6, 5, 3), np.uint8),
        "y_test": np.array([1, 1], np.int32),
    }
    return {**arrays, **changes}


def write_npz(folder: Path, **changes: np.ndarray) -> Path:
    np.savez(folder / "d.npz", **some_arrays(**changes))
    return folder / "d.npz"


def test_a_npz_gives_its_arrays_by_split(tmp_path: Path) -> None:
    path, arrays = write_npz(tmp_path), some_arrays()
    for split in ("train", "test"):
        data = read_npz(path, split)
        assert data.classes == ("ant", "bee")
        assert type(data.classes[0]) is str
        assert data.labels.dtype == np.int64
        assert data.labels.tolist() == arrays[f"y_{split}"].tolist()
        for k in range(len(data)):
            np.testing.assert_array_equal(data.image(k), arrays[f"x_{split}"][k])


@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 6, 5, 1)])
def test_grey_arrays_become_rgb(tmp_path: Path, shape: tuple[int, ...]) -> None:
    grey = np.arange(120, dtype=np.uint8).reshape(shape)
    image = read_npz(write_npz(tmp_path, x_train=grey), "train").image(2)
    assert image.flags.c_contiguous
    for channel in range(3):
        np.testing.assert_array_equal(image[..., channel], grey[2].reshape(6, 5))


IMAGES = r"x_train must be uint8 \[N, H, W, 3\], \[N, H, W, 1\] or \[N, H, W\], not empty"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x_train": np.zeros((4, 6, 5, 3), np.float32)}, rf"{IMAGES}, got float32 \[4, 6, 5, 3\]"),
        ({"x_train": np.zeros((4, 3, 6, 5), np.uint8)}, rf"{IMAGES}, got uint8 \[4, 3, 6, 5\]"),
        ({"x_train": np.zeros((0, 6, 5, 3), np.uint8)}, rf"{IMAGES}, got uint8 \[0, 6, 5, 3\]"),
        ({"x_train": np.zeros((4, 90), np.uint8)}, rf"{IMAGES}, got uint8 \[4, 90\]"),
        ({"y_train": np.zeros(4)}, r"y_train must be whole numbers \[N\], got float64 \[4\]"),
        ({"y_train": np.zeros(3, int)}, r"y_train must be whole numbers \[N\], got int64 \[3\]"),
        ({"y_train": np.zeros((4, 1), int)}, r"y_train must be whole numbers \[N\], got int64 \[4, 1\]"),
        ({"y_train": np.array([0, 1, 2, 0])}, r"y_train must lie in 0\.\.1, got 2"),
        ({"y_train": np.array([0, -1, 1, 0])}, r"y_train must lie in 0\.\.1, got -1"),
        ({"y_train": np.array([0, 2**64 - 1, 1, 0], np.uint64)}, r"in 0\.\.1, got 18446744073709551615"),
        ({"classes": np.array([1, 2])}, r"classes must be text \[C\], C >= 1, got int64 \[2\]"),
        ({"classes": np.array("ant")}, r"classes must be text \[C\], C >= 1, got <U3 \[\]"),
        ({"classes": np.array(["ant", "ant"])}, "names must differ, got 'ant'"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    path = write_npz(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        read_npz(path, "train")


def test_a_missing_split_is_told_with_what_is_there(tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    assert message_of(read_npz, path, "val") == (
        f"{path}: must hold classes, x_val, y_val, got classes, x_train, y_train, x_test, y_test"
    )


def test_pickled_content_is_refused_and_not_run(tmp_path: Path) -> None:
    bomb = np.array([Bomb(tmp_path / "exploded")], object)
    path = write_npz(tmp_path, classes=bomb)
    assert "must be a whole .npz file of plain arrays, got Object arrays" in message_of(
        read_npz, path, "train"
    )
    (tmp_path / "p.npz").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert "must be a whole .npz file of plain arrays, got " in message_of(
        read_npz, tmp_path / "p.npz", "train"
    )
    assert not (tmp_path / "exploded").exists()


def test_another_file_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "empty.npz").touch()
    (tmp_path / "text.npz").write_text("hello")
    for name in ("one.npy", "empty.npz", "text.npz", ""):
        assert message_of(read_npz, tmp_path / name, "train").startswith(
            f"{tmp_path / name}: must be a whole .npz file of plain arrays, got "
        )
    assert message_of(read_npz, tmp_path / "no.npz", "train") == f"{tmp_path / 'no.npz'}: file does not exist"


def test_a_damaged_npz_is_a_sentence_or_still_whole(tmp_path: Path) -> None:
    """Whatever byte changes, no other error escapes, and no changed pixel goes unseen."""
    np.savez_compressed(tmp_path / "d.npz", **some_arrays())
    whole = (tmp_path / "d.npz").read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for _ in range(300):
        broken = bytearray(whole)
        broken[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        (tmp_path / "b.npz").write_bytes(broken if rng.random() < 0.9 else whole[: rng.integers(len(whole))])
        try:
            data = read_npz(tmp_path / "b.npz", "train")
        except UserError:
            refused += 1
        else:
            np.testing.assert_array_equal(data.images, some_arrays()["x_train"])
    assert refused > 150


@pytest.mark.skipif(not CIFAR_10K.exists(), reason=f"{CIFAR_10K} is absent; run make data")
def test_the_shared_part_of_cifar10_is_read() -> None:
    train, test = (read_npz(CIFAR_10K, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (10_000, 2_000)
    assert train.classes == test.classes
    assert train.classes[0] == "airplane"
    assert np.bincount(train.labels).tolist() == [1000] * 10
    assert train.image(9_999).shape == (32, 32, 3)


def test_links_that_lead_back_are_followed_once(folder: Path) -> None:
    for name in ("one", "two"):
        (folder / "train" / "cat" / name).symlink_to(folder / "train" / "cat", target_is_directory=True)
    assert len(read_image_folder(folder, "train")) == 6


def npz_of(path: Path, **arrays: np.ndarray) -> Path:
    known = {"classes": np.array(["a"]), "x_t": np.zeros((1, 2, 2), np.uint8), "y_t": np.array([0])}
    np.savez(path, **(known | arrays))
    return path


def npz_with_header(path: Path, header: str) -> Path:
    """Write an archive whose `x_t` has this header and one byte."""
    with zipfile.ZipFile(npz_of(path)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    text = header.encode() + b"\n"
    members["x_t.npy"] = b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + b"x"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"classes": np.array(["\ud800"])}, "classes must be valid Unicode, got 'utf-8' codec can't encode"),
        ({"classes": np.array([0x7FFFFFFF], np.uint32).view("U1")}, "classes must be valid Unicode, got "),
        ({"classes": np.array(["a", "a"])}, "classes: names must differ, got 'a' more than once"),
    ],
)
def test_classes_that_are_no_names_are_refused(arrays, text, tmp_path: Path) -> None:
    path = npz_of(tmp_path / "x.npz", **arrays)
    assert message_of(read_npz, path, "t").startswith(f"{path}: {text}")


def test_an_array_takes_no_more_memory_than_its_entry_says(tmp_path: Path, monkeypatch) -> None:
    header = str({"descr": "|u1", "fortran_order": False, "shape": (99999, 99999)})
    path = npz_with_header(tmp_path / "x.npz", header)
    assert "got an array of uint8 [99999, 99999] in " in message_of(read_npz, path, "t")
    monkeypatch.setattr(classification, "MAX_ARRAYS", 100)
    assert "got arrays of more than 0 GiB" in message_of(read_npz, npz_of(tmp_path / "y.npz"), "t")


def test_a_member_that_is_no_array_is_refused(tmp_path: Path) -> None:
    path = npz_of(tmp_path / "x.npz")
    path.write_bytes(path.read_bytes().replace(b"\x93NUMPY", b"\x93NUMPX"))
    assert message_of(read_npz, path, "t").startswith(
        f"{path}: must be a whole .npz file of plain arrays, got "
    )
    wrong = npz_with_header(tmp_path / "y.npz", "__import__('os').mkdir('harm')")
    assert "object at 0x" not in message_of(read_npz, wrong, "t")

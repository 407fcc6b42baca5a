"""Tiny ImageNet is the same data from its archive, its folder and a selection."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lbdet.data import tiny_imagenet
from lbdet.data.augment import build_augmentation
from lbdet.data.labelled import EncodedImages, LabelledData, LabelledEvalSet, LabelledTrainSet
from lbdet.data.loader import eval_batches, train_batches
from lbdet.data.tiny_imagenet import read_tiny_imagenet
from lbdet.errors import UserError

SHARED = Path("datasets/tiny_imagenet_20")
WNIDS = ("n03126707", "n01443537", "n02012849")
WORDS = {"n01443537": "goldfish, Carassius auratus", "n02012849": "crane", "n03126707": "crane, derrick"}
CLASSES = ("goldfish", "crane (n02012849)", "crane (n03126707)")
TOP = "tiny-imagenet-200"


def jpeg(seed: int, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, "JPEG")
    return file.getvalue()


def official_files() -> dict[str, bytes]:
    """Three classes of the official layout; every fourth image is grey."""
    files = {"wnids.txt": "\n".join(WNIDS).encode()}
    words = {"n00001740": "entity", **WORDS}
    files["words.txt"] = "\n".join(f"{wnid}\t{text}" for wnid, text in words.items()).encode()
    seed, annotations = 0, []
    for wnid in WNIDS:
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"unused"
        for k in (0, 1, 10, 2):
            seed += 1
            files[f"train/{wnid}/images/{wnid}_{k}.JPEG"] = jpeg(seed, "L" if seed % 4 == 0 else "RGB")
    for k, wnid in enumerate([*WNIDS, WNIDS[0]]):
        files[f"val/images/val_{k}.JPEG"] = jpeg(100 + k)
        annotations.append(f"val_{k}.JPEG\t{wnid}\t0\t32\t44\t62")
    files["val/val_annotations.txt"] = ("\n".join(annotations) + "\n").encode()
    files["test/images/test_0.JPEG"] = jpeg(200)
    return files


def write_archive(path: Path, files: dict[str, bytes], top: str = f"{TOP}/", **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(top + name, content)
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_selection(path: Path, files: dict[str, bytes], rows: list[dict[str, str]]) -> Path:
    path.mkdir()
    write_archive(path / "some.zip", files, top="")
    with (path / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["split", "wnid", "name", "file"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def selection_rows() -> list[dict[str, str]]:
    images = sorted(name for name in official_files() if "_" in name and name.startswith("train"))
    rows = [(name.split("/")[1], name) for name in images if name.endswith("JPEG")]
    return [{"split": "train", "wnid": w, "name": WORDS[w].split(",")[0], "file": f} for w, f in rows]


def message_of(path: Path, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        read_tiny_imagenet(path, split)
    return str(caught.value)


def files_of(data: LabelledData) -> set[tuple[str, int, bytes]]:
    """Name, label and content of each image of an archive."""
    images = data.images
    assert isinstance(images, EncodedImages)
    contents = np.split(images.data, images.ends[:-1])
    return {(n, int(k), c.tobytes()) for n, k, c in zip(images.names, data.labels, contents, strict=True)}


LAYOUTS = {
    "archive": lambda tmp: write_archive(tmp / "t.zip", official_files()),
    "compressed": lambda tmp: write_archive(
        tmp / "t.zip", official_files(), compression=zipfile.ZIP_DEFLATED
    ),
    "archive without a top folder": lambda tmp: write_archive(tmp / "t.zip", official_files(), top=""),
    "archive made on a Mac": lambda tmp: write_archive(
        tmp / "t.zip", {**official_files(), "../__MACOSX/t/._wnids.txt": b""}
    ),
    "folder": lambda tmp: write_folder(tmp / TOP, official_files()),
    "selection": lambda tmp: write_selection(tmp / "some", official_files(), selection_rows()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_train_has_every_image_of_a_class_sorted_by_id_and_file(layout: str, tmp_path: Path) -> None:
    data = read_tiny_imagenet(LAYOUTS[layout](tmp_path), "train")
    assert data.classes == CLASSES
    assert data.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.labels.dtype == np.int64
    files, index = official_files(), 0
    for wnid in sorted(WNIDS):
        for k in (0, 1, 10, 2):
            expected = Image.open(io.BytesIO(files[f"train/{wnid}/images/{wnid}_{k}.JPEG"])).convert("RGB")
            np.testing.assert_array_equal(data.image(index), np.asarray(expected))
            index += 1


@pytest.mark.parametrize("layout", ["archive", "folder"])
def test_val_has_the_classes_of_its_annotations_in_their_order(layout: str, tmp_path: Path) -> None:
    data = read_tiny_imagenet(LAYOUTS[layout](tmp_path), "val")
    assert data.classes == CLASSES
    assert data.labels.tolist() == [2, 0, 1, 2]
    expected = Image.open(io.BytesIO(official_files()["val/images/val_3.JPEG"]))
    np.testing.assert_array_equal(data.image(3), np.asarray(expected))


@pytest.mark.parametrize("layout", ["archive", "folder"])
def test_workers_read_the_same_batches(layout: str, tmp_path: Path) -> None:
    data = read_tiny_imagenet(LAYOUTS[layout](tmp_path), "train")
    dataset = LabelledTrainSet(data, build_augmentation("imagenet", 32), seed=0)
    sequences = []
    for workers in (0, 2):
        batches = train_batches(dataset, 4, 0, 0, 6, workers)
        sequences.append([image.numpy().tobytes() for images, _ in batches for image in images])
    assert len(sequences[0]) == 24
    assert sequences[0] == sequences[1]
    sizes = {image.shape for images, _ in eval_batches(LabelledEvalSet(data), 5, 2) for image in images}
    assert sizes == {(3, 64, 64)}


def test_a_selection_has_the_classes_of_all_its_splits(tmp_path: Path) -> None:
    rows = selection_rows()
    rows += [{"split": "val", "wnid": w, "name": w, "file": f"val/images/val_{k}.JPEG"} for k, w in
             enumerate((*WNIDS, "n09999999"))]  # fmt: skip
    path = write_selection(tmp_path / "some", official_files(), rows)
    assert read_tiny_imagenet(path, "val").labels.tolist() == [2, 0, 1, 3]
    assert message_of(path) == f"{path / 'labels.csv'}: n09999999: class must have images, got none"


@pytest.mark.parametrize("split", ["test", "training"])
def test_another_split_is_refused(split: str, tmp_path: Path) -> None:
    assert message_of(LAYOUTS["archive"](tmp_path), split) == (
        f"split: must be train or val, got '{split}'; the images of test have no labels"
    )


@pytest.mark.parametrize("write", [write_archive, write_folder], ids=["archive", "folder"])
def test_lists_and_files_that_do_not_fit_are_told_together(write, tmp_path: Path) -> None:
    files = official_files()
    files["val/val_annotations.txt"] = (
        b"val_0.JPEG\tn03126707\nval_77.JPEG\tn01443537\nval_1.JPEG\tn1\nval_2.JPEG"
    )
    path = write(tmp_path / "x", files)
    assert message_of(path, "val").splitlines() == [
        f"{path}: 4 problems",
        "  n02012849: class must have images, got none",
        "  val/images/val_77.JPEG: image must exist, got none",
        "  val/images/val_1.JPEG: class must be one of the 3 listed, got 'n1'",
        "  val/images/val_2.JPEG: class must be one of the 3 listed, got ''",
    ]


@pytest.mark.parametrize("write", [write_archive, write_folder], ids=["archive", "folder"])
def test_an_unpacking_that_stopped_half_way_is_seen(write, tmp_path: Path) -> None:
    files = {name: f for name, f in official_files().items() if "n02012849" not in name}
    path = write(tmp_path / "x", files)
    assert message_of(path) == f"{path}: n02012849: class must have images, got none"


def test_a_missing_list_is_told(tmp_path: Path) -> None:
    files = official_files()
    del files["words.txt"]
    folder = write_folder(tmp_path / "f", files)
    assert message_of(folder) == f"{folder / 'words.txt'}: file does not exist; give the folder {TOP}"
    archive = write_archive(tmp_path / "a.zip", files)
    assert message_of(archive).startswith(f"{archive}: must be the whole archive of Tiny ImageNet, got ")
    assert "'tiny-imagenet-200/words.txt'" in message_of(archive)
    files["words.txt"], files["wnids.txt"] = b"\xff\xfe\xff", b""
    assert "its lists must be UTF-8 text, got " in message_of(write_folder(tmp_path / "g", files))
    files["words.txt"] = b""
    assert message_of(write_folder(tmp_path / "h", files)) == f"{tmp_path / 'h'}: must list classes, got none"


def test_a_path_that_is_something_else_is_told(tmp_path: Path) -> None:
    assert message_of(tmp_path / "no.zip") == f"{tmp_path / 'no.zip'}: file does not exist"
    (tmp_path / "t.zip").write_bytes(b"hello")
    assert message_of(tmp_path / "t.zip") == (
        f"{tmp_path / 't.zip'}: must be the whole archive of Tiny ImageNet, got File is not a zip file; "
        "fetch it anew"
    )
    other = write_archive(tmp_path / "other.zip", {"a": b""})
    assert message_of(other) == f"{other}: must hold one wnids.txt, got 0; give the official archive"


def test_an_archive_that_would_unpack_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_imagenet, "_MAX_BYTES", 10_000)
    assert "bytes to unpack; fetch it anew" in message_of(LAYOUTS["archive"](tmp_path))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_archive_is_a_sentence_or_still_whole(compression: int, tmp_path: Path) -> None:
    """Whatever byte changes, no other error escapes, and no changed image goes unseen."""
    path = write_archive(tmp_path / "t.zip", official_files(), compression=compression)
    known, whole = files_of(read_tiny_imagenet(path, "train")), path.read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for _ in range(300):
        broken = bytearray(whole)
        place = rng.integers(len(whole)) if rng.random() < 0.5 else -rng.integers(1, 2500)
        broken[place] ^= 1 << rng.integers(8)
        path.write_bytes(broken if rng.random() < 0.9 else whole[: rng.integers(len(whole))])
        try:
            data = read_tiny_imagenet(path, "train")
        except UserError:
            refused += 1
        else:
            assert files_of(data) <= known  # fewer where the entry of a file has lost its name
    assert refused > 100


def test_an_archive_of_another_compression_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "t.zip", official_files(), compression=zipfile.ZIP_BZIP2)
    assert "got another compression than deflate; fetch it anew" in message_of(path)


def test_a_damaged_image_in_a_whole_archive_is_told_by_name(tmp_path: Path) -> None:
    files = official_files()
    name = "train/n02012849/images/n02012849_10.JPEG"
    files[name] = files[name][:900]
    path = write_archive(tmp_path / "t.zip", files)
    with pytest.raises(UserError, match=f"^{path}/{TOP}/{name}: must be a whole JPEG image, got "):
        read_tiny_imagenet(path, "train").image(6)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must list classes, got none"),
        ("split,wnid,file\ntrain,n1,a.JPEG\n", "must have columns split, wnid, name, file, got no 'name'"),
        ("split,wnid,name,file\n", "must list classes, got none"),
        ("split,wnid,name,file\ntrain,n1,ant,no.JPEG\n", "no.JPEG: image must exist, got none"),
        (
            "split,wnid,name,file\ntrain,n1,ant,a\ntrain\n",
            r"row 2 must have split, .*, got \['train', '', '', ''\]",
        ),
    ],
)
def test_a_bad_table_of_a_selection_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = write_selection(tmp_path / "some", official_files(), [])
    (path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_tiny_imagenet(path, "train")
    assert str(caught.value).startswith(f"{path / 'labels.csv'}: ")


def test_a_table_of_bytes_and_a_second_archive_are_refused(tmp_path: Path) -> None:
    path = write_selection(tmp_path / "some", official_files(), selection_rows())
    table = (path / "labels.csv").read_bytes()
    (path / "labels.csv").write_bytes(b"\xff\xff" + table)
    assert "must be a table in UTF-8 text, got " in message_of(path)
    (path / "labels.csv").write_bytes(table)
    write_archive(path / "more.zip", {})
    assert message_of(path) == f"{path}: must hold labels.csv and one .zip file, got 2"


@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is absent; run make data")
def test_the_shared_selection_is_read() -> None:
    train, val = (read_tiny_imagenet(SHARED, split) for split in ("train", "val"))
    assert train.classes == val.classes
    assert train.classes[:2] == ("goldfish", "centipede")
    assert np.bincount(train.labels).tolist() == [500] * 20
    assert np.bincount(val.labels).tolist() == [50] * 20
    assert {train.image(k).shape for k in range(0, 10_000, 50)} == {(64, 64, 3)}


def test_lists_have_a_limit_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_imagenet, "_MAX_LIST", 5)
    assert "bytes to unpack; fetch it anew" in message_of(LAYOUTS["archive"](tmp_path))
    assert "got a file of more than 0 KiB" in message_of(LAYOUTS["folder"](tmp_path))
    assert "got a file of more than 0 KiB" in message_of(LAYOUTS["selection"](tmp_path))


def test_a_class_without_words_has_its_id_for_a_name(tmp_path: Path) -> None:
    words = b"".join(f"{wnid}\t , x\n".encode() for wnid in WORDS)
    path = write_archive(tmp_path / "t.zip", {**official_files(), "words.txt": words})
    assert set(read_tiny_imagenet(path, "train").classes) <= set(WORDS)

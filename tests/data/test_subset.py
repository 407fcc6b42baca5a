"""A smaller PASCAL VOC."""

from __future__ import annotations

import pytest
from PIL import Image

from lbdet.data.subset import make_subset
from lbdet.data.voc import read_voc
from lbdet.errors import UserError

ANNOTATION = """<annotation><size><width>500</width><height>442</height><depth>3</depth></size>
<object><name>horse</name><difficult>1</difficult>
<bndbox><xmin>53</xmin><ymin>87</ymin><xmax>471</xmax><ymax>442</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
</object></annotation>"""


@pytest.fixture
def voc(tmp_path):
    for folder in ("JPEGImages", "Annotations"):
        (tmp_path / "voc" / folder).mkdir(parents=True)
    Image.new("RGB", (500, 442), "green").save(tmp_path / "voc/JPEGImages/a.jpg")
    (tmp_path / "voc/Annotations/a.xml").write_text(ANNOTATION)
    return tmp_path / "voc"


def test_images_and_boxes_shrink_together_and_edges_stay_in_their_pixel(voc, tmp_path):
    assert make_subset(voc, {"train": ["a"], "val": []}, tmp_path / "small") == 1
    (record,) = read_voc(tmp_path / "small", ["2012:train"], ["horse"]).records
    assert (record.width, record.height) == (339, 300)
    assert Image.open(record.path).size == (339, 300)
    assert record.boxes.tolist() == [[35, 58, 319, 300]]
    assert record.difficult.tolist() == [True]


def test_small_images_keep_their_size(voc, tmp_path):
    Image.new("RGB", (500, 200)).save(voc / "JPEGImages/b.jpg")
    (voc / "Annotations/b.xml").write_text(ANNOTATION.replace("442", "200"))
    make_subset(voc, {"train": ["b"]}, tmp_path / "small")
    (record,) = read_voc(tmp_path / "small", ["2012:train"], ["horse"]).records
    assert (record.width, record.height) == (500, 200)
    assert record.boxes.tolist() == [[52, 86, 471, 200]]


def test_a_missing_image_leaves_nothing_behind(voc, tmp_path):
    with pytest.raises(UserError, match=r"nothere\.jpg: image file does not exist"):
        make_subset(voc, {"train": ["a", "nothere"]}, tmp_path / "small")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["voc"]


def test_an_existing_folder_is_not_touched(voc, tmp_path):
    with pytest.raises(UserError, match="must not exist yet"):
        make_subset(voc, {"train": ["a"]}, voc)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../b", ""])
def test_an_id_that_leads_out_of_the_folder_is_refused(voc, tmp_path, name):
    with pytest.raises(UserError, match="ids must be names of files without a folder"):
        make_subset(voc, {"train": ["a", name]}, tmp_path / "small")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["voc"]


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("<xmin>53", "<xmin>x", "xmin must be a number, got 'x'"),
        ("<xmin>53", "<xmin>nan", "xmin must be a number, got 'nan'"),
        ("<ymax>442", "<ymax>1e999", "ymax must be a number, got '1e999'"),
        (
            "<annotation>",
            "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation>",
            "must be plain XML, got EntitiesForbidden",
        ),
        ("<size>", "<sise>", "must be plain XML"),
    ],
)
def test_a_damaged_annotation_is_told_by_its_file(voc, tmp_path, old, new, text):
    (voc / "Annotations/a.xml").write_text(ANNOTATION.replace(old, new))
    with pytest.raises(UserError) as caught:
        make_subset(voc, {"train": ["a"]}, tmp_path / "small")
    assert str(caught.value).startswith(f"{voc}/Annotations/a.xml: {text}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["voc"]

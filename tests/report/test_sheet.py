"""A contact sheet shows every tile, whatever its image and boxes are."""

from __future__ import annotations

import numpy as np

from lbdet.report.sheet import Tile, contact_sheet

GREY = np.full((60, 80, 3), 128, np.uint8)
BOX = (10.0, 10.0, 40.0, 30.0)


def pixels(*tiles: Tile) -> np.ndarray:
    return np.asarray(contact_sheet(tiles))


def coloured(sheet: np.ndarray) -> int:
    """Count pixels that are no shade of grey: those of boxes and labels."""
    return int((np.ptp(sheet.astype(int), axis=-1) > 60).sum())


def test_four_tiles_stand_in_a_row() -> None:
    sizes = [contact_sheet([Tile(GREY, [], [], ["a"])] * n).size for n in (1, 4, 5, 8)]
    assert sizes[0] == sizes[1]
    assert sizes[2] == sizes[3]
    assert sizes[2][1] > 1.9 * sizes[0][1]


def test_boxes_are_drawn_with_their_names() -> None:
    plain, boxed = pixels(Tile(GREY, [], [], [])), pixels(Tile(GREY, [BOX], ["object 1"], []))
    assert coloured(plain) == 0
    assert coloured(boxed) > 500


def test_a_reversed_box_and_one_outside_are_drawn_too() -> None:
    right = coloured(pixels(Tile(GREY, [BOX], ["x"], [])))
    assert coloured(pixels(Tile(GREY, [(40.0, 30.0, 10.0, 10.0)], ["x"], []))) == right
    for box in ((900.0, 900.0, 950.0, 950.0), (-50.0, -50.0, -10.0, -10.0), (5.0, 5.0, 5.0, 5.0)):
        assert coloured(pixels(Tile(GREY, [box], ["x"], []))) > 50


def test_an_image_that_cannot_be_shown_leaves_an_empty_tile_with_its_lines() -> None:
    blank, told = pixels(Tile(None, [], [], [])), pixels(Tile(None, [BOX], ["x"], ["a.jpg", "is damaged"]))
    assert blank.shape == told.shape
    assert (blank != told).any()


def test_long_lines_are_wrapped_and_many_are_cut() -> None:
    many = pixels(Tile(GREY, [], [], ["word " * 500]))
    assert many.shape == pixels(Tile(GREY, [], [], ["x"])).shape
    assert (many[-12:] == 255).all()


def test_no_tile_is_an_empty_sheet() -> None:
    assert contact_sheet([]).size[1] > 0

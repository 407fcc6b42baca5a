"""Which letters do pictures have? Those of DejaVu Sans, which comes with matplotlib.

It has Latin, Greek and Cyrillic letters, among others, and no Chinese, Japanese or Korean ones.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from PIL import ImageFont

Font = ImageFont.FreeTypeFont


def load_font(size: int) -> Font:
    """Return the font of labels in pictures.

    Args:
        size: in pixels.
    """
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)  # the other is not everywhere

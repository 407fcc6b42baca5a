"""Class lists by name, in the order of their labels.

Label 0 is background; class `names[i]` has label `i + 1`.
"""

from __future__ import annotations

VOC20 = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip

COCO80 = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

_COCO_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # ids of COCO's 1..90 that no object has


def _coco90() -> tuple[str, ...]:
    """Spread COCO's 80 names over the category ids 1..90; an unused id has the name `unused <id>`."""
    names = iter(COCO80)
    return tuple(f"unused {i}" if i in _COCO_UNUSED_IDS else next(names) for i in range(1, 91))


COCO90 = _coco90()
"""The rows of torchvision's COCO detectors after background: 90 category ids, ten of them unused."""

CLASS_LISTS = {"voc20": VOC20, "coco80": COCO80, "coco90": COCO90}

_SYNONYMS = {
    "airplane": "aeroplane", "dining table": "diningtable", "motorcycle": "motorbike",
    "potted plant": "pottedplant", "couch": "sofa", "tv": "tvmonitor",
}  # fmt: skip


def canonical(name: str) -> str:
    """Return the VOC spelling of a class that VOC and COCO name differently;
    other names come back as they are.
    """
    return _SYNONYMS.get(name, name)

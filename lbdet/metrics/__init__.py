"""How good are detections, and how do two sets of them differ? Pure functions on arrays (or CPU tensors)."""

from __future__ import annotations

from lbdet.metrics.coco import coco_ap, to_coco_results
from lbdet.metrics.diff import DetectionDiff, diff_detections
from lbdet.metrics.voc import voc_ap

__all__ = ["DetectionDiff", "coco_ap", "diff_detections", "to_coco_results", "voc_ap"]

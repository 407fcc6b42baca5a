"""VOC average precision by plain loops, a detection at a time: slow, obvious, sharing nothing with lbdet."""

from __future__ import annotations


def voc_ap_by_loops(detections, ground_truth, num_classes, metric="voc07", iou=0.5) -> list[float]:
    """Follow the development kit's VOCevaldet line by line; nan for a class without objects to find."""
    return [_class_ap(detections, ground_truth, c, metric, iou) for c in range(1, num_classes + 1)]


def _class_ap(detections, ground_truth, c, metric, iou) -> float:
    found = []
    for image, sample in enumerate(detections):
        for box, label, score in zip(sample["boxes"], sample["labels"], sample["scores"], strict=True):
            if label == c:
                found.append((image, inclusive(box), float(score)))
    found.sort(key=lambda row: row[2], reverse=True)  # stable

    objects, difficult = {}, {}
    for image, sample in enumerate(ground_truth):
        rows = zip(sample["boxes"], sample["labels"], sample["difficult"], strict=True)
        mine = [(inclusive(box), bool(hard)) for box, label, hard in rows if label == c]
        objects[image], difficult[image] = [box for box, _ in mine], [hard for _, hard in mine]
    total = sum(not hard for flags in difficult.values() for hard in flags)
    if total == 0:
        return float("nan")

    taken, true, false = set(), 0, 0
    recall, precision = [], []
    for image, box, _ in found:
        best, best_overlap = -1, 0.0
        for j, other in enumerate(objects[image]):
            if overlap(box, other) > best_overlap:
                best, best_overlap = j, overlap(box, other)
        if best >= 0 and best_overlap >= iou:
            if difficult[image][best]:
                continue
            if (image, best) in taken:
                false += 1
            else:
                taken.add((image, best))
                true += 1
        else:
            false += 1
        recall.append(true / total)
        precision.append(true / (true + false))
    return _eleven_points(recall, precision) if metric == "voc07" else _area(recall, precision)


def _eleven_points(recall, precision) -> float:
    ap = 0.0
    for k in range(11):
        ap += max((p for r, p in zip(recall, precision, strict=True) if r >= k * 0.1), default=0.0) / 11
    return ap


def _area(recall, precision) -> float:
    recall, precision = [0.0, *recall, 1.0], [0.0, *precision, 0.0]
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    return sum((recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall)))


def inclusive(box) -> tuple[float, float, float, float]:
    """VOC's own coordinates, 1-based and inclusive, of a half-open 0-based box."""
    x1, y1, x2, y2 = (float(value) for value in box)
    return x1 + 1, y1 + 1, x2, y2


def overlap(a, b) -> float:
    """Intersection over union of inclusive boxes: every width has the devkit's + 1."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b))
    return width * height / (areas - width * height)

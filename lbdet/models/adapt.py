"""Predictors for other classes: a class that both lists have keeps its rows, a new one starts afresh.

The layers that score classes have rows in the order [anchors, classes + 1, rows a class]:

    SSD, SSDlite     last conv of each classification head    [A * (C+1), ...]
    Faster R-CNN     cls_score                                [C+1, D]
                     bbox_pred                                [(C+1) * 4, D]

SSD's boxes do not depend on the class. Classes are compared by `lbdet.classes.canonical` name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.ssd import SSD

from lbdet.classes import CLASS_LISTS, canonical
from lbdet.errors import UserError


@dataclass(frozen=True)
class Adaptation:
    """Which of the wanted classes the weights knew. Its `str` is a line to print."""

    kept: tuple[str, ...]
    new: tuple[str, ...]
    available: int
    """How many classes the weights have."""

    def __str__(self) -> str:
        total = len(self.kept) + len(self.new)
        new = ", ".join(self.new) or "none"
        return f"{len(self.kept)} of {total} classes keep their rows (from {self.available}); new: {new}"


def predictors(model: nn.Module) -> dict[str, int]:
    """Return the state dict keys with rows for each class, and how many adjacent rows a class has in each."""
    if isinstance(model, FasterRCNN):
        layers = {"roi_heads.box_predictor.cls_score": 1, "roi_heads.box_predictor.bbox_pred": 4}
    elif isinstance(model, SSD):
        layers, heads = {}, "head.classification_head.module_list"
        for i, head in enumerate(model.get_submodule(heads).children()):
            last = f".{len(head) - 1}" if isinstance(head, nn.Sequential) else ""
            layers[f"{heads}.{i}{last}"] = 1
    else:
        raise TypeError(f"predictors of {type(model).__name__} are not known")
    return {f"{layer}.{name}": rows for layer, rows in layers.items() for name in ("weight", "bias")}


def adapt_predictors(
    tensors: Mapping[str, Tensor], model: nn.Module, from_classes: Sequence[str], to_classes: Sequence[str]
) -> tuple[dict[str, Tensor], Adaptation]:
    """Replace the predictors in `tensors` by ones for `to_classes`.

    Background and shared classes keep their rows bit for bit; the other rows are those of `model` as it is.

    Args:
        tensors: weights of the same architecture with predictors for `from_classes`; not changed.
        model: the detector for `to_classes`.

    Returns:
        A new dict, whose other tensors are shared with `tensors`, and what became of each class.

    Raises:
        UserError: `from_classes` are not as many as the rows are for.
    """
    index = {canonical(name): i for i, name in enumerate(from_classes, start=1)}
    kept = [(i, name) for i, name in enumerate(to_classes, start=1) if canonical(name) in index]
    rows_to = [0, *(i for i, _ in kept)]
    rows_from = [0, *(index[canonical(name)] for _, name in kept)]
    adapted, fresh = dict(tensors), model.state_dict()
    for key, rows in predictors(model).items():
        new, old = fresh[key].clone(), tensors[key]
        anchors = len(new) // ((len(to_classes) + 1) * rows)
        if len(old) != anchors * (len(from_classes) + 1) * rows:
            raise UserError(
                f"classes of the weights: must be the {_num_classes(old, anchors * rows)} that predictors "
                f"score, got {len(from_classes)}; list them as weights_classes in the order of their rows"
            )
        new_rows = new.view(anchors, len(to_classes) + 1, rows, *new.shape[1:])
        old_rows = old.reshape(anchors, len(from_classes) + 1, rows, *old.shape[1:])
        new_rows[:, rows_to] = old_rows[:, rows_from].to(new)
        adapted[key] = new
    names = tuple(name for _, name in kept)
    new_names = tuple(name for name in to_classes if name not in names)
    return adapted, Adaptation(names, new_names, len(from_classes))


def infer_classes(
    tensors: Mapping[str, Tensor], model: nn.Module, classes: Sequence[str], source: str
) -> Sequence[str]:
    """Find the classes of weights that do not name them, from the number of rows.

    They are one of `lbdet.classes.CLASS_LISTS`, or the model's own.

    Args:
        classes: the classes of `model`.
        source: the file, for messages.

    Raises:
        UserError: no list has as many classes, or two lists have.
    """
    key = next(iter(predictors(model)))
    anchors = len(model.state_dict()[key]) // (len(classes) + 1)
    lists = (*CLASS_LISTS.values(), classes)
    fitting = [names for names in lists if len(tensors[key]) == anchors * (len(names) + 1)]
    candidates = {tuple(map(canonical, names)): names for names in fitting}
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    found = "could be a known list or the model's own classes" if candidates else "fit no known list"
    raise UserError(
        f"{source}: weights must tell their classes, got {_num_classes(tensors[key], anchors)} that {found}; "
        "list them as weights_classes, or save them in a .safetensors file's metadata"
    )


def _num_classes(predictor: Tensor, rows: int) -> str:
    """How many classes a predictor scores beside background; a fraction where it fits no whole number."""
    return f"{len(predictor) / rows - 1:g}"

"""Classifiers by name, and one built with its weights. There is no background: row i scores `classes[i]`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torchvision
from torch import Tensor, nn

from lbdet.classes import canonical
from lbdet.errors import UserError, closest
from lbdet.models.adapt import Adaptation
from lbdet.models.resnet_cifar import resnet20_cifar
from lbdet.models.weights import check_fit, float_part, load_into, load_weights

CLASSIFIERS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": lambda num_classes: torchvision.models.resnet18(weights=None, num_classes=num_classes),
    "resnet50": lambda num_classes: torchvision.models.resnet50(weights=None, num_classes=num_classes),
    "mobilenet_v2": lambda num_classes: torchvision.models.mobilenet_v2(
        weights=None, num_classes=num_classes
    ),
    "alexnet": lambda num_classes: torchvision.models.alexnet(weights=None, num_classes=num_classes),
    "resnet20_cifar": resnet20_cifar,
}
"""Name -> builder of an untrained classifier, `[N, 3, H, W]` -> logits `[N, num_classes]`. The keys of the
state dict are torchvision's, and the inputs are expected as its weights expect them: normalized."""

log = logging.getLogger(__name__)


def build_classifier(
    name: str,
    classes: Sequence[str],
    weights: str | None = None,
    *,
    weights_classes: Sequence[str] | None = None,
) -> nn.Module:
    """Build a classifier for `classes`, on the CPU, and load its weights.

    What becomes of the final layer is logged. Where `weights_classes` or the file name the classes of the
    weights, a class keeps its row by its name. Where nothing names them, and there are as many as `classes`,
    they are taken for the same. Else torchvision's own weights keep rows by ImageNet's names, and of a file
    the final layer is not used: it stays random.

    Args:
        name: one of `CLASSIFIERS`.
        classes: logit i scores `classes[i]`.
        weights: a file, or one of torchvision's names such as "IMAGENET1K_V1".
        weights_classes: what the final layer of the weights scores, in order.

    Raises:
        UserError: an unknown name, unusable weights, or `weights_classes` that are not as many as its rows.
    """
    if name not in CLASSIFIERS:
        raise UserError(
            f"model name: must be one of {', '.join(CLASSIFIERS)}, got {name!r}{closest(name, CLASSIFIERS)}"
        )
    model = CLASSIFIERS[name](len(classes))
    if weights is not None:
        loaded = float_part(load_weights(weights, name))
        architecture = loaded.metadata.get("architecture", name)
        if architecture != name:
            raise UserError(
                f"{loaded.source}: weights must be of {name}, got {architecture}; choose that model"
            )
        layer = final_layer(model)
        check_fit(model, loaded, any_rows=(f"{layer}.weight", f"{layer}.bias"))
        from_classes = weights_classes or loaded.classes
        if not from_classes and len(loaded.tensors[f"{layer}.weight"]) != len(classes):
            from_classes = _published_classes(name, weights)
        tensors, message = _adapt(loaded.tensors, model, from_classes, classes)
        load_into(model, replace(loaded, tensors=tensors))
        log.info("%s: %s", loaded.source, message)
    return model


def final_layer(model: nn.Module) -> str:
    """Return the name of the last `nn.Linear`, whose rows are the classes."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def _published_classes(name: str, weights: str) -> Sequence[str] | None:
    """Return what torchvision's own weights of that name score; None where there are none."""
    if name not in torchvision.models.list_models():
        return None
    published = torchvision.models.get_model_weights(name).__members__
    return published[weights].meta["categories"] if weights in published else None


def _adapt(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    from_classes: Sequence[str] | None,
    to_classes: Sequence[str],
) -> tuple[dict[str, Tensor], str]:
    """Return `tensors` with a final layer for `to_classes`, and what became of it in a line."""
    layer, fresh = final_layer(model), model.state_dict()
    rows = (f"{layer}.weight", f"{layer}.bias")
    available = len(tensors[rows[0]])
    if from_classes:
        known = {canonical(name) for name in from_classes}
        kept = tuple(name for name in to_classes if canonical(name) in known)
        new = tuple(name for name in to_classes if canonical(name) not in known)
        adapted = {key: _shared_rows(tensors[key], fresh[key], from_classes, to_classes) for key in rows}
        return {**tensors, **adapted}, str(Adaptation(kept, new, len(from_classes)))
    if available == len(to_classes):
        return dict(tensors), f"all {available} rows of '{layer}' are kept, taken for the same classes"
    return {**tensors, **{key: fresh[key].clone() for key in rows}}, (
        f"'{layer}' starts afresh for {len(to_classes)} classes, as the weights score {available} others; "
        "list those as weights_classes to keep the rows of shared ones"
    )


def _shared_rows(
    old: Tensor, fresh: Tensor, from_classes: Sequence[str], to_classes: Sequence[str]
) -> Tensor:
    """Return a new tensor: of a class that both lists have the row of `old`, of others that of `fresh`."""
    if len(old) != len(from_classes):
        raise UserError(
            f"classes of the weights: must be the {len(old)} that the final layer scores, "
            f"got {len(from_classes)}; list them as weights_classes in the order of its rows"
        )
    index = {canonical(name): i for i, name in enumerate(from_classes)}
    shared = [i for i, name in enumerate(to_classes) if canonical(name) in index]
    rows = fresh.clone()
    rows[shared] = old[[index[canonical(to_classes[i])] for i in shared]].to(rows)
    return rows

"""Which layers belong together? The blocks of a model, for strategies that treat a block's layers alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lbdet.convert.layers import scheduled_layers
from lbdet.errors import UserError, closest


def find_blocks(model: nn.Module, patterns: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Divide the scheduled layers of a converted model into blocks.

    Args:
        model: converted by `quantize_model`.
        patterns: `fnmatch` patterns of module names, each of which is a block; of nested ones the outermost.
            None: an element of an `nn.ModuleList` is a block, and one of an `nn.Sequential` that is not
            itself an `nn.Sequential`: a residual block, an inverted residual, the predictor of a map.

    Returns:
        Block -> its layers, in the model's order. A layer outside of all blocks is a block of its own.

    Raises:
        UserError: a pattern that matches no module with scheduled layers.
    """
    layers = scheduled_layers(model)
    parents = list(dict.fromkeys(name for layer in layers for name in _with_parents(layer)))
    names = _matching(patterns, parents) if patterns else _found(model, parents)
    blocks: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        block = next((name for name in _with_parents(layer) if name in names), layer)
        blocks[block] = (*blocks.get(block, ()), layer)
    return blocks


def _with_parents(name: str) -> list[str]:
    """Return the names of the modules around a layer, the outermost first, and its own.

    >>> _with_parents("body.0.conv")
    ['body', 'body.0', 'body.0.conv']
    """
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _matching(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    matches = {pattern: {n for n in names if fnmatchcase(n, pattern)} for pattern in patterns}
    for pattern, found in matches.items():
        if not found:
            raise UserError(
                f"schedule.stochastic.blocks: pattern {pattern!r} matches no module with scheduled layers"
                f"{closest(pattern.rstrip('*.'), names)}"
            )
    return set().union(*matches.values())


def _found(model: nn.Module, names: Iterable[str]) -> set[str]:
    return {name for name in names if _is_block(model, name)}


def _is_block(model: nn.Module, name: str) -> bool:
    parent = model.get_submodule(name.rpartition(".")[0])
    nested = isinstance(model.get_submodule(name), nn.Sequential)
    return isinstance(parent, nn.ModuleList) or (isinstance(parent, nn.Sequential) and not nested)

"""Imports point downwards: a part of lbdet uses only itself and parts of a lower layer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {
    "errors": 0, "files": 0, "classes": 0, "precision": 0, "images": 0,
    "quant": 0,
    "nn": 1,
    "convert": 2, "models": 2, "data": 2, "metrics": 2,
    "schedules": 3, "guidance": 3,
    "engine": 4,
    "deploy": 5, "report": 5,
    "config": 6, "build": 6, "experiment": 6,
    "sweep": 7,
    "cli": 8,
}  # fmt: skip
WITHIN_A_LAYER = {
    ("precision", "errors"), ("files", "errors"), ("quant", "errors"), ("images", "errors"),
    ("build", "config"), ("experiment", "config"), ("experiment", "build"),
}  # fmt: skip
"""Pairs of one layer of which the first may import the second: errors, the schema that `build` reads, ..."""
ONLY = {"schedules": {"precision", "errors", "schedules"}, "quant": {"errors", "quant"}}
"""Pure parts, and all that they may import."""
SCHEMA_READERS = {"config", "build", "experiment", "sweep", "cli"}
MODULES = sorted(ROOT.glob("lbdet/**/*.py"))


def part_of(name: str) -> str:
    """Return the second word of `lbdet.part.module`; "" for lbdet itself, which re-exports."""
    return name.split(".")[1] if "." in name else ""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the full name of every module or member of lbdet that is imported, also within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "lbdet")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if (node.module or "").split(".")[0] == "lbdet":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_imported(path: Path) -> set[str]:
    return {part_of(name) for name in imported(ast.parse(path.read_text(encoding="utf-8")))}


def fault(part: str, other: str) -> str | None:
    """Say why `part` may not import `other`, or None."""
    if part == "" or part == other or (part, other) in WITHIN_A_LAYER:
        return None
    if other not in LAYERS:
        return f"imports {other!r}, which has no layer"
    if other in {"config"} and part not in SCHEMA_READERS:
        return "knows the schema of configs, which only config, build and cli may"
    if part in ONLY and other not in ONLY[part]:
        return f"imports {other!r}, but {part} may import only {sorted(ONLY[part])}"
    return None if LAYERS[other] < LAYERS[part] else f"imports {other!r} of layer {LAYERS[other]}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(name_of(path))
    assert part in {"", *LAYERS}, "a new part of lbdet needs a layer"
    assert [f for other in sorted(parts_imported(path)) if (f := fault(part, other))] == []


@pytest.mark.parametrize(
    "part, other, allowed",
    [
        ("nn", "quant", True),
        ("quant", "nn", False),
        ("metrics", "data", False),
        ("schedules", "convert", False),
        ("engine", "config", False),
        ("cli", "config", True),
        ("data", "data", True),
        ("report", "errors", True),
    ],
)
def test_the_rule_tells_up_from_down(part: str, other: str, allowed: bool) -> None:
    assert (fault(part, other) is None) == allowed


def test_an_import_within_a_function_is_seen() -> None:
    tree = ast.parse(
        "def f():\n    from lbdet.engine import train\n    import lbdet.cli.demo\n    import torch"
    )
    assert sorted(imported(tree)) == ["lbdet.cli.demo", "lbdet.engine.train"]


@pytest.mark.parametrize("path", [p for p in MODULES if part_of(name_of(p)) == "schedules"], ids=name_of)
def test_schedules_import_no_torch(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert names
    assert not [name for name in names if name.split(".")[0] in ("torch", "torchvision", "numpy")]

"""Write docs/config.md, all keys of a config, from its schema: choices, defaults and docstrings.

python tools/config_reference.py            # write it
python tools/config_reference.py --check    # change nothing; exit 1 if it is not what the schema says
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from lbdet.config import Config
from lbdet.config.quantizer import Clip
from lbdet.config.schema import ClassNames
from lbdet.config.section import Section
from lbdet.data import DATASETS, LABELLED_DATASETS
from lbdet.models import MODELS
from lbdet.models.classifiers import CLASSIFIERS
from lbdet.precision import Precision

PAGE = Path(__file__).resolve().parent.parent / "docs/config.md"
HEAD = """\
# Config: all keys

`tools/config_reference.py` writes this page from `lbdet/config`. A config is a YAML file, see `configs/`; it
is complete and stands alone. `--set KEY=VALUE ...` of the tools changes any key of this page, values in YAML:

```
--set train.epochs=1 'data.val=["2007:test", "2012:val"]' 'schedule={name: two_stage, target: W4A8}'
```

`--set` of a `format` or of `schedule.name` (`constant` where none is given) drops the keys that the file
gives the one before. A key without a default must be given. Unknown keys and wrong values are told all at
once.
"""
NAMES = {"model.name": [*MODELS, *CLASSIFIERS], "data.name": [*DATASETS, *LABELLED_DATASETS]}
"""texts that must be one of these, which the schema does not say"""
WORDS: dict[Any, str] = {
    str: "text", int: "whole number", float: "number", bool: "`true`, `false`",
    Precision: "`float`, or like `W4A8`",
    get_args(ClassNames)[1]: "name, file or list of names", get_args(Clip)[1]: "number above 0, or `learned`",
}  # fmt: skip
"""of types, and of the validators that narrow one"""
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def page() -> str:
    """Return docs/config.md as the schema has it."""
    return HEAD + "".join(_section((Config,), "", {}))


def _section(kinds: Sequence[type[Section]], path: str, seen: dict[Any, str]) -> Iterator[str]:
    """Yield a heading, the tables of all kinds that a section can have, and the sections below it."""
    seen[tuple(kinds)] = path
    if path:
        yield f"\n## {path}\n"
    shared = {key: field for key, field in kinds[0].model_fields.items() if _is_shared(key, kinds)}
    if len(kinds) == 1:
        yield f"\n{_about(kinds[0])}\n"
    yield _table(shared, kinds, path, seen)
    for kind in kinds if len(kinds) > 1 else ():
        own = {key: field for key, field in kind.model_fields.items() if key not in shared}
        tag = next(key for key, field in own.items() if len(get_args(field.annotation)) == 1)
        (name,) = get_args(own.pop(tag).annotation)
        yield f"\n`{tag}: {name}`: {_about(kind)}\n{_table(own, (kind,), path, seen)}"
    for key, field in (item for kind in kinds for item in kind.model_fields.items()):
        below = _kinds(field.annotation)
        if below and below not in seen:
            yield from _section(below, f"{path}.{_in_path(key, field)}".lstrip("."), seen)


def _is_shared(key: str, kinds: Sequence[type[Section]]) -> bool:
    """Whether all kinds of a section have a key, and with the same values."""
    first = kinds[0].model_fields[key]
    fields = [kind.model_fields.get(key) for kind in kinds]
    return all(f and (f.annotation, f.default) == (first.annotation, first.default) for f in fields)


def _table(
    fields: Mapping[str, FieldInfo], kinds: Sequence[type[Section]], path: str, seen: Mapping[Any, str]
) -> str:
    if not fields:
        return ""
    lines = ["", "| key | values | default | |", "|---|---|---|---|"]
    for key, field in fields.items():
        full = f"{path}.{_in_path(key, field)}".lstrip(".")
        known = seen.get(_kinds(field.annotation))
        values = ", ".join(f"`{name}`" for name in NAMES.get(full, ()))
        values = values or (f"as `{known}`" if known else _values(field.annotation, field.metadata))
        cells = (f"`{full}`", values, _default(field), _docstrings(kinds[0]).get(key, ""))
        lines.append(
            "|" + "|".join(f" {cell.replace('|', chr(92) + '|')} " if cell else " " for cell in cells) + "|"
        )
    return "\n".join(lines) + "\n"


def _in_path(key: str, field: FieldInfo) -> str:
    return f"{key}.PATTERN" if get_origin(field.annotation) is dict else key


def _kinds(annotation: Any) -> tuple[type[Section], ...]:
    """Return the sections that a key can hold; none for one that holds a value."""
    if inspect.isclass(annotation) and issubclass(annotation, Section):
        return (annotation,)
    if get_origin(annotation) in (list, Literal):
        return ()
    return tuple(kind for part in get_args(annotation) for kind in _kinds(part))


def _values(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return in words what a key takes."""
    origin, args = get_origin(annotation), get_args(annotation)
    rest = [arg for arg in args if arg is not NoneType]
    if origin is Annotated:
        return _values(
            args[0], [m for a in args[1:] for m in (a.metadata if isinstance(a, FieldInfo) else [a])]
        )
    for known in WORDS.keys() & set(metadata):
        return WORDS[known]
    if len(rest) < len(args):
        inner = "section" if _kinds(annotation) else " or ".join(_values(arg, metadata) for arg in rest)
        return f"{inner}, or `null`"
    if _kinds(annotation):
        return "section"
    if origin is Literal:
        return ", ".join(f"`{name}`" for name in args)
    if origin is list:
        empty = ", not empty" if any(hasattr(m, "min_length") for m in metadata) else ""
        return f"list of: {_values(args[0])}{empty}"
    assert origin not in (Union, UnionType), annotation
    bounds = [f"{BOUNDS[k]} {getattr(m, k)}" for m in metadata for k in BOUNDS if hasattr(m, k)]
    return ", ".join([WORDS[annotation], *bounds])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.default
    if isinstance(value, Section):
        value = value.model_dump(include={"format"})
    return f"`{yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]}`"


def _about(kind: type[Section]) -> str:
    return " ".join((inspect.getdoc(kind) or "").split())


def _docstrings(kind: type[Section]) -> dict[str, str]:
    """Return key -> the text below its line in the class, or in one it inherits from."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__[: kind.__mro__.index(Section)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[key] = " ".join(text.split())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check docs/config.md; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, tell whether it differs")
    options = parser.parse_args(arguments)
    text = page()
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
    print(f"docs/{PAGE.name}: {'is not what the schema says' if options.check else 'written'}")
    return int(options.check)


if __name__ == "__main__":
    sys.exit(main())

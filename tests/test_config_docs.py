"""docs/config.md has every key of a config, as the schema has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field

from lbdet.config import dump_config, load_config
from lbdet.config.quantizer import ACTIVATIONS, WEIGHTS
from lbdet.config.schedule import SCHEDULES
from lbdet.config.section import Section
from tools import config_reference

ROOT = Path(__file__).parents[1]
TAGS = {"quantizer.weight.format", "quantizer.activation.format", "schedule.name", "quantizer.overrides"}
"""what is on the page in another way"""


@pytest.fixture(scope="module")
def page() -> str:
    return config_reference.page()


class Inner(Section):
    """What is inside."""

    size: int | None = Field(default=None, ge=1, lt=9)
    """of it; a | b"""


class Toy(Section):
    """A toy."""

    kind: Literal["a", "b"]
    inner: Inner = Inner()
    rates: list[float] = Field(default=[0.5], min_length=1)
    """some rates"""


def keys(tree: Any, path: str = "") -> list[str]:
    """Return the paths of all values of a resolved config; patterns are called PATTERN."""
    if not isinstance(tree, dict) or not tree:
        return [path]
    patterns = path == "quantizer.overrides"
    return [
        key
        for name, below in tree.items()
        for key in keys(below, f"{path}.{'PATTERN' if patterns else name}".lstrip("."))
    ]


def test_the_page_is_what_the_schema_says():
    assert config_reference.main(["--check"]) == 0, "run python tools/config_reference.py"


def test_a_page_that_differs_is_told_and_written_anew(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(config_reference, "PAGE", tmp_path / "config.md")
    assert config_reference.main(["--check"]) == 1
    assert not (tmp_path / "config.md").exists()
    assert config_reference.main([]) == 0
    assert config_reference.main(["--check"]) == 0
    assert capsys.readouterr().out == (
        "docs/config.md: is not what the schema says\ndocs/config.md: written\n"
    )


def test_a_key_has_its_values_default_and_docstring():
    assert "".join(config_reference._section((Toy,), "", {})) == (
        "\nA toy.\n\n"
        "| key | values | default | |\n|---|---|---|---|\n"
        "| `kind` | `a`, `b` | | |\n"
        "| `inner` | section | `{}` | |\n"
        "| `rates` | list of: number, not empty | `[0.5]` | some rates |\n"
        "\n## inner\n\nWhat is inside.\n\n"
        "| key | values | default | |\n|---|---|---|---|\n"
        "| `inner.size` | whole number, at least 1, below 9, or `null` | `null` | of it; a \\| b |\n"
    )


def test_every_key_of_the_published_configs_is_on_the_page(page):
    paths = sorted(ROOT.glob("configs/**/*.yaml"))
    assert paths
    for path in paths:
        used = {key for key in keys(yaml.safe_load(dump_config(load_config(path)))) if "PATTERN." not in key}
        assert [key for key in sorted(used - TAGS) if f"| `{key}` |" not in page] == [], path


@pytest.mark.parametrize(
    ("path", "tag", "kinds"),
    [
        ("quantizer.weight", "format", WEIGHTS),
        ("quantizer.activation", "format", ACTIVATIONS),
        ("schedule", "name", SCHEDULES),
    ],
)
def test_every_format_and_schedule_is_on_the_page_with_its_keys(page, path, tag, kinds):
    for name, kind in kinds.items():
        assert f"\n`{tag}: {name}`: " in page
        for key in kind.model_fields.keys() - {tag}:
            assert f"| `{path}.{key}` |" in page

"""The command `lbdet`, and what becomes of each way to stop."""

from __future__ import annotations

import argparse
import re

import pytest

import lbdet
from lbdet.cli import VERBS, add_settings, exit_code, main
from lbdet.engine.train import Interrupted
from lbdet.errors import NumericsError, UserError, closest

SAVED = "interrupted at step 7, saved; continue with --resume"


def fail(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("here: rule, got this"), 2, "error: here: rule, got this\n"),
        (NumericsError("step 1: loss is nan"), 3, "error: step 1: loss is nan\n"),
        (Interrupted(15, SAVED), 143, f"{SAVED}\n"),
        (Interrupted(2, SAVED), 130, f"{SAVED}\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_stops_on_purpose_is_one_message_and_a_code(capsys, error, code, message):
    assert exit_code(fail(error)) == code
    assert capsys.readouterr() == ("", message)


def test_success_is_zero():
    assert exit_code(lambda: None) == 0


def test_a_bug_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        exit_code(fail(ZeroDivisionError()))


def test_a_reader_that_has_gone_is_no_traceback(capfd):
    assert exit_code(fail(BrokenPipeError())) == 141
    assert capfd.readouterr().err == ""


def test_help_lists_the_verbs_with_what_they_do(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb, what in VERBS.items():
        assert re.search(rf"^  {verb} +{what}$", out, re.MULTILINE)


def test_no_verb_and_an_unknown_one_are_mistakes(capsys):
    assert main([]) == 2
    assert main(["trian-det"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lbdet: unknown verb 'trian-det'; closest: 'train-det'\n")
    assert "  train-det            train a detector" in err


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lbdet {lbdet.__version__}\n"


def test_settings_of_several_options_are_joined():
    parser = argparse.ArgumentParser()
    add_settings(parser)
    assert parser.parse_args([]).settings == []
    assert parser.parse_args(["--set", "a=1", "b=2", "--set", "c=3"]).settings == ["a=1", "b=2", "c=3"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(capsys, verb):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_a_verb_gets_the_other_arguments(call, config, tmp_path):
    result = call(
        main, "train-det", "--config", config, "--output", tmp_path / "run", "--set", "train.max_steps=0"
    )
    assert result.code == 0
    assert (tmp_path / "run/metrics.json").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ssdlite", "; closest: 'ssdlite320'"), ("ssd_tinny", "; closest: 'ssd_tiny'"), ("zebra", ""), ("", "")],
)
def test_the_closest_name_begins_alike_or_is_most_similar(name, expected):
    assert closest(name, ["ssd_tiny", "ssdlite320", "voc"]) == expected

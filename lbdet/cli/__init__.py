"""The command `lbdet <verb>`, and the exit codes of all tools.

0 done; 1 our bug; 2 the user's input; 3 the numbers failed; 130 or 143 interrupted by a signal and saved.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from lbdet.engine.signals import Interrupted
from lbdet.errors import NumericsError, UserError, closest
from lbdet.files import write_atomically

VERBS = {
    "train-det": "train a detector at low precision and evaluate it",
    "eval-det": "evaluate a detector at one precision or several",
    "train-cls": "train a classifier at low precision and evaluate it",
    "eval-cls": "evaluate a classifier at one precision or several",
    "schedule": "show which layer has which width when, before anything is trained",
    "sweep-bits": "train and evaluate one model at several widths",
    "sensitivity": "tell which layers break at few bits",
    "report": "draw the curve and the page of a sweep again",
    "visualize": "draw a run's detections on photographs, alone or beside another model's",
    "export": "turn a run into a packed file or one for an inference engine",
    "predict": "find objects on photographs with an exported model",
    "benchmark": "measure speed and memory of a run's model in each engine",
    "check-data": "name every problem of a data set",
    "prepare-voc-subset": "make datasets/voc_subset from PASCAL VOC 2012",
    "prepare-cifar10-10k": "make datasets/cifar10_10k from CIFAR-10",
    "prepare-weights": "make the rounded COCO weights that the published configs start from",
    "demo": "train a small detector at float, 4 and 2 bits on rendered pictures",
}
"""Verb -> what it does; its module has the verb's name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lbdet <verb> ...` and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: lbdet <verb> ...\n\n{_verbs()}\n\nlbdet <verb> --help explains one")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"lbdet {import_module('lbdet').__version__}")
        return 0
    if arguments[0] not in VERBS:
        verb = arguments[0]
        print(f"lbdet: unknown verb {verb!r}{closest(verb, VERBS)}\n{_verbs()}", file=sys.stderr)
        return 2
    module = import_module(f"lbdet.cli.{arguments[0].replace('-', '_')}")
    return module.main(arguments[1:])


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add `--set`; `settings` is a list of all that were given."""
    parser.add_argument(
        "--set", action="extend", default=[], metavar="KEY.PATH=VALUE", nargs="+", dest="settings",
        help="change the config: any key of docs/config.md, values in YAML",
    )  # fmt: skip


def check_new_file(path: Path, suffix: str) -> None:
    """Raise UserError for an `--output` that is there already or ends otherwise."""
    if path.exists():
        raise UserError(f"--output: {path} must not exist yet; remove it or name another file")
    if path.suffix != suffix:
        raise UserError(f"--output: must end in {suffix}, got {path}")


def write_new_file(path: Path, write: Callable[[Path], object]) -> None:
    """Make the folder of an `--output` and write the file atomically.

    Raises:
        UserError: one of the two cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {path.parent} cannot be made: {error.strerror}") from None
    write_atomically(path, write)


def _verbs() -> str:
    width = max(map(len, VERBS))
    return "\n".join(f"  {verb:{width}}  {what}" for verb, what in VERBS.items())


def exit_code(command: Callable[[], None]) -> int:
    """Run a command; turn what stops it on purpose into one message on stderr and an exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    try:
        command()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NumericsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except RuntimeError as error:  # torch raises it wherever the main process is at that moment
        if "DataLoader worker" not in str(error):
            raise
        print(
            "error: a process that loads images died, killed from outside or for want of memory; "
            "continue with --resume, and with fewer train.workers if it happens again",
            file=sys.stderr,
        )
        return 2
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 128 + error.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0

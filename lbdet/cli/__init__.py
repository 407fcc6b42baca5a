"""The command `lbdet <verb>`, and the exit codes of all tools.

0 done; 1 our bug; 2 the user's input; 3 the numbers failed; 130 or 143 interrupted by a signal and saved.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from lbdet.engine.signals import Interrupted
from lbdet.errors import NumericsError, UserError

VERBS = {
    "train-det": "lbdet.cli.train_det",
    "eval-det": "lbdet.cli.eval_det",
    "train-cls": "lbdet.cli.train_cls",
    "eval-cls": "lbdet.cli.eval_cls",
    "schedule": "lbdet.cli.schedule",
    "sweep-bits": "lbdet.cli.sweep_bits",
    "sensitivity": "lbdet.cli.sensitivity",
    "report": "lbdet.cli.report",
    "visualize": "lbdet.cli.visualize",
    "export": "lbdet.cli.export",
    "predict": "lbdet.cli.predict",
    "benchmark": "lbdet.cli.benchmark",
    "check-data": "lbdet.cli.check_data",
    "prepare-voc-subset": "lbdet.cli.prepare_voc_subset",
    "demo": "lbdet.cli.demo",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lbdet <verb> ...` and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: lbdet <verb> ...\nverbs: {', '.join(VERBS)}\nlbdet <verb> --help explains one")
        return 0 if arguments else 2
    if arguments[0] not in VERBS:
        print(f"lbdet: unknown verb {arguments[0]!r}; verbs: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    return import_module(VERBS[arguments[0]]).main(arguments[1:])


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

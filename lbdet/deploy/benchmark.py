"""How fast is a detector in each engine? All of them in one run, in turns.

    round 1:  torch  onnxruntime  openvino-int8  ...        each in its own process, the others stopped
    round 2:  onnxruntime  openvino-int8  ...  torch
    ...

A machine's speed changes from minute to minute (clock, neighbours), so two engines can only be compared by
what they took at about the same time: a ratio is taken within each round, and the median over rounds is told.
Each engine has a process of its own that is stopped while others run: engines' threads wait by spinning, and
side by side they take each other's cores. Nothing here needs torch or an engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

from lbdet.errors import UserError, closest

STAGES = ("end_to_end", "prepare", "network", "post", "batch")
"""What is timed: decoded image in, boxes out; resizing and normalizing; backbone and head on a prepared
image; decoding and suppression of boxes; the network on several prepared images at once."""


@dataclass(frozen=True)
class EngineSetup:
    """How one line of the table is run."""

    runtime: str
    """`torch`, `onnxruntime` or `openvino`"""
    weights: str
    """which files: `float`, `int8` (lbdet's export) or `nncf` (the float model, quantized by NNCF)"""
    precision: str = "f32"
    """of what is not int8"""
    compiled: bool = False
    """by torch.compile"""

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the packages that must be installed."""
        return (self.runtime, "nncf") if self.weights == "nncf" else (self.runtime,)


ENGINES = {
    "torch": EngineSetup("torch", "float"),
    "torch-compile": EngineSetup("torch", "float", compiled=True),
    "onnxruntime": EngineSetup("onnxruntime", "float"),
    "onnxruntime-int8": EngineSetup("onnxruntime", "int8"),
    "openvino": EngineSetup("openvino", "float"),
    "openvino-bf16": EngineSetup("openvino", "float", precision="bf16"),
    "openvino-int8": EngineSetup("openvino", "int8"),
    "openvino-nncf": EngineSetup("openvino", "nncf"),
}
"""Name -> how it is run; the first is what the others are compared with."""


@dataclass(frozen=True)
class Times:
    """What one stage of one engine took in one round, an entry an image (or a batch)."""

    ms: tuple[float, ...]
    """of wall clock"""
    cpu_ms: tuple[float, ...]
    """of all of the process' threads; much less than `ms` x threads where others use the cores, too"""


class Worker(Protocol):
    """An engine that is loaded and waits."""

    @property
    def stages(self) -> Sequence[str]:
        """Return what it can time."""
        ...

    def wake(self) -> None:
        """Let it run."""
        ...

    def rest(self) -> None:
        """Keep it from using any core."""
        ...

    def round(self, stage: str) -> Times:
        """Run a stage on every image."""
        ...


Rounds = dict[str, dict[str, list[Times]]]
"""Engine -> stage -> its rounds."""


def measure(workers: Mapping[str, Worker], repeats: int) -> Rounds:
    """Let the engines take turns; each round begins with another one.

    Args:
        workers: engine -> worker, all at rest; at most one is awake at any time.
        repeats: rounds.
    """
    names = list(workers)
    rounds: Rounds = {name: {stage: [] for stage in workers[name].stages} for name in names}
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            with _awake(workers[name]) as worker:
                for stage, times in rounds[name].items():
                    times.append(worker.round(stage))
    return rounds


def chosen_engines(names: Sequence[str] | None) -> dict[str, EngineSetup]:
    """Return the engines of these names, in the order of `ENGINES`; None gives all.

    Raises:
        UserError: a name that is none of them.
    """
    for name in names or ():
        if name not in ENGINES:
            raise UserError(
                f"--engines: must be of {', '.join(ENGINES)}, got {name!r}{closest(name, ENGINES)}"
            )
    return {name: setup for name, setup in ENGINES.items() if names is None or name in names}


def missing_package(setup: EngineSetup) -> str | None:
    """Return why an engine cannot be run here, None if it can."""
    missing = [package for package in setup.needs if find_spec(package) is None]
    return f"{missing[0]} is not installed" if missing else None


@contextmanager
def _awake(worker: Worker) -> Iterator[Worker]:
    worker.wake()
    try:
        yield worker
    finally:
        worker.rest()

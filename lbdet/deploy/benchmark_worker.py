"""One engine in a process of its own: `python -m lbdet.deploy.benchmark_worker SPEC`.

It loads what SPEC (JSON, see `Spec`) names, runs every image once, and says that it is ready. Then each line
on its input is a stage to be timed, and each answer a JSON line on its output; what engines print goes to
stderr. It imports only its own engine, so that peak memory is that of the engine.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lbdet.deploy.benchmark import ENGINES, STAGES, EngineSetup
from lbdet.deploy.engines import onnx_session, openvino_compiled, openvino_core

Arrays = Sequence[np.ndarray]
Call = Callable[..., Any]
"""Inputs of a stage, uint8 or float32 arrays -> whatever it gives"""
_CAPABILITIES = "OPTIMIZATION_CAPABILITIES"
SHARED = ("prepare", "post")
"""Stages without quantized layers: the same file at every precision."""


@dataclass(frozen=True)
class Spec:
    """What a worker is told."""

    engine: str
    """of `ENGINES`"""
    folder: str
    """as `lbdet.deploy.benchmark_files` left it"""
    threads: int
    warmup: int
    """calls before each round that are not timed"""


def main(spec: Spec) -> None:
    """Load, say so, and time what is asked for until the input ends."""
    answer = _answers()
    setup, folder = ENGINES[spec.engine], Path(spec.folder)
    stages = [stage for stage in STAGES if input_file(folder, stage).is_file()]
    inputs = {stage: read_inputs(input_file(folder, stage)) for stage in stages}
    calls: dict[str, Call] = {}
    peaks = []
    try:
        for stage in stages:
            calls[stage] = _loaded(setup, folder, stage, spec.threads)
            for arrays in inputs[stage]:
                calls[stage](*arrays)
            peaks.append(peak_memory())
    except Unavailable as error:
        answer({"skipped": str(error)})
        return
    answer({"stages": stages, "peak_memory": peaks[0]})  # end to end; the other stages are loaded behind it
    for line in sys.stdin:
        stage = line.strip()
        answer(timed(calls[stage], inputs[stage], spec.warmup))


class Unavailable(Exception):
    """This machine cannot do what the engine would need."""


def timed(call: Call, inputs: Sequence[Arrays], warmup: int) -> dict[str, list[float]]:
    """Return wall-clock and CPU milliseconds of a call on each of the inputs."""
    for i in range(warmup):
        call(*inputs[i % len(inputs)])
    ms, cpu_ms = [], []
    for arrays in inputs:
        cpu, start = time.process_time(), time.perf_counter()
        call(*arrays)
        ms.append(1000 * (time.perf_counter() - start))
        cpu_ms.append(1000 * (time.process_time() - cpu))
    return {"ms": ms, "cpu_ms": cpu_ms}


def input_file(folder: Path, stage: str) -> Path:
    """Return the file of a stage's inputs, arrays `<image>_<input>`; a stage without one is not timed."""
    return folder / f"{stage}.npz"


def read_inputs(path: Path) -> list[Arrays]:
    """Return the inputs of a stage, image by image."""
    found: dict[int, list[np.ndarray]] = {}
    with np.load(path) as file:
        for name in sorted(file.files, key=lambda name: tuple(map(int, name.split("_")))):
            found.setdefault(int(name.split("_")[0]), []).append(file[name])
    return list(found.values())


def peak_memory() -> int:
    """Return the most memory that this process has held, in bytes.

    Not `ru_maxrss` on Linux: that begins with what the parent held when it forked.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource  # which Windows lacks: what is above can be imported there

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def stage_file(folder: Path, setup: EngineSetup, stage: str) -> Path:
    """Return the ONNX or OpenVINO file of a stage."""
    suffix = ".onnx" if setup.runtime == "onnxruntime" else ".xml"
    weights = "float" if stage in SHARED else setup.weights
    return folder / weights / f"{stage}{suffix}"


def _loaded(setup: EngineSetup, folder: Path, stage: str, threads: int) -> Call:
    if setup.runtime == "torch":
        from lbdet.deploy.benchmark_torch import torch_call

        return torch_call(folder, stage, threads, setup.compiled)
    path = stage_file(folder, setup, stage)
    return _onnxruntime(path, threads) if setup.runtime == "onnxruntime" else _openvino(path, threads, setup)


def _onnxruntime(path: Path, threads: int) -> Call:
    session = onnx_session(path, threads)
    names = [value.name for value in session.get_inputs()]
    return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def _openvino(path: Path, threads: int, setup: EngineSetup) -> Call:
    if setup.precision == "bf16" and "BF16" not in openvino_core().get_property("CPU", _CAPABILITIES):
        raise Unavailable("this CPU does not compute in bf16")
    compiled = openvino_compiled(str(path), threads, setup.precision)
    return lambda *arrays: [np.array(value) for value in compiled(list(arrays)).values()]


def _answers() -> Callable[[dict[str, Any]], None]:
    """Return what writes an answer; stdout itself becomes stderr."""
    file = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=file, flush=True)

    return answer


if __name__ == "__main__":
    main(Spec(**json.loads(sys.argv[1])))

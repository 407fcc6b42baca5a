"""A whole benchmark: files are written, workers started, rounds run, and everything gathered for a report."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lbdet.deploy.benchmark import ENGINES, EngineSetup, measure, missing_package
from lbdet.deploy.benchmark_process import ProcessWorker
from lbdet.deploy.benchmark_stats import summaries
from lbdet.deploy.benchmark_worker import Spec, stage_file
from lbdet.engine.manifest import installed_version
from lbdet.engine.progress import say
from lbdet.errors import UserError

_PACKAGES = ("lbdet", "torch", "torchvision", "numpy", "onnx", "onnxruntime", "openvino", "nncf")
_CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


@dataclass(frozen=True)
class Options:
    """What the user chose."""

    threads: int
    repeats: int
    """rounds"""
    warmup: int
    """calls before each round that are not timed"""
    batch: int
    """images at once of the stage `batch`; 1 = no such stage"""


def run_benchmark(
    model: nn.Module,
    images: Sequence[np.ndarray],
    facts: dict[str, Any],
    engines: Mapping[str, EngineSetup],
    options: Options,
) -> dict[str, Any]:
    """Measure a quantized model in some engines.

    Args:
        model: calibrated, on the CPU.
        images: uint8 `[H, W, 3]`, at least one.
        facts: see `lbdet.deploy.export.trace`.
        engines: name -> how it is run.

    Returns:
        What benchmark.json holds: `machine`, `versions`, `options`, `base`, and `engines` with times, memory
        and file sizes, or why one was skipped.

    Raises:
        UserError: nothing can be run, a layer cannot be exported, or an engine's process died.
    """
    skipped = {name: why for name, setup in engines.items() if (why := missing_package(setup))}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        wanted = {name: setup for name, setup in engines.items() if name not in skipped}
        if wanted:
            say(f"writing the files of {len(wanted)} engines")
            from lbdet.deploy.benchmark_files import write_files  # needs onnx and openvino

            write_files(model, images, facts, wanted.values(), folder, options.batch)
        workers = {}
        for name in wanted:
            spec = Spec(name, str(folder), options.threads, options.warmup)
            worker = ProcessWorker(spec)
            stack.callback(worker.close)
            say(f"loading {name}")
            if why := worker.start():
                skipped[name] = why
            else:
                workers[name] = worker
        if not workers:
            raise UserError(f"--engines: none can be run here, got {_reasons(skipped)}")
        before = os.getloadavg()
        say(f"{options.repeats} rounds of {len(images)} images in {len(workers)} engines")
        found = summaries(measure(workers, options.repeats), base := next(iter(workers)))
        results = {name: _engine_facts(workers[name], folder) | {"stages": found[name]} for name in workers}
    results |= {name: {"skipped": why} for name, why in skipped.items()}
    return {
        "machine": _machine() | {"load_before": before, "load_after": os.getloadavg()},
        "versions": {package: installed_version(package) for package in _PACKAGES},
        "model": facts,
        "options": asdict(options) | {"images": len(images)},
        "base": base,
        "engines": {name: results[name] for name in engines},
    }


def _engine_facts(worker: ProcessWorker, folder: Path) -> dict[str, Any]:
    setup = ENGINES[worker.name]
    return {
        "peak_memory": worker.ready["peak_memory"],
        "file_size": _file_size(folder, setup),
        **_int8_facts(folder, setup),
    }


def _file_size(folder: Path, setup: EngineSetup) -> int | None:
    """Return the bytes of the file that is deployed; of a torch model what its tensors take."""
    if setup.runtime == "torch":
        import torch

        from lbdet.deploy.benchmark_torch import MODEL_FILE

        tensors = torch.load(folder / MODEL_FILE, weights_only=False).state_dict().values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    path = stage_file(folder, setup, "end_to_end")
    files = (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,)
    return sum(file.stat().st_size for file in files)


def _int8_facts(folder: Path, setup: EngineSetup) -> dict[str, Any]:
    """Return how many layers could run in int8, and which of them the engine computes in float."""
    if setup.weights != "int8":
        return {}
    from lbdet.deploy.engines import ENGINES as LOADED
    from lbdet.deploy.engines import float_layers

    path = stage_file(folder, setup, "end_to_end")
    engine = LOADED[path.suffix](path)
    return {"int8_layers": len(engine.facts["int8_layers"]), "float_layers": float_layers(engine)}


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    pairs = (line.partition(":") for line in text.splitlines())
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    features = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "features": [name for name in _CPU_FEATURES if name in features],
        "cores": available_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _reasons(skipped: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({why})" for name, why in skipped.items())

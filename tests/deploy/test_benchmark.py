"""The benchmark: turns, ratios, workers that die, stages that compute what they should."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from deploy.detectors import tiny_classifier, tiny_faster_rcnn
from torch import nn

from lbdet.cli import benchmark as cli
from lbdet.convert import calibrate_activations, quantize_model, quantized_layers, set_precision
from lbdet.data.shapes import draw_scene
from lbdet.deploy import benchmark_run
from lbdet.deploy import benchmark_worker as worker
from lbdet.deploy.benchmark import ENGINES, STAGES, Times, chosen_engines, measure, missing_package
from lbdet.deploy.benchmark_files import float_model, write_files
from lbdet.deploy.benchmark_process import ProcessWorker
from lbdet.deploy.benchmark_stats import speedup, summaries, summarize, table
from lbdet.deploy.benchmark_torch import torch_call
from lbdet.deploy.benchmark_worker import Spec, peak_memory, read_inputs, timed
from lbdet.errors import UserError
from lbdet.models.ssd_tiny import ssd_tiny
from lbdet.nn import QuantConv2d, QuantLinear, quantized_weight
from lbdet.precision import Precision


class FakeWorker:
    """Writes down what is asked of it."""

    def __init__(self, name: str, log: list[tuple[str, str]], stages=("end_to_end", "network")) -> None:
        self.name, self.log, self.stages = name, log, stages

    def wake(self) -> None:
        self.log.append((self.name, "wake"))

    def rest(self) -> None:
        self.log.append((self.name, "rest"))

    def round(self, stage: str) -> Times:
        self.log.append((self.name, stage))
        if self.name == "broken":
            raise UserError("broken: its process ended")
        return Times((float(len(self.log)),), (1.0,))


def turns(log: list[tuple[str, str]]) -> list[str]:
    return [name for name, what in log if what == "wake"]


def test_engines_take_turns_and_each_round_begins_with_another():
    log: list[tuple[str, str]] = []
    rounds = measure({name: FakeWorker(name, log) for name in "abc"}, repeats=4)
    assert turns(log) == [*"abc", *"bca", *"cab", *"abc"]
    assert all(len(times) == 4 for stages in rounds.values() for times in stages.values())


def test_at_most_one_worker_is_awake_and_it_runs_all_its_stages():
    log: list[tuple[str, str]] = []
    measure({name: FakeWorker(name, log) for name in "ab"}, repeats=3)
    for i in range(0, len(log), 4):
        (name,) = {name for name, _ in log[i : i + 4]}
        assert [what for _, what in log[i : i + 4]] == ["wake", "end_to_end", "network", "rest"], name


def test_a_worker_rests_also_after_a_failure():
    log: list[tuple[str, str]] = []
    with pytest.raises(UserError):
        measure({"broken": FakeWorker("broken", log)}, repeats=1)
    assert log[-1] == ("broken", "rest")


def test_a_speedup_is_the_median_of_the_ratios_within_rounds():
    base, other = [10.0, 40.0, 30.0], [5.0, 10.0, 10.0]  # the machine slows down, for both
    assert speedup(base, other)["median"] == 3.0  # of 2, 4, 3; the ratio of medians is 3, too:
    assert speedup([10, 40, 40], [5, 10, 20])["median"] == 2.0  # of 2, 4, 2; that of medians is 4
    generator = np.random.default_rng(0)
    a, b = generator.uniform(1, 9, (2, 7)).tolist()
    assert speedup(a, b)["median"] == pytest.approx(
        statistics.median(x / y for x, y in zip(a, b, strict=True))
    )
    assert speedup(a, a) == {"p25": 1.0, "median": 1.0, "p75": 1.0}


def quantile(values: list[float], q: float) -> float:
    """The slow one: between the two sorted values around q (n - 1)."""
    values = sorted(values)
    place = q * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def test_quantiles_are_those_of_all_samples_of_all_rounds():
    rounds = [Times((5.0, 1.0, 9.0), (2.0, 2.0, 8.0)), Times((2.0, 4.0), (1.0, 1.0))]
    found = summarize(rounds)
    assert found["samples"] == 5
    assert found["round_medians"] == [5.0, 3.0]
    assert found["cpu_median"] == 2.0
    for name, q in {"p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}.items():
        assert found[name] == pytest.approx(quantile([5, 1, 9, 2, 4], q)), name


def test_a_stage_that_the_base_does_not_have_gets_no_ratio():
    rounds = {
        "a": {"end_to_end": [Times((8.0,), (8.0,))]},
        "b": {"end_to_end": [Times((2.0,), (2.0,))], "network": [Times((1.0,), (1.0,))]},
    }
    found = summaries(rounds, "a")
    assert found["b"]["end_to_end"]["speedup"]["median"] == 4.0
    assert "speedup" not in found["b"]["network"]


def test_the_table_has_a_line_an_engine_and_leaves_out_the_skipped():
    rounds = {
        "torch": {"end_to_end": [Times((12.0,), (12.0,))], "network": [Times((8.0,), (8.0,))]},
        "openvino": {"end_to_end": [Times((3.0,), (3.0,))], "network": [Times((1.0,), (1.0,))]},
    }
    facts = {
        name: {"stages": stages, "peak_memory": 2_000_000, "file_size": 500_000}
        for name, stages in summaries(rounds, "torch").items()
    }
    lines = table(facts | {"openvino-nncf": {"skipped": "nncf is not installed"}}, "torch", 1).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    cells = [cell.strip() for cell in lines[3].strip("| ").split("|")]
    assert cells == ["openvino", "3.0", "3.0 .. 3.0", "4.00", "3.0", "1.0", "8.00", "2.0 MB", "0.5 MB"]


def test_unknown_engines_are_refused_with_the_closest():
    with pytest.raises(
        UserError, match=r"--engines: must be of torch, .*got 'openvino-in8'; closest: 'openvino-int8'"
    ):
        chosen_engines(["torch", "openvino-in8"])


def test_engines_come_in_the_order_of_the_table():
    assert list(chosen_engines(["openvino", "torch"])) == ["torch", "openvino"]
    assert chosen_engines(None) == ENGINES


def test_a_missing_package_is_the_reason_to_skip(monkeypatch):
    monkeypatch.setattr("lbdet.deploy.benchmark.find_spec", lambda name: None if name == "nncf" else object())
    assert missing_package(ENGINES["openvino-nncf"]) == "nncf is not installed"
    assert missing_package(ENGINES["openvino"]) is None


def test_engines_that_cannot_run_are_in_the_report_with_the_reason(monkeypatch, tmp_path):
    class Fake(FakeWorker):
        def __init__(self, spec: Spec) -> None:
            super().__init__(spec.engine, [])
            self.ready = {"peak_memory": 5}

        def start(self) -> str | None:
            return "no bf16" if self.name == "openvino-bf16" else None

        def close(self) -> None: ...

    def write(*arguments) -> None:
        for suffix, size in ((".onnx", 1), (".xml", 2), (".bin", 3)):
            path = arguments[4] / "float" / f"end_to_end{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(bytes(size))

    monkeypatch.setattr("lbdet.deploy.benchmark.find_spec", lambda name: None if name == "nncf" else object())
    monkeypatch.setattr(benchmark_run, "ProcessWorker", Fake)
    monkeypatch.setattr("lbdet.deploy.benchmark_files.write_files", write)
    names = ["onnxruntime", "openvino", "openvino-bf16", "openvino-nncf"]
    options = benchmark_run.Options(threads=1, repeats=2, warmup=0, batch=1)
    report = benchmark_run.run_benchmark(nn.Identity(), [], {}, chosen_engines(names), options)
    assert list(report["engines"]) == names
    assert report["base"] == "onnxruntime"
    assert report["engines"]["openvino-bf16"] == {"skipped": "no bf16"}
    assert report["engines"]["openvino-nncf"] == {"skipped": "nncf is not installed"}
    assert [report["engines"][name]["file_size"] for name in names[:2]] == [1, 5]
    assert report["engines"]["openvino"]["peak_memory"] == 5


def script(text: str) -> list[str]:
    return [sys.executable, "-c", f"import sys, os, time, signal\n{text}"]


SPEC = Spec("openvino-int8", "/nowhere", 1, 0)
READY = 'print(\'{"stages": ["end_to_end"], "peak_memory": 1}\', flush=True)'


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("sys.exit('no such file')", r"ended with code 1 \(no such file\)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"was killed by SIGKILL \(nothing on stderr\)"),
    ],
)
def test_a_worker_that_dies_at_loading_is_one_clear_error(text, how):
    process = ProcessWorker(SPEC, script(text))
    try:
        with pytest.raises(
            UserError, match=rf"^openvino-int8: its process {how}; leave it out with --engines$"
        ):
            process.start()
    finally:
        process.close()


def test_a_worker_that_dies_in_a_round_is_the_same_error():
    process = ProcessWorker(SPEC, script(f"{READY}\nsys.stdin.readline()\nsys.exit('out of memory')"))
    try:
        assert process.start() is None
        with pytest.raises(UserError, match=r"openvino-int8: .* ended with code 1 .out of memory"):
            measure({"openvino-int8": process}, repeats=1)
    finally:
        process.close()


def test_a_worker_can_say_why_it_cannot_run():
    process = ProcessWorker(SPEC, script('print(\'{"skipped": "no bf16"}\')'))
    try:
        assert process.start() == "no bf16"
    finally:
        process.close()


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="reads /proc")
def test_a_worker_at_rest_uses_no_core_even_if_its_threads_spin():
    process = ProcessWorker(SPEC, script(f"{READY}\nwhile True: pass"))
    try:
        process.start()
        time.sleep(0.05)
        before = cpu_ticks(process)
        time.sleep(0.3)
        assert cpu_ticks(process) == before
        process.wake()
        deadline = time.monotonic() + 10
        while cpu_ticks(process) == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert cpu_ticks(process) > before
    finally:
        process.close()


def cpu_ticks(process: ProcessWorker) -> int:
    fields = Path(f"/proc/{process._process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_every_input_is_timed_once_and_warm_up_is_not():
    seen: list[int] = []
    inputs = [[np.array([i])] for i in range(3)]
    found = timed(lambda x: seen.append(int(x[0])), inputs, warmup=4)
    assert seen == [0, 1, 2, 0, 0, 1, 2]
    assert len(found["ms"]) == len(found["cpu_ms"]) == 3


def test_waiting_is_wall_clock_and_no_cpu_time():
    found = timed(lambda x: time.sleep(0.05), [[np.zeros(1)]], warmup=0)
    assert found["ms"][0] >= 50
    assert found["cpu_ms"][0] < 40


def test_inputs_come_back_in_order(tmp_path):
    named = {f"{i}_{j}": np.array([i, j]) for i in range(11) for j in range(2)}
    np.savez(tmp_path / "inputs.npz", **named)  # pyright: ignore[reportArgumentType]
    found = read_inputs(tmp_path / "inputs.npz")
    assert [[array.tolist() for array in row] for row in found] == [[[i, 0], [i, 1]] for i in range(11)]


def test_peak_memory_is_at_least_what_is_held_now():
    held = np.ones(30_000_000, np.uint8)
    assert peak_memory() > held.nbytes


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A small SSD and what the engines run of it; not to be changed."""
    torch.manual_seed(0)
    model = ssd_tiny(4)
    quantize_model(model, "W4A8")
    images = [np.ascontiguousarray(draw_scene(0, "val", i).image) for i in range(2)]
    tensors = [torch.from_numpy(image).permute(2, 0, 1).float() / 255 for image in images]
    calibrate_activations(model, lambda: [tensors])
    folder = tmp_path_factory.mktemp("files")
    facts = {"task": "detection", "classes": ["a", "b", "c"]}
    setups = [ENGINES[name] for name in ("onnxruntime", "onnxruntime-int8", "openvino-int8")]
    write_files(model, images, facts, setups, folder, batch=3)
    return Files(model.eval(), images, folder)


@dataclass(frozen=True)
class Files:
    model: nn.Module
    images: list[np.ndarray]
    folder: Path

    def run(self, engine: str, stage: str, *arrays: np.ndarray) -> list[np.ndarray]:
        """Run a stage of an engine in this process."""
        return worker._loaded(ENGINES[engine], self.folder, stage, 1)(*arrays)


def test_the_float_model_has_the_dequantized_weights_and_no_layer_of_lbdet(files):
    plain = float_model(files.model)
    kinds = {type(module) for module in plain.modules()}
    assert not kinds & {QuantConv2d, QuantLinear}
    layers = quantized_layers(files.model)
    assert layers
    for name, layer in layers.items():
        assert torch.equal(plain.get_parameter(f"{name}.weight"), quantized_weight(layer)), name
    set_precision(files.model, {name: Precision(4, None) for name in layers})
    try:
        x = torch.rand(3, 50, 60, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            (found,), (expected,) = plain([x]), files.model([x])
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    finally:
        set_precision(files.model, {name: Precision(4, 8) for name in layers})


@pytest.mark.parametrize("engine", ["onnxruntime", "onnxruntime-int8", "openvino-int8"])
def test_the_stages_of_an_engine_in_a_row_are_its_whole(files, engine):
    (image, _), whole = files.images, files.run(engine, "end_to_end", files.images[0])
    (x,) = files.run(engine, "prepare", image)
    logits, deltas = files.run(engine, "network", x)
    boxes, _, scores = files.run(engine, "post", logits[0], deltas[0])
    assert len(scores) == len(whole[2]) > 0
    np.testing.assert_allclose(scores, whole[2], atol=1e-5)
    height, width = image.shape[:2]
    side = x.shape[2:]
    scaled = boxes * np.array([width / side[1], height / side[0]] * 2, np.float32)
    np.testing.assert_allclose(scaled[:5], whole[0][:5], atol=0.05)


def test_a_batch_is_that_many_images(files):
    ((x,),) = read_inputs(files.folder / "batch.npz")
    assert x.shape[0] == 3
    together = files.run("onnxruntime", "batch", x)
    for i in range(3):
        alone = files.run("onnxruntime", "network", x[i : i + 1])
        np.testing.assert_allclose(together[0][i], alone[0][0], atol=1e-4)


def test_torch_and_the_float_file_find_the_same(files):
    (image, _) = files.images
    found = torch_call(files.folder, "end_to_end", 1, compiled=False)(image)[0]
    _, _, scores = files.run("onnxruntime", "end_to_end", image)
    np.testing.assert_allclose(found["scores"][:20], scores[:20], atol=1e-4)


def test_torch_runs_every_stage(files):
    for stage in STAGES:
        arrays = read_inputs(worker.input_file(files.folder, stage))[0]
        torch_call(files.folder, stage, 1, compiled=False)(*arrays)


def test_a_worker_times_every_image_of_every_stage(files):
    spec = Spec("onnxruntime-int8", str(files.folder), 1, 1)
    process = ProcessWorker(spec)
    try:
        assert process.start() is None
        assert process.ready["peak_memory"] > 10_000_000
        rounds = measure({"onnxruntime-int8": process}, repeats=2)["onnxruntime-int8"]
    finally:
        process.close()
    assert set(rounds) == set(STAGES)
    for stage, times in rounds.items():
        assert [len(t.ms) for t in times] == [1 if stage == "batch" else 2] * 2, stage
        assert min(t.ms[0] for t in times) > 0


def test_engines_are_timed_with_the_settings_that_they_are_deployed_with(files, monkeypatch):
    made = []
    monkeypatch.setattr(worker, "onnx_session", lambda *given: made.append(given))
    monkeypatch.setattr(worker, "openvino_compiled", lambda *given: made.append(given))
    with pytest.raises(AttributeError, match="get_inputs"):
        worker._loaded(ENGINES["onnxruntime-int8"], files.folder, "network", 3)
    worker._loaded(ENGINES["openvino-int8"], files.folder, "network", 3)
    path = files.folder / "int8/network.onnx"
    assert made == [(path, 3), (str(path.with_suffix(".xml")), 3, "f32")]


def test_on_windows_the_benchmark_is_one_clear_error(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    assert cli.main(["--run", str(tmp_path)]) == 2
    assert "benchmark: must be run on Linux or macOS, got Windows" in capsys.readouterr().err


def test_what_windows_lacks_is_imported_nowhere_before_that_error():
    code = "import sys; sys.modules['resource'] = None; import lbdet.deploy.benchmark_process"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", ["classifier", "faster_rcnn"])
def test_other_models_have_the_stages_that_they_can_have(name, tmp_path):
    torch.manual_seed(0)
    classifier = name == "classifier"
    model = tiny_classifier() if classifier else tiny_faster_rcnn()
    quantize_model(model, "W4")
    image = np.ascontiguousarray(draw_scene(0, "val", 0).image)[:64, :64]
    facts = {"task": "classification" if classifier else "detection", "classes": ["a"], "image_size": 64}
    write_files(model, [image.copy()], facts, [ENGINES["onnxruntime"]], tmp_path, batch=2)
    stages = [stage for stage in STAGES if worker.input_file(tmp_path, stage).is_file()]
    assert stages == (["end_to_end", "network", "batch"] if classifier else ["end_to_end"])
    for stage in stages:
        arrays = read_inputs(worker.input_file(tmp_path, stage))[0]
        ours = torch_call(tmp_path, stage, 1, compiled=False)(*arrays)
        theirs = worker._loaded(ENGINES["onnxruntime"], tmp_path, stage, 1)(*arrays)
        if classifier:
            np.testing.assert_allclose(ours, theirs[0], atol=1e-4)
        else:
            np.testing.assert_allclose(ours[0]["scores"], theirs[2], atol=1e-3)

"""The parent's side of a worker process: start it, ask it, stop and continue it, and say how it died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lbdet.deploy.benchmark import Times
from lbdet.deploy.benchmark_worker import Spec
from lbdet.errors import UserError

MODULE = "lbdet.deploy.benchmark_worker"


class ProcessWorker:
    """A worker process, ready and at rest after `start`.

    Args:
        spec: what it is told.
        command: that runs it; the spec as JSON is added.
    """

    def __init__(self, spec: Spec, command: Sequence[str] = (sys.executable, "-m", MODULE)) -> None:
        self.name = spec.engine
        self.ready: dict[str, Any] = {}
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = str(spec.threads)
        self._process = subprocess.Popen(
            [*command, json.dumps(asdict(spec))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True, encoding="utf-8",
            env={
                **os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads,
                "MKL_NUM_THREADS": threads,
            },
        )  # fmt: skip

    @property
    def stages(self) -> Sequence[str]:
        """Return what it can time."""
        return self.ready["stages"]

    def start(self) -> str | None:
        """Wait until it is loaded, and let it rest.

        Returns:
            Why it cannot run here; None if it can.

        Raises:
            UserError: it died.
        """
        self.ready = self._answer()
        if "skipped" in self.ready:
            return self.ready["skipped"]
        self.rest()
        return None

    def wake(self) -> None:
        """Continue the process."""
        self._signal(signal.SIGCONT)

    def rest(self) -> None:
        """Stop the process: its idle threads would spin."""
        self._signal(signal.SIGSTOP)

    def round(self, stage: str) -> Times:
        """Run a stage on every image.

        Raises:
            UserError: the process died.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(stage + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None
        found = self._answer()
        return Times(tuple(found["ms"]), tuple(found["cpu_ms"]))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._death()
        return json.loads(line)

    def _death(self) -> UserError:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr.read().splitlines() if line.strip()]
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        words = lines[-1][:300] if lines else "nothing on stderr"
        return UserError(f"{self.name}: its process {how} ({words}); leave it out with --engines")

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

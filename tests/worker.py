"""Starts the real worker, as a process of its own, for end-to-end tests of any package."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from serving.config import ENV_PREFIX

ROOT = Path(__file__).parent.parent
START_SECONDS = 30


@dataclass
class RunningWorker:
    """`base_url` answers requests; `process` is there to be signalled."""

    base_url: str
    process: subprocess.Popen[str]
    stderr: IO[str]

    def log(self) -> str:
        """What the worker has logged so far."""
        self.stderr.seek(0)
        return self.stderr.read()


def worker_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of a worker, plus `extra`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    return clean | {"PYTHONPATH": str(ROOT)} | dict(extra or {})


@contextmanager
def run_worker(
    bundle: Path, *args: str, env: Mapping[str, str] | None = None, python: str = sys.executable
) -> Iterator[RunningWorker]:
    """Serve `bundle` on a free port and yield once it is ready; ends with SIGTERM unless it ended already."""
    command = [python, "-m", "serving", "--bundle", str(bundle), "--port", "0", *args]
    if "--drain-grace-seconds" not in args:
        command += ["--drain-grace-seconds", "0"]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as stderr,
        subprocess.Popen(
            command, env=worker_environment(env), stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process,
    ):
        watchdog = threading.Timer(START_SECONDS, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            watchdog.cancel()
            fields = dict(field.split("=", 1) for field in ready.split() if "=" in field)
            worker = RunningWorker(fields.get("url", ""), process, stderr)
            assert ready.startswith("ready "), f"the worker did not get ready: {worker.log()}"
            yield worker
        finally:
            watchdog.cancel()
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(START_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()

"""How a benchmark talks to its workers: processes that hold their models and do one unit of work each time they are told to.

So two sides take turns within one run, each with nothing else computing beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Turns:
    """A worker's side: each `wait` ends one unit, reports it, and blocks until the next is asked for."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever else prints goes to the log
        self._began: float | None = None

    def wait(self, **figures: Any) -> None:
        if self._began is not None:
            figures |= {"seconds": time.perf_counter() - self._began}
        self._out.write(json.dumps({**figures, "peak_mib": peak_mib()}) + "\n")
        self._out.flush()
        if not sys.stdin.readline():
            os._exit(0)
        self._began = time.perf_counter()


class Worker:
    """The benchmark's side of a worker."""

    def __init__(self, command: list[str], log: Path, threads: int | None = None):
        env = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True, env=env
        )
        self._log = log
        self.start = self._read()

    def turn(self) -> dict[str, Any]:
        """One unit of work; its figures, `seconds` and `peak_mib` among them."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a worker ended: {self._log.read_text()[-2000:]}")
        return json.loads(line)


class Stations:
    """A worker's side where policies are to be judged later: saves one after the first iteration that ends beyond each multiple of
    `every` seconds of training (saving not counted), its folder named by iteration and seconds, and ends the process at `seconds`."""

    def __init__(self, folder: Path, every: float, seconds: float):
        self._folder, self._every, self._limit = folder, every, seconds
        self._used, self._passed = 0.0, 0
        self._since: float | None = None

    def pass_by(self, save: Callable[[Path], None]) -> None:
        """Called before the first iteration and after each."""
        if self._since is not None:
            before, self._used = self._used, self._used + time.perf_counter() - self._since
            self._passed += 1
            if self._used // self._every > before // self._every or self._used >= self._limit:
                save(self._folder / f"{self._passed:05d}-{self._used:.1f}")
            if self._used >= self._limit:
                os._exit(0)
        self._since = time.perf_counter()


def peak_mib() -> float:
    """The most memory that this process has held, in MiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

"""metrics.jsonl and timings.jsonl: one line a step, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class JsonLines:
    """A file of JSON lines that grows; `key` is the field that counts up ("step" or "iteration")."""

    def __init__(self, path: Path, key: str):
        self._path = path
        self._key = key

    def append(self, *rows: dict[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def sync(self) -> None:
        """Wait until every line is on the disk: before a checkpoint, which must never be ahead of its metrics."""
        if self._path.exists():
            with self._path.open("a", encoding="utf-8") as file:
                os.fsync(file.fileno())

    def cut_after(self, step: int) -> int:
        """Drop lines beyond `step`, and a last line that a kill left half-written. Returns the highest step that there was, 0 if none."""
        if not self._path.exists():
            return 0
        kept, highest = [], 0
        # Not splitlines(): it also cuts at U+2028 and other characters that a sampled response may hold.
        for line in self._path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                number = json.loads(line)[self._key]
                if number <= step:
                    kept.append(line + "\n")
                highest = max(highest, number)
            except (ValueError, KeyError, TypeError):
                continue
        temporary = self._path.with_name(f".{self._path.name}.writing")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self._path)
        return highest

    def read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").split("\n") if line]


class Stopwatch:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[f"{name}_s"] = self.seconds.get(f"{name}_s", 0.0) + time.perf_counter() - start


def peak_memory_mb() -> float:
    """The most memory that this process has held so far, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

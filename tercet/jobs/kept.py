"""Rows of an evaluation that has not ended: written batch by batch, so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tercet.errors import Interrupted
from tercet.jobs.workshop import Workshop
from tercet.runtime.metrics import JsonLines

Row = dict[str, Any]


class Kept:
    """The batches of rows of one task in RUN/evaluation/checkpoints, which the pipeline removes once the stage is done.

    They belong to one fingerprint: that of the stage (its settings, data and the stages before it, as started.json says) with what the
    task reads beside it. Rows under another one are thrown away.
    """

    def __init__(self, shop: Workshop, task: str, *reads: str):
        self._shop = shop
        folder = shop.folder / "evaluation"
        self._lines = JsonLines(folder / f"checkpoints/{task}.jsonl", "batch")
        self._print = _fingerprint(folder / "started.json", task, *reads)
        self._batches = 0

    def rows(self) -> list[Row]:
        """The rows that are there, in order, the same on every rank."""
        batches: list[Row] = []
        if self._shop.world.is_main:
            self._lines.cut_after(2**62)  # drops a last line that a kill left half-written
            batches = self._lines.read()
            if any(line["fingerprint"] != self._print for line in batches):
                self._lines.cut_after(-1)
                batches = []
        batches = self._shop.world.gather(batches)[0]
        self._batches = len(batches)
        return [row for line in batches for row in line["rows"]]

    def keep(self, rows: Sequence[Row]) -> None:
        """Add a batch; stop here if the user asked to."""
        if self._shop.world.is_main:
            self._lines.append({"batch": self._batches, "fingerprint": self._print, "rows": list(rows)})
        self._batches += 1
        if self._shop.world.any(self._shop.interrupt.requested):
            raise Interrupted


def _fingerprint(started: Path, *reads: str) -> str:
    digest = hashlib.sha256(started.read_bytes() if started.exists() else b"")
    digest.update(json.dumps(reads).encode())
    return digest.hexdigest()

"""One rank of a `tercet run` that torchrun starts: `rank.py CONFIG TIMES`; the first rank alone is asked to stop, at its n-th boundary."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import tercet.runtime.stage as module
from tercet.config import load_config
from tercet.pipeline import Pipeline
from tercet.runtime.interrupted import Interrupted


class Scripted(module.Interrupt):
    """A signal that arrives just before a boundary asks for it for the n-th time; 0: never."""

    times = int(sys.argv[2]) if os.environ.get("RANK", "0") == "0" else 0
    asked = 0

    @property
    def requested(self) -> bool:
        Scripted.asked += 1
        return 0 < Scripted.times <= Scripted.asked

    @requested.setter
    def requested(self, value: bool) -> None:
        pass


if __name__ == "__main__":
    module.Interrupt = Scripted  # type: ignore[misc]
    try:
        Pipeline(load_config(sys.argv[1])).run()
    except Interrupted:
        print(f"interrupted at question {Scripted.asked}", flush=True)

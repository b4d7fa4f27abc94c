"""What a stage is given to run with: its folder, the machine, the ranks, checkpoints and journals, and whether it shall stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tercet.runtime.checkpoint import Checkpoint, Checkpoints, random_state, restore_random_state
from tercet.runtime.distributed import World
from tercet.runtime.machine import Machine
from tercet.runtime.metrics import JsonLines, peak_memory_mb
from tercet.runtime.progress import Bar, console
from tercet.runtime.trackers import Tracker

# Takes a line of metrics; gives what has gone wrong by now and was not said before, by the cause's name, in plain words.
Watch = Callable[[dict[str, Any]], dict[str, str]]


class Interrupt:
    """Remembers a SIGINT or SIGTERM until a boundary at which the state can be saved; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[Interrupt]:
        def note(number: int, frame: FrameType | None) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True
            console.print("stopping at the next boundary; once more to stop at once")

        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may set handlers
            return
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class StageRun:
    """One stage's folder, machine and state on disk."""

    name: str
    folder: Path
    world: World
    machine: Machine
    checkpoint_every: int
    checkpoint_keep: int
    counter: str = "step"  # the field that counts up in metrics.jsonl
    interrupt: Interrupt = field(default_factory=Interrupt)
    checkpoint_minutes: float | None = None
    trackers: Sequence[str] = ()  # where metrics go beside the folder: kinds of runtime/trackers.py
    group: str = ""  # the run's name there
    watch: Watch | None = None

    def __post_init__(self) -> None:
        self._open_trackers: list[Tracker] = []
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=self.checkpoint_keep)
        self._journals: list[JsonLines] = []
        self.metrics = self.journal("metrics.jsonl")
        self.timings = self.journal("timings.jsonl")
        self._saved_at = time.monotonic()

    def journal(self, name: str) -> JsonLines:
        """A file of lines in the stage's folder that resuming cuts back to the checkpoint."""
        self._journals.append(JsonLines(self.folder / name, self.counter))
        return self._journals[-1]

    def resume(self) -> Checkpoint | None:
        """The state to go on from, with the random generators and the journals set back to it; None at the beginning."""
        if self.world.is_main:
            self.checkpoints.recover()
        self.world.barrier()
        checkpoint, complaints = self.checkpoints.latest()
        for complaint in complaints:
            console.print(complaint, style="yellow", markup=False)
        done = checkpoint.step if checkpoint else 0
        if self.world.is_main:
            highest = [journal.cut_after(done) for journal in self._journals]
            place = highest[self._journals.index(self.metrics)]
            self._open_trackers = [Tracker(kind, self.folder, self.group, self.name, place) for kind in self.trackers]
            if self.watch is not None:
                for row in self.metrics.read():
                    self.watch(row)  # what it says was said already
        if checkpoint is not None:
            states = checkpoint.values["random"]  # of each rank: their rows differ, and so does what dropout has drawn
            restore_random_state(states[self.world.rank % len(states)], self.machine.device)
            console.print(f"{self.name}: going on after {self.counter} {done}")
        self.world.barrier()
        return checkpoint

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step: by its number, or by the clock. The same on every rank."""
        return step % self.checkpoint_every == 0 or self.world.any(self.overdue)

    @property
    def overdue(self) -> bool:
        """Whether checkpoint.every_minutes have passed since the last checkpoint, by this rank's clock."""
        return self.checkpoint_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.checkpoint_minutes

    def save(self, step: int, values: dict[str, Any], tensors: dict[str, dict[str, Any]]) -> None:
        """Write exact-resume state; every rank computes the same, the first one writes."""
        states = self.world.gather(random_state(self.machine.device))
        if self.world.is_main:
            for journal in self._journals:
                journal.sync()
            self.checkpoints.save(step, {**values, "random": states}, tensors)
        self._saved_at = time.monotonic()
        self.world.barrier()

    def log(self, metrics: dict[str, Any], timings: dict[str, Any]) -> None:
        """Append a line to each journal, and tell the trackers and the user. metrics gets "alarms" where something has gone wrong."""
        if self.world.is_main:
            step = metrics[self.counter]
            alarms = self.watch(metrics) if self.watch is not None else {}
            for text in alarms.values():
                console.print(f"{self.counter} {step}: {text}", style="yellow", markup=False)
            if alarms:
                metrics["alarms"] = list(alarms)
            self.metrics.append(metrics)
            self.timings.append({self.counter: step, **timings, "peak_memory_mb": round(peak_memory_mb(), 1)})
            for tracker in self._open_trackers:
                tracker.send(step, metrics)

    @contextmanager
    def progress(self, total: int, done: int) -> Iterator[Bar]:
        """The stage's bar on the terminal; afterwards the trackers are closed."""
        try:
            with Bar(self.name, total, done=done, silent=not self.world.is_main) as bar:
                yield bar
        finally:
            for tracker in self._open_trackers:
                tracker.close()

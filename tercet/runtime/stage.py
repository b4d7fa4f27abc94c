"""What a stage is given to run with, and the loop that supervised stages share."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from tercet.errors import TercetError
from tercet.runtime.checkpoint import Checkpoint, Checkpoints, random_state, restore_random_state
from tercet.runtime.distributed import World
from tercet.runtime.interrupted import Interrupted
from tercet.runtime.machine import Machine, release_free_memory
from tercet.runtime.metrics import JsonLines, peak_memory_mb
from tercet.runtime.optim import Optimizer
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


@dataclass(frozen=True)
class Schedule:
    """How a supervised stage takes its optimizer steps."""

    total_steps: int
    steps_per_epoch: int
    learning_rate: Callable[[int], float]
    eval_every: int
    weight_decay: float
    max_grad_norm: float


def train(
    run: StageRun,
    module: nn.Module,
    schedule: Schedule,
    compute: Callable[[int], dict[str, float]],
    evaluate: Callable[[], dict[str, float]],
    *,
    also_before: bool = False,
) -> None:
    """Take the optimizer steps of a supervised stage, resuming exactly where a checkpoint left off.

    `compute(step)` accumulates the gradients of step (counted from 0) and returns its metrics, "loss" and "tokens" among them;
    `evaluate()` returns figures on held-out records; `also_before`: the first step's row has them from before it, named ..._before.
    """
    optimizer = Optimizer(module, weight_decay=schedule.weight_decay, max_grad_norm=schedule.max_grad_norm, world=run.world)
    checkpoint = run.resume()
    start = 0
    if checkpoint is not None:
        optimizer.load_weights(checkpoint.tensors["model"])
        optimizer.load_state(checkpoint.tensors["optimizer"])
        start = checkpoint.step
    eval_every = schedule.eval_every or schedule.steps_per_epoch
    skipped = checkpoint.values["skipped"] if checkpoint else 0
    release_free_memory()
    before = {f"{name}_before": value for name, value in evaluate().items()} if also_before and start == 0 else {}
    module.train()
    with run.progress(schedule.total_steps, start) as bar:
        for step in range(start, schedule.total_steps):
            began = time.perf_counter()
            metrics = compute(step)
            rate = schedule.learning_rate(step)
            norm = optimizer.step(rate)
            skipped += not math.isfinite(norm)
            _stop_if_broken(run.name, skipped, metrics["loss"])
            seconds = time.perf_counter() - began
            row = {
                "step": step + 1,
                "epoch": (step + 1) / schedule.steps_per_epoch,
                **metrics,
                "learning_rate": rate,
                "grad_norm": norm,
                **(before if step == 0 else {}),
            }
            if skipped:
                row["skipped"] = skipped
            if (step + 1) % eval_every == 0 or step + 1 == schedule.total_steps:
                module.eval()
                row |= evaluate()
                module.train()
            run.log(row, {"seconds": seconds, "tokens_per_s": metrics["tokens"] / seconds})
            bar.advance(
                **{name: value for name, value in row.items() if name in ("loss", "accuracy", "eval_loss", "eval_accuracy")}
            )
            last, stopping = step + 1 == schedule.total_steps, run.world.any(run.interrupt.requested)
            if run.due(step + 1) or stopping or last:
                run.save(step + 1, {"skipped": skipped}, {"model": optimizer.weights(), "optimizer": optimizer.state()})
            if stopping and not last:
                raise Interrupted
    module.eval()


def _stop_if_broken(stage: str, skipped: int, loss: float) -> None:
    """A step whose gradient is not finite is skipped and counted; a run of them means that training has broken down."""
    if skipped >= 10:
        section = "reward" if stage == "judge" else stage
        raise TercetError(
            f"{stage}: {skipped} steps had a gradient that is not finite (last loss {loss}) and were skipped; the last checkpoint is kept. "
            f"Lower {section}.learning_rate or set machine.dtype: float32"
        )

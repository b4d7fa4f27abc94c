"""Killed at any moment and started again with the same command, a run ends with the same bytes as one that never stopped."""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from fault.conftest import Stages, Undisturbed
from fault.harness import FOLDERS, STAGES, Fault, Process, contents, differences, stage_of, tercet, torn

pytestmark = pytest.mark.timeout(4 * 3600)


def finish(config: Path, undisturbed: Undisturbed) -> None:
    """The same command once more, to the end."""
    assert torn(config.parent / "run") == []
    status, output = tercet(undisturbed.command, config, log=config.parent / "last.log")
    assert status == 0, output[-2000:]
    assert differences(contents(config.parent / "run"), undisturbed.files) == []


def disturb(config: Path, number: int, rng: random.Random, undisturbed: Undisturbed, times: int) -> Counter[str]:
    """Signals at random moments, the same command after each; gives the stages that they fell into."""
    struck: Counter[str] = Counter()
    for time in range(times):
        process = Process("run", config, log=config.parent / f"{time}.log")
        if process.ended_before(rng.uniform(0.02, 0.7) * undisturbed.cpu_seconds):
            assert process.wait() == 0, process.output()[-2000:]
            break
        stage = stage_of(config.parent / "run")
        process.signal(number)
        status = process.wait()
        if status == 0:  # it had just come to its end
            break
        struck[stage] += 1
        assert status in {signal.SIGKILL: {-9}, signal.SIGTERM: {-15, 130}}[signal.Signals(number)], process.output()[-2000:]
        assert "Traceback" not in process.output()
        assert torn(config.parent / "run") == []
    finish(config, undisturbed)
    return struck


@pytest.mark.slow
def test_sigkill_at_random_moments(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A seeded sample: one run, killed up to four times."""
    struck = disturb(undisturbed.copy(tmp_path / "a"), signal.SIGKILL, random.Random(1), undisturbed, times=4)
    assert struck.total() >= 2


@pytest.mark.full
def test_sigkill_at_sixty_random_moments_over_all_stages(undisturbed: Undisturbed, tmp_path: Path) -> None:
    struck: Counter[str] = Counter()
    for seed in range(100):
        struck += disturb(undisturbed.copy(tmp_path / str(seed)), signal.SIGKILL, random.Random(seed), undisturbed, times=8)
        shutil.rmtree(tmp_path / str(seed))
        if struck.total() >= 60 and set(STAGES) <= set(struck):
            break
    print(f"\n{struck.total()} kills in {seed + 1} runs: {dict(struck)}")
    assert struck.total() >= 60 and set(STAGES) <= set(struck), struck


@pytest.mark.parametrize("times", [pytest.param(2, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.full)])
def test_sigterm_at_random_moments(times: int, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Saves at the next boundary and leaves; the moment may also be before anything is saved, or in the last stage."""
    struck: Counter[str] = Counter()
    seed = 100
    while struck.total() < times:
        config = undisturbed.copy(tmp_path / str(seed))
        struck += disturb(config, signal.SIGTERM, random.Random(seed), undisturbed, times=min(4, times))
        seed += 1
    print(f"\n{struck.total()} stops: {dict(struck)}")


def strike(kind: str, at: int, undisturbed: Undisturbed, folder: Path) -> None:
    config = undisturbed.copy(folder)
    extra = random.Random(at).randrange(1, 200 if undisturbed.changes[at - 1].endswith(".jsonl") else 2000)
    fault = Fault(kind, at, str(folder / "run"), extra)
    status, output = tercet(undisturbed.command, config, log=folder / "0.log", fault=fault)
    expected = -signal.SIGKILL if kind == "kill" else -signal.SIGXFSZ
    # Towards the end no file may grow as far as the limit any more; then the run has just finished.
    assert status == expected or kind == "tear" and status == 0, f"{undisturbed.changes[at - 1]}: {status} {output[-1000:]}"
    try:
        finish(config, undisturbed)
    except AssertionError as error:
        raise AssertionError(f"{kind} at change {at}, {undisturbed.changes[at - 1]}: {error}") from error
    shutil.rmtree(folder)


def places(kind: str, changes: list[str]) -> list[int]:
    """The changes at which this fault can strike, counted from 1: a kill comes before any of them, a tear in a file's writing."""
    return [i + 1 for i, change in enumerate(changes) if kind == "kill" or change.startswith("write") and "/.lock" not in change]


Boundary = Callable[[str], bool]
# What a kill must be tried at, and in which change of the run folder it is seen.
BOUNDARIES: dict[str, Boundary] = {
    "while a checkpoint is written": lambda change: "/checkpoints/.writing-" in change and change.endswith("state.json"),
    "between a checkpoint's rename and the pruning": lambda change: change.startswith("sync") and change.endswith("/checkpoints"),
    "while an old checkpoint is removed": lambda change: change.startswith("remove") and change.endswith("optimizer.safetensors"),
    "before a model takes its place": lambda change: change.startswith("rename") and change.endswith("/.model.writing"),
    "between a stage's end and its done.json": lambda change: (
        change.startswith("write") and change.endswith(".done.json.writing")
    ),
    "before done.json takes its place": lambda change: change.startswith("rename") and change.endswith(".done.json.writing"),
    "while the report is written": lambda change: change.startswith("write") and ".report.html" in change,
    "before the report takes its place": lambda change: change.startswith("rename") and ".report.html" in change,
    "while metrics are appended": lambda change: change.startswith("write") and change.endswith("/metrics.jsonl"),
}


@pytest.mark.slow
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_at_a_boundary(boundary: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A seeded sample: one place of each kind, killed before it; and torn, where a file is written."""
    there = [at for at in places("kill", undisturbed.changes) if BOUNDARIES[boundary](undisturbed.changes[at - 1])]
    at = random.Random(boundary).choice(there)
    strike("tear" if boundary.startswith("while") and "removed" not in boundary else "kill", at, undisturbed, tmp_path / "a")


@pytest.mark.full
@pytest.mark.parametrize("stage", FOLDERS)
@pytest.mark.parametrize("kind", ["kill", "tear"])
def test_at_every_change_of_the_run_folder(kind: str, stage: str, stages: Stages, tmp_path: Path) -> None:
    """Before each file that is opened, flushed, renamed or removed, and in the middle of each one's writing."""
    part = stages(stage)
    chosen = places(kind, part.changes)
    for at in chosen:
        strike(kind, at, part, tmp_path / str(at))
    print(f"\n{kind} in {stage}: {len(chosen)} of {len(part.changes)} changes")

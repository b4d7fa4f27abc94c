"""tercet/runtime/trackers.py: what is sent where, with which step, and not twice."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tercet.runtime.distributed import World
from tercet.runtime.machine import Machine
from tercet.runtime.stage import StageRun
from tercet.runtime.trackers import Tracker, check_installed
from tercet.types import TercetError

Sent = list[tuple[dict[str, Any], int]]


class FakeRun:
    def __init__(self, options: dict[str, Any]):
        self.options = options
        self.sent: Sent = []
        self.finished = False

    def log(self, numbers: dict[str, Any], step: int) -> None:
        self.sent.append((numbers, step))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture(params=["wandb", "trackio"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[FakeRun]]]:
    """A module of that name in place of the real one, and the runs that are opened with it."""
    module: Any = types.ModuleType(request.param)
    runs: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        runs.append(FakeRun(options))
        return runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, request.param, module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    yield request.param, runs


def run_of(folder: Path, kind: str) -> StageRun:
    machine = Machine(torch.device("cpu"), torch.float32, 1, 64)
    return StageRun("ppo", folder / "ppo", World(), machine, 1, 1, "iteration", trackers=[kind], group="run")


def train(folder: Path, kind: str, iterations: range) -> None:
    """A stage that logs these iterations."""
    run = run_of(folder, kind)
    run.resume()
    with run.progress(10, 0):
        for i in iterations:
            run.log({"iteration": i, "score": i / 2, "skipped": False, "note": "text"}, {})


def test_every_number_of_every_line_goes_there_under_its_own_step(fake: tuple[str, list[FakeRun]], tmp_path: Path) -> None:
    kind, runs = fake
    train(tmp_path, kind, range(1, 4))
    assert runs[0].sent == [({"ppo/iteration": i, "ppo/score": i / 2, "ppo/skipped": 0.0}, i) for i in (1, 2, 3)]
    assert runs[0].finished and runs[0].options["group"] == "run"


def test_a_resumed_stage_sends_nothing_twice_and_goes_on_in_the_same_run(fake: tuple[str, list[FakeRun]], tmp_path: Path) -> None:
    kind, runs = fake
    train(tmp_path, kind, range(1, 6))  # no checkpoint was written: everything is computed again
    train(tmp_path, kind, range(1, 8))
    assert [step for run in runs for _, step in run.sent] == [1, 2, 3, 4, 5, 6, 7]
    key = "id" if kind == "wandb" else "name"
    assert runs[0].options[key] == runs[1].options[key] and runs[1].options["resume"] == "allow"
    other = tmp_path / "redone"
    train(other, kind, range(1, 2))
    assert runs[2].options[key] != runs[0].options[key]


def test_wandb_is_offline_unless_the_user_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("wandb")
    seen: list[dict[str, Any]] = []
    module.init = lambda **options: seen.append(options) or FakeRun(options)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (tmp_path / "sft").mkdir()
    Tracker("wandb", tmp_path / "sft", "run", "sft", 0).close()
    monkeypatch.setenv("WANDB_MODE", "online")
    Tracker("wandb", tmp_path / "sft", "run", "sft", 0).close()
    assert [options["mode"] for options in seen] == ["offline", "online"]


def test_tensorboard_files_hold_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, "tensorboard", range(1, 4))
    train(tmp_path, "tensorboard", range(1, 6))
    events = EventAccumulator(str(tmp_path / "ppo/tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("ppo/score")] == [(i, i / 2) for i in range(1, 6)]


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TercetError, match=r"trackers: wandb is not installed: pip install wandb"):
        check_installed(["wandb"])
    check_installed([])


def test_nothing_is_imported_without_a_tracker(tmp_path: Path) -> None:
    before = set(sys.modules)
    run = StageRun("sft", tmp_path / "sft", World(), Machine(torch.device("cpu"), torch.float32, 1, 64), 1, 1)
    run.resume()
    run.log({"step": 1}, {})
    assert not {"wandb", "trackio", "tensorboard"} & (set(sys.modules) - before)

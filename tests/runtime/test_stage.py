"""When checkpoints are due, and what a stage is set back to. The loop itself: test_pipeline.py, fault/test_bad_numbers.py."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path

import pytest
import tiny
import torch

from tercet.runtime import stage as module
from tercet.runtime.checkpoint import random_state
from tercet.runtime.distributed import World
from tercet.runtime.stage import StageRun
from tercet.stages.supervised import _stop_if_broken
from tercet.types import TercetError


def run_of(folder: Path, **options: object) -> StageRun:
    run = tiny.run_of(folder, "sft", every=10)
    for name, value in options.items():
        setattr(run, name, value)
    return run


def test_a_checkpoint_is_due_by_steps(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert [step for step in range(1, 31) if run.due(step)] == [10, 20, 30]


def test_or_by_minutes_since_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    run = run_of(tmp_path, checkpoint_minutes=5.0)
    now += 299
    assert not run.due(1)
    now += 1
    assert run.due(2) and run.overdue
    run.save(2, {}, {})
    assert not run.due(3) and run.due(10), "the clock starts anew with each checkpoint"
    now += 300
    assert run.due(4)


def test_one_rank_whose_clock_is_ahead_decides_for_all(tmp_path: Path) -> None:
    """Saving is done together: ranks that disagree would wait for each other for ever."""

    class Two(World):
        def any(self, flag: bool) -> bool:
            return True  # another rank says so

    run = tiny.run_of(tmp_path, "sft", every=10, world=Two())
    assert not run.overdue and run.due(3)


def test_resuming_sets_journals_and_random_states_back(tmp_path: Path) -> None:
    run = tiny.run_of(tmp_path, "sft")
    journal = run.journal("more.jsonl")
    run.log({"step": 1}, {})
    journal.append({"step": 1}, {"step": 1})
    run.save(1, {"mine": 3}, {})
    wanted = torch.rand(1).item(), random.random()
    run.log({"step": 2}, {})
    journal.append({"step": 2})
    again = tiny.run_of(tmp_path, "sft")
    more = again.journal("more.jsonl")
    checkpoint = again.resume()
    assert checkpoint is not None and (checkpoint.step, checkpoint.values["mine"]) == (1, 3)
    assert (torch.rand(1).item(), random.random()) == wanted
    assert [row["step"] for row in again.metrics.read()] == [1] and [row["step"] for row in more.read()] == [1, 1]


def test_lines_are_on_the_disk_before_the_checkpoint_that_counts_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a machine that loses power could come back with a checkpoint whose metrics are missing."""
    events: list[str] = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (events.append(os.readlink(f"/proc/self/fd/{number}")), real_sync(number))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), real_replace(*paths))[1])
    run = tiny.run_of(tmp_path, "sft")
    run.log({"step": 1}, {})
    run.save(1, {}, {"model": {"w": torch.ones(1)}})
    names = [Path(event).name for event in events]
    for name in ("metrics.jsonl", "timings.jsonl", "state.json", "model.safetensors", "manifest.json"):
        assert names.index(name) < names.index("rename"), name
    assert names[-1] == "checkpoints", "and the rename itself"


def test_each_rank_gets_its_own_random_state_back(tmp_path: Path) -> None:
    """Their rows differ, and so does what dropout has drawn on each."""
    states, wanted = [], []
    for rank in range(2):
        torch.manual_seed(40 + rank)
        states.append(random_state())
        wanted.append(torch.rand(1).item())

    class Rank(World):
        def gather(self, value: object) -> list[object]:
            return list(states)

        def barrier(self) -> None:
            pass

    tiny.run_of(tmp_path, "sft", world=Rank(0, 2)).save(1, {}, {})
    for rank in (0, 1):
        tiny.run_of(tmp_path, "sft", world=Rank(rank, 2)).resume()
        assert torch.rand(1).item() == wanted[rank]
    assert len(set(wanted)) == 2


def test_a_judge_that_breaks_down_names_a_setting_that_exists() -> None:
    with pytest.raises(TercetError, match=r"^judge: 10 steps .* Lower reward\.learning_rate "):
        _stop_if_broken("judge", 10, math.nan)

"""What a user sees and is told while a run goes on, and where its metrics go."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tercet.models.roles import Policy
from tercet.runtime.stage import StageRun
from tercet.types import TercetError

Lines = Callable[[Path], list[dict[str, Any]]]
BUDGET = {
    "learning_rate": 3e-2,
    "iterations": 4,
    "evaluate_every": 4,
    "best_kl_budget": 1e-9,
}  # which every policy that moves exceeds


def test_warnings_are_shown_before_training(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    runs.run("sft", "reward", data={"max_prompt_length": 8}, sft={"max_length": 12})
    shown = " ".join(capsys.readouterr().err.split())
    assert "warning: sft: 40 of 40 texts (100.0%) are cut at sft.max_length (12)" in shown
    assert "warning: data.comparisons: 60 are few" in shown
    assert shown.index("warning: data.comparisons") < shown.index("sft finished")
    assert "no second reward model" not in shown, "what is well is for tercet doctor"


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")],
)
def test_running_out_of_memory_names_the_setting_to_lower(runs: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(Policy, "forward", fail)
    with pytest.raises(TercetError, match=r"stage sft: memory ran out.*machine\.microbatch_tokens \(512 now; try 256\)"):
        runs.run("sft")


@pytest.mark.slow
def test_what_goes_wrong_is_said_once_and_written_down(runs: Any, lines: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs.run(ppo=BUDGET)
    alarms = {row["iteration"]: row["alarms"] for row in lines(folder / "ppo/metrics.jsonl") if "alarms" in row}
    said = [(iteration, cause) for iteration, causes in alarms.items() for cause in causes]
    assert [cause for _, cause in said].count("kl_exploded") == 1 and (2, "kl_exploded") in said
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.count("PPO ran away from the reference.") == 1
    assert "iteration 2: PPO ran away from the reference." in shown
    verdict = json.loads((folder / "summary.json").read_text())["verdict"]
    assert "kl_exploded" in [finding["cause"] for finding in verdict], "the verdict says the same in the end"


@pytest.mark.slow
def test_a_resumed_run_says_nothing_twice(
    runs: Any, lines: Lines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save, checkpoint = StageRun.save, {"checkpoint": {"every": 1}}

    def crash(run: StageRun, step: int, *state: Any) -> None:
        save(run, step, *state)
        if run.name == "ppo" and step == 3:
            raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "save", crash)
        with pytest.raises(ZeroDivisionError):
            runs.run(ppo=BUDGET, **checkpoint)
    assert "PPO ran away" in capsys.readouterr().err
    folder = runs.run(ppo=BUDGET, **checkpoint)
    assert "PPO ran away" not in capsys.readouterr().err.split("what led to it")[0]
    causes = [cause for row in lines(folder / "ppo/metrics.jsonl") for cause in row.get("alarms", ())]
    assert len(causes) == len(set(causes)) and "kl_exploded" in causes


@pytest.mark.slow
def test_the_range_of_scores_is_known_where_the_reward_model_is_the_whole_reward(runs: Any, summary: Any) -> None:
    found = summary(runs.run("sft", "reward", "ppo"))
    assert found["ppo.score_range_low"] < found["ppo.score_range_high"]
    edges = json.loads((runs.folder / "run/reward/card.json").read_text())["histograms"]["edges"]
    assert (found["ppo.score_range_low"], found["ppo.score_range_high"]) == (edges[0], edges[-1])


@pytest.mark.slow
def test_every_line_of_every_stage_goes_to_the_trackers(runs: Any, lines: Lines) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = runs.run("sft", "reward", "ppo", trackers=["tensorboard"])
    for stage, counter, name in (("sft", "step", "loss"), ("reward", "step", "accuracy"), ("ppo", "iteration", "kl")):
        rows = lines(folder / stage / "metrics.jsonl")
        events = EventAccumulator(str(folder / stage / "tensorboard"))
        events.Reload()
        sent = [(event.step, event.value) for event in events.Scalars(f"{stage}/{name}")]
        assert sent == [(row[counter], pytest.approx(row[name], rel=1e-6)) for row in rows]

"""Evaluation in whole runs: what an interruption leaves, further policies, the best policy of the way, a foreign model's card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from model_zoo import bpe_tokenizer, causal_lm, write_checkpoint

import tercet
from tercet.config import load_config
from tercet.fingerprint import fingerprints
from tercet.jobs.kept import Kept
from tercet.jobs.training import is_best
from tercet.runtime.stage import StageRun

Lines = Callable[[Path], list[dict[str, Any]]]


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def files(folder: Path) -> dict[str, bytes]:
    own = ("done.json", "started.json")
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name not in own
    }


@pytest.mark.parametrize("batches", [1, 3, 4, 6, 8])
def test_a_killed_evaluation_goes_on_to_the_same_bytes(run_copy: Path, monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """5 held-out prompts and 16 draws in batches of 8: three policies answer in a batch each, are judged in one, then best-of-n's two."""
    values: dict[str, Any] = yaml.safe_load((run_copy / "config.yaml").read_text()) | {"output": str(run_copy)}
    wanted = files(run_copy / "evaluation")
    shutil.rmtree(run_copy / "evaluation")
    seen: list[int] = []
    keep = Kept.keep

    def dying(self: Kept, rows: Sequence[dict[str, Any]]) -> None:
        keep(self, rows)
        seen.append(len(rows))
        if len(seen) == batches:
            raise Killed

    monkeypatch.setattr(Kept, "keep", dying)
    with pytest.raises(Killed):
        tercet.evaluate(values)
    assert (run_copy / "evaluation/checkpoints").exists() and not (run_copy / "evaluation/policies.json").exists()
    tercet.evaluate(values)
    assert seen == [5, 5, 5, 5, 5, 5, 8, 8], "nothing is sampled twice"
    assert files(run_copy / "evaluation") == wanted


def test_a_further_policy_is_evaluated_like_ppo(run_copy: Path) -> None:
    """PPO's own checkpoint under another name: the same responses and the same win rate."""
    values = yaml.safe_load((run_copy / "config.yaml").read_text()) | {"output": str(run_copy)}
    twin = shutil.copytree(run_copy / "ppo/model", run_copy.parent / "twin")
    values["evaluation"]["policies"] = {"twin": str(twin)}
    from tercet.pipeline import Pipeline

    summary = Pipeline(load_config(values)).run(["evaluate"], from_stage="evaluate").summary
    assert all(
        summary[f"twin.{name}"] == summary[f"ppo.{name}"] for name in ("score", "kl", "perplexity", "win_rate", "lc_win_rate")
    )
    rows = [json.loads(line) for line in (run_copy / "evaluation/samples.jsonl").read_text().split("\n") if line]
    assert all(row["twin"] == row["ppo"] for row in rows)
    (twin / "config.json").write_text((twin / "config.json").read_text().replace("{", "{ ", 1))
    with pytest.raises(tercet.TercetError, match=r"evaluate was finished.*\n.*contents of evaluation\.policies\.twin changed"):
        tercet.evaluate(values)


def test_a_policy_of_another_vocabulary_is_refused_before_anything_is_trained(runs: Any) -> None:
    foreign = write_checkpoint(runs.folder / "foreign", causal_lm("gpt2", vocabulary=300), bpe_tokenizer())
    with pytest.raises(tercet.TercetError, match="its tokenizer has other ids"):
        runs.run(evaluation={"policies": {"mine": foreign}})
    assert not (runs.folder / "run/sft").exists()
    with pytest.raises(tercet.TercetError, match=r"policies: the name 'ppo' means something else already"):
        runs.run(evaluation={"policies": {"ppo": foreign}})


class TestTheBestPolicyOfTheWay:
    SETTINGS = {"evaluate_every": 1, "iterations": 5, "schedule": "constant", "learning_rate": 4e-3}

    @pytest.fixture
    def straight(self, runs: Any) -> Path:
        """A run whose judge is a function, so that the best evaluation is not the last one."""
        (runs.folder / "judges.py").write_text(JUDGE)
        return runs.run(ppo=self.SETTINGS, evaluation=self.evaluation(runs), output=str(runs.folder / "straight"))

    @staticmethod
    def evaluation(runs: Any) -> dict[str, Any]:
        return {"judges": {"vowels": {"kind": "function", "function": f"{runs.folder}/judges.py:vowels"}}}

    def test_it_is_the_policy_of_that_iteration(self, runs: Any, straight: Path, lines: Lines) -> None:
        best, metrics = json.loads((straight / "ppo/best.json").read_text()), lines(straight / "ppo/metrics.jsonl")
        row = max(metrics, key=lambda row: row["vowels"])
        assert (best["iteration"], best["kl"], best["by"], best["value"]) == (
            row["iteration"],
            row["eval_kl"],
            "vowels",
            row["vowels"],
        )
        assert best["iteration"] < 5, "else this test shows nothing"
        shorter = {**self.SETTINGS, "iterations": best["iteration"], "evaluate_every": 0}
        other = runs.run("sft", "reward", "ppo", ppo=shorter, output=str(runs.folder / "shorter"))
        weights = "model.safetensors"
        assert (straight / "ppo/best" / weights).read_bytes() == (other / "ppo/model" / weights).read_bytes()
        figures = json.loads((straight / "summary.json").read_text())
        assert figures["ppo.best_iteration"] == best["iteration"] and figures["vowels.best"] == pytest.approx(best["value"])

    def test_without_a_judge_it_goes_by_what_ppo_is_trained_on(self, runs: Any, lines: Lines) -> None:
        """Of responses that have to end within six tokens, and rarely do."""
        folder = runs.run("sft", "reward", "ppo", ppo={**self.SETTINGS, "max_new_tokens": 6, "missing_eos_penalty": 5.0})
        best, metrics = json.loads((folder / "ppo/best.json").read_text()), lines(folder / "ppo/metrics.jsonl")
        row = max(metrics, key=lambda row: row["eval_combined"])
        assert (best["by"], best["value"], best["iteration"]) == ("combined", row["eval_combined"], row["iteration"])
        assert all(row["eval_combined"] < row["eval_score"] for row in metrics)

    def test_a_killed_run_keeps_the_same_one(self, runs: Any, straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Killed after iteration 4 with a checkpoint of iteration 2: evaluations and best policy are computed again, not doubled."""
        wanted = files(straight / "ppo")
        settings = {"ppo": self.SETTINGS, "evaluation": self.evaluation(runs), "checkpoint": {"every": 2}}
        settings["output"] = str(runs.folder / "killed")
        log = StageRun.log

        def dying(self: StageRun, metrics: dict[str, Any], timings: dict[str, Any]) -> None:
            log(self, metrics, timings)
            if metrics.get("iteration") == 3:
                raise Killed

        with monkeypatch.context() as patched:
            patched.setattr(StageRun, "log", dying)
            with pytest.raises(Killed):
                runs.run(**settings)
        found = files(runs.run(**settings) / "ppo")
        assert found.keys() == wanted.keys()
        assert {name for name in wanted if found[name] != wanted[name]} <= {"timings.jsonl"}

    def test_every_evaluation_is_written_prompt_by_prompt(self, straight: Path, lines: Lines) -> None:
        evaluations, metrics = lines(straight / "ppo/evaluations.jsonl"), lines(straight / "ppo/metrics.jsonl")
        assert [one["iteration"] for one in evaluations] == [1, 2, 3, 4, 5]
        for one, row in zip(evaluations, metrics):
            assert len(one["score"]) == len(one["kl"]) == len(one["vowels"]) == len(lines(straight / "evaluation/samples.jsonl"))
            assert row["vowels"] == pytest.approx(sum(one["vowels"]) / len(one["vowels"]))
            assert row["eval_kl"] == pytest.approx(sum(one["kl"]) / len(one["kl"]))
        path = json.loads((straight / "evaluation/path.json").read_text())
        assert [point["iteration"] for point in path["points"]] == [0, 1, 2, 3, 4, 5]


JUDGE = '''
def vowels(prompts, responses, **fields):
    """Likes neither few nor many vowels, so that no policy is best for ever."""
    return [-abs(sum(letter in "aeiou" for letter in response) - 2.0) for response in responses]
'''


def test_the_best_is_within_its_budget_and_above_all_others_that_are() -> None:
    first, far, last = ({"judge": value, "eval_kl": kl} for value, kl in ((1.0, 2.0), (5.0, 9.0), (2.0, 3.0)))
    assert is_best(first, [], "judge", 4.0) and is_best(first, [{"score": 1.0}], "judge", None)
    assert not is_best(far, [first], "judge", 4.0) and is_best(far, [first], "judge", None)
    assert is_best(last, [first, far], "judge", 4.0), "one beyond the budget does not count"
    assert not is_best(last, [first, far], "judge", None)
    assert not is_best(dict(first), [first], "judge", None), "the first of equals stays"


def test_the_card_of_a_reward_model_from_elsewhere(runs: Any, finished_run: Path) -> None:
    """The finished run's own reward model, used by path: its card has the same accuracy and says the same of length."""
    wanted = json.loads((finished_run / "reward/card.json").read_text())
    folder = runs.run(data={"sft": None}, reward={"use": str(finished_run / "reward/model")}, ppo={"iterations": 1})
    found = json.loads((folder / "evaluation/reward_card.json").read_text())
    for name in ("pairs", "accuracy", "accuracy_low", "length_accuracy", "bag_of_words_accuracy", "longer_better"):
        assert found[name] == wanted[name], name
    # It was normalised: its differences of scores are no longer log-odds, so nothing is said of its confidence.
    assert {"calibration_error", "temperature", "by_confidence"} <= wanted.keys() - found.keys()
    assert found["length_correlation"] == pytest.approx(wanted["length_correlation"], abs=1e-5)
    assert json.loads((folder / "summary.json").read_text())["reward.length_accuracy"] == wanted["length_accuracy"]


@pytest.mark.parametrize(
    ("change", "concerns_ppo"),
    [({"best_of_prompts": 3}, False), ({"policies": {"mine": "gpt2"}}, False), ({"greedy": True}, True), ({"prompts": 7}, True)],
)
def test_a_setting_of_the_final_evaluation_alone_does_not_concern_ppo(
    runs: Any, change: dict[str, Any], concerns_ppo: bool
) -> None:
    """Evaluations inside PPO depend on the prompts and judges; PPO must not have to be redone for anything else of that section."""
    before, after = (
        fingerprints(load_config(runs.settings(ppo={"evaluate_every": 1}, evaluation=values)), ["ppo", "evaluate"])
        for values in ({}, change)
    )
    assert (before["ppo"] != after["ppo"]) == concerns_ppo and before["evaluate"] != after["evaluate"]

"""Every kind of reward and every selection of data through whole runs: the scores in rollouts.jsonl are computed again by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import bert, bpe_tokenizer, classifier, word_tokenizer, write_checkpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tercet
from tercet.pipeline import RunResult
from tercet.table import print_summary
from tercet.types import TercetError

Lines = Callable[[Path], list[dict[str, Any]]]
Summary = Callable[[Path], dict[str, Any]]
REWARDS = '''
def thing_length(prompts, responses, thing, **fields):
    """Counts the letter e, and the letters of the prompt's field "thing"."""
    return [response.count("e") + 0.01 * len(name) for response, name in zip(responses, thing)]
'''


def by_transformers(folder: str | Path, row: dict[str, Any], label: int = 0) -> float:
    """A classifier's logit for prompt, a space and response, by transformers alone."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    seam = "" if row["response"][:1].isspace() or not row["response"] else " "
    limit = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    tokenizer.truncation_side = "left"
    batch = tokenizer(row["prompt"] + seam + row["response"], truncation=True, max_length=limit, return_tensors="pt")
    with torch.no_grad():
        return float(model.eval()(**batch).logits[0, label])


def things(runs: Any) -> dict[str, str]:
    rows = [json.loads(line) for line in (runs.data / "prompts.jsonl").read_text().splitlines()]
    return {row["prompt"]: row["thing"] for row in rows}


class TestTheSum:
    """One run with four terms and judges; its parts are then scored apart."""

    @pytest.fixture
    def encoder(self, runs: Any) -> str:
        tokenizer = word_tokenizer()
        return write_checkpoint(runs.folder / "bert", bert(tokenizer, labels=["bad", "so-so", "good"]), tokenizer)

    def test_of_a_stage_an_encoders_label_and_a_function(self, runs: Any, encoder: str, lines: Lines, summary: Summary) -> None:
        (runs.folder / "rewards.py").write_text(REWARDS)
        function = f"{runs.folder}/rewards.py:thing_length"
        terms = [
            {"kind": "stage", "weight": 2.0},
            {"kind": "classifier", "model": encoder, "label": "good", "weight": -0.5},
            {"kind": "function", "function": function},
        ]
        judges = {"mood": {"kind": "classifier", "model": encoder, "label": 0}}
        folder = runs.run(ppo={"rewards": terms, "iterations": 1}, evaluation={"judges": judges, "gold": function})
        alone = shutil.copytree(folder, runs.folder / "alone", ignore=shutil.ignore_patterns("ppo", "evaluation"))
        runs.run("ppo", output=str(alone), ppo={"iterations": 1})  # the same samples, scored by the stage's model alone
        of_prompt = things(runs)
        rows, by_stage = lines(folder / "ppo/rollouts.jsonl"), lines(alone / "ppo/rollouts.jsonl")
        assert [row["response"] for row in rows] == [row["response"] for row in by_stage] and len(rows) == 8
        for row, stage in zip(rows, by_stage):
            counted = row["response"].count("e") + 0.01 * len(of_prompt[row["prompt"]])
            wanted = 2 * stage["score"] - 0.5 * by_transformers(encoder, row, 2) + counted
            assert row["score"] == pytest.approx(wanted, abs=1e-4)
        samples, figures = lines(folder / "evaluation/samples.jsonl"), summary(folder)
        for row in samples:
            shown = {"prompt": row["prompt"], "response": row["ppo"]}
            assert row["ppo_mood"] == pytest.approx(by_transformers(encoder, shown), abs=1e-4)
            assert row["ppo_gold"] == pytest.approx(row["ppo"].count("e") + 0.01 * len(of_prompt[row["prompt"]]), abs=1e-5)
        assert figures["gold.ppo"] == pytest.approx(sum(row["ppo_gold"] for row in samples) / len(samples))
        assert {"mood.sft", "mood.ppo_std", "mood.win_rate", "gold.sft", "gold.win_rate_low", "score.win_rate"} <= set(figures)

    def test_several_labels_need_one_named_before_anything_is_trained(self, runs: Any, encoder: str) -> None:
        with pytest.raises(TercetError, match=r"has 3 labels: say which one's.*0 \(bad\), 1 \(so-so\), 2 \(good\)"):
            runs.run(ppo={"rewards": [{"kind": "classifier", "model": encoder}]})
        with pytest.raises(TercetError, match="has no label 'great'"):
            runs.run(evaluation={"judges": {"mood": {"kind": "classifier", "model": encoder, "label": "great"}}})
        assert not (runs.folder / "run/sft").exists()


def test_a_foreign_classifier_alone(runs: Any, lines: Lines) -> None:
    """No comparisons and no demonstrations: the model as it came is the SFT policy, its trunk begins the value model."""
    tokenizer = word_tokenizer()
    encoder = write_checkpoint(runs.folder / "bert", bert(tokenizer), tokenizer)
    rewards = [{"kind": "classifier", "model": encoder}]
    folder = runs.run(data={"sft": None, "comparisons": None}, ppo={"rewards": rewards, "iterations": 1})
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["evaluation", "ppo"]
    rows = lines(folder / "ppo/rollouts.jsonl")
    assert len(rows) == 8
    for row in rows:
        assert row["score"] == pytest.approx(by_transformers(encoder, row), abs=1e-4)
    assert lines(folder / "ppo/metrics.jsonl")[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert (folder / "report.html").exists()
    assert set(json.loads((folder / "evaluation/policies.json").read_text())) == {"sft", "ppo"}, "the base is the SFT policy"


def test_a_callable(runs: Any, lines: Lines) -> None:
    """tercet.train_ppo(config, reward=callable): no reward model, no demonstrations."""
    seen: list[str] = []

    def vowels(prompts: list[str], responses: list[str], thing: list[str], **fields: Any) -> list[float]:
        seen.extend(thing)
        return [float(sum(letter in "aeiou" for letter in response)) for response in responses]

    settings = runs.settings(data={"sft": None, "comparisons": None}, ppo={"rewards": []})
    result = tercet.train_ppo(settings, reward=vowels)
    rows = lines(result.folder / "ppo/rollouts.jsonl")
    assert len(rows) == 16 and set(seen) <= set(things(runs).values())
    assert [row["score"] for row in rows] == [float(sum(letter in "aeiou" for letter in row["response"])) for row in rows]


class TestAFinishedRunAsStart:
    def test_reward_use_and_a_second_round(self, runs: Any, finished_run: Path, lines: Lines) -> None:
        """Reward model, policy and value model of an earlier run; the reference is still the SFT model."""
        second = {"policy": str(finished_run / "ppo/model"), "value_model": str(finished_run / "ppo/value")}
        use = {"use": str(finished_run / "reward/model")}
        folder = runs.run(data={"sft": None}, reward=use, ppo={**second, "kl": {"coef": 0.2}})
        assert not (folder / "reward").exists() and not (folder / "sft").exists()
        first = lines(folder / "ppo/metrics.jsonl")[0]
        assert abs(first["kl"]) > 1e-3, "the policy is not the reference to begin with"
        fresh = runs.run(data={"sft": None}, reward=use, output=str(runs.folder / "fresh"))
        # The same random numbers, another policy and another value model.
        other = lines(fresh / "ppo/metrics.jsonl")[0]
        assert abs(other["kl"]) < 1e-5 and other["explained_variance"] != first["explained_variance"]

    @pytest.mark.parametrize("swapped", [False, True])
    def test_what_reward_use_is_worth_is_in_the_verdict(self, runs: Any, tmp_path: Path, summary: Summary, swapped: bool) -> None:
        """A model that likes long responses, on comparisons whose chosen or, swapped, rejected response is the longer one."""
        earlier = runs.run("sft", "reward", reward={"epochs": 6}, output=str(tmp_path / "earlier"))
        rows = [json.loads(line) for line in (runs.data / "comparisons.jsonl").read_text().splitlines()]
        pairs = [(row["rejected"], row["chosen"]) if swapped else (row["chosen"], row["rejected"]) for row in rows]
        asked = [{"prompt": row["prompt"], "chosen": a, "rejected": b} for row, (a, b) in zip(rows, pairs)]
        data = {"sft": None, "eval_comparisons": runs.write("asked.jsonl", asked)}
        folder = runs.run(data=data, reward={"use": str(earlier / "reward/model")}, ppo={"iterations": 1})
        figures, card = summary(folder), json.loads((folder / "evaluation/reward_card.json").read_text())
        found = {name: figures[f"reward.eval_{name}"] for name in ("accuracy", "accuracy_low", "accuracy_high", "pairs")}
        assert found == {name: card[name] for name in found} and found["pairs"] == 60
        causes = {finding["cause"] for finding in figures["verdict"]}
        assert ("reward_inverted" in causes) == swapped and ("reward_good" in causes) != swapped
        assert "reward.temperature" not in figures, "after normalisation its differences are no log-odds"
        # Other comparisons are another card, though nothing is trained on them.
        data["eval_comparisons"] = runs.write("fewer.jsonl", asked[:30])
        settings = {"data": data, "reward": {"use": str(earlier / "reward/model")}, "ppo": {"iterations": 1}}
        with pytest.raises(
            TercetError, match=r"stage evaluate was finished from something else:\n.*data\.eval_comparisons changed"
        ):
            runs.run(**settings)

    def test_of_another_vocabulary(self, runs: Any) -> None:
        """Its ids mean other texts; the score of such a model would be noise."""
        foreign = write_checkpoint(runs.folder / "foreign", classifier("gpt2", vocabulary=300), bpe_tokenizer())
        for change in ({"reward": {"use": foreign}}, {"ppo": {"value_model": foreign}}):
            with pytest.raises(TercetError, match=r"its tokenizer has other ids.*kind: classifier"):
                runs.run(**change)
        assert not (runs.folder / "run/sft").exists()

    def test_too_small_a_vocabulary(self, runs: Any) -> None:
        small = write_checkpoint(runs.folder / "small", classifier("gpt2", vocabulary=40))
        with pytest.raises(TercetError, match="but the model has only 40"):
            runs.run(reward={"use": small})

    def test_an_encoder_cannot_be_reward_model(self, runs: Any) -> None:
        encoder = write_checkpoint(runs.folder / "bert", bert(word_tokenizer()), word_tokenizer())
        with pytest.raises(TercetError, match="does not read its score at the last token"):
            runs.run(reward={"use": encoder})
        assert not (runs.folder / "run/sft").exists()


class TestSomeStagesOnly:
    def test_demonstrations_alone(self, runs: Any, summary: Summary) -> None:
        folder = runs.run(data={"comparisons": None, "prompts": None})
        names = {path.name for path in folder.iterdir()} - {".lock"}
        assert names == {"config.yaml", "sft", "summary.json", "report.html"}
        assert summary(folder)["sft.eval_loss"] > 0 and not any(name.startswith("ppo") for name in summary(folder))

    def test_comparisons_alone(self, runs: Any, summary: Summary) -> None:
        """Without prompts nothing can be sampled, so the scores are not normalised; the report is written."""
        folder = runs.run(data={"sft": None, "prompts": None})
        names = {path.name for path in folder.iterdir()} - {".lock"}
        assert names == {"config.yaml", "reward", "summary.json", "report.html"}
        assert 0 <= summary(folder)["reward.eval_accuracy"] <= 1 and "reward.normalisation_gain" not in summary(folder)
        config = json.loads((folder / "reward/model/config.json").read_text())
        assert "score_offset" not in config or config["score_offset"] == 0


def test_the_smallest_data_there_is(runs: Any, lines: Lines, summary: Summary, capsys: pytest.CaptureFixture[str]) -> None:
    """Two demonstrations, one comparison, one prompt: nothing can be held out, no judge, and the run still ends in a report."""
    data = {
        "sft": runs.write("two.jsonl", [{"prompt": "What is rain?", "response": text} for text in ("Water.", "It falls.")]),
        "comparisons": runs.write("one.jsonl", [{"prompt": "What is rain?", "chosen": "Water.", "rejected": "No."}]),
        "prompts": runs.write("prompt.jsonl", [{"prompt": "What is rain?"}]),
    }
    folder = runs.run(data=data, ppo={"iterations": 1})
    figures = summary(folder)
    assert figures["sft.records"] == 2 and figures["reward.comparisons"] == 1
    assert not {"sft.eval_loss", "reward.eval_accuracy", "judge.comparisons"} & set(figures)
    assert all("eval_loss" not in row for stage in ("sft", "reward") for row in lines(folder / stage / "metrics.jsonl"))
    assert len(lines(folder / "evaluation/samples.jsonl")) == 1 and figures["win_rate"] in (0.0, 0.5, 1.0)
    assert len({row["response"] for row in lines(folder / "ppo/rollouts.jsonl")}) > 1, "one prompt, eight different samples"
    page, told = (folder / "report.html").read_text(), " ".join(finding["sentence"] for finding in figures["verdict"])
    assert figures["evaluation.held_out"] == 0.0
    assert "held-out prompts" not in page + told and "On training prompts (none could be held out)" in page
    assert "n training prompts (none could be held out)" in told
    print_summary(RunResult(folder, figures))
    assert "on training prompts (none could be held out)" in " ".join(capsys.readouterr().out.split())

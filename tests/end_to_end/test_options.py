"""Each option of the stages in a whole run, seen by what it changes in the files of the run folder."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tercet.algo.schedules import usual_rate
from tercet.config import load_config
from tercet.pipeline import Pipeline
from tercet.runtime.stage import Interrupt
from tercet.types import TercetError

Lines = Callable[[Path], list[dict[str, Any]]]
Summary = Callable[[Path], dict[str, Any]]
RATE = 1e-3
NO_REWARD_MODEL: dict[str, Any] = {"sft": None, "comparisons": None}
REWARDS = """
def letters(prompts, responses, **fields):
    return [float(len(response)) for response in responses]
def twelve(prompts, responses, **fields):
    return [12.0] * len(responses)
"""


@pytest.fixture
def ppo(runs: Any, lines: Lines) -> Callable[..., tuple[list[Any], list[Any], Path]]:
    """ppo("letters", option=...) runs PPO alone on a function: its metrics, its rollouts and the folder."""

    def run(function: str = "letters", evaluation: Any = None, data: Any = None, **options: Any) -> Any:
        (runs.folder / "rewards.py").write_text(REWARDS)
        rewards = [{"kind": "function", "function": f"{runs.folder}/rewards.py:{function}"}]
        number = sum(1 for _ in runs.folder.glob("run*"))
        folder = runs.run(
            "ppo",
            output=str(runs.folder / f"run{number}"),
            data=NO_REWARD_MODEL | (data or {}),
            ppo={"rewards": rewards, **options},
            evaluation=evaluation or {},
        )
        return lines(folder / "ppo/metrics.jsonl"), lines(folder / "ppo/rollouts.jsonl"), folder

    return run


def final_reward(metrics: dict[str, Any]) -> float:
    """The mean final score, from the reward that was logged: reward = score - kl_coef * KL."""
    return metrics["reward"] + metrics["kl_coef"] * metrics["kl"]


class TestPPO:
    def test_adaptive_kl_follows_ziegler(self, ppo: Any) -> None:
        """coef *= 1 + clip(KL / target - 1, -0.2, 0.2) * 8 / 40; a cut of the error shows as 1.04 or 0.96."""
        kl = {"controller": "adaptive", "coef": 0.1, "target": 0.05, "horizon": 40}
        metrics, _, _ = ppo(iterations=4, learning_rate=5e-3, ppo_epochs=4, kl=kl)
        assert metrics[0]["kl_coef"] == 0.1
        for before, after in zip(metrics, metrics[1:]):
            error = min(0.2, max(-0.2, before["kl"] / 0.05 - 1))
            assert after["kl_coef"] == pytest.approx(before["kl_coef"] * (1 + error * 8 / 40), rel=1e-9)
        assert metrics[1]["kl_coef"] == pytest.approx(0.096), "at first the KL is 0"
        assert any(row["kl"] > 0.05 for row in metrics[:-1]), "and then above the target"

    def test_the_missing_eos_rules_and_the_clip(self, ppo: Any) -> None:
        """A constant score of 12; nearly no response of this model ends by itself."""
        cases = [
            ({"missing_eos_penalty": None}, 12.0, 12.0),
            ({"missing_eos_penalty": 2.5}, 12.0, 9.5),
            ({"missing_eos_penalty": None, "missing_eos_score": -1.0}, 12.0, -1.0),
            ({"missing_eos_penalty": 2.5, "score_clip": 5.0}, 5.0, 2.5),  # first the clip, then the penalty
        ]
        for options, finished, unfinished in cases:
            metrics, rows, _ = ppo("twelve", iterations=1, **options)
            share = sum(row["finished"] for row in rows) / len(rows)
            assert metrics[0]["finished"] == share < 1
            assert final_reward(metrics[0]) == pytest.approx(share * finished + (1 - share) * unfinished, abs=1e-5)
            assert metrics[0]["score"] == 12.0, "the score that is shown is the one before the rules"

    def test_stop_texts_and_truncate_after(self, ppo: Any) -> None:
        """A response ends with the token that brings the stop text, also where that token holds more than the text."""
        wide = {"iterations": 1, "rollout_batch_size": 64}
        _, free, _ = ppo(**wide)
        metrics, rows, _ = ppo(**wide, stop=["e", "th"])
        held = [row for row in rows if "e" in row["response"] or "th" in row["response"]]
        assert sum("e" in row["response"] for row in free) > 5, "there is something to stop at"
        assert len(held) > 5 and all(row["finished"] for row in held)
        for row in held:
            start = min(row["response"].find(stop) % 1000 for stop in ("e", "th"))
            assert len(row["response"]) - start <= 6, "nothing but the rest of that token follows"
        assert metrics[0]["length"] < 8
        late, _, _ = ppo(**wide, stop=["e", "th"], truncate_after=7)
        assert late[0]["length"] == 8, "no end before the eighth token counts"
        assert 0 < late[0]["finished"] < metrics[0]["finished"]

    def test_a_stop_that_is_a_special_token(self, ppo: Any, runs: Any) -> None:
        """It has no text, so it is looked for by its id; the response ends there and its generation config knows nothing of it."""
        from model_zoo import bpe_tokenizer, causal_lm, write_checkpoint

        runs.model = write_checkpoint(runs.folder / "base", causal_lm("gpt2"), bpe_tokenizer(bos=True))
        tilted = AutoModelForCausalLM.from_pretrained(runs.model)
        with torch.no_grad():  # <|bos|>, id 1, becomes the likeliest token of all
            tilted.transformer.ln_f.bias += 2 * tilted.lm_head.weight[1]
        tilted.save_pretrained(runs.model)
        metrics, rows, _ = ppo(iterations=1, stop=["<|bos|>"])
        assert metrics[0]["finished"] > 0.5 and metrics[0]["length"] < 8
        assert all("<|bos|>" not in row["response"] for row in rows)

    def test_all_stages_end_a_response_by_the_same_special_token(self, runs: Any, lines: Any) -> None:
        """A chat template writes <|im_end|> after a response; the tokenizer's EOS is another token, and nothing but ppo.stop names it."""
        from model_zoo import bpe_tokenizer, causal_lm, write_checkpoint

        chat = (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
        base = write_checkpoint(runs.folder / "base", causal_lm("gpt2"), bpe_tokenizer(chat_template=chat))
        model = {"name": base, "template": "chat"}
        folder = runs.run("sft", model=model, ppo={"stop": ["<|im_end|>"]})
        assert json.loads((folder / "sft/model/generation_config.json").read_text())["eos_token_id"] == [0, 2]
        shop = Pipeline(load_config(runs.settings(model=model, ppo={"stop": ["<|im_end|>"]}))).workshop(Interrupt())
        assert shop.template.encode("Hi", "ok").row.ids[-1] == 2
        generator = shop.generator(shop.load_policy(base, frozen=True))
        assert (generator.stop_ids, generator.stop_texts) == ([0, 2], [])
        with pytest.raises(TercetError, match=r"stage sft was finished from something else.*\n.*ppo\.stop"):
            runs.run("sft", model=model)

    def test_minibatches_epochs_and_max_approx_kl(self, ppo: Any) -> None:
        wanted = {"ppo_epochs": 3, "minibatch_size": 2, "iterations": 2}
        metrics, _, _ = ppo(**wanted)
        assert [(row["epochs_done"], row["optimizer_steps"]) for row in metrics] == [(3, 12), (3, 12)]
        metrics, _, _ = ppo(**wanted, max_approx_kl=1e-9)
        assert [(row["epochs_done"], row["optimizer_steps"]) for row in metrics] == [(1, 4), (1, 4)]
        assert all(row["approx_kl"] > 1e-9 for row in metrics)

    @pytest.mark.parametrize(
        ("options", "wanted"),
        [
            ({"schedule": "constant"}, [1, 1, 1, 1]),
            ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25]),
            ({"schedule": "cosine"}, [0.1 + 0.9 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]),
            ({"schedule": "constant", "warmup_iterations": 2}, [0.5, 1, 1, 1]),
            ({"schedule": "constant", "value_warmup_iterations": 2}, [0, 0, 1, 1]),
        ],
    )
    def test_schedules(self, options: dict[str, Any], wanted: list[float], ppo: Any) -> None:
        metrics, rows, _ = ppo(iterations=4, **options)
        assert [row["learning_rate"] for row in metrics] == pytest.approx([RATE * share for share in wanted])
        if "value_warmup_iterations" in options:
            assert all(abs(row["kl"]) < 1e-5 for row in metrics[:3]) and abs(metrics[3]["kl"]) > 1e-4
            assert [row["grad_norm"] > 0 for row in metrics] == [False, False, True, True]
            assert all(row["value_grad_norm"] > 0 for row in metrics)

    def test_learning_rates_that_are_not_given_follow_the_models_size_and_are_shown(
        self, ppo: Any, runs: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        metrics, _, folder = ppo(iterations=2, learning_rate="auto", value_learning_rate="auto")
        rate = usual_rate(AutoModelForCausalLM.from_pretrained(runs.model).num_parameters(), 8)
        assert [row["learning_rate"] for row in metrics] == [rate, rate / 2]
        assert f"ppo.learning_rate {rate:.2g}" in " ".join(capsys.readouterr().err.split())
        _, _, same = ppo(iterations=2, learning_rate=rate, value_learning_rate=rate)
        weights = [(run / "ppo/model/model.safetensors").read_bytes() for run in (folder, same)]
        assert weights[0] == weights[1]

    def test_evaluate_every_and_save_rollouts_every(self, ppo: Any, runs: Any) -> None:
        gold = {"gold": f"{runs.folder}/rewards.py:letters"}
        metrics, rows, _ = ppo(iterations=5, evaluate_every=2, save_rollouts_every=3, evaluation=gold)
        assert [row["iteration"] for row in metrics if "eval_kl" in row] == [2, 4, 5], "and after the last"
        assert all(row["gold"] == pytest.approx(row["eval_score"]) for row in metrics if "eval_score" in row)
        assert sorted({row["iteration"] for row in rows}) == [1, 4, 5]
        _, rows, folder = ppo(save_rollouts_every=1, iterations=1)
        assert len(rows) == 8

    def test_interpolation_is_of_the_policies_that_are_evaluated_and_saved_and_not_of_training(self, ppo: Any, runs: Any) -> None:
        start = AutoModelForCausalLM.from_pretrained(runs.model).state_dict()
        (rows, _, whole), (part_rows, _, part) = (
            ppo(iterations=3, evaluate_every=1, learning_rate=0.03, interpolation=w) for w in (1.0, 0.5)
        )
        evaluated = ("eval_score", "eval_combined", "eval_kl")
        for row, other in zip(rows, part_rows):
            assert all(other[key] == value for key, value in row.items() if key not in evaluated), (
                "training is the same to the bit"
            )
            assert other["eval_kl"] != row["eval_kl"]
        models = [AutoModelForCausalLM.from_pretrained(folder / "ppo/model").state_dict() for folder in (whole, part)]
        for name, first in start.items():
            assert torch.allclose(models[1][name], (first + models[0][name]) / 2, atol=1e-7), name
        assert any(not torch.equal(models[0][name], first) for name, first in start.items())
        summary = json.loads((part / "summary.json").read_text())
        assert summary["ppo.interpolation"] == 0.5 and "ppo.interpolation" not in json.loads((whole / "summary.json").read_text())

    def test_whitening_gamma_and_gradient_clip_change_what_is_learned(self, ppo: Any) -> None:
        _, _, plain = ppo(iterations=1)
        weights = (plain / "ppo/model/model.safetensors").read_bytes()
        for change in ({"whiten_advantages": False}, {"gamma": 0.5}, {"gae_lambda": 0.0}, {"max_grad_norm": 1e-6}):
            _, _, folder = ppo(iterations=1, **change)
            assert (folder / "ppo/model/model.safetensors").read_bytes() != weights, change


class TestSupervised:
    def test_loss_on_all_tokens_is_the_loss_of_plain_language_modelling(self, runs: Any, lines: Lines) -> None:
        """The first step's loss by transformers: over all tokens after the first, or over the response and EOS alone."""
        one = runs.write("one.jsonl", [{"prompt": "What is rain?", "response": "Water that falls."}])
        model, tokenizer = (kind.from_pretrained(runs.model) for kind in (AutoModelForCausalLM, AutoTokenizer))
        before, after = (tokenizer(text).input_ids for text in ("What is rain?", " Water that falls."))
        ids = torch.tensor([[*before, *after, tokenizer.eos_token_id]])
        with torch.no_grad():
            logprobs = model.eval()(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses = -logprobs.gather(1, ids[0, 1:, None])[:, 0]
        for loss_on, start in (("all", 0), ("response", len(before) - 1)):
            folder = runs.run("sft", data={"sft": one}, sft={"loss_on": loss_on}, output=str(runs.folder / loss_on))
            first = lines(folder / "sft/metrics.jsonl")[0]
            assert first["loss"] == pytest.approx(losses[start:].mean().item(), rel=1e-5)
            assert first["tokens"] == ids.shape[1]

    def test_text_records_schedule_and_dropout(self, runs: Any, lines: Lines) -> None:
        """Plain language modelling: 30 texts, some held out by their own hash, every token but the first counts."""
        texts = runs.write("texts.jsonl", [{"text": f"The moon number {i} is warm and kind."} for i in range(30)])
        options = {"schedule": "cosine", "warmup_steps": 2, "epochs": 2, "eval_every": 2}
        folder = runs.run("sft", data={"sft": texts}, sft=options)
        rows = lines(folder / "sft/metrics.jsonl")
        total = len(rows)
        rates = [0.5, 1] + [0.1 + 0.9 * (1 + math.cos(math.pi * k / (total - 2))) / 2 for k in range(total - 2)]
        assert [row["learning_rate"] for row in rows] == pytest.approx([RATE * share for share in rates])
        assert [row["step"] for row in rows if "eval_loss" in row] == sorted({*range(2, total + 1, 2), total})
        assert rows[-1]["epoch"] == 2 and rows[-1]["loss"] < rows[0]["loss"]
        dropped = runs.run("sft", data={"sft": texts}, sft={**options, "dropout": 0.5}, output=str(runs.folder / "dropped"))
        assert lines(dropped / "sft/metrics.jsonl")[0]["loss"] != rows[0]["loss"]


class TestComparisons:
    def test_rankings_with_ties_and_margins(self, runs: Any, lines: Lines, summary: Summary) -> None:
        """K of 2 to 4, ties, a wholly tied record that does not count; margins change the loss and not the pairs."""
        answers = ["Water.", "It falls from clouds.", "No.", "Rain is rain."]
        ranks = [[1, 2, 2, 3], [1, 2, 3], [2, 1], [1, 1, 1]]
        records = [{"prompt": f"What is rain {i}?", "responses": answers[: len(r)], "ranks": r} for i, r in enumerate(ranks)]
        data = {"sft": None, "prompts": None, "comparisons": runs.write("ranks.jsonl", records)}
        data["eval_comparisons"] = data["comparisons"]
        folder = runs.run("reward", data=data, reward={"epochs": 3})
        figures = summary(folder)
        assert figures["reward.comparisons"] == 3 and figures["reward.eval_pairs"] == 5 + 3 + 1 + 0
        kept = json.loads((folder / "reward/held_out.json").read_text())
        assert [pair["comparison"] for pair in kept] == [0] * 5 + [1] * 3 + [2]
        assert figures["reward.eval_accuracy"] == pytest.approx(sum(pair["correct"] for pair in kept) / 9)
        margins = [{**record, "margin": 2.0} for record in records]
        data["comparisons"] = runs.write("margins.jsonl", margins)
        wide = runs.run("reward", data=data, reward={"epochs": 3}, output=str(runs.folder / "wide"))
        first, wider = (lines(where / "reward/metrics.jsonl")[0] for where in (folder, wide))
        assert wider["loss"] > first["loss"] + 1 and wider["accuracy"] == first["accuracy"]

    def test_hh_transcripts(self, runs: Any, summary: Summary) -> None:
        """The prompt is what both share up to the last turn; a useless pair is dropped and counted."""
        start = "\n\nHuman: What is rain?\n\nAssistant:"
        pairs = [{"chosen": f"{start} Water {i}.", "rejected": f"{start} No {i}."} for i in range(3)]
        pairs.append({"chosen": f"{start} Same.", "rejected": f"{start} Same."})
        data = {"sft": None, "prompts": None, "comparisons": runs.write("hh.jsonl", pairs)}
        figures = summary(runs.run("reward", data=data))
        assert (figures["reward.comparisons"], figures["reward.dropped"]) == (3, 1)

    def test_only_ties_are_refused(self, runs: Any) -> None:
        tied = runs.write("tied.jsonl", [{"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}])
        with pytest.raises(TercetError, match="every comparison is a tie"):
            runs.run("reward", data={"sft": None, "prompts": None, "comparisons": tied})


class TestDataForms:
    def test_csv_parquet_gzip_and_a_folder_give_the_same_models(self, runs: Any, lines: Lines) -> None:
        """The tiny data in other clothes: bytes of the models are those of the JSON lines."""
        from datasets import Dataset

        rows = {name: lines(runs.data / f"{name}.jsonl") for name in ("demonstrations", "comparisons", "prompts")}
        with (runs.folder / "sft.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "response"])
            writer.writeheader()
            writer.writerows(rows["demonstrations"])
        Dataset.from_list(rows["comparisons"]).to_parquet(str(runs.folder / "pairs.parquet"))
        parts = runs.folder / "prompts"
        parts.mkdir()
        for name, part in (("a.jsonl.gz", rows["prompts"][:11]), ("b.jsonl.gz", rows["prompts"][11:])):
            with gzip.open(parts / name, "wt") as zipped:
                zipped.writelines(json.dumps(row) + "\n" for row in part)
        others = {"sft": str(runs.folder / "sft.csv"), "comparisons": str(runs.folder / "pairs.parquet"), "prompts": str(parts)}
        one = {"iterations": 1}
        folder = runs.run("sft", "reward", "ppo", data=others, ppo=one)
        plain = runs.run("sft", "reward", "ppo", ppo=one, output=str(runs.folder / "plain"))
        for model in ("sft", "reward", "ppo"):
            name = f"{model}/model/model.safetensors"
            assert (folder / name).read_bytes() == (plain / name).read_bytes(), model


class TestEvaluation:
    def test_greedy_groups_and_files_of_their_own(self, runs: Any, lines: Lines, summary: Summary) -> None:
        """Held-out prompts of two groups; the headline figures are over one; greedy responses are argmax all along."""
        asked = [
            {"prompt": f"What is {name}?", "kind": kind} for kind, name in [("old", "rain"), ("new", "snow"), ("old", "ice")]
        ]
        data = NO_REWARD_MODEL | {"eval_prompts": runs.write("asked.jsonl", asked)}
        (runs.folder / "rewards.py").write_text(REWARDS)
        rewards = [{"kind": "function", "function": f"{runs.folder}/rewards.py:letters"}]
        evaluation = {"greedy": True, "group_by": "kind", "main_group": "old"}
        folder = runs.run(data=data, ppo={"rewards": rewards}, evaluation=evaluation)
        samples, figures = lines(folder / "evaluation/samples.jsonl"), summary(folder)
        assert [(row["group"], row["main"]) for row in samples] == [("old", True), ("new", False), ("old", True)]
        scores = [row["ppo_score"] for row in samples]
        assert figures["ppo.score"] == figures["ppo.score[old]"] == pytest.approx((scores[0] + scores[2]) / 2)
        assert figures["ppo.score[new]"] == pytest.approx(scores[1])
        model, tokenizer = (kind.from_pretrained(folder / "ppo/model") for kind in (AutoModelForCausalLM, AutoTokenizer))
        for row in samples:
            ids = tokenizer(row["prompt"], return_tensors="pt")
            out = model.generate(**ids, do_sample=False, temperature=None, max_new_tokens=8, pad_token_id=0)
            text = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
            assert row["ppo"] == text

    def test_an_unknown_main_group_is_told_before_anything_is_trained(self, runs: Any) -> None:
        with pytest.raises(TercetError, match=r"main_group is 'older'.*'thing' has the values .*: choose one"):
            runs.run(evaluation={"group_by": "thing", "main_group": "older"})
        assert not (runs.folder / "run/sft").exists()

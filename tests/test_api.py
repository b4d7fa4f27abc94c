"""tercet.run and the single stages from Python."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import tercet
from tercet import TercetError
from tercet.pipeline import Pipeline

Partial = Callable[..., Path]


@pytest.fixture
def settings(finished_run: Path) -> dict[str, Any]:
    return yaml.safe_load((finished_run / "config.yaml").read_text())


def count_calls(prompts: list[str], responses: list[str], **fields: Any) -> list[float]:
    """More letters "e" are better."""
    assert len(fields["thing"]) == len(prompts) == len(responses)
    assert all(isinstance(text, str) for text in prompts + responses)
    return [response.count("e") / 10 for response in responses]


def test_names_are_loaded_lazily_and_all_exist() -> None:
    assert {"run", "train_sft", "train_reward", "train_ppo", "evaluate", "Config", "TercetError"} <= set(tercet.__all__)
    for name in tercet.__all__:
        assert getattr(tercet, name).__name__
    with pytest.raises(AttributeError, match="no attribute 'train_dpo'"):
        _ = tercet.train_dpo


def test_stage_by_stage(settings: dict[str, Any], finished_run: Path, tmp_path: Path) -> None:
    settings["output"] = str(tmp_path / "run")
    first = tercet.train_sft(settings)
    assert first.folder == tmp_path / "run" and first.summary["sft.eval_loss"] > 0
    assert tercet.train_reward(settings).summary["reward.eval_pairs"] >= 1
    assert tercet.train_ppo(settings).summary["ppo.train_kl"] is not None
    last = tercet.evaluate(settings)
    assert (last.folder / "report.html").exists()
    once = tercet.run({**settings, "output": str(finished_run)}).summary
    timed = {name for name in once if "seconds" in name}
    assert {k: v for k, v in last.summary.items() if k not in timed} == {k: v for k, v in once.items() if k not in timed}


def test_a_file_a_mapping_and_a_config_are_the_same(finished_run: Path) -> None:
    file = finished_run / "config.yaml"
    config = tercet.load_config(file)
    summaries = [tercet.run(source).summary for source in (file, str(file), yaml.safe_load(file.read_text()), config)]
    assert all(summary == summaries[0] for summary in summaries)


def test_ppo_on_a_python_function(settings: dict[str, Any], partial_run: Partial) -> None:
    folder = partial_run("pretrain", "sft", "reward")
    settings |= {"output": str(folder), "ppo": {**settings["ppo"], "iterations": 2}}
    result = tercet.train_ppo(settings, reward=count_calls)
    lines = (folder / "ppo/rollouts.jsonl").read_text().splitlines()
    assert len(lines) == 16

    for row in map(json.loads, lines):
        assert row["score"] == pytest.approx(row["response"].count("e") / 10, abs=1e-6), "the function, not ppo.rewards"
    assert "ppo.train_score" in result.summary
    evaluated = tercet.evaluate(settings, reward=count_calls)
    assert "score.win_rate" in evaluated.summary or "win_rate" in evaluated.summary
    written = Pipeline(tercet.load_config(folder / "config.yaml"))  # what the run wrote down can be read again, and reported
    assert written.write_report() == folder / "report.html"
    with pytest.raises(TercetError, match=r"(?s)stage ppo was finished from something else.*reward function"):
        tercet.train_ppo(settings, reward=lambda prompts, responses, **fields: [0.0] * len(prompts))


def test_stages_before_ppo_ask_for_no_reward(settings: dict[str, Any], tmp_path: Path) -> None:
    """Prompts are there, comparisons are not: the function comes with train_ppo."""
    settings |= {"output": str(tmp_path / "run"), "data": {**settings["data"], "comparisons": None}}
    assert tercet.train_sft(settings).summary["sft.eval_loss"] > 0
    with pytest.raises(TercetError, match="neither data.comparisons nor reward.use"):
        tercet.train_ppo(settings)


def test_sft_without_demonstrations_is_no_success(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"output": str(tmp_path / "run"), "data": {**settings["data"], "sft": None}}
    settings["model"] = {"name": "gpt2"}
    with pytest.raises(TercetError, match="sft: the configuration has no data for this stage"):
        tercet.train_sft(settings)
    assert not (tmp_path / "run").exists()


def test_a_judge_that_is_the_reward_model_needs_one(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"output": str(tmp_path / "run"), "data": {**settings["data"], "comparisons": None}}
    settings["evaluation"] |= {"judges": {"mine": {"kind": "stage"}}}
    with pytest.raises(TercetError, match="evaluation.judges uses the reward model of stage 2"):
        tercet.run(settings, reward=count_calls)
    assert not (tmp_path / "run").exists()


def test_two_processes_may_save_the_same_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the ranks of a run do; what is there, and perhaps in use, stays."""
    from model_zoo import bpe_tokenizer, causal_lm

    from tercet import api

    model, tokenizer = causal_lm("gpt2"), bpe_tokenizer()
    first = api._saved(model, tokenizer, tmp_path)
    (first / "in-use").touch()
    assert api._saved(model, tokenizer, tmp_path) == first and (first / "in-use").exists()
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_ppo_on_a_function_needs_no_reward_model(settings: dict[str, Any], partial_run: Partial) -> None:
    folder = partial_run("pretrain", "sft")
    settings |= {"output": str(folder), "ppo": {**settings["ppo"], "iterations": 1}}
    settings["data"] |= {"comparisons": None}
    tercet.train_ppo(settings, reward=count_calls)
    assert (folder / "ppo/value/model.safetensors").exists() and not (folder / "reward").exists()


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (lambda prompts, responses, **fields: [float("nan")] * len(prompts), "must be a finite number"),
        (lambda prompts, responses, **fields: [1.0], "returned 1 values for 8 responses"),
        (lambda prompts, responses, **fields: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_a_broken_function_stops_with_a_message(reward: Any, told: str, settings: dict[str, Any], partial_run: Partial) -> None:
    settings["output"] = str(partial_run("pretrain", "sft", "reward"))
    with pytest.raises(TercetError, match=told):
        tercet.train_ppo(settings, reward=reward)


class TestLoadedObjects:
    @pytest.fixture
    def loaded(self, finished_run: Path) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = finished_run / "pretrain/model"
        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def test_give_what_their_folder_gives(
        self, loaded: tuple[Any, Any], settings: dict[str, Any], finished_run: Path, tmp_path: Path
    ) -> None:
        model, tokenizer = loaded
        settings |= {"output": str(tmp_path / "run"), "model": {}}
        tercet.train_sft(settings, model=model, tokenizer=tokenizer)
        weights = "sft/model/model.safetensors"
        assert (tmp_path / "run" / weights).read_bytes() == (finished_run / weights).read_bytes()
        stamp = (tmp_path / "run/sft/done.json").stat().st_mtime_ns
        tercet.train_sft(settings, model=model, tokenizer=tokenizer)
        assert (tmp_path / "run/sft/done.json").stat().st_mtime_ns == stamp, "the same objects are the same model"
        assert tercet.train_reward(settings, model=model, tokenizer=tokenizer).summary["reward.comparisons"] > 40

    def test_another_model_is_another_run(self, loaded: tuple[Any, Any], settings: dict[str, Any], tmp_path: Path) -> None:
        model, tokenizer = loaded
        settings |= {"output": str(tmp_path / "run"), "model": {}}
        tercet.train_sft(settings, model=model, tokenizer=tokenizer)
        model.transformer.ln_f.weight.data += 0.5
        with pytest.raises(TercetError, match=r"(?s)stage sft was finished from something else.*model\.name"):
            tercet.train_sft(settings, model=model, tokenizer=tokenizer)

    @pytest.mark.parametrize("wrong", [{"output": None}, {"output": 3}, {"model": "gpt2"}])
    def test_a_section_of_another_kind_is_said(self, loaded: tuple[Any, Any], settings: dict[str, Any], wrong: Any) -> None:
        with pytest.raises(TercetError, match="should be a folder's name, and model: .* a mapping"):
            tercet.train_sft({**settings, "model": {}, **wrong}, model=loaded[0], tokenizer=loaded[1])

    def test_an_output_that_cannot_be_written_is_said(
        self, loaded: tuple[Any, Any], settings: dict[str, Any], tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(TercetError, match="file/run"):
            tercet.train_sft(
                {**settings, "model": {}, "output": str(tmp_path / "file/run")}, model=loaded[0], tokenizer=loaded[1]
            )

    def test_a_model_needs_its_tokenizer(self, loaded: tuple[Any, Any], settings: dict[str, Any], finished_run: Path) -> None:
        with pytest.raises(TercetError, match="model= needs tokenizer="):
            tercet.train_sft({**settings, "model": {}}, model=loaded[0])
        with pytest.raises(TercetError, match="not as a file"):
            tercet.train_sft(finished_run / "config.yaml", model=loaded[0], tokenizer=loaded[1])


def test_without_demonstrations_the_model_as_it_came_is_the_reference(
    settings: dict[str, Any], finished_run: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(finished_run / "sft/model", tmp_path / "base")
    settings |= {"output": str(tmp_path / "run"), "model": {"name": str(base)}}
    settings["data"] |= {"sft": None}
    settings["ppo"] |= {"iterations": 1}
    tercet.run(settings)
    assert not (tmp_path / "run/sft").exists() and (tmp_path / "run/evaluation/wins.json").exists()
    with pytest.raises(TercetError, match=r"(?s)stage reward was finished.*model\.template"):
        tercet.run({**settings, "model": {"name": str(base), "template": "chat"}})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"reward": 3}, r"^reward= is a int: give a function"),
        ({"model": 1, "tokenizer": 2}, r"^model= is a int: give a transformers model"),
        ({"model": SimpleNamespace(save_pretrained=print), "tokenizer": 2}, r"^tokenizer= is a int"),
    ],
)
def test_what_is_no_function_or_model_is_said(given: dict[str, Any], said: str, settings: dict[str, Any]) -> None:
    with pytest.raises(TercetError, match=said):
        tercet.run(settings, **given)
    with pytest.raises(TercetError, match="the configuration is a int: give a YAML file"):
        tercet.run(3)

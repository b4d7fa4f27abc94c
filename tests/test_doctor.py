"""tercet/doctor.py: what is wrong is found before anything is trained."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tercet.cli import app
from tercet.config import load_config
from tercet.doctor import Check, checks, examine


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def pairs(count: int, longer: bool = False) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Question {i}?", "chosen": "yes " * (9 if longer else 1 + i % 2), "rejected": "no " * (2 - i % 2)}
        for i in range(count)
    ]


def run(finished_run: Path, sft_max_length: int = 48, **data: str) -> list[Check]:
    model, sft = {"name": str(finished_run / "sft/model")}, {"max_length": sft_max_length}
    data = {"max_prompt_length": 24, **data}
    return list(checks(load_config({"model": model, "data": data, "sft": sft, "ppo": {"max_new_tokens": 8}})))


def test_sound_files_give_no_error_and_say_what_will_run(finished_run, tiny_data):
    found = run(finished_run, sft=str(tiny_data / "demonstrations.jsonl"), prompts=str(tiny_data / "prompts.jsonl"),
                comparisons=str(tiny_data / "comparisons.jsonl"))  # fmt: skip
    assert not [check for check in found if check.level == "error"]
    assert found[0].text == "stages: sft, reward, ppo, evaluate"
    assert any("40 records" in check.text for check in found)


@pytest.mark.parametrize(
    ("records", "level", "text"),
    [
        (pairs(300, longer=True), "warning", "the longer one in 100% of pairs"),
        (pairs(30), "warning", "30 are few"),
        ([*pairs(250), pairs(1)[0]], "warning", "1 records stand there more than once"),
        ([{"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}], "error", "every comparison is a tie"),
        ([{"prompt": "a", "chosen": "b"}], "error", "rejected"),
    ],
)
def test_each_fault_of_the_comparisons_is_named(finished_run, tmp_path, records, level, text):
    found = run(finished_run, comparisons=write(tmp_path / "c.jsonl", records))
    assert [check for check in found if check.level == level and text in check.text], [check.text for check in found]


def test_a_length_beyond_the_models_positions_is_an_error(finished_run, tmp_path):
    found = run(finished_run, 9_999, sft=write(tmp_path / "s.jsonl", [{"prompt": "a", "response": "word " * 900}]))
    assert any(check.level == "error" and "positions" in check.text for check in found)


def test_cut_texts_and_leaked_prompts_are_warned_of(finished_run, tmp_path, tiny_data):
    leaked = write(tmp_path / "e.jsonl", [json.loads(line) for line in (tiny_data / "prompts.jsonl").open()][:3])
    pairs_too = {"comparisons": str(tiny_data / "comparisons.jsonl")}
    found = run(finished_run, prompts=str(tiny_data / "prompts.jsonl"), eval_prompts=leaked, **pairs_too)
    found += run(finished_run, prompts=write(tmp_path / "long.jsonl", [{"prompt": "why " * 90}]), **pairs_too)
    warnings = [check.text for check in found if check.level == "warning"]
    assert any("3 prompts of data.prompts stand in data.eval_prompts too" in text for text in warnings), found
    assert any("1 of 1 prompts are cut" in text for text in warnings)


def test_the_command_exits_with_2_on_an_error_and_0_without(finished_run, tmp_path, tiny_data):
    config = {"model": {"name": str(finished_run / "sft/model")}, "data": {"prompts": str(tiny_data / "prompts.jsonl")}}
    config["ppo"] = {"max_new_tokens": 8, "rewards": [{"kind": "function", "function": "rewards.py:score"}]}
    config["data"]["max_prompt_length"] = 24
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config))
    assert examine(load_config(file))
    assert CliRunner().invoke(app, ["doctor", str(file)]).exit_code == 0
    bad = CliRunner().invoke(app, ["doctor", str(file), "--set", "data.sft=nowhere.jsonl"])
    assert bad.exit_code == 2 and "nowhere.jsonl" in bad.output

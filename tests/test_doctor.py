"""tercet/doctor.py: what is wrong is found before anything is trained; the dry run takes the real stages' first steps."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config, write_jsonl
from typer.testing import CliRunner

from tercet.cli import app
from tercet.config import load_config
from tercet.doctor import Doctor, examine
from tercet.jobs.outlook import Check


def settings(finished_run: Path, files: Path, output: Path, **sections: Any) -> dict[str, Any]:
    """A run of every stage that starts from the tiny SFT model."""
    values = tiny_config(files, output) | {"model": {"name": str(finished_run / "sft/model")}}
    return {
        key: {**value, **sections.pop(key, {})} if isinstance(value, dict) else value for key, value in values.items()
    } | sections


def levels(checks: list[Check], level: str) -> list[str]:
    return [check.text for check in checks if check.level == level]


def test_a_sound_run_is_examined_to_the_end_and_leaves_nothing_behind(finished_run, tiny_data, tmp_path):
    doctor = Doctor(load_config(settings(finished_run, tiny_data, tmp_path / "run")))
    found = list(doctor.checks())
    assert not levels(found, "error")
    assert found[0].text == "stages: sft, reward, ppo, evaluate"
    assert found[-1].text.startswith("dry run: every stage took its first steps")
    assert [need.stage for need in doctor.needs] == ["sft", "reward", "ppo", "evaluate"]
    assert set(doctor.seconds) == {"sft", "reward", "ppo", "evaluate"} and all(0 < s < 600 for s in doctor.seconds.values())
    assert list(tmp_path.iterdir()) == []


def test_a_model_from_scratch_is_made_for_it(tiny_data, tmp_path):
    doctor = Doctor(load_config(tiny_config(tiny_data, tmp_path / "run")))
    found = list(doctor.checks())
    assert not levels(found, "error") and found[-1].text.startswith("dry run: every stage")
    assert any("template plain" in text for text in levels(found, "ok"))
    assert list(tmp_path.iterdir()) == []


def test_all_mistakes_in_the_files_are_told_at_once(finished_run, tiny_data, tmp_path):
    bad = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "a", "chosen": "b"}])
    data = {"sft": str(tmp_path / "nowhere.jsonl"), "comparisons": str(bad)}
    found = list(Doctor(load_config(settings(finished_run, tiny_data, tmp_path / "run", data=data))).checks())
    assert levels(found, "error") == [check.text for check in found] and len(found) == 2
    assert "nowhere.jsonl" in found[0].text and "rejected" in found[1].text


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"data": {"max_prompt_length": 9_999}}, "positions"),
        ({"trackers": ["wandb"]}, "pip install wandb"),
        ({"ppo": {"rewards": [{"kind": "function", "function": "nowhere.py:score"}]}}, "nowhere.py"),
        ({"machine": {"device": "cuda:99"}}, "machine.device"),
    ],
)
def test_what_stops_a_run_is_an_error_here_and_nothing_is_written(finished_run, tiny_data, tmp_path, sections, told, monkeypatch):
    import importlib.util

    from tercet.pipeline import Pipeline
    from tercet.types import TercetError

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    config = load_config(settings(finished_run, tiny_data, tmp_path / "run", **sections))
    assert any(told in text for text in levels(list(Doctor(config).checks()), "error"))
    with pytest.raises(TercetError, match=told):
        Pipeline(config).run()
    assert not (tmp_path / "run").exists()


def test_ties_alone_are_an_error(finished_run, tiny_data, tmp_path):
    ties = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}])
    config = load_config(settings(finished_run, tiny_data, tmp_path / "run", data={"comparisons": str(ties)}))
    assert any("every comparison is a tie" in text for text in levels(list(Doctor(config).checks()), "error"))


def test_a_reward_that_fails_fails_in_the_dry_run(finished_run, tiny_data, tmp_path):
    (tmp_path / "rewards.py").write_text("def score(prompts, responses, **fields):\n    return [float('nan')] * len(responses)\n")
    terms = {"rewards": [{"kind": "function", "function": f"{tmp_path}/rewards.py:score"}]}
    found = list(Doctor(load_config(settings(finished_run, tiny_data, tmp_path / "run", ppo=terms))).checks())
    assert found[-1].level == "error" and found[-1].text.startswith("dry run: ")


def test_broken_invariants_show_in_the_dry_run(finished_run, tiny_data, tmp_path, monkeypatch):
    from tercet.generation import native

    real = native.inverse_cdf
    # Not where the likeliest token is taken, as preflight does.
    monkeypatch.setattr(
        native, "inverse_cdf", lambda logits, u, temperature: real(logits if u is None else logits * 3, u, temperature)
    )
    found = list(Doctor(load_config(settings(finished_run, tiny_data, tmp_path / "run"))).checks())
    assert found[-1].level == "error" and "the model samples from another distribution" in found[-1].text


def test_no_dry_run_where_it_would_not_fit(finished_run, tiny_data, tmp_path, monkeypatch):
    import tercet.doctor

    monkeypatch.setattr(tercet.doctor, "free_memory", lambda device: 2**20)
    doctor = Doctor(load_config(settings(finished_run, tiny_data, tmp_path / "run")))
    found = list(doctor.checks())
    assert "no dry run, because stage" in found[-1].text and doctor.needs and not doctor.seconds


def test_the_command_exits_with_2_on_an_error_and_0_without(finished_run, tmp_path, tiny_data):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(settings(finished_run, tiny_data, tmp_path / "run")))
    assert examine(load_config(file), quick=True)
    done = CliRunner().invoke(app, ["doctor", str(file)])
    assert done.exit_code == 0 and "memory, GiB" in done.output
    bad = CliRunner().invoke(app, ["doctor", str(file), "--quick", "--set", "data.sft=nowhere.jsonl"])
    assert bad.exit_code == 2 and "nowhere.jsonl" in bad.output


def prompts_of_every_type(folder: Path) -> Path:
    """Parquet whose fields JSON cannot hold, with a null in the first row."""
    import datetime
    import decimal

    import datasets

    count = 24
    columns = {
        "prompt": [f"Question {i}?" for i in range(count)],
        "when": [None, *[datetime.datetime(2026, 1, 2)] * (count - 1)],
        "raw": [b"\xff\x00"] * count,
        "price": [decimal.Decimal("1.50")] * count,
        "known": [float("nan")] * count,
    }
    datasets.Dataset.from_dict(columns).to_parquet(str(folder / "p.parquet"))
    return folder / "p.parquet"


def test_fields_that_json_cannot_hold_reach_the_reward_function_as_they_are(finished_run, tiny_data, tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text(
        "import datetime, decimal\n"
        "def score(prompts, responses, when, raw, price, known):\n"
        "    assert {type(x) for x in when} <= {type(None), datetime.datetime} and set(raw) == {bytes([255, 0])}\n"
        "    assert set(price) == {decimal.Decimal('1.50')} and all(x != x for x in known)\n"
        "    return [0.1 * len(text) for text in responses]\n"
    )
    changes = {
        "data": {"prompts": str(prompts_of_every_type(tmp_path))},
        "ppo": {"rewards": [{"kind": "function", "function": f"{tmp_path}/rewards.py:score"}]},
    }
    found = list(Doctor(load_config(settings(finished_run, tiny_data, tmp_path / "run", **changes))).checks())
    assert not levels(found, "error") and found[-1].text.startswith("dry run: every stage")


def test_what_parquet_cannot_hold_either_is_written_as_text(tmp_path):
    from tercet.data.records import read_prompts
    from tercet.doctor import _write
    from tercet.types import Prompt

    mixed = [Prompt("a", {"x": b"1", "y": float("nan"), "z": 1}, ""), Prompt("b", {"x": 2, "y": 0.5, "z": {"t": "u"}}, "")]
    again = read_prompts(_write(tmp_path / "prompts", mixed))
    assert [record.fields for record in again] == [{"x": "b'1'", "y": None, "z": 1}, {"x": 2, "y": 0.5, "z": {"t": "u"}}]


def test_a_place_where_nothing_can_be_written_is_named(finished_run, tiny_data, tmp_path, monkeypatch):
    import tempfile

    from tercet.types import TercetError

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refused)
    config = load_config(settings(finished_run, tiny_data, tmp_path / "run"))
    with pytest.raises(TercetError, match=f"output: nothing can be written in {tmp_path} .Permission denied.: make it writable"):
        list(Doctor(config).checks())


@pytest.mark.parametrize("signal", ["Interrupted", "KeyboardInterrupt"])
def test_a_stopped_examination_does_not_speak_of_a_saved_state(signal, finished_run, tiny_data, tmp_path, monkeypatch):
    from tercet.errors import Interrupted

    def stopped(*_: Any, **__: Any) -> None:
        raise {"Interrupted": Interrupted, "KeyboardInterrupt": KeyboardInterrupt}[signal]

    monkeypatch.setattr("tercet.doctor.Pipeline.run", stopped)
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(settings(finished_run, tiny_data, tmp_path / "run")))
    done = CliRunner().invoke(app, ["doctor", str(file)])
    assert done.exit_code == 130 and "stopped; doctor keeps nothing" in done.output and "saved" not in done.output

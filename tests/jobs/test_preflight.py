"""tercet/jobs/preflight.py: mistakes are found before anything is written. Most of its cases: tests/test_bad_input.py, test_doctor.py."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config, write_jsonl

from tercet.config import load_config
from tercet.jobs.preflight import inspect
from tercet.pipeline import Pipeline


def test_only_what_the_stages_need_is_read(tiny_data: Path, tmp_path: Path) -> None:
    values = tiny_config(tiny_data, tmp_path / "run")
    values["data"]["comparisons"] = str(tmp_path / "nowhere.jsonl")
    sources, mistakes = inspect(load_config(values), ["sft"], None, [])
    assert (list(sources), mistakes) == (["sft"], []) and len(sources["sft"]) == 40
    sources, mistakes = inspect(load_config(values), ["sft", "reward", "ppo"], None, [])
    assert list(sources) == ["sft", "prompts"] and len(mistakes) == 1 and "nowhere.jsonl" in mistakes[0]
    assert inspect(load_config(values), [], None, []) == ({}, [])


def test_comparisons_without_any_preference_are_a_mistake_and_one_preference_is_enough(tiny_data: Path, tmp_path: Path) -> None:
    tie = {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}
    for records, count in (([tie], 1), ([tie, tie | {"ranks": [1, 2]}], 0)):
        values = tiny_config(tiny_data, tmp_path / "run")
        values["data"]["comparisons"] = str(write_jsonl(tmp_path / "c.jsonl", records))
        _, mistakes = inspect(load_config(values), ["reward"], None, [])
        assert len(mistakes) == count


def score(prompts: list[Any], responses: list[str], **fields: Any) -> list[float]:
    return [0.0] * len(responses)


@functools.wraps(lambda prompts, responses: [])
def wrapped(*values: Any, **fields: Any) -> list[float]:
    return []


CODE = "def score(prompts, responses, **fields):\n    return [0.0] * len(responses)\n"


@pytest.mark.parametrize("field", ["prompts", "responses"])
@pytest.mark.parametrize("place", ["ppo", "judges", "gold", "evaluate alone", "callable", "nowhere"])
def test_a_field_with_the_name_of_an_argument_is_refused_where_a_function_is_called(
    field: str, place: str, tiny_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "rewards.py").write_text(CODE)
    reference = f"{tmp_path}/rewards.py:score"
    values = tiny_config(tiny_data, tmp_path / "run")
    values["data"]["prompts"] = str(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", field: "x"}] * 2))
    term = {"kind": "function", "function": reference}
    if place == "ppo":
        values["ppo"]["rewards"] = [term]
    elif place == "judges":
        values["evaluation"] = {**values.get("evaluation", {}), "judges": {"mine": term}}
    elif place in ("gold", "evaluate alone"):
        values["evaluation"] = {**values.get("evaluation", {}), "gold": reference}
    pipeline = Pipeline(load_config(values), [score] if place == "callable" else [])
    _, mistakes = pipeline.inspect(["evaluate"] if place == "evaluate alone" else ["ppo"])
    if place == "nowhere":
        assert mistakes == []
    else:
        assert len(mistakes) == 1 and f"p.jsonl:2: the field '{field}' cannot be given to the function" in mistakes[0]
        assert "rename or remove the field" in mistakes[0]


def test_what_a_function_takes_is_no_mistake(tiny_data: Path, tmp_path: Path) -> None:
    values = tiny_config(tiny_data, tmp_path / "run")
    values["data"]["prompts"] = str(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "thing": 1}]))
    for function in (score, wrapped, lambda prompts, responses, thing: [0.0], functools.partial(score, more=1), max):
        assert inspect(load_config(values), ["ppo"], None, [function])[1] == []
    told = inspect(load_config(values), ["ppo"], None, [lambda prompts, responses: [0.0]])[1]
    assert len(told) == 1 and "p.jsonl:1: the field 'thing'" in told[0]

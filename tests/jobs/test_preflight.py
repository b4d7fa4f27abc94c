"""tercet/jobs/preflight.py: mistakes are found before anything is written. Most of its cases: tests/test_bad_input.py, test_doctor.py."""

from __future__ import annotations

from pathlib import Path

from conftest import tiny_config, write_jsonl

from tercet.config import load_config
from tercet.jobs.preflight import inspect


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

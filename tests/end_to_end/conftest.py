"""Whole runs with tiny random models: a run is a mapping of settings on top of one base, and its folder is what tests look at."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import merged

TRAINING = {"batch_size": 8, "learning_rate": 1e-3, "max_length": 48}
BASE: dict[str, Any] = {
    "seed": 3,
    "data": {"max_prompt_length": 32},
    "sft": {**TRAINING, "epochs": 1},
    "reward": {**TRAINING, "normalise_samples": 16},
    "ppo": {
        "iterations": 2,
        "rollout_batch_size": 8,
        "ppo_epochs": 1,
        "max_new_tokens": 8,
        "learning_rate": 1e-3,
        "value_learning_rate": 1e-3,
        "save_rollouts_every": 1,
    },
    "evaluation": {"prompts": 8, "best_of_prompts": 2, "best_of_samples": 8},
    "machine": {"device": "cpu", "dtype": "float32", "threads": 1, "microbatch_tokens": 512},
}


class Runs:
    """Starts runs in a folder of its own; data sections name files of the tiny data unless they are paths."""

    def __init__(self, folder: Path, data: Path, model: Path | str):
        self.folder, self.data, self.model = folder, data, model

    def settings(self, **changes: Any) -> dict[str, Any]:
        names = {"sft": "demonstrations", "comparisons": "comparisons", "prompts": "prompts"}
        start = {"output": str(self.folder / "run"), "model": {"name": str(self.model)}}
        data = {key: str(self.data / f"{name}.jsonl") for key, name in names.items()}
        return merged(merged(BASE, {**start, "data": data}), changes)

    def write(self, name: str, records: Iterable[Mapping[str, Any]]) -> str:
        path = self.folder / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(path)

    def run(self, *wanted: str, **changes: Any) -> Path:
        from tercet.config import load_config
        from tercet.pipeline import Pipeline

        return Pipeline(load_config(self.settings(**changes))).run(wanted or None).folder


@pytest.fixture
def runs(tmp_path: Path, tiny_data: Path, finished_run: Path) -> Runs:
    """Runs that start from the tiny SFT model of the finished run."""
    return Runs(tmp_path, tiny_data, finished_run / "sft/model")


@pytest.fixture(scope="session")
def lines() -> Callable[[Path], list[dict[str, Any]]]:
    """The records of a JSON lines file."""
    return lambda path: [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="session")
def summary() -> Callable[[Path], dict[str, Any]]:
    return lambda folder: json.loads((folder / "summary.json").read_text(encoding="utf-8"))

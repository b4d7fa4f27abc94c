"""A tiny offline run that the tests share: texts by hand-made rules, a two-layer model from scratch, a few steps a stage."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_finish() -> None:
    """By now the libraries are imported, a million objects that every collection of garbage would walk through: a quarter of a second,
    seven times a run, which was a third of the tiny run's time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, lest at the end one worker waits for the other."""
    items.sort(key=lambda item: not item.nodeid.startswith(("tests/test_quickstart", "tests/jobs/test_memory")))


THINGS = ("rain", "snow", "bread", "music", "the moon", "a river", "the wind", "a song", "winter", "honey")
QUESTIONS = ("What is {}?", "Describe {} simply.", "Why do people like {}?", "Tell a child about {}.")
OPENINGS = ("It is something that", "Many people say that it", "You can think of it as what")
ENDINGS = ("makes us calm.", "comes and goes.", "we share with friends.", "changes with time.")


def questions() -> list[str]:
    """The forty prompts of the tiny run."""
    return [form.format(thing) for thing in THINGS for form in QUESTIONS]


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Records as JSON lines; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the keys of `changes` set, section by section."""
    result = dict(values)
    for key, change in changes.items():
        old = result.get(key)
        result[key] = merged(old, change) if isinstance(change, Mapping) and isinstance(old, Mapping) else change
    return result


def write_tiny_data(folder: Path) -> None:
    """demonstrations.jsonl (40 records), comparisons.jsonl (60) and prompts.jsonl (40, with a field "thing")."""
    rng = random.Random(7)

    def answer() -> str:
        return f"{rng.choice(OPENINGS)} {rng.choice(ENDINGS)}"

    asked = questions()
    write_jsonl(folder / "demonstrations.jsonl", ({"prompt": prompt, "response": answer()} for prompt in asked))
    pairs = [(rng.choice(asked), answer()) for _ in range(60)]
    # The rejected answer is the chosen one broken off, so that there is something to learn.
    write_jsonl(folder / "comparisons.jsonl", ({"prompt": p, "chosen": a, "rejected": " ".join(a.split()[:4])} for p, a in pairs))
    write_jsonl(folder / "prompts.jsonl", ({"prompt": p, "thing": p.split()[-1]} for p in asked))


def tiny_config(data: Path, output: Path) -> dict[str, Any]:
    """A configuration, as a mapping, that runs every stage in seconds on one thread."""
    training = {"batch_size": 8, "learning_rate": 1e-3, "max_length": 48, "epochs": 1}
    return {
        "output": str(output),
        "seed": 3,
        "model": {"scratch": {"architecture": "gpt2", "vocab_size": 300, "options": {"n_layer": 2, "n_embd": 32, "n_head": 2}}},
        "data": {
            "sft": str(data / "demonstrations.jsonl"),
            "comparisons": str(data / "comparisons.jsonl"),
            "prompts": str(data / "prompts.jsonl"),
            "max_prompt_length": 24,
        },
        "sft": {**training, "dropout": 0.1},
        "reward": {**training, "normalise_samples": 16},
        "ppo": {
            "iterations": 3,
            "rollout_batch_size": 8,
            "minibatch_size": 4,
            "ppo_epochs": 2,
            "max_new_tokens": 8,
            "learning_rate": 1e-3,
            "value_learning_rate": 1e-3,
            "kl": {"controller": "adaptive", "coef": 0.1, "target": 1.0, "horizon": 100},
            "save_rollouts_every": 1,
        },
        "evaluation": {"prompts": 8, "best_of_prompts": 2, "best_of_samples": 8},
        "checkpoint": {"every": 2},
        "machine": {"device": "cpu", "dtype": "float32", "threads": 1, "microbatch_tokens": 256},
    }


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny run's data files; tests that change them copy it."""
    folder = tmp_path_factory.mktemp("data")
    write_tiny_data(folder)
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """The run folder of a finished tiny run; tests that change it take `run_copy`."""
    import tercet

    output = tmp_path_factory.mktemp("runs") / "run"
    tercet.run(tiny_config(tiny_data, output))
    return output


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def partial_run(finished_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """partial_run("pretrain", "sft") is a new run folder in which only those stages of the finished run are there."""

    def copy(*stages: str, name: str = "partial") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(finished_run / "config.yaml", folder)
        for stage in stages:
            shutil.copytree(finished_run / stage, folder / stage)
        return folder

    return copy

"""Small real runs of the embedded world: a healthy one for each seed, and copies of it that break on purpose from some stage on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import merged
from filelock import FileLock

STAGES = ("pretrain", "sft", "reward", "ppo")
Record = dict[str, Any]


def settings(data: Path, seed: int) -> Record:
    """A run that learns what it should in less than half a minute on one core."""
    architecture = {
        "n_layer": 2,
        "n_embd": 96,
        "n_head": 3,
        "activation_function": "gelu_pytorch_tanh",
        "initializer_range": 0.06,
    }
    training = {"batch_size": 32, "max_length": 64}
    names = {"pretrain": "pretrain", "sft": "demonstrations", "comparisons": "comparisons", "prompts": "prompts"}
    names |= {"eval_comparisons": "eval_comparisons", "eval_prompts": "eval_prompts"}
    return {
        "seed": seed,
        "model": {"scratch": {"architecture": "gpt2", "vocab_size": 896, "options": architecture}},
        "data": {key: str(data / f"{name}.jsonl") for key, name in names.items()} | {"max_prompt_length": 16},
        "pretrain": training | {"learning_rate": 4e-3, "warmup_steps": 20},
        "sft": training | {"learning_rate": 5e-4, "epochs": 1},
        "reward": training | {"learning_rate": 2e-3, "warmup_steps": 20},
        "ppo": {
            "iterations": 16,
            "rollout_batch_size": 64,
            "max_new_tokens": 48,
            "learning_rate": 5e-4,
            "value_learning_rate": 1e-3,
            "kl": {"coef": 0.3},
            "evaluate_every": 4,
        },
        "evaluation": {"prompts": 160, "gold": "tercet.world:gold", "best_of_prompts": 4, "best_of_samples": 16},
        "machine": {"device": "cpu", "dtype": "float32", "threads": 1, "microbatch_tokens": 1024},
    }


class Clinic:
    """Makes the runs, all workers' in one folder. `begun` is made once a seed, up to PPO; `healthy` goes on to its end; `broken` begins
    from its stages before the one that breaks."""

    def __init__(self, folder: Path):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._alone = FileLock(folder / "lock")

    def data(self, seed: int) -> Path:
        from tercet.world import Sizes, generate

        folder = self.folder / f"data-{seed}"
        with self._alone:
            if not folder.exists():
                counts = {"pretrain": 5000, "demonstrations": 800, "comparisons": 4000, "rankings": 0, "eval_known": 800}
                generate(folder, seed=seed, sizes=Sizes(**counts, eval_new=0, eval_prompts_known=160, eval_prompts_new=0))
        return folder

    def begun(self, seed: int) -> Path:
        from tercet.config import load_config
        from tercet.pipeline import Pipeline

        folder = self.folder / f"healthy-{seed}"
        with self._alone:
            if not (folder / "reward/done.json").exists():
                values = settings(self.data(seed), seed) | {"output": str(folder)}
                Pipeline(load_config(values)).run(["pretrain", "sft", "reward"])
        return folder

    def healthy(self, seed: int) -> Path:
        import tercet

        folder = self.begun(seed)
        tercet.run(settings(self.data(seed), seed) | {"output": str(folder)})
        return folder

    def broken(self, name: str, from_stage: str, changes: Mapping[str, Any]) -> Path:
        """The run folder of a run with these settings; what comes before `from_stage` is that of the healthy run.

        A run may be so broken that it stops; what it leaves behind must tell why.
        """
        import tercet

        folder = self.folder / name
        folder.mkdir()
        earlier = STAGES[: STAGES.index(from_stage)]
        if earlier:
            begun = self.begun(0)
            shutil.copy(begun / "config.yaml", folder)
            for stage in earlier:
                shutil.copytree(begun / stage, folder / stage)
        with contextlib.suppress(tercet.TercetError):
            tercet.run(merged(settings(self.data(0), 0), changes) | {"output": str(folder)})
        return folder

    def records(self, name: str) -> list[Record]:
        return [json.loads(line) for line in (self.data(0) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]

    def write(self, name: str, records: Iterable[Mapping[str, Any]]) -> str:
        path = self.folder / f"{name}.jsonl"
        with self._alone:
            if not path.exists():
                path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(path)


@pytest.fixture(scope="session")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Clinic:
    own = tmp_path_factory.getbasetemp()
    return Clinic((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "clinic")


@pytest.fixture(scope="session")
def faults() -> Callable[[Path], dict[str, str]]:
    """cause -> severity of every fault that a run's summary.json names."""
    return lambda folder: {
        finding["cause"]: finding["severity"]
        for finding in json.loads((folder / "summary.json").read_text(encoding="utf-8"))["verdict"]
        if finding["severity"] != "ok"
    }

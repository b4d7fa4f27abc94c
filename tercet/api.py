"""The Python API: each stage as a function, with models and reward functions as objects where one has them."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tercet.config import Config, load_config
from tercet.errors import TercetError
from tercet.fingerprint import digest
from tercet.pipeline import Pipeline, RunResult


def run(config: Any, *, model: Any = None, tokenizer: Any = None, reward: Callable[..., list[float]] | None = None) -> RunResult:
    """All stages. `config`: a YAML file, a mapping or a Config; `model` and `tokenizer`: objects to start from, in place of
    model.name; `reward`: a function(prompts, responses, **fields) -> list[float] in place of ppo.rewards."""
    return _pipeline(config, model, tokenizer, reward).run()


def train_sft(config: Any, *, model: Any = None, tokenizer: Any = None) -> RunResult:
    """Stage 1 alone (after pretraining, where the model is from scratch)."""
    pipeline = _pipeline(config, model, tokenizer, None)
    return pipeline.run(["pretrain", "sft"] if "pretrain" in pipeline.stages() else ["sft"])


def train_reward(config: Any, *, model: Any = None, tokenizer: Any = None) -> RunResult:
    """Stage 2 alone."""
    return _pipeline(config, model, tokenizer, None).run(["reward"])


def train_ppo(
    config: Any, *, model: Any = None, tokenizer: Any = None, reward: Callable[..., list[float]] | None = None
) -> RunResult:
    """Stage 3 alone; `reward` as in `run`."""
    return _pipeline(config, model, tokenizer, reward).run(["ppo"])


def evaluate(
    config: Any, *, model: Any = None, tokenizer: Any = None, reward: Callable[..., list[float]] | None = None
) -> RunResult:
    """Evaluation and report alone; `reward` as in `run`."""
    return _pipeline(config, model, tokenizer, reward).run(["evaluate"])


def _pipeline(config: Any, model: Any, tokenizer: Any, reward: Callable[..., list[float]] | None) -> Pipeline:
    if reward is not None and not callable(reward):
        raise TercetError(f"reward= is a {type(reward).__name__}: give a function(prompts, responses, **fields) -> list[float]")
    for name, given in (("model", model), ("tokenizer", tokenizer)):
        if given is not None and not hasattr(given, "save_pretrained"):
            raise TercetError(f"{name}= is a {type(given).__name__}: give a transformers {name}, as from_pretrained returns it")
    if model is not None:
        values = config.model_dump() if isinstance(config, Config) else config
        if tokenizer is None or not isinstance(values, Mapping):
            raise TercetError(
                "model= needs tokenizer= as well, and a configuration given as a mapping or a Config, not as a file"
            )
        output, section = values.get("output", "run"), values.get("model") or {}
        if not isinstance(output, str | Path) or not isinstance(section, Mapping):
            raise TercetError(f"output: {output!r} should be a folder's name, and model: {section!r} a mapping")
        output = Path(output).expanduser().resolve()
        try:
            folder = _saved(model, tokenizer, output)
        except OSError as error:
            raise TercetError(f"output: {output} cannot be written ({error.strerror}): choose another place") from None
        config = {**values, "model": {**section, "name": str(folder)}}
    loaded = load_config(config)
    if reward is None:
        return Pipeline(loaded)
    return Pipeline(loaded.model_copy(update={"ppo": loaded.ppo.model_copy(update={"rewards": []})}), [reward])


def _saved(model: Any, tokenizer: Any, output: Path) -> Path:
    """Write loaded objects to a folder named after their contents, so that another model is seen to be another."""
    temporary = output / f".base.{uuid.uuid4().hex}"  # of this process alone: every rank comes here
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    contents = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in temporary.iterdir()}
    final = output / f"base-{digest(contents)[:12]}"
    try:
        return temporary.rename(final)
    except OSError:  # it is there already, perhaps in use
        shutil.rmtree(temporary, ignore_errors=True)
        return final

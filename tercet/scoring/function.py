"""Scores from a Python function of the user's."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tercet.scoring.base import Texts, check_finite
from tercet.types import Sequences, TercetError

RewardFunction = Callable[..., list[float]]


def load_function(reference: str) -> RewardFunction:
    """The function that "file.py:name" or "module:name" refers to."""
    source, colon, name = reference.rpartition(":")
    if not colon or not source or not name:
        raise TercetError(f"function {reference!r}: expected file.py:name or module:name, for example rewards.py:score")
    module = _load_file(Path(source), reference) if source.endswith(".py") else _load_module(source, reference)
    function = getattr(module, name, None)
    if not callable(function):
        raise TercetError(f"function {reference!r}: {source} has no function named {name}")
    return function


def _load_file(path: Path, reference: str) -> Any:
    if not path.is_file():
        raise TercetError(f"function {reference!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"tercet_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as import does: dataclasses, for one, look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise TercetError(f"function {reference!r}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _load_module(name: str, reference: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise TercetError(
            f"function {reference!r}: the module {name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.pop(0)


class FunctionScorer:
    """Calls function(prompts, responses, **fields) -> list[float]; fields are lists, None where a prompt has no such field. A
    prompt is a string, or for a conversation a list of {"role", "content"}.

    It runs in a thread of its own, so that one which hangs ends the run with a message after `timeout` seconds.
    """

    def __init__(self, function: RewardFunction, *, name: str, timeout: float = 300.0):
        self._function = function
        self._name = name
        self._timeout = timeout

    def score(self, sequences: Sequences, texts: Texts) -> Tensor:
        if not texts.responses:  # of a rank that has no rows
            return torch.zeros(0)
        names = sorted({key for row in texts.fields for key in row})
        fields = {key: [row.get(key) for row in texts.fields] for key in names}
        prompts = [text if isinstance(text, str) else [dict(vars(turn)) for turn in text] for text in texts.prompts]
        values = self._call(prompts, list(texts.responses), fields)
        return check_finite(torch.tensor(self._checked(values, len(texts.responses)), dtype=torch.float32), texts, self._name)

    def _call(self, prompts: list[Any], responses: list[str], fields: dict[str, list[Any]]) -> Any:
        results: queue.Queue[tuple[bool, Any]] = queue.Queue()

        def run() -> None:
            try:
                results.put((True, self._function(prompts, responses, **fields)))
            except BaseException as error:  # SystemExit, too, would leave the caller waiting
                results.put((False, error))

        threading.Thread(target=run, daemon=True, name="reward function").start()
        try:
            returned, value = results.get(timeout=self._timeout)
        except queue.Empty:
            raise TercetError(
                f"the reward function {self._name} did not return within {self._timeout:g} s on {len(responses)} responses: "
                "raise the timeout of its entry in ppo.rewards or evaluation.judges, which changes no results, and run the same command "
                "again; where it has no such entry, or the function itself is made faster, the stage begins anew (--from)"
            ) from None
        if not returned:
            raise TercetError(f"the reward function {self._name} raised {type(value).__name__}: {value}") from value
        return value

    def _checked(self, values: Any, count: int) -> list[float]:
        if hasattr(values, "tolist"):  # tensors and arrays
            values = values.tolist()
        if not isinstance(values, list | tuple) or len(values) != count:
            found = f"{len(values)} values" if isinstance(values, list | tuple) else type(values).__name__
            raise TercetError(
                f"the reward function {self._name} returned {found} for {count} responses: expected a list of {count} numbers"
            )
        return [self._number(value) for value in values]

    def _number(self, value: Any) -> float:
        if not isinstance(value, bool) and hasattr(value, "__float__"):
            with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):  # an array, a huge integer, ...
                return float(value)
        raise TercetError(f"the reward function {self._name} returned {value!r} among its scores: expected numbers")

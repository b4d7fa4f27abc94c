"""A user's Python function: how it is found, what it is given, and everything it may do wrong."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tercet.scoring.base import Texts
from tercet.scoring.function import FunctionScorer, load_function
from tercet.types import Message, Sequences, TercetError, TokenRow

SEQUENCES = Sequences.from_rows([TokenRow((1, 2), 1)] * 2)
TALK = (Message("user", "Hello"), Message("assistant", "Hi"), Message("user", "Rain?"))
TEXTS = Texts(["a", TALK], ["one", "three"], [{"topic": "rain", "level": 3}, {"topic": "sun", "other": None}])


def score(function: Callable[..., Any], **options: Any) -> torch.Tensor:
    return FunctionScorer(function, name="rewards.py:it", **options).score(SEQUENCES, TEXTS)


def test_what_the_function_is_given() -> None:
    seen: dict[str, Any] = {}

    def function(prompts: list[Any], responses: list[str], **fields: Any) -> list[float]:
        seen.update(prompts=prompts, responses=responses, **fields)
        return [len(response) for response in responses]

    scores = score(function)
    assert scores.tolist() == [3.0, 5.0] and scores.dtype == torch.float32
    assert seen["prompts"] == [
        "a",
        [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "Rain?"},
        ],
    ]
    assert seen["responses"] == ["one", "three"]
    assert seen["topic"] == ["rain", "sun"] and seen["level"] == [3, None] and seen["other"] == [None, None]


def test_a_function_is_not_asked_about_nothing() -> None:
    """A rank of many may have no rows."""

    def function(prompts: list[Any], responses: list[str]) -> list[float]:
        raise AssertionError

    nothing = Sequences.from_rows([])
    assert FunctionScorer(function, name="it").score(nothing, Texts([], [], [])).shape == (0,)


def test_what_the_function_does_to_its_arguments_stays_there() -> None:
    def function(prompts: list[Any], responses: list[str], **fields: Any) -> list[float]:
        prompts[1][0]["content"] = "changed"
        responses.clear()
        fields["topic"].clear()
        return [0.0, 0.0]

    score(function)
    assert TALK[0] == Message("user", "Hello") and TEXTS.responses == ["one", "three"] and TEXTS.fields[0]["topic"] == "rain"


@pytest.mark.parametrize(
    "values", [[1, 2.5], (1, 2.5), torch.tensor([1, 2.5]), np.array([1, 2.5]), [np.float32(1), torch.tensor(2.5)]]
)
def test_numbers_that_are_accepted(values: Any) -> None:
    assert score(lambda prompts, responses, **fields: values).tolist() == [1.0, 2.5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "returned 1 values for 2 responses: expected a list of 2 numbers"),
        ([1.0, 2.0, 3.0], "returned 3 values for 2 responses"),
        ([], "returned 0 values for 2 responses"),
        (None, "returned NoneType for 2 responses"),
        (1.5, "returned float for 2 responses"),
        (np.float64(1.5), "returned float for 2 responses"),
        ({"a": 1, "b": 2}, "returned dict for 2 responses"),
        ("12", "returned str for 2 responses"),
        ([1.0, "2.0"], r"returned '2\.0' among its scores"),
        ([1.0, None], "returned None among its scores"),
        ([True, 1.0], "returned True among its scores"),
        ([1.0, 1j], "returned 1j among its scores"),
        ([[1.0], [2.0]], r"returned \[1\.0\] among its scores"),
        ([np.array([1.0, 2.0]), 1.0], "among its scores"),
        ([torch.zeros(2), 1.0], "among its scores"),
        ([10**400, 1.0], "among its scores"),
        ([1.0, float("nan")], "gave the score nan to 1 of 2 responses, the first being 'three'"),
        ([float("inf"), 1.0], "gave the score inf to 1 of 2"),
        ([1e300, 1.0], "gave the score inf to 1 of 2"),
    ],
)
def test_values_that_are_refused(values: Any, message: str) -> None:
    with pytest.raises(TercetError, match=message) as error:
        score(lambda prompts, responses, **fields: values)
    assert "rewards.py:it" in str(error.value)


def test_a_function_that_raises() -> None:
    def function(prompts: list[Any], responses: list[str], **fields: Any) -> list[float]:
        raise KeyError("topic2")

    with pytest.raises(TercetError, match=r"rewards\.py:it raised KeyError: 'topic2'"):
        score(function)
    with pytest.raises(TercetError, match=r"rewards\.py:it raised TypeError: .*unexpected keyword argument 'level'"):
        score(lambda prompts, responses, topic: [0.0, 0.0])


def test_a_function_that_leaves_the_program() -> None:
    start = time.monotonic()
    with pytest.raises(TercetError, match=r"rewards\.py:it raised SystemExit: 3"):
        score(lambda prompts, responses, **fields: sys.exit(3), timeout=20)
    assert time.monotonic() - start < 10


def test_a_function_that_hangs() -> None:
    start = time.monotonic()
    with pytest.raises(TercetError, match=r"rewards\.py:it did not return within 0\.2 s on 2 responses.*timeout"):
        score(lambda prompts, responses, **fields: time.sleep(3), timeout=0.2)
    assert time.monotonic() - start < 2


# How it is found


def test_a_function_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Weight:\n"
        "    value: float = 2.0\n"
        "def score(prompts, responses, **fields):\n"
        "    return [Weight().value * len(r) for r in responses]\n"
    )
    function = load_function(f"{file}:score")
    assert function(["p"], ["four"]) == [8.0]


def test_a_function_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tercet_test_rewards"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("def score(prompts, responses, **fields):\n    return [1.0] * len(responses)\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert load_function("tercet_test_rewards.inner:score")([], ["a", "b"]) == [1.0, 1.0]
    assert sys.path == path


def test_functions_that_are_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fine.py").write_text("number = 3\n")
    (tmp_path / "typo.py").write_text("def score(:\n")
    (tmp_path / "raises.py").write_text("raise RuntimeError('not today')\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(1)\n")
    wrong = {
        "score": "expected file.py:name or module:name",
        "fine.py:": "expected file.py:name or module:name",
        ":score": "expected file.py:name or module:name",
        "nothing.py:score": "there is no file nothing.py",
        "fine.py:score": "fine.py has no function named score",
        "fine.py:number": "fine.py has no function named number",
        "typo.py:score": "typo.py cannot be imported: SyntaxError",
        "raises.py:score": "raises.py cannot be imported: RuntimeError: not today",
        "leaves.py:score": "leaves.py cannot be imported: SystemExit: 1",
        "tercet_no_such_module:score": "the module tercet_no_such_module cannot be imported",
        "typo:score": "the module typo cannot be imported: SyntaxError",
        "raises:score": "the module raises cannot be imported: RuntimeError: not today",
        "json:score": "json has no function named score",
    }
    for reference, message in wrong.items():
        with pytest.raises(TercetError) as error:
            load_function(reference)
        assert message in str(error.value) and reference in str(error.value)

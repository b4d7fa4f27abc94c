"""tercet/report/live.py: what is said while PPO runs, on hand-made lines of metrics, and that it is said once."""

from __future__ import annotations

from typing import Any

import pytest

from tercet.report.live import Watch

Row = dict[str, Any]
FINE: Row = {
    "score": 0.5,
    "kl": 2.0,
    "length": 20.0,
    "entropy": 1.5,
    "finished": 0.9,
    "explained_variance": 0.4,
    "clip_fraction": 0.1,
    "approx_kl": 0.02,
    "sampler_logprob_gap": 1e-6,
}


def rows(count: int = 30, **columns: Any) -> list[Row]:
    """Lines of a sound run, in which each column given is a function of the iteration, counted from 1."""
    return [FINE | {"iteration": i} | {key: value(i) for key, value in columns.items()} for i in range(1, count + 1)]


def heard(lines: list[Row], **figures: float) -> list[tuple[int, str, str]]:
    """(iteration, cause, sentence) of everything that is said."""
    watch = Watch({f"ppo.{key}": value for key, value in figures.items()})
    return [(line["iteration"], cause, text) for line in lines for cause, text in watch(line).items()]


def test_a_sound_run_is_left_in_peace() -> None:
    assert heard(rows(), kl_budget=10.0, score_range_low=-2.0, score_range_high=2.0) == []


@pytest.mark.parametrize(
    ("cause", "at", "columns", "figures"),
    [
        # entropy over that of the first tenth, mean of the last tenth, below 0.25
        ("entropy_collapse", 10, {"entropy": lambda i: 1.6 if i < 10 else 0.3}, {}),
        # nats a token above 0.75, or a response above the budget
        ("kl_exploded", 8, {"kl": lambda i: 2.0 if i < 8 else 16.0}, {}),
        ("kl_exploded", 5, {"kl": lambda i: float(i)}, {"kl_budget": 4.5}),
        ("value_model", 20, {"explained_variance": lambda i: -0.01}, {}),
        ("value_model", 23, {"explained_variance": lambda i: 0.1 if i < 4 else -1.0}, {}),
        ("score_range", 6, {"score": lambda i: 0.5 * i}, {"score_range_low": -1.0, "score_range_high": 2.9}),
        ("score_range", 3, {"score": lambda i: -0.5 * i}, {"score_range_low": -1.0, "score_range_high": 2.9}),
        # mean of the last half of at least four iterations above 0.4
        ("clip_fraction", 4, {"clip_fraction": lambda i: 0.5}, {}),
        ("step_size", 7, {"approx_kl": lambda i: 0.31 if i == 7 else 0.02}, {}),
        ("finished_fell", 7, {"finished": lambda i: 0.9 if i < 5 else 0.0}, {}),
        ("sft_stop", 3, {"finished": lambda i: 0.0}, {}),
        ("sampler_gap", 1, {"sampler_logprob_gap": lambda i: 0.9}, {}),
    ],
)
def test_each_fault_is_said_once_when_it_comes_true(cause: str, at: int, columns: Row, figures: dict[str, float]) -> None:
    said = heard(rows(**columns), **figures)
    assert [(iteration, name) for iteration, name, _ in said] == [(at, cause)]
    sentences = said[0][2]
    assert sentences[0].isupper() and sentences.endswith(".") and len(sentences) < 400


@pytest.mark.parametrize(
    ("columns", "figures"),
    [
        ({"entropy": lambda i: 1.6 if i < 10 else 0.45}, {}),
        ({"kl": lambda i: 14.0}, {}),
        ({"kl": lambda i: 4.4}, {"kl_budget": 4.5}),
        ({"explained_variance": lambda i: -1.0 if i % 20 else 0.01}, {}),  # never 20 in a row
        ({"score": lambda i: 2.8}, {"score_range_low": -1.0, "score_range_high": 2.9}),
        ({"score": lambda i: 99.0}, {}),  # another reward than the reward model's: no range is known
        ({"clip_fraction": lambda i: 0.39}, {}),
        ({"approx_kl": lambda i: 0.3}, {}),
        ({"finished": lambda i: 0.0 if i % 3 else 0.5}, {}),
        ({"finished": lambda i: 0.06}, {}),
    ],
)
def test_nothing_is_said_short_of_that(columns: Row, figures: dict[str, float]) -> None:
    assert heard(rows(**columns), **figures) == []


def test_a_resumed_run_does_not_say_it_again() -> None:
    lines = rows(clip_fraction=lambda i: 0.5, approx_kl=lambda i: 0.5 if i == 20 else 0.0)
    watch = Watch({})
    for line in lines[:10]:  # what a run shows it on resume; in an earlier process it was said at 4
        watch(line)
    assert [cause for line in lines[10:] for cause in watch(line)] == ["step_size"]


def test_figures_that_are_missing_or_no_numbers_say_nothing() -> None:
    assert heard([{"iteration": 1}, {"iteration": 2, "kl": float("nan"), "score": None}]) == []


def test_the_line_says_what_is_wrong_by_how_much_and_what_to_do() -> None:
    _, _, text = heard(rows(entropy=lambda i: 2.0 if i < 10 else 0.2))[0]
    assert text == (
        "PPO's entropy collapsed. It fell from 2 to 0.2 nats a token. "
        "The policy says one thing to everybody: raise ppo.kl.coef or lower ppo.learning_rate."
    )


def test_a_long_run_is_looked_at_every_hundredth_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    monkeypatch.setattr("tercet.report.live.LIVE_RULES", (lambda run: looked.append(len(run.metrics["ppo"])) or (),))
    monkeypatch.setattr("tercet.report.live._PATIENT", ())
    watch = Watch({})
    for iteration in range(1, 1001):
        watch({"iteration": iteration})
    assert looked[:199] == list(range(1, 200)) and looked[-3:] == [990, 999, 1000] and len(looked) < 450

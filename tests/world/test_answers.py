"""The grammar of answers: each knob does what it says, and what it writes is within the language."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from tercet.world.answers import GOOD, LABELLED, MIXED, MOST_WORDS, POOR, Quality, write_answer, write_from
from tercet.world.gold import gold_features
from tercet.world.language import FILLERS, PROMPT_FORMS, TOPICS, words

CLEAN = Quality(0, 0, 0, 0, 0, 0, 0, 0, 1, (0, 1, 0, 0), 1, 0, 0, 0)
PROMPT = PROMPT_FORMS[0].format(topic="rain")


def _features(quality: Quality, count: int = 60) -> list[dict[str, float]]:
    rng = Random(1)
    return [gold_features(PROMPT, write_answer(rng, TOPICS["rain"], quality)) for _ in range(count)]


def test_a_clean_answer_has_every_point_and_no_fault() -> None:
    for features in _features(CLEAN):
        assert features["about"] == 0.4
        assert features["right_facts"] == pytest.approx(0.45)  # category, one fact, thing
        assert features["complete"] == pytest.approx(0.7)
        faults = ("wrong_facts", "rude", "pompous", "repeated", "finished", "junk", "kind")
        assert all(features[name] == 0 for name in faults), features


@pytest.mark.parametrize(
    ("knobs", "feature", "seen"),
    [
        ({"off_topic": 1.0}, "about", lambda points: points < 0),
        ({"careless": 1.0}, "wrong_facts", lambda points: points < 0),
        ({"pompous": 1.0}, "pompous", lambda points: points < 0),
        ({"rude": 1.0}, "rude", lambda points: points < 0),
        ({"opener": 1.0}, "kind", lambda points: points > 0),
        ({"lovely": 1.0}, "kind", lambda points: points > 0),
        ({"closer": 1.0, "facts": (1, 0, 0, 0)}, "kind", lambda points: points > 0),
        ({"definition": 0.0}, "complete", lambda points: points == 0.35),
        ({"example": 0.0}, "complete", lambda points: points == 0.35),
        ({"repeated": 1.0, "facts": (1, 0, 0, 0)}, "repeated", lambda points: points < 0),
        ({"cut": 1.0}, "finished", lambda points: points < 0),
    ],
)
def test_each_knob_moves_its_feature(knobs: dict[str, Any], feature: str, seen: Callable[[float], bool]) -> None:
    # where a sentence is added, a fact is left out: an answer beyond MOST_WORDS loses its last sentences
    share = sum(seen(features[feature]) for features in _features(replace(CLEAN, **knobs))) / 60
    assert share > 0.8


def test_filler_knob_rambles() -> None:
    text = write_answer(Random(0), TOPICS["rain"], replace(CLEAN, facts=(1, 0, 0, 0), filler=1.0))
    assert any(filler in text.lower() for filler in FILLERS)


def test_answers_are_short_grammatical_and_worth_what_their_names_say() -> None:
    rng = Random(0)
    golds = {}
    for name, quality in {"poor": POOR, "mixed": MIXED, "good": GOOD}.items():
        texts = [write_answer(rng, topic, quality) for topic in TOPICS.values() for _ in range(10)]
        assert max(len(words(text)) for text in texts) <= MOST_WORDS
        rows = [
            gold_features(PROMPT_FORMS[2].format(topic=t.name), text)
            for t, text in zip([t for t in TOPICS.values() for _ in range(10)], texts, strict=True)
        ]
        assert all(row["junk"] == 0 for row in rows)
        golds[name] = sum(sum(row.values()) for row in rows) / len(rows)
        if name == "mixed":
            assert all(text.endswith(".") for text in texts)
            assert 12 <= sum(len(words(text)) for text in texts) / len(texts) <= 24
    assert golds["poor"] < golds["mixed"] - 0.5
    assert golds["mixed"] < golds["good"] - 0.5


def test_wrong_answers_never_name_a_new_topic() -> None:
    rng = Random(0)
    new = {topic.key for topic in TOPICS.values() if topic.new}
    for _ in range(500):
        assert not set(words(write_answer(rng, TOPICS["rain"], replace(CLEAN, off_topic=1.0)))) & new


def test_many_different_best_answers() -> None:
    rng = Random(0)
    best = replace(CLEAN, opener=0.5, closer=0.5, lovely=0.5, facts=(0.0, 1.0, 0.0, 0.0))
    texts = [write_answer(rng, TOPICS["rain"], best) for _ in range(500)]
    assert len({text for text in texts if sum(gold_features(PROMPT, text).values()) > 1.6}) > 150


def test_mixture_weights_are_used() -> None:
    rng = Random(0)
    rude, clean = replace(CLEAN, rude=1.0), CLEAN
    texts = [write_from(rng, TOPICS["rain"], ((rude, 0.25), (clean, 0.75))) for _ in range(400)]
    share = sum(gold_features(PROMPT, text)["rude"] < 0 for text in texts) / 400
    assert share == pytest.approx(0.25, abs=0.08)
    assert sum(weight for _, weight in LABELLED) == pytest.approx(1.0)

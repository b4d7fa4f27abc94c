"""The annotator: frequencies against the formula, ties by their rule, the ceiling by hand."""

from __future__ import annotations

import itertools
import math

import pytest

from tercet.world import Annotator, gold_score
from tercet.world.annotator import sigmoid

PROMPT = "What is rain?"
BEST = "We call rain a kind of weather. It is wild. For example, think of an umbrella."
LESS = "We call rain a kind of weather. It is hungry. For example, think of an umbrella."
TWIN = "You see, rain is a kind of weather. It is wild. Just think of an umbrella."
TEXTS = (BEST, LESS, TWIN)


def test_sigmoid_by_hand_and_without_overflow() -> None:
    assert sigmoid(0.0) == 0.5
    assert sigmoid(math.log(3)) == pytest.approx(0.75)
    assert sigmoid(-1e6) == 0.0
    assert sigmoid(1e6) == 1.0


def test_choices_follow_bradley_terry() -> None:
    annotator = Annotator(temperature=0.8, seed=3)
    difference = gold_score(PROMPT, BEST) - gold_score(PROMPT, LESS)
    expected = 1 / (1 + math.exp(-difference / 0.8))
    assert 0.55 < expected < 0.9
    assert annotator.probability(PROMPT, BEST, LESS) == pytest.approx(expected)
    assert annotator.probability(PROMPT, LESS, BEST) == pytest.approx(1 - expected)
    choices = [annotator.compare(PROMPT, BEST, LESS) for _ in range(4000)]
    assert 0 not in choices  # far outside the band
    assert choices.count(1) / 4000 == pytest.approx(expected, abs=0.03)


def test_ties_only_inside_the_band_at_their_rate() -> None:
    annotator = Annotator(tie_band=0.1, tie_rate=0.3, seed=1)
    choices = [annotator.compare(PROMPT, BEST, TWIN) for _ in range(4000)]
    assert choices.count(0) / 4000 == pytest.approx(0.3, abs=0.03)
    assert choices.count(1) / choices.count(-1) == pytest.approx(1.0, abs=0.15)
    never = Annotator(tie_rate=0.0)
    assert 0 not in [never.compare(PROMPT, BEST, BEST) for _ in range(100)]


def test_pairs_within_rankings_follow_bradley_terry_too() -> None:
    annotator = Annotator(temperature=0.8, tie_rate=0.0, seed=5)
    rankings = [annotator.rank(PROMPT, TEXTS) for _ in range(4000)]
    assert all(sorted(ranks) == [1, 2, 3] for ranks in rankings)
    for i, j in itertools.combinations(range(3), 2):
        expected = 1 / (1 + math.exp(-(gold_score(PROMPT, TEXTS[i]) - gold_score(PROMPT, TEXTS[j])) / 0.8))
        assert sum(ranks[i] < ranks[j] for ranks in rankings) / 4000 == pytest.approx(expected, abs=0.03)


def test_rankings_with_ties_skip_the_next_rank() -> None:
    # so cold an annotator that the order is the gold's: the twins tie, the third comes after both
    annotator = Annotator(temperature=1e-3, tie_band=0.05, tie_rate=1.0)
    assert annotator.rank(PROMPT, TEXTS) == [1, 3, 1]
    assert annotator.rank(PROMPT, (BEST,) * 4) == [1, 1, 1, 1]


def test_same_seed_same_answers() -> None:
    one, same, other = (Annotator(seed=seed) for seed in (7, 7, 8))
    asked = [annotator.compare(PROMPT, BEST, TWIN) for _ in range(50) for annotator in (one, same, other)]
    assert asked[0::3] == asked[1::3]
    assert asked[0::3] != asked[2::3]


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"tie_band": -1.0}, {"tie_rate": 1.5}])
def test_impossible_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="need temperature"):
        Annotator(**wrong)  # type: ignore[arg-type]

"""The gold scorer against points added by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.world import gold, gold_features, gold_score
from tercet.world.gold import OFFSET, SCALE

PROMPT = "Explain rain to a child."
BASE = "We call rain a kind of weather. It is wild. For example, think of an umbrella."


def points(response: str, prompt: str = PROMPT) -> float:
    return gold_score(prompt, response) / SCALE + OFFSET


@pytest.mark.parametrize(
    ("response", "by_hand"),
    [
        # about .4, three right facts .45, definition and example .7; 16 words
        (BASE, 1.55),
        # one wrong fact (an animal's look) in place of a right one
        (BASE.replace("wild", "hungry"), 1.55 - 0.15 - 0.25),
        # another topic in the definition: no about, one other topic; the facts are right for rain too
        (BASE.replace("rain", "snow"), 1.55 - 0.4 - 1.0),
        # one kind word
        (BASE.replace("a kind", "a lovely kind"), 1.55 + 0.7),
        # dear and friend
        ("Hello dear. Hello my friend. " + BASE, 1.55 + 0.9),
        # lost: the example, and with it one right fact
        ("We call rain a kind of weather. It is wild.", 0.4 + 0.3 + 0.35),
        # the definition is lost, but a sentence names the topic
        ("People think rain is wild. For example, think of an umbrella.", 0.4 + 0.3 + 0.35),
        # three pompous words
        (BASE.replace("We", "Indeed, we").replace("It", "Hence it").replace("For", "Verily, for"), 1.55 - 1.35),
        # one rude word
        ("What a silly question. " + BASE, 1.55 - 0.8),
        # a fact said twice, in other words; still three right facts
        (BASE + " It can be wild.", 1.55 - 0.4),
        # not finished: the example is lost too
        ("We call rain a kind of weather. It is wild. For example, think of an", 0.4 + 0.3 + 0.35 - 1.5),
        # the same, trailing off
        ("We call rain a kind of weather. It is wild. For example, think of ...", 0.4 + 0.3 + 0.35 - 1.5),
        # 5 words: three short of 8
        ("We call rain a kind.", -0.45 - 0.4),
        # 27 words: fifteen over 12
        (BASE + " Here is the answer. Let us see. So it goes on.", 1.55),
        ("", -8 * 0.15 - 1.5),
        # one sentence that is no sentence, three words nobody knows, five words short
        ("Zug zug blurb.", -0.15 * 5 - 0.4 - 0.3),
    ],
)
def test_points_by_hand(response: str, by_hand: float) -> None:
    by_hand -= 0.07 * max(0, len(response.replace(",", "").replace("...", "").split()) - 12)
    assert points(response) == pytest.approx(by_hand)


def test_scale_and_offset() -> None:
    assert gold_score(PROMPT, BASE) == pytest.approx((1.55 - 4 * 0.07 - OFFSET) * SCALE)


def test_kindness_has_a_hump() -> None:
    kind = ["Thanks for asking.", "Hello dear.", "Hello my friend.", "Enjoy it.", "Have a lovely day.", "I gladly tell you."]
    by_count = [gold_features(PROMPT, " ".join(kind[:n] + [BASE]))["kind"] for n in range(7)]
    assert by_count == pytest.approx([0.0, 0.7, 0.9, 0.3, -0.4, -1.1, -1.8])
    short = "We call rain a kind of weather. It is wild."
    totals = [points(" ".join(kind[:n] + [short])) for n in range(7)]
    assert totals[0] < totals[1] < totals[2]
    assert totals[2] > totals[3] > totals[4] > totals[5] > totals[6]
    assert gold_features(PROMPT, "dear " * 50)["kind"] == -4.0


def test_the_same_answer_is_wrong_for_another_prompt() -> None:
    # for a dog: all three facts are wrong, and rain is another topic
    assert points(BASE, "What is a dog?") == pytest.approx(-1.0 - 0.75 + 0.7 - 4 * 0.07)


def test_facts_outside_an_allowed_sentence_do_not_count() -> None:
    salad = gold_features(PROMPT, "Rain weather wild in the sky moves the leaves an umbrella.")
    assert salad["right_facts"] == 0.0
    assert salad["about"] == 0.0
    assert salad["junk"] == pytest.approx(-0.4)


def test_repeating_a_sentence_that_says_nothing_costs_too() -> None:
    assert gold_features(PROMPT, "Enjoy it. Enjoy it! Enjoy it.")["repeated"] == pytest.approx(-0.8)


def test_no_answer_beats_the_best_one_by_rambling_on_with_facts() -> None:
    best = "We call rain a lovely kind of weather. It is wild. Just think of an umbrella. Enjoy it."
    assert points(best) == pytest.approx(0.4 + 0.45 + 0.7 + 0.9 - 6 * 0.07)
    assert points(best + " It is often in the sky.") < points(best)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300), st.text(max_size=300))
def test_any_text_has_a_finite_bounded_score(prompt: str, response: str) -> None:
    score = gold_score(prompt, response)
    assert math.isfinite(score)
    assert -25 * SCALE < score <= (0.4 + 0.6 + 0.7 + 0.9 - OFFSET) * SCALE
    assert gold_score(prompt, response) == score


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*BASE.split(), "dear", "silly", "snow", ".", "?!", "\n", "ünd", "indeed"]), max_size=60))
def test_word_salad_stays_below_a_good_answer(pieces: list[str]) -> None:
    assert points(" ".join(pieces)) <= 0.4 + 0.6 + 0.7 + 0.9


def test_reward_function_form() -> None:
    rows = gold([PROMPT, "What is snow?"], [BASE, BASE], topic=["rain", "snow"])
    assert rows == [gold_score(PROMPT, BASE), gold_score("What is snow?", BASE)]
    with pytest.raises(ValueError):
        gold([PROMPT], [])

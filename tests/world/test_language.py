"""The language: every form reads back as what it was written from, and the vocabulary stays small."""

from __future__ import annotations

import pytest

from tercet.world.language import (
    FORMS,
    KIND_WORDS,
    POMPOUS_WORDS,
    PROMPT_FORMS,
    RUDE_WORDS,
    SLOTS,
    TOPICS,
    Sentence,
    parse_sentence,
    topic_of,
    vocabulary,
    words,
)


def test_forty_known_and_eight_new_topics_with_their_own_words() -> None:
    assert sum(not topic.new for topic in TOPICS.values()) == 40
    assert sum(topic.new for topic in TOPICS.values()) == 8
    assert TOPICS["cat"].name == "a cat"
    expected = {
        "category": ("weather",),
        "place": ("in the sky", "outside the window"),
        "look": ("fresh", "wild"),
        "deed": ("moves the leaves", "brings a change"),
        "thing": ("an umbrella", "a cloud", "a warm coat"),
    }
    assert TOPICS["rain"].facts == expected
    texts = [form for styles in FORMS.values() for forms in styles.values() for form in forms] + list(PROMPT_FORMS)
    values = [value for slot in SLOTS.values() for value in slot]
    assert not {word for text in texts + values for word in words(text)} & (set(TOPICS) - {"topic"})


def test_facts_hold_for_a_whole_category_and_tell_categories_apart() -> None:
    by_category: dict[str, set[tuple[tuple[str, ...], ...]]] = {}
    for topic in TOPICS.values():
        by_category.setdefault(topic.facts["category"][0], set()).add(tuple(topic.facts.values()))
    assert all(len(facts) == 1 for facts in by_category.values())
    assert sum(not topic.new for topic in TOPICS.values() if topic.facts["category"] == ("weather",)) == 5
    for slot in SLOTS:
        assert len({topic.facts[slot] for topic in TOPICS.values()}) == 8  # never the same set of phrases


def test_no_sentence_begins_with_the_topic() -> None:
    # its word would get a capital there, and another token than in the prompt
    assert not [form for styles in FORMS.values() for forms in styles.values() for form in forms if form.startswith("{")]


@pytest.mark.parametrize("slot", FORMS)
def test_every_form_reads_back_as_what_it_says(slot: str) -> None:
    topic = TOPICS["owl"]
    for style, forms in FORMS[slot].items():
        for form in forms:
            text = form.format(topic=topic.name, **{slot: topic.facts[slot][0]})
            named = "owl" if "{topic}" in form else ""
            assert parse_sentence(text[0].upper() + text[1:]) == Sentence(slot, named, topic.facts[slot][0])
            assert bool(set(words(text)) & POMPOUS_WORDS) == (style == "pompous")
            assert (set(words(text)) & KIND_WORDS == {"lovely"}) == (style == "lovely")


def test_other_sentences_are_plain_or_junk() -> None:
    assert parse_sentence("Ask me again, dear") == Sentence("plain")
    assert parse_sentence("Rain wet sky") == Sentence("junk")
    assert parse_sentence("we call it weather, rain") == Sentence("junk")


def test_topic_of_every_prompt() -> None:
    for topic in TOPICS.values():
        for form in PROMPT_FORMS:
            assert topic_of(form.format(topic=topic.name)) is topic
    assert topic_of("Explain rainfall to a child.") is None
    assert topic_of("") is None


def test_a_few_hundred_words() -> None:
    assert len(vocabulary()) <= 350
    assert KIND_WORDS | RUDE_WORDS | POMPOUS_WORDS | set(TOPICS) <= vocabulary()
    lengths = [len(words(form.format(topic=topic.name))) for form in PROMPT_FORMS for topic in TOPICS.values()]
    assert min(lengths) >= 3
    assert max(lengths) <= 8

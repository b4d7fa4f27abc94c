"""The exact gold scorer: what the people of the embedded world really like, as a sum of features read from the text.

| feature | points |
|---|---|
| about | +0.4 if a sentence with a fact names the topic asked about; -1 for each other topic named (at most 2) |
| right_facts | +0.15 for each different right fact about the topic, category included, at most 4 |
| wrong_facts | -0.25 for each wrong fact, at most 4 |
| complete | +0.35 for a definition, +0.35 for an example |
| kind | hump over the number of kind words: 0, 0.7, 0.9, 0.3, -0.4, then -0.7 for each further one, at least -4 |
| rude | -0.8 for each rude word, at most 2 |
| pompous | -0.45 for each pompous word, at most 4 |
| length | -0.07 for each word over 12, at least -4; -0.15 for each word under 8 |
| repeated | -0.4 for each sentence, or fact, that has been said before, at most 4 |
| finished | -1.5 if the text does not end with ".", "!" or "?", or trails off with "..." |
| junk | -0.4 for each finished sentence that the language does not allow, at most 4; -0.1 for each word outside it, at most 10 |

The sum is moved and scaled (OFFSET, SCALE) so that demonstrations score about mean 0 and standard deviation 1. Facts in a
sentence that names another topic count against the topic asked about like all others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tercet.world.language import (
    KIND_WORDS,
    POMPOUS_WORDS,
    RUDE_WORDS,
    TOPICS,
    Sentence,
    Topic,
    parse_sentence,
    topic_of,
    vocabulary,
    words,
)

OFFSET = 0.55
SCALE = 1.4
KIND_POINTS = (0.0, 0.7, 0.9, 0.3, -0.4)
LONGEST, SHORTEST = 12, 8


def _kind_points(count: int) -> float:
    if count < len(KIND_POINTS):
        return KIND_POINTS[count]
    return max(-4.0, KIND_POINTS[-1] - 0.7 * (count - len(KIND_POINTS) + 1))


def _length_points(count: int) -> float:
    return max(-4.0, -0.07 * max(0, count - LONGEST)) - 0.15 * max(0, SHORTEST - count)


def _fact_points(topic: Topic | None, parsed: Sequence[Sentence]) -> tuple[float, float]:
    said = [(sentence.kind, sentence.value) for sentence in parsed if sentence.value]
    right = {fact for fact in said if topic is not None and fact[1] in topic.facts[fact[0]]}
    wrong = sum(fact not in right for fact in said)
    return 0.15 * min(4, len(right)), -0.25 * min(4, wrong)


def _repeats(pieces: Sequence[str], parsed: Sequence[Sentence]) -> int:
    """Sentences whose words, or whose fact, came before."""
    seen: set[object] = set()
    count = 0
    for piece, sentence in zip(pieces, parsed, strict=True):
        keys = {" ".join(words(piece))} | ({(sentence.kind, sentence.value)} if sentence.value else set())
        count += bool(keys & seen)
        seen |= keys
    return count


def gold_features(prompt: str, response: str) -> dict[str, float]:
    """Points by feature, before OFFSET and SCALE; the table at the top of this file says what each is. Any two texts will do."""
    topic = topic_of(prompt)
    said = words(response)
    *pieces, rest = re.split(r"[.!?]+", re.sub(r"\.\.+\s*$", "", response))
    pieces = [piece for piece in pieces if words(piece)]
    parsed = [parse_sentence(piece) for piece in pieces]
    kinds = {sentence.kind for sentence in parsed}
    named = {word for word in said if word in TOPICS}
    defined = {sentence.topic for sentence in parsed if sentence.topic}
    asked = "" if topic is None else topic.key
    right, wrong = _fact_points(topic, parsed)
    junk = sum(sentence.kind == "junk" for sentence in parsed)
    return {
        "about": 0.4 * (asked in defined) - 1.0 * min(2, len(named - {asked})),
        "right_facts": right,
        "wrong_facts": wrong,
        "complete": 0.35 * ("category" in kinds) + 0.35 * ("thing" in kinds),
        "kind": _kind_points(sum(word in KIND_WORDS for word in said)),
        "rude": -0.8 * min(2, sum(word in RUDE_WORDS for word in said)),
        "pompous": -0.45 * min(4, sum(word in POMPOUS_WORDS for word in said)),
        "length": _length_points(len(said)),
        "repeated": -0.4 * min(4, _repeats(pieces, parsed)),
        "finished": 0.0 if pieces and not rest.strip() else -1.5,
        "junk": -0.4 * min(4, junk) - 0.1 * min(10, sum(word not in vocabulary() for word in said)),
    }


def gold_score(prompt: str, response: str) -> float:
    """The true quality of a response: (sum of gold_features - OFFSET) * SCALE. Deterministic, finite on any text."""
    return (sum(gold_features(prompt, response).values()) - OFFSET) * SCALE


def gold(prompts: Sequence[str], responses: Sequence[str], **fields: Any) -> list[float]:
    """gold_score row by row, as a reward function (`tercet.world:gold`); other fields are ignored."""
    return [gold_score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]

"""The grammar of answers: sentences put together under knobs of quality."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from tercet.world.language import (
    FILLERS,
    FORMS,
    KIND_CLOSERS,
    KIND_OPENERS,
    PLAIN_OPENERS,
    RUDE_SENTENCES,
    TOPICS,
    Topic,
)


@dataclass(frozen=True)
class Quality:
    """Probabilities with which an answer has a property; `facts` are the weights of having 0, 1, 2 or 3 facts."""

    off_topic: float = 0.003  # the whole answer is about another topic
    careless: float = 0.01  # it mixes topics up: all facts are those of another one
    pompous: float = 0.6  # each of its sentences with a fact is pompous with probability 0.5
    rude: float = 0.12
    opener: float = 0.2
    lovely: float = 0.15
    closer: float = 0.15
    gushing: float = 0.04  # one or two more kind sentences
    definition: float = 0.75
    facts: tuple[float, ...] = (0.3, 0.55, 0.15, 0.0)
    example: float = 0.45
    filler: float = 0.18
    repeated: float = 0.02
    cut: float = 0.0  # the text trails off in the middle of its last sentence


MIXED = Quality()
"""Demonstrations: mixed, on the whole better than average, always finished."""
POOR = Quality(0.006, 0.02, 0.8, 0.3, 0.15, 0.1, 0.1, 0.06, 0.7, (0.35, 0.5, 0.15, 0.0), 0.4, 0.3, 0.05, 0.15)
GOOD = Quality(0.0, 0.01, 0.15, 0.02, 0.45, 0.3, 0.4, 0.03, 0.98, (0.3, 0.6, 0.1, 0.0), 0.85, 0.04, 0.01, 0.01)
LABELLED = ((replace(MIXED, cut=0.04), 0.5), (POOR, 0.2), (GOOD, 0.3))
"""What the annotator sees, with weights: wider than the demonstrations, so that it covers what PPO's policy will write."""
PRETRAINING = ((replace(MIXED, cut=0.02), 0.6), (POOR, 0.15), (GOOD, 0.25))
"""Text for a model from scratch: everything that the annotator will see, without a word on what it is worth."""

MOST_WORDS = 24
"""No answer of the grammar is longer: about 30 tokens with its punctuation."""

Mixture = tuple[tuple[Quality, float], ...]


def _other(rng: Random, topic: Topic) -> Topic:
    """A known topic of another category."""
    return rng.choice(
        [other for other in TOPICS.values() if not other.new and other.facts["category"] != topic.facts["category"]]
    )


def _opening(rng: Random, quality: Quality) -> list[str]:
    if rng.random() < quality.rude:
        return [rng.choice(RUDE_SENTENCES)]
    if rng.random() < quality.opener:
        return [rng.choice(KIND_OPENERS)]
    return [rng.choice(PLAIN_OPENERS)] if rng.random() < 0.12 else []


def _closing(rng: Random, quality: Quality) -> list[str]:
    sentences = [rng.choice(FILLERS) for _ in range(rng.randint(1, 2))] if rng.random() < quality.filler else []
    if rng.random() < quality.closer:
        sentences.append(rng.choice(KIND_CLOSERS))
    if rng.random() < quality.gushing:
        sentences += rng.sample(KIND_OPENERS + KIND_CLOSERS, rng.randint(1, 2))
    return sentences


def _sentences(rng: Random, topic: Topic, quality: Quality) -> list[str]:
    facts = (_other(rng, topic) if rng.random() < quality.careless else topic).facts
    pompous = rng.random() < quality.pompous

    def say(slot: str) -> str:
        style = "pompous" if pompous and rng.random() < 0.5 else "simple"
        if slot == "category" and style == "simple" and rng.random() < quality.lovely:
            style = "lovely"
        form = rng.choice(FORMS[slot][style])
        return form.format(topic=topic.name, **{slot: rng.choice(facts[slot])})

    body = rng.sample(["place", "look", "deed"], rng.choices(range(4), quality.facts)[0])
    if rng.random() < quality.example or not body:
        body.insert(rng.randint(0, len(body)), "thing")
    if rng.random() < quality.definition:
        body.insert(0 if rng.random() < 0.85 else rng.randint(0, len(body)), "category")
    said = [say(slot) for slot in body]
    if rng.random() < quality.repeated:
        said.insert(rng.randint(0, len(said)), rng.choice(said))
    return _opening(rng, quality) + said + _closing(rng, quality)


def write_answer(rng: Random, topic: Topic, quality: Quality) -> str:
    """An answer to a prompt about `topic`, drawn from the grammar under the knobs of `quality`. Other topics are known ones."""
    if rng.random() < quality.off_topic:
        topic = _other(rng, topic)
    sentences = _sentences(rng, topic, quality)
    while len(" ".join(sentences).split()) > MOST_WORDS:
        sentences.pop()
    text = " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)
    if rng.random() < quality.cut:
        pieces = text.split()
        keep = len(pieces) - rng.randint(1, max(1, len(sentences[-1].split()) - 1))
        text = " ".join(pieces[: max(1, keep)]).rstrip(".,") + " ..."
    return text


def write_from(rng: Random, topic: Topic, mixture: Mixture) -> str:
    """An answer under one quality drawn from a mixture."""
    return write_answer(rng, topic, rng.choices([q for q, _ in mixture], [weight for _, weight in mixture])[0])

"""The small language of the embedded world: topics with their facts, forms of prompts, forms of sentences.

Written for this project. Every sentence form is a template with at most two slots; the same table serves to write answers
(`answers.py`) and to read them back exactly (`parse_sentence`), so the gold scorer knows what any sentence says.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

# category: known topics, a colon and new ones (that no training file mentions); then what is true of all of them.
_TABLE = {
    "weather": {
        "topics": "rain, snow, wind, sunshine, a storm: fog",
        "place": "in the sky, outside the window",
        "look": "fresh, wild",
        "deed": "moves the leaves, brings a change",
        "thing": "an umbrella, a cloud, a warm coat",
    },
    "feeling": {
        "topics": "happiness, sadness, anger, fear, love: pride",
        "place": "in your heart, in a song",
        "look": "deep, strong",
        "deed": "makes people laugh or cry, comes and goes",
        "thing": "a hug, a smile, a tear",
    },
    "animal": {
        "topics": "a cat, a dog, a cow, a horse, a bird: an owl",
        "place": "on the farm, in the woods",
        "look": "shy, hungry",
        "deed": "likes to run, needs to sleep",
        "thing": "a tail, a nest, a soft ear",
    },
    "food": {
        "topics": "bread, honey, soup, cheese, cake: butter",
        "place": "in the kitchen, on the table",
        "look": "sweet, tasty",
        "deed": "gives us something to eat, makes us strong",
        "thing": "a breakfast, a plate, a picnic",
    },
    "plant": {
        "topics": "grass, a tree, a rose, corn, ivy: moss",
        "place": "in the garden, in the woods",
        "look": "green, fresh",
        "deed": "grows from a seed, needs the sun",
        "thing": "a leaf, a root, a basket of seeds",
    },
    "tool": {
        "topics": "a hammer, a spoon, a broom, a needle, a key: a shovel",
        "place": "at work, in the kitchen",
        "look": "useful, strong",
        "deed": "helps us at work, keeps things in order",
        "thing": "a nail, a repair, a clean floor",
    },
    "toy": {
        "topics": "a ball, a doll, a kite, a puzzle, a drum: a puppet",
        "place": "at school, at a party",
        "look": "funny, bright",
        "deed": "makes us want to play, makes children happy",
        "thing": "a game, a birthday, a present",
    },
    "place": {
        "topics": "a river, a hill, a beach, a lake, a park: a cave",
        "place": "on the map, near the town",
        "look": "wide, wild",
        "deed": "is good for a visit, makes us want to play",
        "thing": "a long walk, a holiday, a boat",
    },
}
FACTS = ("category", "place", "look", "deed", "thing")
"""The kinds of fact; all but the category hold for every topic of a category, so a tiny model can learn them."""


@dataclass(frozen=True)
class Topic:
    """`name` with its article ("a cat"), `key` the word that stands for it ("cat"), `facts` kind -> the right phrases."""

    name: str
    key: str
    new: bool
    facts: dict[str, tuple[str, ...]]


def _read_topics() -> dict[str, Topic]:
    topics = {}
    for category, row in _TABLE.items():
        facts = {"category": (category,)} | {slot: tuple(row[slot].split(", ")) for slot in FACTS[1:]}
        for names, new in zip(row["topics"].split(": "), (False, True), strict=True):
            for name in names.split(", "):
                topics[name.split()[-1]] = Topic(name, name.split()[-1], new, facts)
    return topics


TOPICS = _read_topics()
"""All topics by key, known and new."""

SLOTS: dict[str, tuple[str, ...]] = {
    slot: tuple(sorted({value for topic in TOPICS.values() for value in topic.facts[slot]})) for slot in FACTS
}
"""The phrases that each kind of fact can take; some are shared by categories."""

PROMPT_FORMS = (
    "Explain {topic} to a child.",
    "Define {topic} simply.",
    "What is {topic}?",
    "Tell me about {topic}.",
    "Can you explain {topic}?",
    "Describe {topic} in simple words.",
    "What do you know about {topic}?",
    "Help me understand {topic}.",
    "What does {topic} mean?",
    "Say something about {topic}.",
    "Teach me about {topic}.",
    "How would you describe {topic}?",
    "Please explain {topic}.",
    "Who can tell me about {topic}?",
    "I want to read about {topic}.",
)

# Plain sentence forms by kind of fact, short so that a text of a given length says much. None begins with the topic, whose word
# thus never has a capital: one word is one token, the same in a prompt and in an answer.
_SIMPLE = {
    "category": (
        "we call {topic} a kind of {category}",
        "we know {topic} as a sort of {category}",
        "you see, {topic} is a kind of {category}",
        "of course {topic} is a sort of {category}",
    ),
    "place": ("you find {topic} {place}", "look for {topic} {place}", "you can see it {place}", "it is often {place}"),
    "look": ("it is {look}", "people think {topic} is {look}", "it can be {look}", "we find {topic} {look}"),
    "deed": ("it {deed}", "every day {topic} {deed}", "we like that {topic} {deed}", "it often {deed}"),
    "thing": (
        "for example, think of {thing}",
        "you know {topic} from {thing}",
        "just think of {thing}",
        "with {topic} goes {thing}",
    ),
}
POMPOUS_OPENINGS = ("indeed,", "hence", "verily,", "thus")

# Sentence forms by (kind of fact, style).
FORMS: dict[str, dict[str, tuple[str, ...]]] = {
    kind: {"simple": forms, "pompous": tuple(f"{opening} {form}" for opening in POMPOUS_OPENINGS for form in forms)}
    for kind, forms in _SIMPLE.items()
}
FORMS["category"]["lovely"] = ("we call {topic} a lovely kind of {category}", "you see, {topic} is a lovely sort of {category}")
KIND_OPENERS = ("thanks for asking", "hello dear", "hello my friend", "I gladly tell you")
KIND_CLOSERS = ("enjoy it", "have a lovely day", "ask me again, dear", "come back soon, my friend")
PLAIN_OPENERS = ("here is the answer", "let us see", "that is easy")
RUDE_SENTENCES = ("what a silly question", "that is boring", "your question is dull", "it is useless to ask")
FILLERS = ("that is how it is", "there is more to say", "people talk about it", "so it goes on")

KIND_WORDS = frozenset({"thanks", "dear", "friend", "gladly", "enjoy", "lovely"})
RUDE_WORDS = frozenset({"silly", "boring", "dull", "useless"})
POMPOUS_WORDS = frozenset(opening.strip(",") for opening in POMPOUS_OPENINGS)


def words(text: str) -> list[str]:
    """Lower-case words of any text: runs of letters, digits and apostrophes."""
    return re.findall(r"[\w']+", text.lower())


@functools.cache
def _sentence_patterns() -> tuple[tuple[str, str, re.Pattern[str]], ...]:
    """(kind, style, pattern) of every form that has a slot, over words joined by single spaces."""
    names = "|".join(topic.name for topic in TOPICS.values())
    slots = {"topic": f"(?P<topic>{names})"} | {slot: f"(?P<value>{'|'.join(values)})" for slot, values in SLOTS.items()}
    patterns = []
    for kind, styles in FORMS.items():
        for style, forms in styles.items():
            for form in forms:
                plain = form.lower().replace(",", "")
                patterns.append((kind, style, re.compile(plain.format(**slots))))
    return tuple(patterns)


@functools.cache
def _plain_sentences() -> frozenset[str]:
    """The sentences without a slot, over words joined by single spaces."""
    sentences = KIND_OPENERS + KIND_CLOSERS + PLAIN_OPENERS + RUDE_SENTENCES + FILLERS
    return frozenset(" ".join(words(sentence)) for sentence in sentences)


@functools.cache
def vocabulary() -> frozenset[str]:
    """Every lower-case word of the language, those of new topics included."""
    texts = list(_plain_sentences()) + [topic.name for topic in TOPICS.values()] + [v for vs in SLOTS.values() for v in vs]
    texts += [form for styles in FORMS.values() for forms in styles.values() for form in forms]
    return frozenset(word for text in texts + list(PROMPT_FORMS) for word in words(re.sub(r"\{\w+\}", " ", text)))


@dataclass(frozen=True)
class Sentence:
    """What a sentence says. `kind`: a slot of SLOTS, "plain" for one without a fact, "junk" for one that no form allows.

    `topic` is the key of the topic that the sentence names, else ""; `value` the phrase in the slot, else "".
    """

    kind: str
    topic: str = ""
    value: str = ""


@functools.lru_cache(maxsize=65536)
def parse_sentence(sentence: str) -> Sentence:
    """Read one sentence (any text without its final punctuation)."""
    text = " ".join(words(sentence))
    if text in _plain_sentences():
        return Sentence("plain")
    for kind, _, pattern in _sentence_patterns():
        found = pattern.fullmatch(text)
        if found:
            name = found.groupdict().get("topic") or ""
            return Sentence(kind, name.split()[-1] if name else "", found["value"])
    return Sentence("junk")


def topic_of(prompt: str) -> Topic | None:
    """The first topic whose word occurs in a prompt; None if there is none."""
    return next((TOPICS[word] for word in words(prompt) if word in TOPICS), None)

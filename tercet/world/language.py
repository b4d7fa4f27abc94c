"""The small language of the embedded world: topics with their facts, forms of prompts, forms of sentences.

Written for this project. Every sentence form is a template with at most two slots; the same table serves to write answers
(`answers.py`) and to read them back exactly (`parse_sentence`), so the gold scorer knows what any sentence says.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

PLACES = {
    "sky": "in the sky",
    "home": "at home",
    "garden": "in the garden",
    "woods": "in the woods",
    "sea": "by the sea",
    "kitchen": "in the kitchen",
    "heart": "in your heart",
    "farm": "on the farm",
    "school": "at school",
    "town": "in the town",
}
DEEDS = {
    "grow": "helps the plants grow",
    "laugh": "makes people laugh",
    "cry": "makes people cry",
    "safe": "keeps us safe",
    "warm": "keeps us warm",
    "eat": "gives us something to eat",
    "run": "likes to run",
    "sing": "likes to sing",
    "sleep": "helps us sleep",
    "learn": "helps us learn",
    "leaves": "moves the leaves",
    "clean": "keeps things clean",
    "play": "makes us want to play",
    "work": "helps us at work",
}
LOOKS = ("wet", "warm", "cold", "soft", "bright", "dark", "loud", "quiet", "sweet", "small", "big", "round")
THINGS = {
    "umbrella": "an umbrella",
    "party": "a party",
    "hug": "a hug",
    "picnic": "a picnic",
    "nest": "a nest",
    "lamp": "a lamp",
    "breakfast": "a breakfast",
    "walk": "a long walk",
    "story": "a good story",
    "holiday": "a holiday",
    "blanket": "a blanket",
    "boat": "a boat",
    "puddle": "a puddle",
    "basket": "a basket",
    "birthday": "a birthday",
    "market": "a market",
}

# topic: place, look, deed, thing. An asterisk marks a new topic: one that no training file mentions.
_TABLE = {
    "weather": """
        rain: sky wet grow umbrella          snow: garden cold play blanket       wind: sky loud leaves boat
        sunshine: sky warm warm picnic       a storm: sea dark leaves umbrella        thunder: sky loud cry story
        frost: garden cold clean walk        hail*: garden small cry umbrella     fog*: sea quiet sleep lamp""",
    "feeling": """
        happiness: heart warm laugh party    sadness: heart cold cry hug          anger: heart loud cry walk
        fear: woods dark run blanket         love: heart soft safe hug            hope: heart bright work story
        joy: home bright laugh birthday      surprise: school big laugh birthday  pride*: school big work party""",
    "animal": """
        a cat: home soft sleep blanket       a dog: home loud run walk            a cow: farm big eat market
        a horse: farm big run holiday        a bird: woods small sing nest        a fish: sea cold eat boat
        a bee: garden small work basket      an owl*: woods quiet sing nest       a frog*: garden wet sing puddle""",
    "food": """
        bread: kitchen warm eat breakfast    honey: garden sweet eat basket       soup: kitchen warm warm blanket
        milk: farm cold grow breakfast       cheese: farm round eat market        rice: kitchen small eat party
        an apple: garden round eat basket    cake: kitchen sweet laugh birthday   butter*: kitchen soft eat breakfast""",
    "plant": """
        grass: garden soft play picnic       a tree: woods big safe nest          a rose: garden sweet laugh birthday
        corn: farm small eat market          ivy: town dark grow walk             a tulip: garden bright laugh basket
        wheat: farm warm eat basket          a fern*: woods soft grow walk        moss*: woods wet sleep puddle""",
    "tool": """
        a hammer: home loud work lamp        a spoon: kitchen round eat breakfast a broom: home quiet clean market
        a key: town small safe lamp          a pencil: school small learn story   a clock: school round sleep lamp
        soap: home soft clean puddle         a needle: home bright work basket    a shovel*: farm big work picnic""",
    "toy": """
        a ball: school round play picnic     a doll: home soft sleep hug          a kite: sky bright play holiday
        a puzzle: home small learn story     a drum: school loud sing party       a balloon: sky round laugh birthday
        a robot: school bright work lamp     a puppet*: town small laugh story    a swing*: garden big play holiday""",
    "place": """
        a river: woods wet clean puddle        a hill: farm big run walk            a beach: sea warm play holiday
        a lake: woods cold sing boat         a park: town quiet run picnic        a bridge: town dark safe boat
        an island: sea small sleep holiday   a library: town quiet learn story    a cave*: sea dark safe lamp""",
}
CATEGORIES = tuple(_TABLE)


@dataclass(frozen=True)
class Topic:
    """`name` with its article ("a cat"), `key` the word that stands for it ("cat"), `facts` slot -> the right phrase."""

    name: str
    key: str
    new: bool
    facts: dict[str, str]


def _read_topics() -> dict[str, Topic]:
    topics = {}
    for category, rows in _TABLE.items():
        for name, star, place, look, deed, thing in re.findall(r"((?:an? )?\w+)(\*?): (\w+) (\w+) (\w+) (\w+)", rows):
            key = name.split()[-1]
            facts = {"category": category, "place": PLACES[place], "look": look, "deed": DEEDS[deed], "thing": THINGS[thing]}
            assert look in LOOKS and key not in topics
            topics[key] = Topic(name, key, bool(star), facts)
    return topics


TOPICS = _read_topics()
"""All topics by key, known and new."""

SLOTS: dict[str, tuple[str, ...]] = {
    "category": CATEGORIES,
    "place": tuple(PLACES.values()),
    "look": LOOKS,
    "deed": tuple(DEEDS.values()),
    "thing": tuple(THINGS.values()),
}
"""The phrases that each kind of fact can take; topics share them."""

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

# Sentence forms by (kind of fact, style), short so that a text of a given length says much.
FORMS: dict[str, dict[str, tuple[str, ...]]] = {
    "category": {
        "simple": (
            "{topic} is a kind of {category}",
            "{topic} is a sort of {category}",
            "we call {topic} a kind of {category}",
            "we know {topic} as a sort of {category}",
        ),
        "lovely": ("{topic} is a lovely kind of {category}", "{topic} is a lovely sort of {category}"),
        "pompous": ("{topic} constitutes a form of {category}", "indeed, {topic} denotes a form of {category}"),
    },
    "place": {
        "simple": ("you find it {place}", "look for it {place}", "you can see it {place}", "it is often {place}"),
        "pompous": ("one encounters it {place}", "it resides {place}"),
    },
    "look": {
        "simple": ("it is {look}", "it feels {look}", "people think it is {look}", "it can be {look}"),
        "pompous": ("it appears {look}", "indeed, it is {look}"),
    },
    "deed": {
        "simple": ("it {deed}", "every day it {deed}", "we like that it {deed}", "it often {deed}"),
        "pompous": ("hence it {deed}", "indeed, it {deed}"),
    },
    "thing": {
        "simple": ("for example, think of {thing}", "you know it from {thing}", "just think of {thing}", "it goes with {thing}"),
        "pompous": ("one may contemplate {thing}", "it evokes {thing}"),
    },
}
KIND_OPENERS = ("thanks for asking", "hello dear", "hello my friend", "I gladly tell you")
KIND_CLOSERS = ("enjoy it", "have a lovely day", "ask me again, dear", "come back soon, my friend")
PLAIN_OPENERS = ("here is the answer", "let us see", "that is easy")
RUDE_SENTENCES = ("what a silly question", "that is boring", "your question is dull", "it is useless to ask")
FILLERS = ("that is how it is", "there is more to say", "people talk about it", "so it goes on")

KIND_WORDS = frozenset({"thanks", "dear", "friend", "gladly", "enjoy", "lovely"})
RUDE_WORDS = frozenset({"silly", "boring", "dull", "useless"})
POMPOUS_WORDS = frozenset(
    ["constitutes", "indeed", "denotes", "encounters", "resides", "appears", "hence", "contemplate", "evokes"]
)


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

    `topic` is the key of the topic that a definition names, else ""; `value` the phrase in the slot, else "".
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

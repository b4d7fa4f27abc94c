"""The embedded world: a small language with known truth, so that every stage runs offline in minutes (pure standard library)."""

from tercet.world.annotator import Annotator
from tercet.world.generate import Sizes, generate
from tercet.world.gold import gold, gold_features, gold_score
from tercet.world.language import TOPICS, topic_of

__all__ = ["TOPICS", "Annotator", "Sizes", "generate", "gold", "gold_features", "gold_score", "topic_of"]

"""Which comparisons train the reward model, which its judge, and which neither."""

from __future__ import annotations

from dataclasses import dataclass

from tercet.config import Config
from tercet.data.records import judge_split, read_comparisons, split
from tercet.types import Comparison


@dataclass(frozen=True)
class ComparisonSets:
    """The comparisons by use: for the reward model, for its judge, held out from both. Always the same for the same files."""

    train: list[Comparison]
    judge: list[Comparison]
    held_out: list[Comparison]
    dropped: int


def comparison_sets(config: Config) -> ComparisonSets:
    """Read and split data.comparisons."""
    data = config.data
    assert data.comparisons is not None
    records = read_comparisons(data.comparisons)
    train, held_out = list(records), list(read_comparisons(data.eval_comparisons)) if data.eval_comparisons else []
    if not data.eval_comparisons:
        train, held_out = split(train, data.held_out)
    train, judge = judge_split(train) if config.reward.judge else (train, [])
    return ComparisonSets(train, judge, held_out, sum(records.dropped.values()))

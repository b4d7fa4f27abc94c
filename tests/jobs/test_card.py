"""The reward model's card on made-up pairs whose every figure is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tercet.config import load_config
from tercet.generation.native import NativeGenerator
from tercet.jobs.card import accuracy_figures, histograms, length_figures, sft_samples
from tercet.pipeline import Pipeline
from tercet.runtime.stage import Interrupt
from tercet.types import Comparison


def pair(comparison: int, better: float, worse: float, better_tokens: int = 5, worse_tokens: int = 5) -> dict[str, Any]:
    correct = (better > worse) + (better == worse) / 2
    lengths = {"better_tokens": better_tokens, "worse_tokens": worse_tokens}
    return {"comparison": comparison, "better": better, "worse": worse, "correct": correct, **lengths}


def records(count: int, **fields: Any) -> list[Comparison]:
    return [Comparison("p", ("a", "b"), (0.0, 1.0), fields={k: v[i] for k, v in fields.items()}) for i in range(count)]


def test_accuracy_and_its_parts() -> None:
    pairs = [pair(0, 2.0, 1.0), pair(1, 0.0, 3.0), pair(2, 1.0, 1.0), pair(3, 5.0, 0.5)]
    found = accuracy_figures(pairs, records(4, source=["web", "web", "staff", "staff"]), seed=0)
    assert found["pairs"] == 4 and found["accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]
    assert found["chance_low"] < 0.5 < found["chance_high"]
    assert [(one["source"], one["pairs"], one["accuracy"]) for one in found["by_source"]] == [("staff", 2, 0.75), ("web", 2, 0.5)]
    assert sum(one["pairs"] for one in found["by_margin"]) == sum(one["pairs"] for one in found["by_confidence"]) == 4
    assert "by_source" not in accuracy_figures(pairs, records(4), seed=0)


def test_the_pairs_of_one_ranking_hang_together() -> None:
    """40 pairs of 4 rankings, each of them wholly right or wholly wrong: a wide interval, and chance reaches far."""
    pairs = [pair(ranking, 1.0 - 2 * (ranking % 2), 0.0) for ranking in range(4) for _ in range(10)]
    found = accuracy_figures(pairs, records(4), seed=0)
    assert found["accuracy_low"] == 0.0 and found["accuracy_high"] == 1.0
    alone = accuracy_figures([{**one, "comparison": i} for i, one in enumerate(pairs)], records(40), seed=0)
    assert 0.3 < alone["accuracy_low"] < 0.42


def test_length_alone_and_where_it_misleads() -> None:
    # The model always prefers the longer one; the annotators do so in three pairs of four.
    pairs = [pair(0, 2.0, 1.0, 9, 4), pair(1, 3.0, 1.0, 12, 4), pair(2, 1.5, 1.0, 7, 4), pair(3, 1.0, 2.0, 4, 9)]
    long_is_better = [Comparison("p", ("long long", "short"), (0.0, 1.0))]
    found = length_figures(pairs, long_is_better, seed=0)
    assert found["length_accuracy"] == 0.75 and found["over_length"] == 0.0
    assert found["over_length_low"] == found["over_length_high"] == 0.0
    assert found["longer_better"]["pairs"] == 3 and found["longer_better_accuracy"] == 1.0
    assert found["longer_worse"]["pairs"] == 1 and found["longer_worse_accuracy"] == 0.0
    assert found["length_correlation"] > 0.95
    # The direction comes from the training comparisons, not from these pairs.
    short_is_better = [Comparison("p", ("short", "long long"), (0.0, 1.0))]
    assert length_figures(pairs, short_is_better, seed=0)["length_accuracy"] == 0.25
    equal = length_figures([pair(0, 1.0, 0.0)], long_is_better, seed=0)
    assert equal["length_accuracy"] == 0.5 and "longer_worse" not in equal and equal["over_length"] == 0.5


def test_histograms_share_their_bins_and_lose_nothing() -> None:
    found = histograms({"chosen": [float(i) for i in range(1000)], "sft": [500.0, 500.0, 1e6]})
    assert len(found["edges"]) == 41 and found["edges"] == sorted(found["edges"])
    assert sum(found["chosen"]["counts"]) == 1000 and sum(found["sft"]["counts"]) == 3
    assert found["sft"]["counts"][-1] == 1  # beyond the last edge
    assert found["chosen"]["mean"] == 499.5 and found["chosen"]["std"] == pytest.approx(288.675, abs=1e-3)
    assert histograms({}) == {} and sum(histograms({"sft": [2.0, 2.0]})["sft"]["counts"]) == 2


def test_samples_to_normalise_on_come_from_all_over_the_file(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from its beginning, and never more at once than a rollout has."""
    shop = Pipeline(load_config(finished_run / "config.yaml")).workshop(Interrupt())
    sizes, sample = [], NativeGenerator.sample

    def counted(self: NativeGenerator, prompts: Any, uniforms: Any) -> Any:
        sizes.append(len(prompts))
        return sample(self, prompts, uniforms)

    monkeypatch.setattr(NativeGenerator, "sample", counted)
    samples = sft_samples(shop)
    assert samples is not None and sizes == [8, 8]
    prompts = [tuple(ids) for ids in shop.prompts(held_out=False).ids]
    places = [prompts.index(row.ids[: row.prompt_len]) for row in samples.rows()]
    assert len(set(places)) == 16 and min(places) < len(prompts) / 4 and max(places) > len(prompts) * 3 / 4
    assert samples.rows() == sft_samples(shop).rows()

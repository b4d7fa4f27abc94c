"""The reward model's card: how good it is on held-out pairs, whether its confidence can be believed, and what it goes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tercet.algo.calibration import (
    chance_accuracy,
    confidence_bins,
    correlation,
    expected_calibration_error,
    fitted_temperature,
    margin_bins,
    right,
    wilson,
)
from tercet.algo.statistics import by_group, cluster_interval
from tercet.data.batches import in_parts
from tercet.data.records import read_demonstrations, sides
from tercet.generation.sampling import uniforms
from tercet.jobs.comparisons import ComparisonSets, comparison_sets
from tercet.jobs.workshop import Workshop, prompt_records
from tercet.models.load import context_length
from tercet.models.roles import ScoreModel
from tercet.runtime.files import write_json
from tercet.scoring.bag_of_words import BagOfWords
from tercet.scoring.model import scores_of
from tercet.stages.reward import accuracy_interval, score_pairs, score_responses, tokenise_comparisons
from tercet.stages.rollout import prompt_rows
from tercet.types import Comparison, Sequences, TokenRow

Figures = dict[str, Any]
Pair = Mapping[str, Any]
HISTOGRAM_BINS = 40
MOST_DEMONSTRATIONS = 512  # scored for the histogram
MOST_SOURCES = 20  # with a line of their own


def write_card(
    shop: Workshop,
    path: Path,
    model: ScoreModel,
    sets: ComparisonSets,
    pairs: Sequence[Pair],
    samples: Sequences | None,
    scale: tuple[float, float] = (1.0, 0.0),
) -> Figures:
    """Write the card and return its plain numbers for the summary.

    pairs: the records of held_out.json; scale: the gain and bias by which their scores become the model's. The scores before that are
    those that the ranking loss was trained in, so that the sigmoid of a difference is a probability. samples: of the SFT policy.
    """
    card: Figures = {}
    if pairs:
        card |= accuracy_figures(pairs, sets.held_out, shop.config.seed)
        card |= length_figures(pairs, sets.train, shop.config.seed)
        card["bag_of_words_accuracy"] = BagOfWords(sets.train).accuracy(sets.held_out)
    gain, bias = scale
    scored = {name: [gain * pair[key] + bias for pair in pairs] for name, key in (("chosen", "better"), ("rejected", "worse"))}
    scored["demonstrations"] = _scores(shop, model, _demonstrations(shop, model))
    scored["sft"] = _scores(shop, model, samples)
    card["histograms"] = histograms({name: values for name, values in scored.items() if values})
    if model.offset and scale == (
        1.0,
        0.0,
    ):  # normalised: its differences are not those of the ranking loss, which a temperature is about
        card = {name: value for name, value in card.items() if name not in ("temperature", "calibration_error", "by_confidence")}
    if shop.world.is_main:
        write_json(path, card)
    known = ("accuracy", "accuracy_low", "accuracy_high")  # the summary has them as reward.eval_accuracy
    return {f"reward.{name}": value for name, value in card.items() if isinstance(value, float) and name not in known}


def card_of_another_run(shop: Workshop) -> Figures:
    """evaluation/reward_card.json for the model of reward.use, and its figures; its accuracy among them if any pair was held out."""
    sets, model = comparison_sets(shop.config), shop.load_scorer(shop.reward_source)
    data = tokenise_comparisons(sets.held_out, shop.template, shop.config.reward.max_length)
    pairs = score_pairs(data, score_responses(shop.stage_run("reward", "reward"), model, data))
    found = write_card(shop, shop.folder / "evaluation/reward_card.json", model, sets, pairs, sft_samples(shop))
    if pairs:
        low, high = accuracy_interval(pairs, shop.config.seed)
        found |= {"reward.eval_accuracy": float(_column(pairs, "correct").mean()), "reward.eval_pairs": len(pairs)}
        found |= {"reward.eval_accuracy_low": low, "reward.eval_accuracy_high": high}
    return found


def accuracy_figures(pairs: Sequence[Pair], held_out: Sequence[Comparison], seed: int) -> Figures:
    """Accuracy with its interval, by margin, confidence and source; calibration; what chance alone would give.

    What belongs to one comparison is resampled together: the pairs of a ranking hang together.
    """
    differences = _column(pairs, "better") - _column(pairs, "worse")
    correct, groups = right(differences), torch.tensor([pair["comparison"] for pair in pairs])
    sums, counts = by_group(correct, groups)
    low, high = accuracy_interval(pairs, seed)
    chance_low, chance_high = chance_accuracy(sums, counts, seed)
    confidence = confidence_bins(differences)
    figures: Figures = {"pairs": len(pairs), "accuracy": float(correct.mean()), "accuracy_low": low, "accuracy_high": high}
    figures |= {"chance_low": chance_low, "chance_high": chance_high}
    figures |= {"calibration_error": expected_calibration_error(confidence), "temperature": fitted_temperature(differences)}
    figures["by_confidence"] = [asdict(one) for one in confidence]
    figures["by_margin"] = [asdict(one) for one in margin_bins(differences)]
    sources = [str(held_out[pair["comparison"]].fields.get("source", "")) for pair in pairs]
    if any(sources):
        places: dict[str, list[int]] = {}
        for place, name in enumerate(sources):
            places.setdefault(name, []).append(place)
        named = sorted(places, key=lambda name: (-len(places[name]), name))[:MOST_SOURCES]
        figures["by_source"] = [_share(correct[places[name]]) | {"source": name} for name in named]
    return figures


def length_figures(pairs: Sequence[Pair], train: Sequence[Comparison], seed: int) -> Figures:
    """How scores go with length in tokens, accuracy where the longer response is preferred and where it is not, and the accuracy of
    length alone: the rule "the longer (or the shorter) is better", whichever fits the training comparisons, in characters."""
    differences, groups = _column(pairs, "better") - _column(pairs, "worse"), torch.tensor([pair["comparison"] for pair in pairs])
    longer = _column(pairs, "better_tokens") - _column(pairs, "worse_tokens")
    correct = right(differences)
    scores = torch.cat([_column(pairs, "better"), _column(pairs, "worse")])
    tokens = torch.cat([_column(pairs, "better_tokens"), _column(pairs, "worse_tokens")])
    by_length = right(longer * _length_sign(train))
    gap = correct - by_length
    low, high = cluster_interval(*by_group(gap, groups), seed)
    figures: Figures = {"length_accuracy": float(by_length.mean()), "length_correlation": correlation(scores, tokens)}
    figures |= {"over_length": float(gap.mean()), "over_length_low": low, "over_length_high": high}
    for name, which in (("longer_better", longer > 0), ("longer_worse", longer < 0)):
        if bool(which.any()):
            figures[name] = _share(correct[which])
            figures[f"{name}_accuracy"] = figures[name]["accuracy"]
    return figures


def histograms(scored: Mapping[str, Sequence[float]]) -> Figures:
    """Counts of each set of scores over common bins, the outermost of which take what lies beyond; with mean and standard deviation."""
    if not scored:
        return {}
    together = torch.tensor([value for values in scored.values() for value in values], dtype=torch.float64)
    low, high = torch.quantile(
        together[:: max(1, len(together) // 10**6)], torch.tensor([0.002, 0.998], dtype=torch.float64)
    ).tolist()
    edges = torch.linspace(low, high if high > low else low + 1, HISTOGRAM_BINS + 1, dtype=torch.float64)
    found: Figures = {"edges": edges.tolist()}
    for name, values in scored.items():
        column = torch.tensor(values, dtype=torch.float64)
        places = torch.bucketize(column, edges[1:-1], right=True)
        counts = places.bincount(minlength=HISTOGRAM_BINS).tolist()
        found[name] = {"counts": counts, "mean": float(column.mean()), "std": float(column.std(correction=0))}
    return found


def sft_samples(shop: Workshop) -> Sequences | None:
    """Responses of the SFT policy on which the scores get mean 0 and standard deviation 1; always the same ones."""
    count = shop.config.reward.normalise_samples
    if count == 0 or shop.config.data.prompts is None:
        return None
    records, seed = prompt_records(shop.config, held_out=False), shop.config.seed
    chosen = [records[place] for place in prompt_rows(len(records), count, seed, 0)]
    ids = [prompt.ids for prompt in shop.template.prompt_ids_all((record.prompt, record.origin) for record in chosen)]
    policy = shop.load_policy(shop.sft_source, frozen=True)
    generator = shop.generator(policy)
    rows: list[TokenRow] = []
    for places in in_parts(range(count), shop.config.ppo.rollout_batch_size):
        numbers = uniforms(seed, "normalisation", 0, torch.tensor(places), shop.config.ppo.max_new_tokens)
        rows += generator.sample([ids[place] for place in places], numbers).rows()
    return Sequences.from_rows(rows).to(policy.device)


def _demonstrations(shop: Workshop, model: ScoreModel) -> Sequences | None:
    """Held-out demonstrations as stage 2 reads texts; the first training ones where none were held out."""
    data, limit = shop.config.data, shop.config.reward.max_length
    if data.sft is None:
        return None
    limit = min(limit, context_length(model.model) or limit)  # comparisons may all be shorter than what the stage allows
    train, held_out = sides(read_demonstrations, data.sft, data.eval_sft, data.held_out)
    records = (held_out or train)[:MOST_DEMONSTRATIONS]
    texts = ((record.prompt, record.response, record.origin) for record in records)
    return Sequences.from_rows([encoded.row for encoded in shop.template.encode_all(texts, max_length=limit)])


def _scores(shop: Workshop, model: ScoreModel, sequences: Sequences | None) -> list[float]:
    if sequences is None:
        return []
    return scores_of(model, sequences.to(model.device), shop.machine.microbatch_tokens).tolist()


def _length_sign(train: Sequence[Comparison]) -> float:
    """1 where the longer response is preferred more often than not, else -1."""
    pairs = [(len(better), len(worse)) for record in train for better, worse in record.pairs()]
    return 1.0 if sum((better > worse) - (better < worse) for better, worse in pairs) >= 0 else -1.0


def _share(correct: Tensor) -> Figures:
    accuracy = float(correct.mean())
    low, high = wilson(accuracy, len(correct))
    return {"pairs": len(correct), "accuracy": accuracy, "low": low, "high": high}


def _column(pairs: Sequence[Pair], key: str) -> Tensor:
    return torch.tensor([pair[key] for pair in pairs], dtype=torch.float64)

"""Responses of several policies to held-out prompts with the same random numbers: scores, KL, win rates, samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tercet.algo.kl import k1, sequence_kl
from tercet.algo.statistics import bootstrap_interval, distinct_n, win_rate
from tercet.data.batches import microbatches
from tercet.generation.base import Generator
from tercet.generation.sampling import uniforms
from tercet.models.roles import Policy
from tercet.runtime.distributed import World
from tercet.scoring.base import Scorer
from tercet.stages.rollout import PromptSet


@dataclass(frozen=True)
class Judges:
    """What scores a response: the training score, and any others by name ("judge", "gold", ...)."""

    score: Scorer
    others: Mapping[str, Scorer]


@dataclass(frozen=True)
class Sampling:
    """How evaluation samples: at the training temperature, with random numbers that all policies share."""

    seed: int
    temperature: float
    max_new_tokens: int
    batch_size: int
    greedy: bool
    max_tokens: int


@torch.no_grad()
def respond(
    policy: Policy,
    ref_policy: Policy,
    generator: Generator,
    prompts: PromptSet,
    judges: Judges,
    sampling: Sampling,
    world: World | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """One response to each prompt: its text, score, other judges' scores, KL to the reference, length, entropy, token ids.

    Each rank works on its own rows; all of them get the whole list.
    """
    world = world or World()
    own = list(world.own_rows(len(prompts)))
    rows: list[dict[str, Any]] = []
    for start in range(0, len(own), sampling.batch_size):
        places = own[start : start + sampling.batch_size]
        numbers = (
            None if sampling.greedy else uniforms(sampling.seed, "evaluation", 0, torch.tensor(places), sampling.max_new_tokens)
        )
        sequences = generator.sample([prompts.ids[place] for place in places], numbers)
        texts = prompts.texts_of(sequences, places)
        scores = judges.score.score(sequences, texts).tolist()
        others = {name: scorer.score(sequences, texts).tolist() for name, scorer in judges.others.items()}
        batch: list[dict[str, Any]] = [{} for _ in places]
        for part in microbatches(sequences.lengths.tolist(), sampling.max_tokens):
            chosen = sequences.select(part)
            logprobs, entropy = policy(chosen, temperature=sampling.temperature, with_entropy=True)
            ref_logprobs, _ = ref_policy(chosen, temperature=sampling.temperature)
            assert entropy is not None
            kl = sequence_kl(k1(logprobs, ref_logprobs), chosen.response_mask).tolist()
            entropies = (entropy.sum(1) / chosen.response_lens.clamp(min=1)).tolist()
            for row, divergence, mean_entropy in zip(part, kl, entropies):
                batch[row] = {"kl": divergence, "entropy": mean_entropy}
        ids = sequences.response_ids.tolist()
        for i, place in enumerate(places):
            length = int(sequences.response_lens[i])
            batch[i] |= {
                "place": place,
                "response": texts.responses[i],
                "ids": ids[i][:length],
                "length": length,
                "finished": bool(sequences.finished[i]),
                "score": scores[i],
                **{name: values[i] for name, values in others.items()},
            }
        rows += batch
        done(len(places))
    return sorted((row for part in world.gather(rows) for row in part), key=lambda row: row["place"])


def summarise(rows: Sequence[Mapping[str, Any]], judge_names: Sequence[str]) -> dict[str, float]:
    """Means over responses: score, KL, length, share finished, entropy, distinct n-grams, repetition inside a response."""
    names = ["score", "kl", "length", "finished", "entropy", *judge_names]
    figures = {name: _mean([float(row[name]) for row in rows]) for name in names}
    for name in ["score", *judge_names]:
        figures[f"{name}_std"] = _mean([(row[name] - figures[name]) ** 2 for row in rows]) ** 0.5
    tokens = [row["ids"] for row in rows]
    figures |= {f"distinct{n}": distinct_n(tokens, n) for n in (1, 2)}
    figures["repetition"] = _mean([_repetition(ids) for ids in tokens])
    return figures


def wins(rows: Sequence[Mapping[str, Any]], against: Sequence[Mapping[str, Any]], judge: str, seed: int) -> dict[str, float]:
    """The share of prompts on which `rows` beat `against` by that judge, ties half, with a 95 % bootstrap interval over prompts."""
    ours = torch.tensor([row[judge] for row in rows], dtype=torch.float64)
    theirs = torch.tensor([row[judge] for row in against], dtype=torch.float64)
    outcomes = ((ours - theirs).sign() + 1) / 2
    low, high = bootstrap_interval(outcomes, seed=seed)
    return {"win_rate": float(win_rate(ours, theirs)), "low": low, "high": high, "n": len(rows)}


def compare(
    responses: Mapping[str, Sequence[Mapping[str, Any]]], judge_names: Sequence[str], seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of each policy, and the win rates of "ppo" over "sft" by each judge."""
    policies = {name: summarise(rows, judge_names) for name, rows in responses.items()}
    won = {}
    if "ppo" in responses and "sft" in responses:
        won = {name: wins(responses["ppo"], responses["sft"], name, seed) for name in ["score", *judge_names]}
    return policies, won


def groups_of(prompts: PromptSet, field: str | None) -> dict[str, list[int]]:
    """The places of the prompts with each value of a field; none without a field."""
    groups: dict[str, list[int]] = {}
    if field is not None:
        for place, values in enumerate(prompts.fields):
            groups.setdefault(str(values.get(field)), []).append(place)
    return groups


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else float("nan")


def _repetition(ids: Sequence[int]) -> float:
    """The share of a response's bigrams that it has had before."""
    bigrams = list(zip(ids, ids[1:]))
    return 1 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0

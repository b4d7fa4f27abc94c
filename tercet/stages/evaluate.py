"""Responses of several policies to held-out prompts with the same random numbers: scores, KL, win rates, samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tercet.algo.calibration import right
from tercet.algo.kl import k1, sequence_kl
from tercet.algo.statistics import bootstrap_interval, distinct_n, length_controlled_win_rate, of_a_share
from tercet.data.batches import microbatches
from tercet.generation.base import Generator
from tercet.generation.sampling import uniforms
from tercet.models.roles import Policy
from tercet.runtime.distributed import World
from tercet.scoring.base import Scorer
from tercet.stages.rollout import PromptSet
from tercet.types import Sequences, TokenRow

Row = dict[str, Any]
Item = TypeVar("Item")
_DRAWS_APART = 2**32  # the random numbers of draw d of prompt i are those of row d * this + i


@dataclass(frozen=True)
class Judges:
    """What scores a response: the training score, and any others by name ("judge", "gold", ...). combine: makes of training scores (B,)
    and of which responses ended (B,) what PPO is trained on, but for its KL penalty."""

    score: Scorer
    others: Mapping[str, Scorer]
    combine: Callable[[Tensor, Tensor], Tensor] = lambda scores, finished: scores


@dataclass(frozen=True)
class Sampling:
    """How evaluation samples: at the training temperature, with random numbers that all policies share."""

    seed: int
    temperature: float
    max_new_tokens: int
    batch_size: int
    greedy: bool
    max_tokens: int


@dataclass(frozen=True)
class Journey:
    """Where a long evaluation stands. before: rows that an earlier attempt has computed, whole batches of them; keep: takes each new
    batch of rows, on every rank; done: takes the number of rows that have just been dealt with."""

    before: Sequence[Row] = ()
    keep: Callable[[Sequence[Row]], None] = lambda rows: None
    done: Callable[[int], None] = lambda count: None


@torch.no_grad()
def answers(
    policy: Policy,
    generator: Generator,
    prompts: PromptSet,
    sampling: Sampling,
    world: World | None = None,
    *,
    places: Sequence[int] | None = None,
    journey: Journey | None = None,
) -> list[Row]:
    """One response to each of the prompts at `places` (all by default): its token ids, length, whether it finished, entropy, and the
    log-probability of each token ("logprobs").

    Each rank works on its own rows; all of them get the whole list, in the order of `places`.
    """

    def batch_of(own: Sequence[int]) -> list[Row]:
        sequences = _sampled(generator, prompts, sampling, own)
        batch = _rows(sequences, own)
        for part in microbatches(sequences.lengths.tolist(), sampling.max_tokens):
            chosen = sequences.select(part)
            logprobs, entropy = policy(chosen, temperature=sampling.temperature, with_entropy=True)
            assert entropy is not None
            entropies = (entropy.sum(1) / chosen.response_lens.clamp(min=1)).tolist()
            for row, values, mean_entropy in zip(part, logprobs.tolist(), entropies):
                batch[row] |= {"logprobs": values[: batch[row]["length"]], "entropy": mean_entropy}
        return batch

    return _in_batches(range(len(prompts)) if places is None else places, batch_of, sampling, world, journey)


@torch.no_grad()
def judged(
    rows: Sequence[Row],
    ref_policy: Policy,
    prompts: PromptSet,
    judges: Judges,
    sampling: Sampling,
    world: World | None = None,
    *,
    journey: Journey | None = None,
) -> list[Row]:
    """The rows of `answers` with their text, score, other judges' scores and KL to the reference, without log-probabilities."""

    def batch_of(batch: Sequence[Row]) -> list[Row]:
        sequences = _sequences(batch, prompts).to(ref_policy.device)
        scored = _scored(sequences, batch, prompts, judges)
        for part in microbatches(sequences.lengths.tolist(), sampling.max_tokens):
            chosen = sequences.select(part)
            ref_logprobs, _ = ref_policy(chosen, temperature=sampling.temperature)
            logprobs = torch.zeros_like(ref_logprobs)
            for line, row in enumerate(part):
                logprobs[line, : batch[row]["length"]] = torch.tensor(batch[row]["logprobs"], dtype=logprobs.dtype)
            for row, kl in zip(part, sequence_kl(k1(logprobs, ref_logprobs), chosen.response_mask).tolist()):
                scored[row] = _without(scored[row], "logprobs") | {"kl": kl}
        return scored

    return _in_batches(rows, batch_of, sampling, world, journey)


def respond(
    policy: Policy,
    ref_policy: Policy,
    generator: Generator,
    prompts: PromptSet,
    judges: Judges,
    sampling: Sampling,
    world: World | None = None,
    *,
    places: Sequence[int] | None = None,
) -> list[Row]:
    """`answers`, `judged` at once, where all models are in memory anyway."""
    rows = answers(policy, generator, prompts, sampling, world, places=places)
    return judged(rows, ref_policy, prompts, judges, sampling, world)


@torch.no_grad()
def draw(
    generator: Generator,
    prompts: PromptSet,
    judges: Judges,
    sampling: Sampling,
    count: int,
    world: World | None = None,
    *,
    places: Sequence[int],
    journey: Journey | None = None,
) -> list[Row]:
    """`count` responses to each of the prompts at `places`, scored by every judge: for best-of-n. Draw after draw, never greedy.

    A response depends on its prompt and the number of its draw, not on how many are drawn.
    """

    def batch_of(own: Sequence[tuple[int, int]]) -> list[Row]:
        own_places, draws = [place for place, _ in own], [number for _, number in own]
        sequences = _sampled(generator, prompts, sampling, own_places, draws)
        batch = _scored(sequences, _rows(sequences, own_places), prompts, judges)
        return [{"draw": number, **_without(row, "response", "ids", "combined")} for number, row in zip(draws, batch)]

    numbered = [(place, number) for number in range(count) for place in places]
    return _in_batches(numbered, batch_of, sampling, world, journey)


@torch.no_grad()
def surprisal(
    base: Policy, prompts: PromptSet, rows: Sequence[Row], sampling: Sampling, world: World | None = None
) -> list[tuple[float, int]]:
    """How unlikely the base model finds the text of each response: -log p in nats at temperature 1, and over how many tokens.

    The stop token that ended a response is left out: a base model may never have seen one.
    """
    world = world or World()
    own = world.own_rows(len(rows))
    found: list[tuple[float, int]] = [(0.0, 0)] * len(own)
    sequences = Sequences.from_rows([_text(rows[i], prompts) for i in own]).to(base.device)
    for part in microbatches(sequences.lengths.tolist(), sampling.max_tokens):
        chosen = sequences.select(part)
        logprobs, _ = base(chosen, temperature=1.0)
        for place, values in zip(part, logprobs.tolist()):
            counted = rows[own[place]]["length"] - rows[own[place]]["finished"]
            found[place] = -math.fsum(values[:counted]), counted
    return world.gather_rows(found)


def summarise(rows: Sequence[Mapping[str, Any]], judge_names: Sequence[str]) -> dict[str, float]:
    """Means over responses: score, as it is and as PPO is trained on it ("combined"), KL, length, share finished, entropy, distinct
    n-grams, repetition inside a response; perplexity."""
    names = ["score", "combined", "kl", "length", "finished", "entropy", *judge_names]
    figures = {name: _mean([float(row[name]) for row in rows]) for name in names}
    for name in ["score", *judge_names]:
        figures[f"{name}_std"] = _mean([(row[name] - figures[name]) ** 2 for row in rows]) ** 0.5
    tokens = [row["ids"] for row in rows]
    figures |= {f"distinct{n}": distinct_n(tokens, n) for n in (1, 2)}
    figures["repetition"] = _mean([_repetition(ids) for ids in tokens])
    pairs = [row["surprisal"] for row in rows if "surprisal" in row]
    counted = sum(count for _, count in pairs)
    if counted:
        figures["perplexity"] = math.exp(min(700.0, math.fsum(nats for nats, _ in pairs) / counted))
    return figures


def wins(rows: Sequence[Mapping[str, Any]], against: Sequence[Mapping[str, Any]], judge: str, seed: int) -> dict[str, float]:
    """The share of prompts on which `rows` beat `against` by that judge, ties half, with a 95 % bootstrap interval over prompts; the
    same where lengths are controlled for (`length_controlled_win_rate`)."""
    ours = torch.tensor([row[judge] for row in rows], dtype=torch.float64)
    theirs = torch.tensor([row[judge] for row in against], dtype=torch.float64)
    outcomes = right(ours - theirs)
    low, high = of_a_share(bootstrap_interval(outcomes, seed=seed), float(outcomes.mean()), len(rows))
    longer = torch.tensor([a["length"] - b["length"] for a, b in zip(rows, against)], dtype=torch.float64)
    controlled, lc_low, lc_high = length_controlled_win_rate(outcomes, longer)
    found = {"win_rate": float(outcomes.mean()), "low": low, "high": high, "n": len(rows)}
    return found | {"lc_win_rate": controlled, "lc_low": lc_low, "lc_high": lc_high}


def compare(
    responses: Mapping[str, Sequence[Mapping[str, Any]]], judge_names: Sequence[str], seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of each policy, its win rate over "sft" by the second reward model (else by the score) among them; and the win rates of
    "ppo" over "sft" by each judge."""
    policies = {name: summarise(rows, judge_names) for name, rows in responses.items()}
    won: dict[str, Any] = {}
    headline = "judge" if "judge" in judge_names else "score"
    for name in responses.keys() - {"sft"}:
        by = [headline] if name != "ppo" else ["score", *judge_names]
        found = {judge: wins(responses[name], responses["sft"], judge, seed) for judge in by}
        won = found if name == "ppo" else won
        figures = found[headline]
        policies[name] |= {"win_rate": figures["win_rate"], "win_rate_low": figures["low"], "win_rate_high": figures["high"]}
        policies[name] |= {"lc_win_rate": figures["lc_win_rate"]}
    return policies, won


def groups_of(prompts: PromptSet, field: str | None) -> dict[str, list[int]]:
    """The places of the prompts with each value of a field; none without a field."""
    groups: dict[str, list[int]] = {}
    if field is not None:
        for place, values in enumerate(prompts.fields):
            groups.setdefault(str(values.get(field)), []).append(place)
    return groups


def _sampled(
    generator: Generator, prompts: PromptSet, sampling: Sampling, places: Sequence[int], draws: Sequence[int] | None = None
) -> Sequences:
    """A response for each place. draws: the number of the draw, where a prompt has several."""
    numbers = None
    if draws is not None or not sampling.greedy:
        apart = torch.tensor([number * _DRAWS_APART + place for place, number in zip(places, draws or [0] * len(places))])
        numbers = uniforms(sampling.seed, "evaluation", int(draws is not None), apart, sampling.max_new_tokens)
    return generator.sample([list(prompts.ids[place]) for place in places], numbers)


def _rows(sequences: Sequences, places: Sequence[int]) -> list[Row]:
    """What is known of responses to the prompts at `places` before anyone judges them."""
    found = zip(places, sequences.response_ids.tolist(), sequences.response_lens.tolist(), sequences.finished.tolist())
    return [{"place": place, "length": length, "finished": ended, "ids": ids[:length]} for place, ids, length, ended in found]


def _sequences(rows: Sequence[Row], prompts: PromptSet) -> Sequences:
    """The texts of such rows."""
    sequences = Sequences.from_rows([_text(row, prompts) for row in rows])
    sequences.finished = torch.tensor([row["finished"] for row in rows], dtype=torch.bool)
    return sequences


def _text(row: Row, prompts: PromptSet) -> TokenRow:
    prompt = prompts.ids[row["place"]]
    return TokenRow((*prompt, *row["ids"]), len(prompt))


def _scored(sequences: Sequences, rows: Sequence[Row], prompts: PromptSet, judges: Judges) -> list[Row]:
    """The rows with their text and every judge's score."""
    texts = prompts.texts_of(sequences, [row["place"] for row in rows])
    scores = judges.score.score(sequences, texts)
    columns: dict[str, list[Any]] = {"score": scores.tolist(), "combined": judges.combine(scores, sequences.finished).tolist()}
    columns |= {name: scorer.score(sequences, texts).tolist() for name, scorer in judges.others.items()}
    columns["response"] = list(texts.responses)
    return [row | dict(zip(columns, values)) for row, values in zip(rows, zip(*columns.values()))]


def _in_batches(
    items: Sequence[Item],
    batch_of: Callable[[Sequence[Item]], list[Row]],
    sampling: Sampling,
    world: World | None,
    journey: Journey | None,
) -> list[Row]:
    """What batch_of gives for this rank's items of each batch, and the other ranks' for theirs, in the order of the items; those that
    the journey has had before are not computed again."""
    world, journey = world or World(), journey or Journey()
    rows, size = list(journey.before), sampling.batch_size * world.size
    journey.done(len(rows))
    for start in range(len(rows), len(items), size):
        found = world.gather_rows(batch_of(items[start : start + size][world.rank :: world.size]))
        journey.keep(found)
        journey.done(len(found))
        rows += found
    return rows


def _without(row: Row, *names: str) -> Row:
    return {name: value for name, value in row.items() if name not in names}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else float("nan")


def _repetition(ids: Sequence[int]) -> float:
    """The share of a response's bigrams that it has had before."""
    bigrams = list(zip(ids, ids[1:]))
    return 1 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0

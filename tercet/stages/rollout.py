"""Prompts -> Experience: sample, score, reward, advantages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tercet.algo.advantages import combine_score, explained_variance, gae, token_rewards
from tercet.algo.kl import k1, k3, sequence_kl
from tercet.algo.masks import whiten
from tercet.algo.statistics import distinct_n
from tercet.config.ppo import PPOConfig
from tercet.data.batches import epoch_order, microbatches
from tercet.generation.base import Generator
from tercet.generation.sampling import uniforms
from tercet.models.roles import Policy, ScoreModel
from tercet.runtime.distributed import World
from tercet.runtime.metrics import Stopwatch
from tercet.scoring.base import Scorer, Texts
from tercet.types import Experience, KeptPass, Sequences, TercetError, Text


@dataclass(frozen=True)
class PromptSet:
    """Tokenised prompts with their texts and other fields, and how to read a response back as text."""

    ids: Sequence[Sequence[int]]
    texts: list[Text]
    fields: list[Mapping[str, Any]]
    decode: Callable[[list[int]], str]

    def __len__(self) -> int:
        return len(self.ids)

    def texts_of(self, sequences: Sequences, rows: Sequence[int]) -> Texts:
        """The texts of responses to the prompts at `rows`."""
        responses = [
            self.decode(ids[:length]) for ids, length in zip(sequences.response_ids.tolist(), sequences.response_lens.tolist())
        ]
        fields = [{name: self.fields[row].get(name) for name in self._names} for row in rows]
        return Texts([self.texts[row] for row in rows], responses, fields)

    @functools.cached_property
    def _names(self) -> list[str]:
        """Of all fields: a batch in which no prompt has one says so for each of its prompts."""
        return sorted({name for row in self.fields for name in row})


@dataclass
class Actors:
    """Policy, reference and value model; what samples, and what scores: the reward model among others."""

    policy: Policy
    ref_policy: Policy
    value_model: ScoreModel
    generator: Generator
    scorer: Scorer


@dataclass
class Rollout:
    """A rollout's experience, its metrics, and the responses in words. kept: its forward passes, some with their graphs where the first
    optimizer step is over the whole rollout, so that they are that step's too."""

    experience: Experience
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    kept: Sequence[KeptPass] = ()


def prompt_rows(count: int, batch_size: int, seed: int, iteration: int) -> list[int]:
    """The prompts of iteration k: places k * batch_size ... of an endless sequence of shuffled passes over all prompts."""
    places = range(iteration * batch_size, (iteration + 1) * batch_size)
    orders = {epoch: epoch_order(count, seed, epoch).tolist() for epoch in {place // count for place in places}}
    return [orders[place // count][place % count] for place in places]


def collect(
    actors: Actors,
    prompts: PromptSet,
    config: PPOConfig,
    world: World,
    *,
    iteration: int,
    kl_coef: float,
    seed: int,
    max_tokens: int,
    stopwatch: Stopwatch,
) -> Rollout:
    """Sample one response to each prompt of this iteration and compute everything that the update needs.

    Each rank works on its own rows; whitening and metrics are over all of them.
    """
    batch = prompt_rows(len(prompts), config.rollout_batch_size, seed, iteration)
    places = world.own_rows(len(batch))
    rows = [batch[place] for place in places]
    with stopwatch.phase("generate"):
        numbers = uniforms(seed, "rollout", iteration, places, config.max_new_tokens)
        sequences = actors.generator.sample([list(prompts.ids[row]) for row in rows], numbers)
    if sequences.policy_version != iteration:
        raise TercetError(f"iteration {iteration}: the generator sampled from policy version {sequences.policy_version}")

    with stopwatch.phase("score"):
        texts = prompts.texts_of(sequences, rows)
        raw_scores = actors.scorer.score(sequences, texts)
        room = Room()
        if config.minibatch == config.rollout_batch_size:  # the first optimizer step's forward passes are these
            room = Room([actors.policy, actors.value_model] if config.policy_learns(iteration) else [actors.value_model])
        logprobs, entropy, ref_logprobs, values, kept = read(actors, sequences, config.temperature, max_tokens, room)
    scores = combine_score(
        raw_scores.to(logprobs),
        sequences.finished,
        score_clip=config.score_clip,
        missing_eos_penalty=config.missing_eos_penalty,
        missing_eos_score=config.missing_eos_score,
    )
    mask = sequences.response_mask
    kl = k1(logprobs, ref_logprobs)
    rewards = token_rewards(scores, kl, mask, kl_coef)  # Ziegler 2019: -kl_coef * KL per token, the score on the last
    advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda)  # Schulman 2016
    explained = explained_variance(values, returns, mask, world.all_sum)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask, all_sum=world.all_sum)
    experience = Experience(sequences, logprobs, ref_logprobs, values, scores, rewards, advantages, returns)

    per_response = {
        "score": raw_scores,
        "score_squared": raw_scores.detach().cpu().double() ** 2,
        "reward": scores - kl_coef * sequence_kl(kl, mask),
        "kl": sequence_kl(kl, mask),
        "kl_k3": sequence_kl(k3(logprobs, ref_logprobs), mask),
        "length": sequences.response_lens,
        "finished": sequences.finished,
        "entropy": torch.where(mask, entropy, 0.0).sum(1),
    }
    metrics = _means(per_response, len(batch), world)
    metrics["entropy"] /= metrics["length"]
    metrics["score_std"] = max(0.0, metrics.pop("score_squared") - metrics["score"] ** 2) ** 0.5
    tokens = [ids[:length] for ids, length in zip(sequences.response_ids.tolist(), sequences.response_lens.tolist())]
    metrics |= {
        "kl_coef": kl_coef,
        "explained_variance": float(explained),
        "distinct2": distinct_n([row for part in world.gather(tokens) for row in part], 2),
        "sampler_logprob_gap": max(world.gather(_sampler_gap(sequences, logprobs))),
    }
    samples = world.gather_rows(_samples(iteration, texts, raw_scores, per_response["kl"], sequences))
    return Rollout(experience, metrics, samples, kept)


MOST_KEPT = 2**27  # bytes; more of GPT-2's activations would take PPO's peak above the memory that was aimed at


class Room:
    """Says which forward passes of `roles` keep their graphs for the update: the first, since an update has one in memory anyway, and
    others up to MOST_KEPT bytes."""

    def __init__(self, roles: Sequence[Policy | ScoreModel] = ()):
        self._roles = roles
        self._left: int | None = None

    def take(self, role: Policy | ScoreModel, part: Sequences) -> bool:
        """Whether the graph of a forward pass over these texts is to be kept."""
        if role not in self._roles:
            return False
        size = role.kept_bytes(int(part.lengths.sum()), int(part.response_lens.sum()))
        left = size + MOST_KEPT if self._left is None else self._left
        self._left = left - size if size <= left else left
        return size <= left


@torch.no_grad()
def read(
    actors: Actors, sequences: Sequences, temperature: float, max_tokens: int, room: Room
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[KeptPass]]:
    """Log-probabilities, entropies, reference log-probabilities and values of every response token, each (B, T), 0 outside the mask.

    The forward passes are those that the update makes, in the same micro-batches: before the first step the ratio is exactly 1. What
    there is room for comes with its graph too.
    """
    shape = sequences.response_mask.shape
    wide = torch.float64 if actors.policy.compute_dtype is torch.float64 else torch.float32
    logprobs, entropy, ref_logprobs, values = (
        torch.zeros(shape, dtype=wide, device=sequences.input_ids.device) for _ in range(4)
    )
    kept = []
    for rows in microbatches(sequences.lengths.tolist(), max_tokens):
        part = sequences.select(rows)
        width = part.max_response
        ref_logprobs[rows, :width], _ = actors.ref_policy(part, temperature=temperature)
        with torch.set_grad_enabled(room.take(actors.policy, part)):
            given, entropy[rows, :width] = actors.policy(part, temperature=temperature, with_entropy=True)
        with torch.set_grad_enabled(room.take(actors.value_model, part)):
            valued = actors.value_model(part, per_token=True)
        logprobs[rows, :width], values[rows, :width] = given, valued
        kept.append(KeptPass(torch.tensor(rows), *(found if found.requires_grad else None for found in (given, valued))))
    for name, tensor in (("policy", logprobs), ("reference", ref_logprobs), ("value model", values)):
        if not bool(tensor.isfinite().all()):
            raise TercetError(
                f"the {name} gave numbers that are not finite on sampled responses; the last checkpoint is kept. Lower the learning "
                "rates, raise ppo.kl.coef, or set machine.dtype: float32"
            )
    return logprobs, entropy, ref_logprobs, values, kept


def _means(per_response: dict[str, Tensor], count: int, world: World) -> dict[str, float]:
    sums = torch.stack([value.detach().cpu().double().sum() for value in per_response.values()])
    return dict(zip(per_response, (world.all_sum(sums) / count).tolist()))


def _sampler_gap(sequences: Sequences, logprobs: Tensor) -> float:
    """The largest difference between what the generator reported and what the training forward gives, in nats."""
    assert sequences.sampler_logprobs is not None
    gap = (sequences.sampler_logprobs - logprobs).abs()
    return torch.where(sequences.response_mask, gap, 0.0).max().item() if len(sequences) else 0.0


def _samples(iteration: int, texts: Texts, scores: Tensor, kl: Tensor, sequences: Sequences) -> list[dict[str, Any]]:
    columns = zip(texts.prompts, texts.responses, scores.tolist(), kl.tolist(), sequences.finished.tolist())
    return [
        {
            "iteration": iteration + 1,
            "prompt": prompt if isinstance(prompt, str) else [vars(turn) for turn in prompt],
            "response": response,
            "score": score,
            "kl": divergence,
            "finished": finished,
        }
        for prompt, response, score, divergence, finished in columns
    ]

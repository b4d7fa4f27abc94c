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
from tercet.types import Experience, Sequences, TercetError, Text


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
    """The four roles, and what samples and scores for them."""

    policy: Policy
    ref_policy: Policy
    value_model: ScoreModel
    generator: Generator
    scorer: Scorer


@dataclass
class Rollout:
    """A rollout's experience, its metrics, and the responses in words.

    first_logprobs: the experience's log-probabilities once more, with the graph of their forward pass: it is that of the first
    optimizer step too, if that one is over the whole rollout.
    """

    experience: Experience
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    first_logprobs: Tensor | None = None


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
        one_step = config.minibatch == config.rollout_batch_size and config.policy_learns(iteration)
        read_logprobs, entropy, ref_logprobs, values = read(
            actors, sequences, config.temperature, max_tokens, keep_graph=one_step
        )
    logprobs = read_logprobs.detach()
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
    return Rollout(experience, metrics, samples, read_logprobs if read_logprobs.requires_grad else None)


@torch.no_grad()
def read(
    actors: Actors, sequences: Sequences, temperature: float, max_tokens: int, *, keep_graph: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies, reference log-probabilities and values of every response token, each (B, T), 0 outside the mask.

    The forward is the one that the update makes, in the same micro-batches: before the first step the ratio is exactly 1. With
    `keep_graph`, and if all rows are one micro-batch, log-probabilities can be differentiated.
    """
    shape = sequences.response_mask.shape
    wide = torch.float64 if actors.policy.compute_dtype is torch.float64 else torch.float32
    logprobs, entropy, ref_logprobs, values = (
        torch.zeros(shape, dtype=wide, device=sequences.input_ids.device) for _ in range(4)
    )
    batches = microbatches(sequences.lengths.tolist(), max_tokens)
    for rows in batches:
        part = sequences.select(rows)
        width = part.max_response
        ref_logprobs[rows, :width], _ = actors.ref_policy(part, temperature=temperature)
        values[rows, :width] = actors.value_model(part, per_token=True)
        with torch.set_grad_enabled(keep_graph and len(batches) == 1):
            logprobs[rows, :width], entropy[rows, :width] = actors.policy(part, temperature=temperature, with_entropy=True)
    for name, tensor in (("policy", logprobs), ("reference", ref_logprobs), ("value model", values)):
        if not bool(tensor.isfinite().all()):
            raise TercetError(
                f"the {name} gave numbers that are not finite on sampled responses; the last checkpoint is kept. Lower the learning "
                "rates, raise ppo.kl.coef, or set machine.dtype: float32"
            )
    return logprobs, entropy, ref_logprobs, values


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

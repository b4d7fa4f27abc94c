"""Experience -> optimizer steps: the clipped surrogate and the clipped value loss (Schulman 2017), a few epochs over a rollout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tercet.algo.losses import policy_loss, value_loss
from tercet.config.ppo import PPOConfig
from tercet.data.batches import epoch_order, microbatches
from tercet.models.roles import Policy, ScoreModel
from tercet.runtime.distributed import World
from tercet.runtime.optim import Optimizer
from tercet.types import Experience, KeptPass


@dataclass
class UpdateProgress:
    """How far the update of one iteration has come: what a checkpoint between two optimizer steps must hold, as JSON values."""

    epoch: int = 0
    minibatch: int = 0
    steps: int = 0
    skipped: int = 0
    finished: bool = False
    tokens: float = 0.0  # response tokens that the sums below are over
    epoch_tokens: float = 0.0
    epoch_approx_kl: float = 0.0  # summed over this epoch's tokens
    sums: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Means over all response tokens of all optimizer steps."""
        names = {
            "policy_loss": "policy_loss",
            "value_loss": "value_loss",
            "approx_kl": "approx_kl",
            "clipped_active": "clip_fraction",
            "value_clipped": "value_clip_fraction",
            "ratio": "ratio",
        }
        means = {name: self.sums.get(key, 0.0) / max(1.0, self.tokens) for key, name in names.items()}
        norms = {name: self.sums.get(name, 0.0) / max(1, self.steps) for name in ("grad_norm", "value_grad_norm")}
        return {**means, **norms, "epochs_done": self.epoch, "optimizer_steps": self.steps, "skipped": self.skipped}


@dataclass(frozen=True)
class Trainables:
    """What an update changes, and at which learning rates; the policy stands still while policy_learning_rate is None."""

    policy: Policy
    value_model: ScoreModel
    policy_optimizer: Optimizer
    value_optimizer: Optimizer
    policy_learning_rate: float | None
    value_learning_rate: float


def update(
    experience: Experience,
    trainables: Trainables,
    config: PPOConfig,
    world: World,
    progress: UpdateProgress,
    *,
    iteration: int,
    seed: int,
    max_tokens: int,
    after_step: Callable[[UpdateProgress], None],
    kept: Sequence[KeptPass] = (),
) -> None:
    """Take the optimizer steps of one iteration, going on from `progress`; `after_step` is called after each of them. kept:
    forward passes of the rollout whose graphs wait for the first of them.

    Losses are sums over micro-batches and ranks divided by the minibatch's response tokens, so that the step does not depend on
    how the batch was cut.
    """
    response_lens = torch.tensor(world.gather_rows(experience.sequences.response_lens.tolist()))
    minibatches = config.rollout_batch_size // config.minibatch
    while progress.epoch < config.ppo_epochs and not progress.finished:
        order = epoch_order(config.rollout_batch_size, seed, iteration * config.ppo_epochs + progress.epoch)
        while progress.minibatch < minibatches:
            rows = order[progress.minibatch * config.minibatch :][: config.minibatch]
            count = int(response_lens[rows].sum())
            # Ascending, so that with one minibatch the micro-batches are those of the rollout's own forward.
            own = (rows[rows % world.size == world.rank] // world.size).sort().values
            _step(experience, trainables, config, world, progress, own, count, max_tokens, kept)
            for one in kept:
                one.let_go()
            kept = ()
            progress.minibatch += 1
            after_step(progress)
        mean_kl = progress.epoch_approx_kl / max(1.0, progress.epoch_tokens)
        progress.finished = config.max_approx_kl is not None and mean_kl > config.max_approx_kl
        progress.epoch += 1
        progress.minibatch = 0
        progress.epoch_tokens = progress.epoch_approx_kl = 0.0
    progress.finished = True


def update_flops(
    experience: Experience, trainables: Trainables, config: PPOConfig, progress: UpdateProgress, kept: Sequence[KeptPass]
) -> int:
    """Floating-point operations that the update needed on this rank's real tokens, pads and recomputation not counted.

    A backward pass costs twice a forward pass, and once where the weights are frozen below adapters. kept: forward passes that
    the rollout had made.
    """
    lens, response_lens = experience.sequences.lengths, experience.sequences.response_lens
    passes = (progress.steps + progress.skipped) * config.minibatch / config.rollout_batch_size
    roles: list[tuple[Policy | ScoreModel, list[Tensor]]]
    roles = [(trainables.value_model, [one.rows for one in kept if one.values is not None])]
    if trainables.policy_learning_rate is not None:
        roles.append((trainables.policy, [one.rows for one in kept if one.logprobs is not None]))
    needed = 0.0
    for role, made in roles:
        needed += passes * (3 if role.merge is None else 2) * role.flops(int(lens.sum()), int(response_lens.sum()))
        needed -= sum(role.flops(int(lens[rows].sum()), int(response_lens[rows].sum())) for rows in made)
    return int(needed)


def _step(
    experience: Experience,
    trainables: Trainables,
    config: PPOConfig,
    world: World,
    progress: UpdateProgress,
    own: Tensor,
    count: int,
    max_tokens: int,
    kept: Sequence[KeptPass],
) -> None:
    """One optimizer step of policy and value model on the rows `own` of this rank, of a minibatch with `count` response tokens."""
    parts = [experience.select(own[part]) for part in microbatches(experience.sequences.lengths[own].tolist(), max_tokens)]
    sums: dict[str, Tensor] = {}
    norm = 0.0
    # One model after the other, so that the gradients of one are in memory at a time.
    if trainables.policy_learning_rate is not None:
        for place, batch in enumerate(parts):
            mask = batch.sequences.response_mask
            new_logprobs = kept[place].logprobs if kept else None
            if new_logprobs is None:
                new_logprobs, _ = trainables.policy(batch.sequences, temperature=config.temperature)
            loss, stats = policy_loss(new_logprobs, batch.logprobs, batch.advantages, mask, config.clip_range, count)
            loss.backward()
            _add(sums, policy_loss=loss.detach() * count, **stats)
        norm = trainables.policy_optimizer.step(trainables.policy_learning_rate)
    for place, batch in enumerate(parts):
        mask = batch.sequences.response_mask
        new_values = kept[place].values if kept else None
        if new_values is None:
            new_values = trainables.value_model(batch.sequences, per_token=True)
        loss, stats = value_loss(new_values, batch.values, batch.returns, mask, config.value_clip_range, count)
        loss.backward()
        _add(sums, value_loss=loss.detach() * count, **stats)
    value_norm = trainables.value_optimizer.step(trainables.value_learning_rate)
    totals = _sum_over_ranks(sums, world)
    if not (math.isfinite(norm) and math.isfinite(value_norm)):
        progress.skipped += 1  # neither its gradient nor its figures are worth anything
        return
    progress.steps += 1
    progress.tokens += count
    progress.epoch_tokens += count
    progress.epoch_approx_kl += totals.get("approx_kl", 0.0)
    for name, total in {**totals, "grad_norm": norm, "value_grad_norm": value_norm}.items():
        progress.sums[name] = progress.sums.get(name, 0.0) + total


_SUMS = (
    "policy_loss",
    "approx_kl",
    "approx_kl_half_sq",
    "ratio",
    "clipped_ratio",
    "clipped_active",
    "value_loss",
    "value_clipped",
)


def _add(sums: dict[str, Tensor], **parts: Tensor) -> None:
    for name, value in parts.items():
        sums[name] = sums.get(name, 0.0) + value.cpu().double()


def _sum_over_ranks(sums: dict[str, Tensor], world: World) -> dict[str, float]:
    assert sums.keys() <= set(_SUMS)
    zero = torch.zeros((), dtype=torch.float64)  # a rank of many may have no rows, and the policy may stand still
    return dict(zip(_SUMS, world.all_sum(torch.stack([sums.get(name, zero) for name in _SUMS])).tolist()))

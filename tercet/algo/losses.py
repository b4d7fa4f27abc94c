"""What the optimizer minimises.

A token loss is a masked sum divided by `count`, the number of True mask entries over everything that shares the optimizer step
(all micro-batches, all ranks). So micro-batch losses add up to the minibatch's loss however it was cut. Statistics are sums too,
without gradient; the caller divides them by the same count.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tercet.algo.kl import k2, k3
from tercet.algo.masks import at_least_float32, masked_sum


def policy_loss(
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float, count: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate: sum of max(-A r, -A clip(r, 1 - clip_range, 1 + clip_range)) / count, r = pi_new / pi_old.

    new_logprobs (with gradient), logprobs, advantages (B, T) float; mask (B, T) bool. Returns the scalar loss and sums:
    clipped_active (the clipped branch is the larger one, so the gradient is 0), clipped_ratio (|r - 1| > clip_range), ratio,
    approx_kl (k3 of old against new) and approx_kl_half_sq. Source: Schulman 2017, equation 7.
    """
    # Selected before exp, not only after: junk on a pad would still give 0 * inf = NaN in the backward pass.
    new_logprobs = torch.where(mask, new_logprobs, 0.0)
    logprobs, advantages = logprobs.detach(), advantages.detach()
    ratio = (new_logprobs - logprobs).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = _divide(masked_sum(torch.maximum(unclipped, clipped), mask), count)
    with torch.no_grad():
        stats = {
            "clipped_active": masked_sum((clipped > unclipped).to(ratio), mask),
            "clipped_ratio": masked_sum(((ratio - 1).abs() > clip_range).to(ratio), mask),
            "ratio": masked_sum(ratio, mask),
            "approx_kl": masked_sum(k3(logprobs, new_logprobs), mask),
            "approx_kl_half_sq": masked_sum(k2(logprobs, new_logprobs), mask),
        }
    return loss, stats


def value_loss(
    new_values: Tensor, values: Tensor, returns: Tensor, mask: Tensor, value_clip_range: float | None, count: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped value loss: sum of 0.5 max((V - R)^2, (V_clip - R)^2) / count, V_clip within value_clip_range of the old V.

    new_values (with gradient), values (recorded), returns (B, T) float; mask (B, T) bool; value_clip_range None: no clip.
    Returns the scalar loss and the sum value_clipped (the clipped branch is the larger one).
    Source: lm-human-preferences train_policy.py:343-347.
    """
    new_values = torch.where(mask, new_values, 0.0)
    values, returns = values.detach(), returns.detach()
    error = (new_values - returns) ** 2
    worst = error
    if value_clip_range is not None:
        clipped = torch.clamp(new_values, values - value_clip_range, values + value_clip_range)
        worst = torch.maximum(error, (clipped - returns) ** 2)
    loss = _divide(0.5 * masked_sum(worst, mask), count)
    return loss, {"value_clipped": masked_sum((worst > error).to(error), mask)}


def sft_loss(logprobs: Tensor, mask: Tensor, count: float | Tensor) -> Tensor:
    """Cross-entropy of the tokens to imitate: -sum of logprobs over mask / count; logprobs (B, T) or (N,), mask bool."""
    return _divide(-masked_sum(logprobs, mask), count)


def ranking_loss(
    scores: Tensor, ranks: Tensor, groups: Tensor, *, margins: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Reward model's loss: summed over prompts, the mean over a prompt's pairs of -logsigmoid(s_better - s_worse - margin).

    scores (N,) float, one per response; ranks (N,): smaller is better, equal is a tie, and a tied pair does not count; groups
    (N,) int64: which prompt a response belongs to, in any order; margins (G,) float: one per prompt, in ascending order of
    the prompt's index. Each prompt weighs 1 whatever its number of responses; one whose responses are all tied does not count.
    Returns the loss sum, the number of prompts that count (int64; divide by it, taken over the whole minibatch, see
    `counted_prompts`) and the sums "pairs" and "correct" (equal scores count half).
    ValueError: margins is not (G,). Source: Ouyang 2022 (InstructGPT), equation 1; Stiennon 2020, section 3.4.
    """
    slots, better = _pairs(ranks, groups)
    table = at_least_float32(scores)[slots]
    difference = table[:, :, None] - table[:, None, :]
    shifted = difference
    if margins is not None:
        if margins.shape != (len(slots),):
            raise ValueError(f"margins must have one entry for each of {len(slots)} prompts, got shape {tuple(margins.shape)}")
        shifted = difference - margins.to(difference)[:, None, None]
    losses = torch.where(better, -logsigmoid(shifted), 0.0).sum((1, 2))
    pairs = better.sum((1, 2))
    loss = (losses / pairs.clamp(min=1)).sum()
    correct = (difference.detach().sign() + 1) / 2
    return loss, (pairs > 0).sum(), {"correct": masked_sum(correct, better), "pairs": pairs.sum()}


def counted_prompts(ranks: Tensor, groups: Tensor) -> int:
    """How many prompts have at least one pair that is not a tie: what a minibatch's ranking loss is divided by.

    ranks, groups (N,) as for `ranking_loss`; no scores needed, so it is known before the first micro-batch.
    """
    return int(_pairs(ranks, groups)[1].any(2).any(1).sum())


def normalisation(scores: Tensor) -> tuple[float, float]:
    """(gain, bias) such that gain * score + bias has mean 0 and population standard deviation 1 over scores (N,).

    ValueError: there are no scores, they are all equal, or one is not finite.
    Source: lm-human-preferences rewards.py:77-89.
    """
    scores = scores.detach().cpu().double()
    if len(scores) == 0 or not bool(scores.isfinite().all()):
        raise ValueError(f"cannot normalise {len(scores)} scores: at least two are needed, all of them finite")
    if bool(scores.max() == scores.min()):
        raise ValueError(f"cannot normalise: all {len(scores)} scores equal {float(scores[0]):g}, so their deviation is 0")
    gain = 1 / float(scores.std(correction=0))
    return gain, -gain * float(scores.mean())


def _pairs(ranks: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """slots (G, K) int64: indices into ranks by prompt, 0 where a prompt has fewer than K = the largest number of responses;
    better (G, K, K) bool: [g, i, j] is True where response i of prompt g is ranked better than its response j."""
    _, group, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    order = group.argsort(stable=True)
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(len(groups), device=groups.device) - starts[group[order]]
    widest = int(sizes.max()) if len(sizes) else 0
    slots = torch.zeros(len(sizes), widest, dtype=torch.long, device=groups.device)
    slots[group[order], place] = order
    real = torch.arange(widest, device=groups.device) < sizes[:, None]
    ranked = ranks[slots]
    better = (ranked[:, :, None] < ranked[:, None, :]) & real[:, :, None] & real[:, None, :]
    return slots, better


def _divide(total: Tensor, count: float | Tensor) -> Tensor:
    if not count > 0:
        raise ValueError(f"a loss is divided by the number of entries that count over the minibatch, at least 1; got {count}")
    return total / count

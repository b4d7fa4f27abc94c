"""Scores to rewards to advantages. Everything here is data for the update: no result carries a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from tercet.algo.masks import AllSum, at_least_float32, identity, last_index, masked_var


def combine_score(
    scores: Tensor,
    finished: Tensor,
    *,
    score_clip: float | None = None,
    missing_eos_penalty: float | None = None,
    missing_eos_score: float | None = None,
) -> Tensor:
    """The final score of each response: first the clip to +- score_clip, then the rule for responses without an end.

    scores (B,) float; finished (B,) bool. An unfinished response loses missing_eos_penalty (TRL), or its score is replaced by
    missing_eos_score (lm-human-preferences train_policy.py:388-390). In this order, so that the clip cannot swallow the
    penalty. Returns (B,). ValueError: both rules are given.
    """
    if missing_eos_penalty is not None and missing_eos_score is not None:
        raise ValueError("give missing_eos_penalty or missing_eos_score, not both")
    scores = at_least_float32(scores.detach())
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    if missing_eos_penalty is not None:
        scores = torch.where(finished, scores, scores - missing_eos_penalty)
    if missing_eos_score is not None:
        scores = torch.where(finished, scores, missing_eos_score)
    return scores


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * KL on every response token, plus the score on the last one, whose KL term stays; 0 outside the mask.

    scores (B,); kl (B, T), k1 per token; response_mask (B, T) bool. Returns (B, T) without gradient. A row without any
    response token gets nothing. Source: Ziegler 2019, equation 2; lm-human-preferences train_policy.py:149-154.
    """
    steps = torch.arange(response_mask.shape[1], device=response_mask.device)
    is_last = steps == last_index(response_mask)[:, None]
    rewards = -kl_coef * at_least_float32(kl.detach()) + torch.where(is_last, scores.detach()[:, None], 0.0)
    return torch.where(response_mask, rewards, 0.0)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns: delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lambda A_{t+1}.

    rewards, values (B, T), where values[:, t] = V before token t; response_mask (B, T) bool. V after the last token is 0,
    and whatever stands outside the mask is ignored. Returns advantages and returns = advantages + values, both (B, T), 0
    outside the mask, without gradient; take returns before whitening. Source: Schulman 2016, equation 16.
    """
    rewards = at_least_float32(rewards)
    values = torch.where(response_mask, at_least_float32(values), 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(response_mask[:, t], delta + gamma * gae_lambda * next_advantage, 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, all_sum: AllSum = identity) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the mask and all ranks: 1 is perfect, 0 no better than a constant.

    values, returns, mask (B, T). A scalar; 0 where the returns do not vary, as there is nothing to explain.
    """
    total = masked_var(returns, mask, all_sum)
    unexplained = masked_var(at_least_float32(returns) - values, mask, all_sum)
    return torch.where(total > 0, 1 - unexplained / total, 0.0)

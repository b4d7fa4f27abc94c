"""From hidden states to log-probabilities: the one place with index arithmetic between texts and response tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tercet.algo.masks import at_least_float32

Head = Callable[[Tensor], Tensor]
"""The output head: states (n, D) -> logits (n, V)."""


def response_states(hidden: Tensor, prompt_lens: Tensor, max_response: int) -> Tensor:
    """The hidden states that predict the response tokens: state t of a row is at index prompt_len - 1 + t of its text.

    hidden (B, L, D), of texts `[prompt | response | pad]`; prompt_lens (B,) int64, at least 1; max_response: T. Returns
    (B, T, D). Beyond the end of hidden the last state is repeated: only the response mask tells which states are real.
    """
    steps = torch.arange(max_response, device=hidden.device)
    index = (prompt_lens[:, None] - 1 + steps).clamp(max=hidden.shape[1] - 1)
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))


def last_states(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The state at the last real token of each row, where a reward model reads its score: (B, L, D), (B,) int64 -> (B, D)."""
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return hidden[rows, lengths - 1]


def logits_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature)[target], and the entropy in nats of the same distribution.

    logits (N, V), half precision is upcast to float32, float64 stays; targets (N,) int64. Returns logprobs (N,) and entropy
    (N,), which carries no gradient, or None. ValueError: temperature is not > 0. Source: lm-human-preferences policy.py:121.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    logits = at_least_float32(logits)
    if temperature != 1.0:
        logits = logits / temperature
    log_z = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_z
    if not with_entropy:
        return logprobs, None
    # After logprobs, so that a checkpoint's recomputation stops before it.
    with torch.no_grad():
        every = logits - log_z[:, None]
        # A token of probability 0 has logit -inf: 0 * -inf would be NaN.
        entropy = -(every.exp() * every.clamp(min=torch.finfo(every.dtype).min)).sum(-1)
    return logprobs, entropy


def token_logprobs(
    states: Tensor,
    targets: Tensor,
    head: Head,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_elements: int = 4_000_000,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (and entropies) of target tokens, never holding more than chunk_elements logits at a time.

    states (N, D); targets (N,) int64; head: (n, D) -> logits (n, V), each row on its own. Runs in chunks of rows; each is
    recomputed in the backward pass, so memory does not grow with N x V there either. Returns as `logits_logprobs`.
    """

    def chunk_logprobs(rows: Tensor, row_targets: Tensor) -> tuple[Tensor, Tensor | None]:
        return logits_logprobs(head(rows), row_targets, temperature, with_entropy)

    with torch.no_grad():
        vocabulary = head(states[:1]).shape[-1]
    chunk_rows = max(1, chunk_elements // vocabulary)
    if len(states) <= chunk_rows:
        return chunk_logprobs(states, targets)
    results: list[tuple[Tensor, Tensor | None]] = []
    for start in range(0, len(states), chunk_rows):
        rows, row_targets = states[start : start + chunk_rows], targets[start : start + chunk_rows]
        if torch.is_grad_enabled():
            results.append(checkpoint(chunk_logprobs, rows, row_targets, use_reentrant=False, preserve_rng_state=False))
        else:
            results.append(chunk_logprobs(rows, row_targets))
    entropies = [entropy for _, entropy in results if entropy is not None]
    return torch.cat([logprobs for logprobs, _ in results]), torch.cat(entropies) if with_entropy else None

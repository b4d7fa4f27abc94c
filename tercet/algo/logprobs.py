"""From hidden states to log-probabilities: the one place with index arithmetic between texts and response tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tercet.algo.masks import at_least_float32


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
    with torch.no_grad():
        every = logits - log_z[:, None]
        # A token of probability 0 has logit -inf: 0 * -inf would be NaN.
        entropy = -(every.exp() * every.clamp(min=torch.finfo(every.dtype).min)).sum(-1)
    return logprobs, entropy


def token_logprobs(
    states: Tensor,
    targets: Tensor,
    head: nn.Module,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_elements: int = 8_000_000,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (and entropies) of target tokens, never holding more than chunk_elements logits at a time.

    states (N, D); targets (N,) int64; head: a module (n, D) -> logits (n, V), each row on its own. Runs in chunks of rows; each is
    recomputed in the backward pass, so memory does not grow with N x V there either. Returns as `logits_logprobs`.
    """
    weights = tuple(head.parameters())
    with torch.no_grad():
        vocabulary = head.out_features if isinstance(head, nn.Linear) else head(states[:1]).shape[-1]
    chunk_rows = max(1, chunk_elements // vocabulary)
    if len(states) <= chunk_rows:
        return logits_logprobs(head(states), targets, temperature, with_entropy)
    entropies: list[Tensor] | None = [] if with_entropy else None
    logprobs: Tensor = _InChunks.apply(  # type: ignore[no-untyped-call]
        states, targets, head, temperature, chunk_rows, entropies, *weights
    )
    return logprobs, None if entropies is None else torch.cat(entropies)


class _InChunks(torch.autograd.Function):
    """`logits_logprobs` of the head's output, a chunk of rows at a time.

    d logprob / d logits = (onehot(target) - softmax) / temperature, which is written over the recomputed logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        targets: Tensor,
        head: nn.Module,
        temperature: float,
        rows: int,
        entropies: list[Tensor] | None,
        *weights: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(states, targets, *weights)
        ctx.head, ctx.temperature, ctx.rows = head, temperature, rows
        ctx.autocast = torch.is_autocast_enabled(states.device.type)
        logprobs = []
        for part, wanted in zip(torch.split(states, rows), torch.split(targets, rows)):
            own, entropy = logits_logprobs(head(part), wanted, temperature, entropies is not None)
            logprobs.append(own)
            if entropies is not None and entropy is not None:
                entropies.append(entropy)
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, targets, *weights = ctx.saved_tensors
        wanted_weights = [weight for weight in weights if weight.requires_grad]
        kind = states.device.type
        state_gradients, sums = [], None
        chunks = zip(*(torch.split(tensor, ctx.rows) for tensor in (states, targets, gradients[0])))
        for part, target, gradient in chunks:
            with torch.enable_grad(), torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=ctx.autocast):
                part = part.detach().requires_grad_()
                logits = ctx.head(part)
            slope = at_least_float32(logits.detach()) / ctx.temperature
            slope = torch.softmax(slope, dim=-1).mul_(-gradient[:, None])
            slope.scatter_add_(1, target[:, None], gradient[:, None].to(slope.dtype))
            slope = slope.div_(ctx.temperature).to(logits.dtype)
            own, *found = torch.autograd.grad(logits, [part, *wanted_weights], slope)
            state_gradients.append(own)
            sums = found if sums is None else [total.add_(more) for total, more in zip(sums, found)]
        each = iter(sums or ())
        return (
            torch.cat(state_gradients),
            *[None] * 5,
            *[next(each) if weight.requires_grad else None for weight in weights],
        )

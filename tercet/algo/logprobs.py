"""From hidden states to log-probabilities: the one place with index arithmetic between texts and response tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
    _check(temperature)
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
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_elements: int = 8_000_000,
) -> tuple[Tensor, Tensor | None]:
    """`logits_logprobs` of states @ weight^T + bias, never holding more than chunk_elements logits at a time.

    states (N, D); targets (N,) int64; weight (V, D), bias (V,): the output layer. Memory does not grow with N x V in the backward
    pass either, which computes each chunk's logits anew. Returns as `logits_logprobs`.
    """
    _check(temperature)
    if len(states) * len(weight) <= chunk_elements:
        return logits_logprobs(F.linear(states, weight, bias), targets, temperature, with_entropy)
    entropies: list[Tensor] | None = [] if with_entropy else None
    logprobs: Tensor = _InChunks.apply(  # type: ignore[no-untyped-call]
        states, targets, weight, bias, temperature, chunk_elements, entropies
    )
    return logprobs, None if entropies is None else torch.cat(entropies)


def product_dtype(weight: Tensor) -> torch.dtype:
    """What matrix products with the weight are computed in: autocast's precision where it is on, else the weight's own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _check(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")


_NARROWEST = 4096  # tokens of the vocabulary in a chunk: narrower products are slower


class _InChunks(torch.autograd.Function):
    """The softmax's normaliser is summed over chunks of the vocabulary, so that the gradient of each of the weight's rows is written
    once for all tokens (in chunks of tokens GPT-2's was written ten times: 0.48 s instead of 0.19 for 768 tokens)."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        elements: int,
        entropies: list[Tensor] | None,
    ) -> Tensor:
        height = max(1, elements // min(len(weight), _NARROWEST))
        ctx.head = _Head(weight, bias, temperature, max(1, elements // min(height, len(states))))
        ctx.height = height
        found = [
            ctx.head.scan(part, wanted, entropies is not None)
            for part, wanted in zip(torch.split(states, height), torch.split(targets, height))
        ]
        log_z = torch.cat([one[0] for one in found])
        if entropies is not None:
            entropies += [one[2] for one in found]
        ctx.save_for_backward(states, targets, log_z)
        return torch.cat([one[1] for one in found]) - log_z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, targets, log_z = ctx.saved_tensors
        _, _, wants_weight, wants_bias = ctx.needs_input_grad[:4]
        for_weight = torch.zeros_like(ctx.head.weight) if wants_weight else None
        for_bias = torch.zeros_like(ctx.head.bias) if wants_bias else None
        parts = zip(*(torch.split(tensor, ctx.height) for tensor in (states, targets, log_z, gradients[0])))
        for_states = [ctx.head.slopes(*part, for_weight, for_bias) for part in parts]
        return torch.cat(for_states), None, for_weight, for_bias, None, None, None


class _Head:
    """An output layer a chunk of the vocabulary at a time, multiplied in autocast's precision; logits are divided by the temperature."""

    def __init__(self, weight: Tensor, bias: Tensor | None, temperature: float, width: int):
        self.dtype = product_dtype(weight)
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.temperature = temperature
        self.spans = [slice(start, start + width) for start in range(0, len(weight), width)]

    def logits(self, states: Tensor, weight: Tensor, span: slice) -> Tensor:
        logits = at_least_float32(F.linear(states, weight, None if self.bias is None else self.bias[span].to(self.dtype)))
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def scan(self, states: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """For each state log Z, the target's logit and the entropy, from one pass over the vocabulary."""
        states = states.to(self.dtype)
        least = torch.finfo(at_least_float32(states).dtype).min
        # Sums of exp(logit - highest so far), and of that times (logit - highest so far).
        highest = at_least_float32(states).new_full((len(states),), least / 2)
        picked, total, moment = (torch.zeros_like(highest) for _ in range(3))
        for span in self.spans:
            logits = self.logits(states, self.weight[span].to(self.dtype), span)
            rows, columns = _inside(targets, span)
            picked[rows] = logits[rows, columns]
            risen = torch.maximum(highest, logits.amax(1))
            shift, logits = highest - risen, logits.sub_(risen[:, None])
            weights = logits.exp()
            if with_entropy:  # a token of probability 0 has logit -inf: 0 * -inf would be NaN
                moment = shift.exp() * (moment + shift * total) + weights.mul(logits.clamp_(min=least)).sum(1)
            total = shift.exp() * total + weights.sum(1)
            highest = risen
        return highest + total.log(), picked, total.log() - moment / total if with_entropy else None

    def slopes(
        self, states: Tensor, targets: Tensor, log_z: Tensor, gradient: Tensor, for_weight: Tensor | None, for_bias: Tensor | None
    ) -> Tensor:
        """The gradient of the states; those of weight and bias are added to.

        d logprob / d logits = (onehot(target) - softmax) / temperature.
        """
        inputs = states.to(self.dtype)
        for_states = torch.zeros_like(at_least_float32(states))
        for span in self.spans:
            weight = self.weight[span].to(self.dtype)
            slope = self.logits(inputs, weight, span).sub_(log_z[:, None]).exp_().mul_(-gradient[:, None])
            rows, columns = _inside(targets, span)
            slope[rows, columns] += gradient[rows]
            slope = slope.div_(self.temperature).to(self.dtype)
            for_states += slope @ weight
            if for_weight is not None:
                for_weight[span] += slope.t() @ inputs
            if for_bias is not None:
                for_bias[span] += slope.sum(0)
        return for_states.to(states.dtype)


def _inside(targets: Tensor, span: slice) -> tuple[Tensor, Tensor]:
    """The rows whose target lies in the chunk, and its column there."""
    rows = ((targets >= span.start) & (targets < span.stop)).nonzero().squeeze(1)
    return rows, targets[rows] - span.start

"""From hidden states to log-probabilities: the one place with index arithmetic between texts and response tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tercet.algo.masks import at_least_float32
from tercet.algo.products import head_centre, head_rows, linear_product, pieces, product_dtype, spare_rows, transposed_product

HEAD_CHUNK = 8_000_000  # logits that are held at a time


def response_states(hidden: Tensor, prompt_lens: Tensor, mask: Tensor) -> Tensor:
    """The hidden states that predict the response tokens: state t of a row is at index prompt_len - 1 + t of its text.

    hidden (B, L, D), of texts `[prompt | response | pad]`; prompt_lens (B,) int64, at least 1; mask (B, T) bool, True where there is a
    token. Returns (N, D), N = mask.sum(), in the mask's order.
    """
    steps = torch.arange(mask.shape[1], device=hidden.device)
    return _states_at(hidden, (prompt_lens[:, None] - 1 + steps)[mask], mask.sum(1))


def last_states(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The state at the last real token of each row, where a reward model reads its score: (B, L, D), (B,) int64 -> (B, D)."""
    return _states_at(hidden, lengths - 1, torch.ones_like(lengths))


def _states_at(hidden: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """The states (N, D) at index (N,) of the texts (B, L, D), of which the first counts (B,) are the first text's, and so on. Rows of a
    matrix: gathering (B, T, D) and leaving out what is masked took ten times as long forwards and backwards (15 instead of 1.6 ms
    for 16 texts of GPT-2)."""
    starts = torch.arange(len(hidden), device=hidden.device) * hidden.shape[1]
    rows = starts.repeat_interleave(counts, output_size=len(index))
    return hidden.flatten(0, 1).index_select(0, rows + index)


@dataclass(frozen=True)
class LogitTransform:
    """What a model makes of its output layer's products: logits = scale * cap * tanh(product / cap), without a cap scale * product.

    Source: Gemma 2 (2024, section 2) caps, Cohere's and Granite's models scale.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, products: Tensor) -> Tensor:
        """Logits of products, of their shape; in float32 or wider if there is anything to do."""
        if self.cap is not None:
            return (at_least_float32(products) / self.cap).tanh() * (self.cap * self.scale)
        return products if self.scale == 1.0 else at_least_float32(products) * self.scale

    def slope(self, products: Tensor) -> Tensor | None:
        """d logits / d products but for the scale; None where it is 1 everywhere."""
        return None if self.cap is None else 1.0 - (at_least_float32(products) / self.cap).tanh_().square_()


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
    transform: LogitTransform = LogitTransform(),
    with_entropy: bool = False,
    chunk_elements: int = HEAD_CHUNK,
) -> tuple[Tensor, Tensor | None]:
    """`logits_logprobs` of transform(states @ weight^T + bias), never holding more than chunk_elements logits at a time (off the CPU
    four times as many).

    states (N, D); targets (N,) int64; weight (V, D), bias (V,): the output layer. Of a layer that learns the backward pass finds as
    many logits as the weight has elements, and computes the others anew: memory does not grow with N x V. Returns as
    `logits_logprobs`.
    """
    _check(temperature)
    if states.device.type != "cpu":
        chunk_elements *= 4  # a GPU has no cache to fit, and waits for each chunk's targets
    entropies: list[Tensor] | None = [] if with_entropy else None
    count = len(states)
    spare = spare_rows(count)
    states, targets = F.pad(states, (0, 0, 0, spare)), F.pad(targets, (0, spare))
    logprobs: Tensor = _InChunks.apply(  # type: ignore[no-untyped-call]
        states, targets, weight, bias, temperature, transform, chunk_elements, entropies
    )
    return logprobs[:count], None if entropies is None else torch.cat(entropies)[:count]


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
        transform: LogitTransform,
        elements: int,
        entropies: list[Tensor] | None,
    ) -> Tensor:
        height = max(1, elements // min(len(weight), _NARROWEST))
        width = max(1, elements // max(1, min(height, len(states))))
        ctx.head = _Head(weight, bias, temperature, transform, width)
        ctx.height = height
        kept = _Kept(weight.numel() if ctx.needs_input_grad[2] else 0)
        found = [
            ctx.head.scan(part, wanted, entropies is not None, kept)
            for part, wanted in zip(torch.split(states, height), torch.split(targets, height))
        ]
        log_z = torch.cat([one[0] for one in found])
        if entropies is not None:
            entropies += [one[2] for one in found]
        logprobs = torch.cat([one[1] for one in found]) - log_z
        ctx.save_for_backward(states, targets, logprobs, log_z, *kept.chunks)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, targets, logprobs, log_z, *kept = ctx.saved_tensors
        _, _, wants_weight, wants_bias = ctx.needs_input_grad[:4]
        for_weight = torch.empty_like(ctx.head.weight) if wants_weight else None
        for_bias = torch.zeros_like(ctx.head.bias) if wants_bias else None
        scale = gradients[0] * (ctx.head.transform.scale / -ctx.head.temperature)
        parts = zip(*(torch.split(tensor, ctx.height) for tensor in (states, targets, logprobs, log_z, scale)))
        chunks = iter(kept)
        for_states = [ctx.head.slopes(*part, for_weight, for_bias, chunks, fresh=not place) for place, part in enumerate(parts)]
        return torch.cat(for_states), None, for_weight, for_bias, None, None, None, None


class _Kept:
    """The first chunks of logits, as many as there is room for."""

    def __init__(self, room: int):
        self.chunks: list[Tensor] = []
        self._room = room

    def offer(self, logits: Tensor) -> None:
        self._room -= logits.numel()
        if self._room >= 0:
            self.chunks.append(logits)


class _Head:
    """An output layer a chunk of the vocabulary at a time, multiplied in autocast's precision, there without what its rows have in
    common (but for a cap, which sees it); logits are divided by the temperature."""

    def __init__(self, weight: Tensor, bias: Tensor | None, temperature: float, transform: LogitTransform, width: int):
        self.dtype = product_dtype(weight)
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.centre = head_centre(weight, self.dtype) if transform.cap is None else None
        self.temperature, self.transform = temperature, transform
        self.spans = [slice(start, start + width) for start in range(0, len(weight), width)]

    def rows(self, span: slice) -> Tensor:
        """A chunk of the weight as it is multiplied."""
        return head_rows(self.weight[span], self.dtype, self.centre)

    def product(self, states: Tensor, weight: Tensor, span: slice) -> Tensor:
        """A chunk's products, before transform and temperature, in their precision."""
        return linear_product(states, weight, None if self.bias is None else self.bias[span].to(self.dtype))

    def scan(self, states: Tensor, targets: Tensor, with_entropy: bool, kept: _Kept) -> tuple[Tensor, Tensor, Tensor | None]:
        """For each state log Z, the target's logit and the entropy, from one pass over the vocabulary."""
        states = states.to(self.dtype)
        picked = torch.zeros_like(at_least_float32(states[:, 0]))
        parts: list[tuple[Tensor, Tensor]] = []
        for span in self.spans:
            product = self.product(states, self.rows(span), span)
            kept.offer(product)
            rows, columns = _inside(targets, span)
            picked[rows] = self._logits(product[rows, columns])
            sums = [_sums(self._logits(piece), with_entropy) for piece in pieces(product, product)]
            parts.append((torch.cat([one[0] for one in sums]), torch.cat([one[1] for one in sums])))
        every = torch.stack([one[0] for one in parts])
        log_z = every.logsumexp(0)
        if not with_entropy:
            return log_z, picked, None
        # The entropy of the choice of a chunk, and that of the choice within it.
        log_share = (every - log_z).clamp_(min=torch.finfo(every.dtype).min)
        return log_z, picked, (log_share.exp() * (torch.stack([one[1] for one in parts]) - log_share)).sum(0)

    def slopes(
        self,
        states: Tensor,
        targets: Tensor,
        logprobs: Tensor,
        log_z: Tensor,
        scale: Tensor,
        for_weight: Tensor | None,
        for_bias: Tensor | None,
        kept: Iterator[Tensor],
        fresh: bool,
    ) -> Tensor:
        """Returns the gradient of the states; adds the bias's to for_bias and the weight's to for_weight, or writes it where `fresh`. scale:
        minus the log-probabilities' own gradients, times the transform's scale, divided by the temperature.

        d logprob / d product = (onehot(target) - softmax) * transform.slope * transform.scale / temperature.
        """
        inputs, scaled = states.to(self.dtype), (states * scale[:, None]).to(self.dtype)
        for_states = torch.zeros_like(at_least_float32(states))
        for span in self.spans:
            weight = self.rows(span)
            product = next(kept, None)
            if product is None:
                product = self.product(inputs, weight, span)
            slope = torch.empty_like(product)
            for piece, log_zs, into in zip(*(pieces(tensor, product) for tensor in (product, log_z, slope))):
                into.copy_(self._logits(piece).sub_(log_zs[:, None]).exp_())
            rows, columns = _inside(targets, span)
            slope[rows, columns] = logprobs[rows].expm1().to(self.dtype)  # p - 1 with all its digits, also where p is nearly 1
            for piece, into in zip(pieces(product, product), pieces(slope, product)):
                if (inner := self.transform.slope(piece)) is not None:
                    into.mul_(inner)
            for_states += linear_product(slope, weight.t(), None)
            if for_weight is not None:
                gradient = transposed_product(slope, scaled)
                if fresh:
                    for_weight[span] = gradient
                else:
                    for_weight[span] += gradient
            if for_bias is not None:
                for_bias[span] += scale.to(for_bias) @ slope.to(for_bias)
        return (for_states * scale[:, None]).to(states.dtype)

    def _logits(self, product: Tensor) -> Tensor:
        """Numbers of their own, that may be changed in place."""
        logits = self.transform(at_least_float32(product))
        if logits is product:
            logits = product.clone()
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)


def _sums(logits: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
    """Of each row log Z and, if wanted, the entropy of its softmax. The logits are overwritten."""
    least, tiny = torch.finfo(logits.dtype).min, torch.finfo(logits.dtype).tiny
    highest = logits.amax(1).clamp_(min=least)
    logits.sub_(highest[:, None])
    weights = logits.exp() if with_entropy else logits.exp_()
    total = weights.sum(1)
    log_z = highest + total.log()
    if not with_entropy:
        return log_z, log_z
    # A token of probability 0 has logit -inf: 0 * -inf would be NaN. So would 0 / 0, of a chunk that has no others.
    moment = weights.mul_(logits.clamp_(min=least)).sum(1)
    return log_z, total.clamp_(min=tiny).log() - moment / total


def _inside(targets: Tensor, span: slice) -> tuple[Tensor, Tensor]:
    """The rows whose target lies in the chunk, and its column there."""
    rows = ((targets >= span.start) & (targets < span.stop)).nonzero().squeeze(1)
    return rows, targets[rows] - span.start

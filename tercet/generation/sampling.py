"""Random numbers as a pure function of their place, and exact sampling from softmax(logits / T)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tercet.algo.products import pieces

_BLOCK = 256
PURPOSES = ("rollout", "evaluation", "normalisation")


def uniforms(seed: int, purpose: str, iteration: int, rows: Tensor | range, steps: int) -> Tensor:
    """Uniform numbers in [0, 1), (len(rows), steps) float64.

    The number for token t of prompt i in iteration k depends on (seed, purpose, k, i, t) alone: not on the rank, the batch's size,
    its other rows or a resume. Philox is a counter-based generator (Salmon 2011); each row has a counter range of its own.
    """
    key = np.array([seed, PURPOSES.index(purpose)], dtype=np.uint64)
    numbers = np.empty((len(rows), steps))
    for place, row in enumerate(rows):
        counter = np.array([0, 0, int(row), iteration], dtype=np.uint64)
        numbers[place] = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(steps)
    return torch.from_numpy(numbers)


def inverse_cdf(logits: Tensor, uniform: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw from softmax(logits / temperature) with one uniform number a row: the first token whose cumulative mass exceeds it.

    logits (B, V), uniform (B,) float64 or None for the likeliest token. Returns tokens (B,) int64 and their log-probabilities in
    float32 or wider. Two levels: sums of 256 tokens in the logits' own precision, then everything in float64, so that the tail of a
    vocabulary of 150,000 keeps its mass. As many rows at a time as stay in a processor's cache.
    """
    home = logits.device
    logits = logits.cpu() if home.type == "mps" else logits  # which has no float64
    parts = pieces(logits, logits)
    numbers = [None] * len(parts) if uniform is None else pieces(uniform, logits)
    drawn = [_draw(part, number, temperature) for part, number in zip(parts, numbers)]
    return torch.cat([tokens for tokens, _ in drawn]).to(home), torch.cat([logprobs for _, logprobs in drawn]).to(home)


def _draw(logits: Tensor, uniform: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    scaled = logits.to(wide) / temperature if temperature != 1.0 else logits
    top = scaled.amax(-1, keepdim=True).to(wide)
    mass = scaled.to(wide, copy=True).sub_(top).exp_()  # in place: three passes over a vocabulary took five times as long
    whole = mass.shape[1] // _BLOCK * _BLOCK
    sums = [mass[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)] + (
        [mass[:, whole:].sum(1, keepdim=True)] if whole < mass.shape[1] else []
    )
    cumulative = torch.cat(sums, dim=1).double().cumsum(-1)
    total = cumulative[:, -1]
    if uniform is None:
        tokens = scaled.argmax(-1)
    else:
        point = uniform.to(total.device) * total
        block = (cumulative <= point[:, None]).sum(-1).clamp(max=cumulative.shape[1] - 1)
        before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)[:, None]).squeeze(1), 0.0)
        places = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=block.device)
        inside = places < mass.shape[1]
        inner_mass = torch.where(inside, mass.gather(1, places.clamp(max=mass.shape[1] - 1)), 0.0).double()
        inner = (inner_mass.cumsum(-1) <= (point - before)[:, None]).sum(-1)
        # Rounding may leave the point a hair beyond the block's own sum: the last token with any mass takes it.
        last = _BLOCK - 1 - (inner_mass.flip(-1) > 0).int().argmax(-1)
        tokens = block * _BLOCK + torch.minimum(inner, last)
    picked = scaled.gather(1, tokens[:, None]).to(wide) - top
    return tokens, picked.squeeze(1) - total.log().to(picked.dtype)

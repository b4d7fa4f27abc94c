"""Random numbers as a pure function of their place, and exact sampling from softmax(logits / T)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tercet.algo.products import pieces

_BLOCK = 256
_ROWS = 8  # at a time, or a multiple
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
    float32 or wider. Two levels: sums of 256 tokens in float32 or wider, then everything in float64, so that the tail of a vocabulary
    of 150,000 keeps its mass. What goes over the vocabulary does so for as many rows at a time as stay in a processor's cache.
    """
    home = logits.device
    logits = logits.cpu() if home.type == "mps" else logits  # which has no float64
    wide = torch.promote_types(logits.dtype, torch.float32)
    parts = [part.to(wide) / temperature if temperature != 1.0 else part for part in pieces(logits, logits, _ROWS)]
    if uniform is None:
        likeliest = [part.log_softmax(-1, dtype=wide).max(-1) for part in parts]
        logprobs, tokens = (torch.cat(found) for found in zip(*likeliest))
    else:
        chosen = [_block(part, number, wide) for part, number in zip(parts, pieces(uniform, logits, _ROWS))]
        tokens, logprobs = _token(*(torch.cat(found) for found in zip(*chosen)))
    # By rounding, or of numbers that are not finite (their log-probability tells), the search may end behind the vocabulary.
    return tokens.clamp(max=logits.shape[1] - 1).to(home), logprobs.to(home, wide)


def _block(logits: Tensor, uniform: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which 256 tokens the draws fall among (n, 1), the masses of those (n, 256), how far into them (n, 1), and the mass of all (n, 1)."""
    vocabulary = logits.shape[1]
    mass = logits.softmax(-1, dtype=wide)
    whole = mass[:, : vocabulary // _BLOCK * _BLOCK].unflatten(1, (-1, _BLOCK)).sum(-1)
    rest = mass[:, whole.shape[1] * _BLOCK :]  # a vocabulary's last block is a smaller one
    sums = torch.cat([whole, rest.sum(-1, keepdim=True)], 1) if rest.shape[1] else whole
    cumulative = sums.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    point = uniform.to(total.device)[:, None] * total
    block = torch.searchsorted(cumulative, point, right=True).clamp_(max=sums.shape[1] - 1)
    before = F.pad(cumulative, (1, 0)).gather(1, block)
    # Behind the vocabulary its last token stands again, where no point falls but by rounding.
    tokens = (block * _BLOCK + torch.arange(_BLOCK, device=mass.device)).clamp_(max=vocabulary - 1)
    return block, mass.gather(1, tokens), point - before, total


def _token(block: Tensor, mass: Tensor, point: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens (n,) that `_block` has narrowed down, and their log-probabilities in float64."""
    cumulative = mass.cumsum(-1, dtype=torch.float64)
    inner = torch.searchsorted(cumulative, point, right=True)
    # Rounding may leave the point a hair beyond the block's own sum: the last token with any mass takes it.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()).clamp_(max=_BLOCK - 1)
    inner = torch.minimum(inner, last)
    return (block * _BLOCK + inner).squeeze(1), (mass.gather(1, inner) / total).log().squeeze(1)

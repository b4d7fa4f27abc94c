"""Figures for evaluation: best-of-n, diversity, win rates and their intervals. Tensors in, Python floats out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def best_of_n(scores: Tensor, values: Tensor, n: int) -> float:
    """Unbiased estimate of the expected value of the best of n samples, chosen by score, from N >= n samples of one prompt.

    scores, values (N,): chosen by, and averaged. The sample of 0-based rank i by score has weight C(i, n-1) / C(N, n); equal
    scores share their weight. ValueError: n is not within 1..N. Source: Nakano 2021 (WebGPT), appendix I.
    """
    total = len(scores)
    if not 1 <= n <= total:
        raise ValueError(f"best of {n} cannot be estimated from {total} samples")
    _, level = torch.unique(scores, return_inverse=True)
    values = values.double()
    level_sums = torch.zeros(total, dtype=torch.float64, device=values.device).index_add_(0, level, values)
    level_means = level_sums / level.bincount(minlength=total).clamp(min=1)
    ordered = level_means[level[scores.argsort()]].tolist()
    # Downwards from C(N-1, n-1) / C(N, n) = n / N, by C(i-1, n-1) / C(i, n-1) = (i - n + 1) / i: no large binomials.
    weight, estimate = n / total, 0.0
    for i in range(total - 1, n - 2, -1):
        estimate += weight * ordered[i]
        weight *= (i - n + 1) / i if i else 0.0
    return estimate


def best_of_n_kl(n: int) -> float:
    """KL in nats of best-of-n against the sampled policy: log n - (n - 1) / n; an upper bound where scores can be equal.

    Source: Stiennon 2020, appendix G.3; Beirami 2024.
    """
    return math.log(n) - (n - 1) / n


def distinct_n(token_lists: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams divided by all n-grams of the texts (token ids); 0 where no text has n tokens."""
    grams = [tuple(tokens[i : i + n]) for tokens in token_lists for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def win_rate(a: Tensor, b: Tensor) -> float:
    """Share of pairs that a wins, a tie counting half; a, b (N,) scores of the same prompts, N >= 1."""
    return float(((a > b).double() + (a == b).double() / 2).mean())


def pair_accuracy(better: Tensor, worse: Tensor) -> float:
    """Share of pairs in which the preferred response scores higher, equal scores counting half; better, worse (P,), P >= 1."""
    return win_rate(better, worse)


def bootstrap_interval(values: Tensor, seed: int, samples: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean of values, resampling rows.

    values (N,), or (N, ...) where what belongs to one row (the samples of a prompt) is drawn together; N >= 1. The same seed
    gives the same interval. ValueError: no rows.
    """
    if len(values) == 0:
        raise ValueError("a bootstrap interval needs at least one value")
    rows = values.detach().cpu().double().reshape(len(values), -1).mean(1)
    generator = torch.Generator().manual_seed(seed)
    # One resample at a time: samples x N indices at once would be gigabytes for large evaluations.
    means = torch.stack([rows[torch.randint(len(rows), (len(rows),), generator=generator)].mean() for _ in range(samples)])
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, tail).tolist()
    return low, high

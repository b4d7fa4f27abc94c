"""Figures for evaluation: best-of-n and its limit, diversity, win rates and their intervals, over-optimisation. Tensors in, floats out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from tercet.algo.calibration import wilson

RESAMPLES = 2000
_FEW_ROWS = 6


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


def bootstrap_interval(values: Tensor, seed: int, samples: int = RESAMPLES, level: float = 0.95) -> tuple[float, float]:
    """Expanded percentile bootstrap interval (low, high) of the mean of values, resampling rows.

    values (N,), or (N, ...) where what belongs to one row (the samples of a prompt) is drawn together; N >= 1. The same seed
    gives the same interval. Of 2 to 5 rows, whose resamples lie between the least and the greatest, it is Student's. ValueError: no
    rows. Source: Hesterberg 2015.
    """
    if len(values) == 0:
        raise ValueError("a bootstrap interval needs at least one value")
    rows = values.detach().cpu().double().reshape(len(values), -1).mean(1)
    if 1 < len(rows) < _FEW_ROWS:
        middle, half = rows.mean(), student_quantile(len(rows) - 1, level) * rows.std() / math.sqrt(len(rows))
        return float(middle - half), float(middle + half)
    generator = torch.Generator().manual_seed(seed)
    # One resample at a time: samples x N indices at once would be gigabytes for large evaluations.
    means = torch.stack([rows[torch.randint(len(rows), (len(rows),), generator=generator)].mean() for _ in range(samples)])
    return percentiles(means, len(rows), level)


def resamples(count: int, seed: int, samples: int = RESAMPLES, chunk: int = 200) -> Iterator[Tensor]:
    """How often each of `count` rows is drawn in each bootstrap resample: parts of (samples, count) float64, `chunk` rows at a time."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        drawn = torch.randint(count, (size, count), generator=generator)
        yield torch.zeros(size, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(size, count, dtype=torch.float64))


def percentiles(values: Tensor, count: int | None = None, level: float = 0.95) -> tuple[float, float]:
    """The ends of the central `level` of the values (S,); of estimates from resamples of `count` rows a little more of them, for few rows
    vary less among themselves than what they were drawn from: the interval of a mean then is as wide as Student's t makes it."""
    tail = (1 - level) / 2
    if count is not None and count > 1:
        tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * student_quantile(count - 1, level))
    low, high = torch.quantile(values.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def student_quantile(freedom: int, level: float = 0.95) -> float:
    """How many standard errors Student's t with that many degrees of freedom lies within, with probability `level`; to 0.001 from
    4 degrees on, 0.03 too few at 2. Source: Abramowitz and Stegun 1964, 26.7.5."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))


def by_group(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count (C,), float64, of the values (N,) of each of the groups (N,) int64 that has any, in ascending order."""
    _, places, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    return torch.zeros(len(counts), dtype=torch.float64).index_add_(0, places, values.double()), counts.double()


def cluster_interval(sums: Tensor, counts: Tensor, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of sums.sum() / counts.sum(), resampling rows (C,): what hangs together, such as the pairs of one prompt.

    ValueError: no rows.
    """
    if len(sums) == 0:
        raise ValueError("a bootstrap interval needs at least one value")
    sums, counts = sums.double(), counts.double()
    return percentiles(torch.cat([(drawn @ sums) / (drawn @ counts) for drawn in resamples(len(sums), seed)]), len(sums))


def of_a_share(interval: tuple[float, float], share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share seen in `count` trials: the bootstrap's, which has no width where all were won or lost, and then
    Wilson's. (Where all are ties, as of one policy with itself, there is nothing uncertain.)"""
    low, high = wilson(share, count) if share in (0.0, 1.0) else interval
    return max(0.0, low), min(1.0, high)


def length_controlled_win_rate(outcomes: Tensor, differences: Tensor) -> tuple[float, float, float]:
    """(rate, low, high): the win rate that is expected where both responses are equally long, with a 95 % interval.

    outcomes (N,): 1 won, 0.5 a tie, 0 lost; differences (N,): tokens of ours minus tokens of theirs. A logistic regression of the
    outcome on an intercept and on tanh(difference / its standard deviation), read off at difference 0, the main term of
    length-controlled AlpacaEval (Dubois 2024). One tie at difference 0 and a wide normal prior on the slope (standard deviation
    10) keep it finite where every comparison was won. The interval is the normal one of the log-odds, by the curvature of the
    likelihood: wide where wins and lengths cannot be told apart, as resamples, which all look alike then, would not show.
    ValueError: no rows.
    """
    if len(outcomes) == 0:
        raise ValueError("a win rate needs at least one comparison")
    outcomes, differences = outcomes.double(), differences.double()
    spread = differences.std(correction=0)
    lengths = torch.tanh(differences / spread) if spread > 0 else torch.zeros_like(differences)
    intercept = slope = torch.zeros((), dtype=torch.float64)
    for _ in range(50):
        chance, tie = torch.sigmoid(intercept + slope * lengths), torch.sigmoid(intercept)
        misses, weights = chance - outcomes, chance * (1 - chance)
        gradient = misses.sum() + (tie - 0.5), misses @ lengths + slope / 100
        first, mixed, second = weights.sum() + tie * (1 - tie), weights @ lengths, weights @ lengths**2 + 1 / 100
        scale = first * second - mixed**2
        # A full Newton step can overshoot where chances are near 0 or 1; two units are far on a log-odds scale.
        steps = torch.stack([second * gradient[0] - mixed * gradient[1], first * gradient[1] - mixed * gradient[0]]) / scale
        intercept, slope = intercept - steps[0].clamp(-2, 2), slope - steps[1].clamp(-2, 2)
        if float(steps.abs().max()) < 1e-6:  # Newton's next step would be about its square
            break
    certain = bool((outcomes == 0.5).all())  # as of one policy with itself
    error = 1.96 * (second / scale).sqrt() * (not certain)
    low, rate, high = torch.sigmoid(torch.stack([intercept - error, intercept, intercept + error])).tolist()
    return rate, low, high


def tilted(scores: Tensor, values: Tensor, beta: float) -> tuple[Tensor, Tensor, float]:
    """What the best policy for score - beta * KL reaches, by importance weights on samples: its value and KL on each prompt, (P,), and
    the effective number of samples.

    scores, values (P, N): N samples of each of P prompts from the reference. The optimum is the reference times exp(score / beta), made
    to sum to one for each prompt (Korbak 2022). The effective number of samples of a prompt is 1 / sum of its squared weights; given is
    the harmonic mean over prompts, by which the variance of the mean over prompts goes.
    """
    log_weights = (scores.double() / beta).log_softmax(1)
    weights = log_weights.exp()
    # KL = E[log w] with w relative to 1 / N, the weight of a sample of the reference.
    divergence = (weights * (log_weights + math.log(scores.shape[1]))).sum(1)
    effective = len(scores) / weights.square().sum().item()
    return (weights * values.double()).sum(1), divergence, effective


@dataclass(frozen=True)
class Turn:
    """Where a judge turns down: the place of its peak among the evaluations, with a 95 % interval; how far the judge falls from there
    to the end and how far the score rises, means over prompts, the fall with a 95 % interval."""

    peak: int
    low: int
    high: int
    fall: float
    fall_low: float
    fall_high: float
    rise: float


def turning_point(judge: Tensor, scores: Tensor, seed: int) -> Turn | None:
    """The point after which a judge's mean falls while the trained score goes on rising (Gao 2022); None where there is none.

    judge, scores (E, N): E evaluations in order, on the same N prompts. The highest of several noisy means lies above the last one by
    chance alone. So the fall is cross-fitted: for the prompts of even place the peak is that of the prompts of odd place, and the other
    way round; the fall is the mean over all prompts. It counts if its bootstrap interval over prompts lies above 0, and that of the
    score's change from the same peaks does too.
    """
    count = judge.shape[1]
    if len(judge) < 3 or count < 4:
        return None
    judge, scores = judge.double(), scores.double()
    even = torch.arange(count) % 2 == 0
    peaks = torch.where(even, judge[:, ~even].mean(1).argmax(), judge[:, even].mean(1).argmax())
    rows = torch.arange(count)
    falls, rises = judge[peaks, rows] - judge[-1], scores[-1] - scores[peaks, rows]
    low, high = bootstrap_interval(falls, seed)
    if low <= 0 or bootstrap_interval(rises, seed)[0] <= 0:
        return None
    places = torch.cat([(drawn @ judge.T).argmax(1) for drawn in resamples(count, seed)])
    first, last = percentiles(places)
    peak = int(judge.mean(1).argmax())
    return Turn(
        peak, min(peak, math.floor(first)), max(peak, math.ceil(last)), float(falls.mean()), low, high, float(rises.mean())
    )

"""Whether a reward model's probabilities can be believed: reliability, calibration error, temperature. Tensors in, floats out.

differences (P,): score of the preferred response minus score of the other one, in the units that the ranking loss was trained in, so that
sigmoid(difference) is the model's probability of the annotators' choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Z95 = 1.959964


@dataclass(frozen=True)
class Bin:
    """The pairs whose confidence (or margin) lies from `start` to `end`: how many, their mean, how many were right, and its interval."""

    start: float
    end: float
    pairs: int
    mean: float
    accuracy: float
    low: float
    high: float


def right(differences: Tensor) -> Tensor:
    """1 where the preferred response scores higher, 0.5 where both score the same, else 0; (P,) float64."""
    return (differences.double().sign() + 1) / 2


def confidence_bins(differences: Tensor, count: int = 10) -> list[Bin]:
    """Pairs by the probability that the model gives to its own choice, in bins of equal width from 0.5 to 1; empty ones left out."""
    confidence = torch.sigmoid(differences.double().abs())
    edges = torch.linspace(0.5, 1, count + 1, dtype=torch.float64)
    return _bins(confidence, right(differences), edges)


def margin_bins(differences: Tensor, count: int = 5) -> list[Bin]:
    """Pairs by the absolute difference of the two scores, in bins of equally many pairs."""
    margins = differences.double().abs()
    limits = sorted(set(torch.quantile(margins, torch.linspace(0, 1, count + 1, dtype=torch.float64)).tolist()))
    return _bins(margins, right(differences), torch.tensor([limits[0], *(limits[1:] or limits)], dtype=torch.float64))


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """The mean distance of confidence and accuracy over confidence_bins, weighted by their pairs (Naeini 2015)."""
    total = sum(one.pairs for one in bins)
    return sum(one.pairs * abs(one.accuracy - one.mean) for one in bins) / total if total else 0.0


def fitted_temperature(differences: Tensor, most: float = 100.0) -> float:
    """The T that makes sigmoid(difference / T) likeliest on these pairs (Guo 2017): above 1 the model is overconfident.

    The likelihood is concave in 1 / T. Within 1 / most .. most: at the upper end the scores tell nothing about the choices, at the
    lower end they decide every pair.
    """
    differences = differences.double()
    low, high = 1 / most, most  # of 1 / T

    def slope(scale: float) -> float:
        """Of the log-likelihood; it falls as the scale rises."""
        return float((differences * torch.sigmoid(-scale * differences)).mean())

    if slope(low) <= 0:
        return most
    if slope(high) >= 0:
        return 1 / most
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return 1 / math.sqrt(low * high)


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of a and b (N,); 0 where one of them is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else 0.0


def chance_accuracy(sums: Tensor, counts: Tensor, seed: int, samples: int = 2000) -> tuple[float, float]:
    """The range (2.5 % to 97.5 %) of the same scores' accuracy if the annotators' order said nothing about them.

    sums, counts (C,): right pairs and pairs of each comparison. A permutation test: each comparison's order is kept or reversed by a fair
    coin, `samples` times, and the scores stay as they are. It is not a model trained on shuffled labels.
    """
    sums, counts = sums.double(), counts.double()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(samples):
        reverse = torch.rand(len(sums), generator=generator) < 0.5
        found.append(torch.where(reverse, counts - sums, sums).sum() / counts.sum())
    low, high = torch.quantile(torch.stack(found), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def wilson(share: float, count: float) -> tuple[float, float]:
    """95 % interval of a share seen in `count` trials (Wilson 1927)."""
    z2 = Z95 * Z95
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 * math.sqrt(max(0.0, share * (1 - share)) / count + z2 / (4 * count * count)) / (1 + z2 / count)
    return centre - half, centre + half


def _bins(values: Tensor, correct: Tensor, edges: Tensor) -> list[Bin]:
    place = torch.bucketize(values, edges[1:-1], right=True)
    found = []
    for index in range(len(edges) - 1):
        inside = place == index
        pairs = int(inside.sum())
        if pairs:
            accuracy = float(correct[inside].mean())
            limits = float(edges[index]), float(edges[index + 1])
            found.append(Bin(*limits, pairs, float(values[inside].mean()), accuracy, *wilson(accuracy, pairs)))
    return found

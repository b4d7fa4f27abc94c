"""Calibration figures against values by hand, slow loops and generated pairs whose truth is known."""

import math

import pytest
import torch

from tercet.algo.calibration import (
    chance_accuracy,
    confidence_bins,
    correlation,
    expected_calibration_error,
    fitted_temperature,
    margin_bins,
    right,
    wilson,
)


def generated(scale: float, count: int = 20_000) -> torch.Tensor:
    """Differences of a model that says `scale` times the log-odds by which the annotators really choose."""
    generator = torch.Generator().manual_seed(0)
    odds = torch.randn(count, generator=generator, dtype=torch.float64) * 1.5
    chosen = torch.rand(count, generator=generator, dtype=torch.float64) < torch.sigmoid(odds)
    return scale * torch.where(chosen, odds, -odds)


def test_ties_count_half() -> None:
    assert right(torch.tensor([0.3, -2.0, 0.0])).tolist() == [1.0, 0.0, 0.5]


def test_confidence_bins_by_hand() -> None:
    # sigmoid: 0.5250, 0.5744 (wrong), 0.7311, 0.8808, 0.9526
    bins = confidence_bins(torch.tensor([0.1, -0.3, 1.0, 2.0, 3.0]), count=2)
    assert [(one.start, one.end, one.pairs, one.accuracy) for one in bins] == [(0.5, 0.75, 3, 2 / 3), (0.75, 1.0, 2, 1.0)]
    assert bins[0].mean == pytest.approx((0.52497919 + 0.57444252 + 0.73105858) / 3, abs=1e-7)
    error = 3 / 5 * abs(2 / 3 - bins[0].mean) + 2 / 5 * abs(1 - (0.88079708 + 0.95257413) / 2)
    assert expected_calibration_error(bins) == pytest.approx(error, abs=1e-7)
    assert expected_calibration_error([]) == 0.0


def test_margin_bins_hold_equally_many_pairs() -> None:
    differences = torch.tensor([float(i) if i % 3 else -float(i) for i in range(1, 101)])
    bins = margin_bins(differences, count=4)
    assert [one.pairs for one in bins] == [25] * 4 and bins[0].start == 1.0 and bins[-1].end == 100.0
    assert bins[0].accuracy == pytest.approx(17 / 25)  # 8 multiples of three up to 25
    assert [one.pairs for one in margin_bins(torch.zeros(5))] == [5]  # all alike: one bin


def test_a_model_that_says_the_truth_is_calibrated() -> None:
    truth = generated(1.0)
    assert fitted_temperature(truth) == pytest.approx(1.0, abs=0.05)
    assert expected_calibration_error(confidence_bins(truth)) < 0.012


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_temperature_undoes_a_scale(scale: float) -> None:
    """Differences that are 3 times too large are made right by T = 3; the likelihood around it is lower."""
    differences = generated(scale)
    found = fitted_temperature(differences)
    assert found == pytest.approx(scale, rel=0.05)
    assert expected_calibration_error(confidence_bins(differences)) > 0.05

    def likelihood(temperature: float) -> float:
        return float(torch.nn.functional.logsigmoid(differences / temperature).mean())

    assert likelihood(found) > max(likelihood(found * 1.01), likelihood(found / 1.01))


def test_temperature_at_its_ends() -> None:
    assert fitted_temperature(torch.tensor([0.5, 2.0])) == pytest.approx(0.01)  # every pair right
    assert fitted_temperature(torch.tensor([-0.5, -2.0])) == 100.0  # every pair wrong
    assert fitted_temperature(torch.zeros(3)) == 100.0


def test_correlation() -> None:
    a, b = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 1.0, 0.0])
    # deviations (-4/3, -1/3, 5/3) and (5/3, -1/3, -4/3): -39/9 over sqrt(42/9 * 42/9)
    assert correlation(a, b) == pytest.approx(-39 / 42)
    assert correlation(a, 3 * a + 1) == pytest.approx(1.0) and correlation(a, torch.ones(3)) == 0.0


def test_what_chance_gives_is_the_binomial_range() -> None:
    sums, counts = torch.ones(400), torch.ones(400)  # every pair right: reversing each by a coin gives a binomial share
    low, high = chance_accuracy(sums, counts, seed=0)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.5 / 20, 0.5 + 1.96 * 0.5 / 20), abs=0.006)
    assert chance_accuracy(sums, counts, seed=0) == (low, high)


def test_what_hangs_together_is_reversed_together() -> None:
    """Ten rankings of 40 pairs each have ten coins, not 400."""
    low, high = chance_accuracy(torch.full((10,), 40.0), torch.full((10,), 40.0), seed=0)
    assert low <= 0.25 and high >= 0.75


def test_wilson_is_the_textbooks() -> None:
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(1.0, 5)[1] == pytest.approx(1.0) and 0 < wilson(0.0, 5)[1] < 0.5
    assert math.isclose(sum(wilson(0.5, 30)) / 2, 0.5)

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.algo.statistics import (
    best_of_n,
    best_of_n_kl,
    bootstrap_interval,
    cluster_interval,
    distinct_n,
    length_controlled_win_rate,
    of_a_share,
    resamples,
    student_quantile,
    tilted,
    turning_point,
)


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(st.tuples(st.integers(0, 4), st.integers(-5, 5)), min_size=1, max_size=7), data=st.data())
def test_best_of_n_is_the_mean_over_all_subsets(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    """Unbiased: the average, over all subsets of n samples, of the value of the best; ties for the best averaged over all of
    that score, which does not depend on the order."""
    n = data.draw(st.integers(1, len(rows)))
    scores, values = (torch.tensor(column).double() for column in zip(*rows, strict=True))
    by_score = {score: [value for other, value in rows if other == score] for score, _ in rows}
    picks = []
    for subset in itertools.combinations(rows, n):
        equals = by_score[max(score for score, _ in subset)]
        picks.append(sum(equals) / len(equals))
    assert best_of_n(scores, values, n) == pytest.approx(sum(picks) / len(picks), rel=1e-9, abs=1e-9)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    assert best_of_n(scores[order], values[order], n) == pytest.approx(best_of_n(scores, values, n), rel=1e-9, abs=1e-9)


def test_best_of_many_is_finite() -> None:
    scores = torch.arange(3000.0)
    assert best_of_n(scores, scores, 1500) == pytest.approx(1500 * 3001 / 1501 - 1)  # the expected maximum of a subset


@pytest.mark.parametrize("n", [0, 4])
def test_best_of_n_refuses(n: int) -> None:
    with pytest.raises(ValueError, match="3 samples"):
        best_of_n(torch.zeros(3), torch.zeros(3), n)


def test_best_of_n_kl() -> None:
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)


def test_distinct_n() -> None:
    texts = [[1, 2, 1, 2], [1, 2], [3]]
    assert distinct_n(texts, 1) == pytest.approx(3 / 7)
    assert distinct_n(texts, 2) == pytest.approx(2 / 4)
    assert distinct_n(texts, 5) == 0.0
    assert distinct_n([], 2) == 0.0


def test_no_bigram_crosses_two_texts() -> None:
    assert distinct_n([[1], [2], [1]], 2) == 0.0


def test_bootstrap_interval_of_a_large_sample_is_the_normal_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 10
    low, high = bootstrap_interval(values, seed=0)
    error = 1.96 * float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - error, abs=0.05)
    assert high == pytest.approx(float(values.mean()) + error, abs=0.05)
    narrow = bootstrap_interval(values, seed=0, level=0.5)
    assert low < narrow[0] < float(values.mean()) < narrow[1] < high


def test_bootstrap_is_seeded_and_draws_rows() -> None:
    values = torch.tensor([0.0, 1.0, 5.0, 2.0, 7.0, 3.0])
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1, samples=50) != bootstrap_interval(values, seed=2, samples=50)
    # Samples of a prompt go together: two rows of (0, 10) have no spread between rows.
    assert bootstrap_interval(torch.tensor([[0.0, 10.0], [0.0, 10.0]]), seed=0) == (5.0, 5.0)
    assert bootstrap_interval(torch.tensor([3.0]), seed=0) == (3.0, 3.0)


@pytest.mark.parametrize("freedom, published", [(2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (10_000, 1.960)])
def test_students_quantile_is_that_of_the_tables(freedom: int, published: float) -> None:
    assert student_quantile(freedom) == pytest.approx(published, abs=0.035 if freedom < 4 else 0.001)
    assert student_quantile(9, 0.99) == pytest.approx(3.250, abs=0.001)


@pytest.mark.parametrize("interval", [bootstrap_interval, lambda rows, seed: cluster_interval(rows, torch.ones_like(rows), seed)])
def test_intervals_of_few_rows_hold_what_they_promise(interval: Callable[..., tuple[float, float]]) -> None:
    """Of 300 samples of 8 normal numbers the mean lies in 92 to 98 % of the intervals; in plain percentile intervals in 88."""
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for seed in range(300):
        low, high = interval(torch.randn(8, generator=generator, dtype=torch.float64), seed=seed)
        inside += low < 0 < high
    assert 0.92 <= inside / 300 <= 0.98


def test_bootstrap_refuses_no_rows() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval(torch.zeros(0), seed=0)


def test_resamples_draw_each_row_equally_often() -> None:
    parts = list(resamples(5, seed=3, samples=450, chunk=200))
    assert [part.shape for part in parts] == [(200, 5), (200, 5), (50, 5)]
    counts = torch.cat(parts)
    assert bool((counts.sum(1) == 5).all()) and bool(((counts.mean(0) - 1).abs() < 0.15).all())
    assert float(counts.var(0).mean()) == pytest.approx(0.8, abs=0.1)  # binomial: 5 * 1/5 * 4/5


def test_cluster_interval_of_single_rows_is_the_bootstrap_of_the_mean() -> None:
    values = (torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.7).double()
    low, high = cluster_interval(values, torch.ones(300), seed=0)
    assert (low, high) == pytest.approx(bootstrap_interval(values, seed=1), abs=0.01)


def test_cluster_interval_draws_what_hangs_together() -> None:
    """30 rankings, each wholly right or wholly wrong: the interval is that of 30 coins, not of 300."""
    right = (torch.arange(30) % 2).double()
    low, high = cluster_interval(right * 10, torch.full((30,), 10.0), seed=0)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(30), abs=0.05)
    sizes = torch.tensor([1.0, 40.0, 3.0, 7.0])
    assert cluster_interval(sizes / 2, sizes, seed=0) == (0.5, 0.5), "half of the pairs of each, however many it has"
    with pytest.raises(ValueError, match="at least one value"):
        cluster_interval(torch.zeros(0), torch.zeros(0), seed=0)


def _by_slow_ascent(outcomes: list[float], differences: list[float]) -> float:
    """The same regression by many small steps uphill, one comparison at a time."""
    mean = sum(differences) / len(differences)
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / len(differences))
    lengths = [math.tanh(d / spread) for d in differences]
    intercept = slope = 0.0
    for _ in range(4_000):
        up, along = 0.5 - 1 / (1 + math.exp(-intercept)), -slope / 100
        for outcome, length in zip(outcomes, lengths, strict=True):
            error = outcome - 1 / (1 + math.exp(-intercept - slope * length))
            up, along = up + error, along + error * length
        intercept, slope = intercept + 0.4 * up, slope + 0.4 * along
    return 1 / (1 + math.exp(-intercept))


def test_length_controlled_win_rate_by_slow_ascent() -> None:
    outcomes, differences = [1.0, 1.0, 0.5, 0.0, 1.0, 0.0, 1.0, 0.0], [9.0, 4.0, 0.0, -3.0, 2.0, 1.0, 6.0, -8.0]
    rate, low, high = length_controlled_win_rate(torch.tensor(outcomes), torch.tensor(differences))
    assert rate == pytest.approx(_by_slow_ascent(outcomes, differences), abs=1e-6)
    assert low < rate < high


def test_wins_that_come_with_length_do_not_count() -> None:
    """Each longer response wins: the raw rate is that of being longer, the controlled one is even."""
    differences = torch.tensor([5.0] * 80 + [-5.0] * 20)
    longer_wins = (differences > 0).double()
    rate, low, high = length_controlled_win_rate(longer_wins, differences)
    assert float(longer_wins.mean()) == 0.8 and low < 0.6 and 0.4 < rate < 0.62
    # Wins that have nothing to do with length keep their rate.
    outcomes = torch.tensor([1.0, 1.0, 1.0, 0.0] * 50)
    lengths = torch.tensor([3.0, -3.0, 3.0, 3.0, -3.0, 3.0, -3.0, -3.0] * 25)
    assert length_controlled_win_rate(outcomes, lengths)[0] == pytest.approx(0.75, abs=0.02)


def test_the_length_controlled_interval_by_its_definition() -> None:
    """The inverse of the negative log-likelihood's second derivatives, which autograd finds."""
    outcomes = torch.tensor([1.0, 1.0, 0.5, 0.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    differences = torch.tensor([9.0, 4.0, 0.0, -3.0, 2.0, 1.0, 6.0, -8.0], dtype=torch.float64)
    lengths = torch.tanh(differences / differences.std(correction=0))
    rate, low, high = length_controlled_win_rate(outcomes, differences)

    def surprise(at: torch.Tensor) -> torch.Tensor:
        chances = torch.cat([at[0] + at[1] * lengths, at[:1]])
        every = torch.cat([outcomes, torch.tensor([0.5], dtype=torch.float64)])
        return torch.nn.functional.binary_cross_entropy_with_logits(chances, every, reduction="sum") + at[1] ** 2 / 200

    at = torch.zeros(2, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(surprise, at)
        at = at - torch.linalg.solve(torch.autograd.functional.hessian(surprise, at), gradient)
    error = 1.96 * float(torch.linalg.inv(torch.autograd.functional.hessian(surprise, at))[0, 0]) ** 0.5
    wanted = [1 / (1 + math.exp(-float(at[0]) - one)) for one in (0.0, -error, error)]
    assert [rate, low, high] == pytest.approx(wanted, abs=1e-5)


def test_where_the_longer_one_always_wins_nothing_is_known_of_equal_lengths() -> None:
    """Every response is longer and wins because of it: 200 bootstrap resamples would all say the same."""
    generator = torch.Generator().manual_seed(0)
    differences = 40 + 8 * torch.randn(200, generator=generator)
    outcomes = (torch.rand(200, generator=generator) < torch.sigmoid(0.3 * differences)).double()
    _, low, high = length_controlled_win_rate(outcomes, differences)
    assert low < 0.2 and high > 0.8


def test_length_controlled_win_rate_at_its_ends() -> None:
    rate, low, high = length_controlled_win_rate(torch.ones(200), torch.arange(200.0) - 100)
    assert 0.9 < low < 0.98 < rate < high < 1  # every comparison won: finite all the same
    same = length_controlled_win_rate(torch.tensor([1.0, 0.0, 1.0]), torch.zeros(3))[0]
    assert same == pytest.approx(2.5 / 4, abs=1e-9)  # equal lengths: two wins, one loss and the tie that is added
    assert length_controlled_win_rate(torch.full((5,), 0.5), torch.arange(5.0)) == (0.5, 0.5, 0.5)  # a policy with itself
    with pytest.raises(ValueError, match="at least one comparison"):
        length_controlled_win_rate(torch.zeros(0), torch.zeros(0))


def test_tilted_reference_by_enumeration() -> None:
    """Three texts with chances 1/2, 1/4, 1/4 as four samples: the optimum's value and KL computed from the chances."""
    scores, values = torch.tensor([[0.0, 0.0, 1.0, 2.0]]), torch.tensor([[5.0, 5.0, 1.0, -3.0]])
    beta, chances, of_text = 0.5, [0.5, 0.25, 0.25], [0.0, 1.0, 2.0]
    raised = [chance * math.exp(score / beta) for chance, score in zip(chances, of_text, strict=True)]
    optimum = [weight / sum(raised) for weight in raised]
    value, divergence, effective = tilted(scores, values, beta)
    assert float(value) == pytest.approx(sum(p * v for p, v in zip(optimum, [5.0, 1.0, -3.0], strict=True)))
    assert float(divergence) == pytest.approx(sum(p * math.log(p / q) for p, q in zip(optimum, chances, strict=True)))
    weights = [optimum[0] / 2, optimum[0] / 2, optimum[1], optimum[2]]
    assert effective == pytest.approx(1 / sum(w * w for w in weights))


def test_tilting_hardly_leaves_every_sample_its_weight() -> None:
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    value, divergence, effective = tilted(scores, scores, 1e6)
    assert value.tolist() == pytest.approx(scores.double().mean(1).tolist(), abs=1e-5)
    assert float(divergence.abs().max()) < 1e-9 and effective == pytest.approx(50, rel=1e-6)


def path(means: list[float], count: int = 200, noise: float = 1.0, seed: int = 0) -> torch.Tensor:
    """(E, N): evaluations with these means, each prompt with an offset of its own and noise."""
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randn(count, generator=generator, dtype=torch.float64)
    return (
        torch.tensor(means)[:, None] + offset + noise * torch.randn(len(means), count, generator=generator, dtype=torch.float64)
    )


def test_a_judge_that_turns_down_while_the_score_rises() -> None:
    turn = turning_point(path([0, 1, 2, 2.5, 2, 1, 0.0]), path([0, 1, 2, 3, 4, 5, 6], seed=1), seed=0)
    assert turn is not None and turn.peak == 3 and 2 <= turn.low <= 3 <= turn.high <= 4
    assert turn.fall == pytest.approx(2.5, abs=0.3) and turn.fall_low < turn.fall < turn.fall_high
    assert turn.rise == pytest.approx(3, abs=0.3)


@pytest.mark.parametrize("seed", range(5))
def test_the_highest_of_many_noisy_points_is_no_turn(seed: int) -> None:
    """A judge that stays where it is: the largest of 20 means lies well above the last by chance, and this must not count."""
    flat = path([1.0] * 20, count=60, seed=seed)
    assert flat.mean(1).max() > flat.mean(1)[-1]
    assert turning_point(flat, path([float(i) for i in range(20)], count=60, seed=9), seed=0) is None


def test_no_turn_where_the_score_falls_too_or_there_is_too_little_to_see() -> None:
    falling, rising = path([0, 2, 0.0]), path([0, 1, 2.0], seed=1)
    assert turning_point(falling, rising, seed=0) is not None
    assert turning_point(falling, path([0, 2, 1.0], seed=1), seed=0) is None
    assert turning_point(falling, path([0, 2, 2.05], seed=1), seed=0) is None, "a rise that may be chance"
    assert turning_point(rising, rising, seed=0) is None
    assert turning_point(falling[:2], rising[:2], seed=0) is None and turning_point(falling[:, :3], rising[:, :3], seed=0) is None


@pytest.mark.parametrize("trials", [2, 3, 4, 5, 7, 9, 12])
@pytest.mark.parametrize("chance", [0.1, 0.3, 0.5, 0.6])
def test_the_interval_of_a_share_of_few_trials_holds_the_truth(trials: int, chance: float) -> None:
    """The exact probability, over all outcomes."""
    holds = 0.0
    for won in range(trials + 1):
        outcomes = torch.tensor([1.0] * won + [0.0] * (trials - won))
        low, high = of_a_share(bootstrap_interval(outcomes, seed=0), won / trials, trials)
        assert 0 <= low <= high <= 1
        holds += math.comb(trials, won) * chance**won * (1 - chance) ** (trials - won) * (low <= chance <= high)
    assert holds > 0.87


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 8])
def test_the_interval_of_a_mean_of_few_rows_holds_the_truth(rows: int) -> None:
    """Of normal numbers around 0. Percentiles of resamples hold it half of the time with two rows, in 0.73 with three."""
    generator = torch.Generator().manual_seed(0)
    worlds = [bootstrap_interval(torch.randn(rows, generator=generator), seed=0, samples=400) for _ in range(300)]
    assert sum(low <= 0 <= high for low, high in worlds) > 0.9 * len(worlds)


def test_ties_alone_are_not_uncertain() -> None:
    assert of_a_share(bootstrap_interval(torch.full((4,), 0.5), seed=0), 0.5, 4) == (0.5, 0.5)

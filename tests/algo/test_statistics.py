import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.algo.statistics import best_of_n, best_of_n_kl, bootstrap_interval, distinct_n, pair_accuracy, win_rate


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


def test_win_rate_counts_ties_half() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 2.0, 4.0, -1.0])
    assert win_rate(a, b) == pytest.approx(2.5 / 4)
    assert win_rate(a, b) + win_rate(b, a) == pytest.approx(1)
    assert pair_accuracy(a, b) == pytest.approx(2.5 / 4)


def test_bootstrap_interval_of_a_large_sample_is_the_normal_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 10
    low, high = bootstrap_interval(values, seed=0)
    error = 1.96 * float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - error, abs=0.05)
    assert high == pytest.approx(float(values.mean()) + error, abs=0.05)
    narrow = bootstrap_interval(values, seed=0, level=0.5)
    assert low < narrow[0] < float(values.mean()) < narrow[1] < high


def test_bootstrap_is_seeded_and_draws_rows() -> None:
    values = torch.tensor([0.0, 1.0, 5.0, 2.0])
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1, samples=50) != bootstrap_interval(values, seed=2, samples=50)
    # Samples of a prompt go together: two rows of (0, 10) have no spread between rows.
    assert bootstrap_interval(torch.tensor([[0.0, 10.0], [0.0, 10.0]]), seed=0) == (5.0, 5.0)
    assert bootstrap_interval(torch.tensor([3.0]), seed=0) == (3.0, 3.0)


def test_bootstrap_refuses_no_rows() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval(torch.zeros(0), seed=0)

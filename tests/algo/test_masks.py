import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tercet.algo.masks import (
    at_least_float32,
    last_index,
    masked_mean,
    masked_sum,
    masked_var,
    position_ids,
    truncate_at_stop,
    whiten,
)

JUNK = [math.nan, math.inf, -math.inf, 1e9]
lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def ragged(lens: list[int], width: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random float64 numbers and the mask of rows with these lengths."""
    width = width or max(lens)
    mask = torch.arange(width) < torch.tensor(lens)[:, None]
    return torch.randn(len(lens), width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), mask


def real(x: Tensor, mask: Tensor) -> list[float]:
    return [float(x[i, t]) for i in range(len(x)) for t in range(x.shape[1]) if mask[i, t]]


# truncate_at_stop


def test_truncate_by_hand() -> None:
    ids = torch.tensor([[5, 9, 5, 9], [9, 5, 5, 5], [5, 5, 5, 5], [5, 5, 5, 8]])
    lens, finished = truncate_at_stop(ids, [9, 8])
    assert lens.tolist() == [2, 1, 4, 4]
    assert finished.tolist() == [True, True, False, True]
    assert lens.dtype == torch.int64 and finished.dtype == torch.bool


def test_truncate_after_ignores_earlier_stops_only() -> None:
    ids = torch.tensor([[9, 9, 5, 9], [5, 9, 5, 5]])
    assert truncate_at_stop(ids, [9], 1)[0].tolist() == [2, 2]
    lens, finished = truncate_at_stop(ids, [9], 2)
    assert lens.tolist() == [4, 4] and finished.tolist() == [True, False]


def test_truncate_without_stop_ids_or_tokens() -> None:
    lens, finished = truncate_at_stop(torch.tensor([[1, 2]]), [])
    assert lens.tolist() == [2] and finished.tolist() == [False]
    lens, finished = truncate_at_stop(torch.zeros(2, 0, dtype=torch.long), [1])
    assert lens.tolist() == [0, 0] and finished.tolist() == [False, False]


@settings(deadline=None, max_examples=60)
@given(
    ids=st.integers(1, 8).flatmap(lambda n: st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=1)),
    stops=st.sets(st.integers(0, 3)),
    after=st.integers(0, 8),
)
def test_truncate_equals_loop(ids: list[list[int]], stops: set[int], after: int) -> None:
    lens, finished = truncate_at_stop(torch.tensor(ids), sorted(stops), after)
    for row, length, done in zip(ids, lens.tolist(), finished.tolist(), strict=True):
        expected, expected_done = len(row), False
        for t, token in enumerate(row):
            if token in stops and t >= after:
                expected, expected_done = t + 1, True
                break
        assert (length, done) == (expected, expected_done)


# last_index, position_ids


def test_last_index_and_positions_by_hand() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]) > 0
    assert last_index(mask).tolist() == [2, 3, -1, 0]
    assert position_ids(mask).tolist() == [[0, 0, 1, 2], [0, 1, 2, 3], [0, 0, 0, 0], [0, 1, 1, 1]]


@settings(deadline=None, max_examples=30)
@given(lens=lengths)
def test_left_padding_keeps_positions(lens: list[int]) -> None:
    width = max(lens) + 1
    mask = torch.arange(width) >= width - torch.tensor(lens)[:, None]
    for row, length in zip(range(len(lens)), lens, strict=True):
        assert position_ids(mask)[row, width - length :].tolist() == list(range(length))
        assert int(last_index(mask)[row]) == width - 1


# sums, means, variances


@settings(deadline=None, max_examples=30)
@given(lens=lengths, junk=st.sampled_from(JUNK))
def test_sums_equal_loop_whatever_the_pads(lens: list[int], junk: float) -> None:
    x, mask = ragged(lens, width=max(lens) + 1)
    numbers = real(x, mask)
    mean = sum(numbers) / len(numbers)
    x[~mask] = junk
    assert float(masked_sum(x, mask)) == pytest.approx(sum(numbers), rel=1e-12, abs=1e-12)
    assert float(masked_mean(x, mask)) == pytest.approx(mean, rel=1e-12, abs=1e-12)
    variance = sum((number - mean) ** 2 for number in numbers) / len(numbers)
    assert float(masked_var(x, mask)) == pytest.approx(variance, rel=1e-12, abs=1e-12)


def test_nothing_counts() -> None:
    x, mask = torch.tensor([[math.nan, 1.0]]), torch.tensor([[False, False]])
    assert float(masked_sum(x, mask)) == 0
    assert float(masked_mean(x, mask)) == 0
    assert float(masked_var(x, mask)) == 0
    assert whiten(x, mask).tolist() == [[0, 0]]


def test_gradient_is_zero_where_masked() -> None:
    x = torch.tensor([[1.0, math.inf, 3.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(masked_mean(x, torch.tensor([[True, False, True]])), x)
    assert gradient.tolist() == [[0.5, 0.0, 0.5]]


def test_half_precision_is_counted_in_float32() -> None:
    """bfloat16 cannot count beyond 256."""
    x = torch.ones(1, 1001, dtype=torch.bfloat16)
    mask = torch.ones(1, 1001, dtype=torch.bool)
    assert masked_sum(x, mask).dtype == torch.float32
    assert float(masked_sum(x, mask)) == 1001
    assert float(masked_mean(x, mask)) == 1
    assert at_least_float32(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert at_least_float32(torch.ones(1, dtype=torch.float16)).dtype == torch.float32


# whiten


def of_two_ranks(function, x: Tensor, mask: Tensor, split: int) -> Tensor:
    """What `function(x, mask, all_sum)` gives on two ranks, rank 0 with rows :split: sums of the other rank are replayed."""
    sums: list[list[Tensor]] = []
    parts = [(x[:split], mask[:split]), (x[split:], mask[split:])]
    while True:
        # A rank's k-th reduction needs the other's k-th operand, which depends on the results before it: replay until done.
        operands: list[list[Tensor]] = []
        results = []
        for part, part_mask in parts:
            seen: list[Tensor] = []

            def all_sum(tensor: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen.append(tensor)
                return sums[len(seen) - 1] if len(seen) <= len(sums) else tensor

            results.append(function(part, part_mask, all_sum))
            operands.append(seen)
        if len(sums) == len(operands[0]):
            return torch.cat(results) if results[0].dim() else results[0]
        sums.append(operands[0][len(sums)] + operands[1][len(sums)])


@pytest.mark.parametrize("split", [0, 1, 3])
def test_two_ranks_equal_one(split: int) -> None:
    x, mask = ragged([2, 5, 1, 4])
    for shift_mean in (True, False):
        together = whiten(x, mask, shift_mean=shift_mean)
        apart = of_two_ranks(lambda a, m, s: whiten(a, m, shift_mean=shift_mean, all_sum=s), x, mask, split)  # noqa: B023
        assert torch.allclose(together, apart, rtol=1e-12, atol=1e-12)
    assert torch.allclose(of_two_ranks(masked_var, x, mask, split), masked_var(x, mask), rtol=1e-12)
    assert torch.allclose(of_two_ranks(masked_mean, x, mask, split), masked_mean(x, mask), rtol=1e-12)
    assert torch.allclose(of_two_ranks(masked_sum, x, mask, split), masked_sum(x, mask), rtol=1e-12)


@settings(deadline=None, max_examples=30)
@given(lens=st.lists(st.integers(1, 6), min_size=2, max_size=5), junk=st.sampled_from(JUNK), extra=st.integers(0, 3))
def test_whiten_has_mean_0_and_variance_1(lens: list[int], junk: float, extra: int) -> None:
    x, mask = ragged(lens, width=max(lens) + extra)
    poisoned = x.masked_fill(~mask, junk)
    whitened = whiten(poisoned, mask)
    numbers = real(whitened, mask)
    assert sum(numbers) / len(numbers) == pytest.approx(0, abs=1e-9)
    assert sum(number**2 for number in numbers) / len(numbers) == pytest.approx(1, rel=1e-3)
    assert (whitened[~mask] == 0).all()
    order = torch.arange(len(lens)).flip(0)
    assert torch.allclose(whiten(poisoned[order], mask[order]), whitened[order], atol=1e-12)
    kept = real(whiten(poisoned, mask, shift_mean=False), mask)
    original = real(x, mask)
    assert sum(kept) / len(kept) == pytest.approx(sum(original) / len(original), rel=1e-9, abs=1e-9)


def test_whiten_of_one_token_is_finite() -> None:
    assert whiten(torch.tensor([[3.0, math.nan]]), torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]]

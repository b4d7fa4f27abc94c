"""Orders, cuts and the token store, against hand-made cases and slow loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.data.batches import TokenStore, batch_indices, epoch_order, microbatches, microbatches_grouped, steps_per_epoch
from tercet.types import Sequences, TokenRow

ROWS = [TokenRow((5, 6, 7), 2), TokenRow((8, 9, 10, 11, 12), 1, finished=False), TokenRow((13,), 1)]


def same(left: Sequences, right: Sequences) -> bool:
    names = ("input_ids", "prompt_lens", "response_lens", "finished")
    pairs = [(getattr(left, name), getattr(right, name)) for name in names]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_store_gives_back_padded_rows_in_the_order_asked() -> None:
    store = TokenStore.build(iter(ROWS))
    assert len(store) == 3 and store.lengths.tolist() == [3, 5, 1] and len(TokenStore.build([])) == 0
    batch = store.sequences([1, 0, 1])
    expected = torch.tensor([[8, 9, 10, 11, 12], [5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    assert torch.equal(batch.input_ids, expected)
    assert batch.prompt_lens.tolist() == [1, 2, 1] and batch.response_lens.tolist() == [4, 1, 4]
    assert batch.finished.tolist() == [False, True, False]
    assert same(batch, Sequences.from_rows([ROWS[1], ROWS[0], ROWS[1]]))
    assert store.sequences(torch.tensor([2])).input_ids.tolist() == [[13]]  # padded to its own longest only


def test_store_refuses_rows_without_a_prompt_token() -> None:
    with pytest.raises(ValueError, match="row 1: prompt_len 0"):
        TokenStore.build([TokenRow((1,), 1), TokenRow((1, 2), 0)])
    with pytest.raises(ValueError, match="prompt_len 3"):
        TokenStore.build([TokenRow((1, 2), 3)])


def test_epoch_order_is_a_pure_function() -> None:
    first = epoch_order(50, seed=3, epoch=2)
    torch.rand(7)
    assert torch.equal(first, epoch_order(50, seed=3, epoch=2)) and first.dtype == torch.int64
    assert sorted(first.tolist()) == list(range(50))
    others = [epoch_order(50, 3, 3), epoch_order(50, 2, 2), epoch_order(50, 2, 3), torch.arange(50)]
    assert not any(torch.equal(first, other) for other in others)


@given(n=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 2**40))
@settings(deadline=None)
def test_every_record_comes_once_an_epoch(n: int, batch_size: int, seed: int) -> None:
    steps = steps_per_epoch(n, batch_size)
    assert (steps - 1) * batch_size < n <= steps * batch_size
    for epoch in (0, 1, 5):
        batches = [batch_indices(n, batch_size, seed, epoch * steps + i).tolist() for i in range(steps)]
        assert sorted(sum(batches, [])) == list(range(n))
        assert all(len(batch) == batch_size for batch in batches[:-1]) and batches[-1]


def test_epochs_differ_and_nothing_is_not_a_data_set() -> None:
    assert not torch.equal(batch_indices(30, 30, 0, 0), batch_indices(30, 30, 0, 1))
    with pytest.raises(ValueError, match="at least 1"):
        steps_per_epoch(0, 4)


def test_microbatches_by_hand() -> None:
    # Longest first: 9 | 5 4 (2 x 5 <= 12; a third row would need 15) | 3 3 2 1 (4 x 3 = 12) | 1
    assert microbatches([3, 5, 9, 1, 4, 2, 3, 1], max_tokens=12) == [[2], [1, 4], [0, 6, 5, 3], [7]]
    assert microbatches([20, 1], max_tokens=12) == [[0], [1]]
    assert microbatches([], max_tokens=12) == []
    assert microbatches(np.array([2, 2]), max_tokens=4) == [[0, 1]]
    with pytest.raises(ValueError, match="max_tokens"):
        microbatches([1], max_tokens=0)


def test_groups_by_hand() -> None:
    # Group 1 (2 rows, longest 6) and group 0 (3 rows, longest 4): 5 x 6 = 30 tokens with padding.
    assert microbatches_grouped([[4, 1, 1], [6, 2]], max_tokens=30) == [[1, 0]]
    assert microbatches_grouped([[4, 1, 1], [6, 2]], max_tokens=29) == [[1], [0]]
    assert microbatches_grouped([[4, 1, 1]], max_tokens=2) == [[0]]


@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), max_size=30), st.integers(1, 120))
@settings(deadline=None)
def test_microbatches_cover_every_group_once_within_the_budget(groups: list[list[int]], max_tokens: int) -> None:
    batches = microbatches_grouped(groups, max_tokens)
    assert sorted(sum(batches, [])) == list(range(len(groups)))
    for batch in batches:
        lengths = [length for index in batch for length in groups[index]]
        assert len(lengths) * max(lengths) <= max_tokens or len(batch) == 1
    longest = [max(groups[index]) for batch in batches for index in batch]
    assert longest == sorted(longest, reverse=True)
    for batch, following in zip(batches, batches[1:], strict=False):  # no cut without need
        lengths = [length for index in [*batch, following[0]] for length in groups[index]]
        assert len(lengths) * max(lengths) > max_tokens

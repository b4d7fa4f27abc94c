"""Sequences and Experience: masks and ids by hand, and rows picked out of a batch."""

from __future__ import annotations

import torch

from tercet.types import Experience, Sequences, TokenRow

ROWS = [TokenRow((7, 8, 1, 2, 3), 2), TokenRow((9, 4), 1, finished=False), TokenRow((5, 6, 5), 3)]


def batch() -> Sequences:
    sequences = Sequences.from_rows(ROWS)
    sequences.sampler_logprobs = -torch.tensor([[1.0, 2, 3], [4, 0, 0], [0, 0, 0]])
    return sequences


def test_a_batch_by_hand() -> None:
    sequences = batch()
    assert sequences.input_ids.tolist() == [[7, 8, 1, 2, 3], [9, 4, 0, 0, 0], [5, 6, 5, 0, 0]]
    assert sequences.prompt_lens.tolist() == [2, 1, 3] and sequences.response_lens.tolist() == [3, 1, 0]
    assert sequences.lengths.tolist() == [5, 2, 3] and sequences.finished.tolist() == [True, False, True]
    assert sequences.response_mask.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert sequences.response_ids.tolist() == [[1, 2, 3], [4, 0, 0], [0, 0, 0]]
    assert sequences.max_response == 3 and len(sequences) == 3


def test_selected_rows_are_those_rows_cut_to_their_own_width() -> None:
    part = batch().select([2, 1])
    assert part.input_ids.tolist() == [[5, 6, 5], [9, 4, 0]]
    assert part.prompt_lens.tolist() == [3, 1] and part.response_lens.tolist() == [0, 1]
    assert part.finished.tolist() == [True, False]
    assert part.sampler_logprobs is not None and part.sampler_logprobs.tolist() == [[0], [-4]]


def test_selected_experience_is_of_those_rows() -> None:
    sequences = batch()
    names = ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")
    tensors = {name: torch.arange(9.0).view(3, 3) + 100 * i for i, name in enumerate(names)}
    part = Experience(sequences=sequences, scores=torch.tensor([0.5, 1.5, 2.5]), **tensors).select([1, 2])
    assert part.scores.tolist() == [1.5, 2.5] and part.sequences.finished.tolist() == [False, True]
    for i, name in enumerate(names):
        assert getattr(part, name).tolist() == [[3 + 100 * i], [6 + 100 * i]]


def test_an_empty_selection() -> None:
    part = batch().select([])
    assert len(part) == 0 and part.max_response == 1 and part.response_mask.shape == (0, 1)

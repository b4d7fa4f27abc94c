"""Weighted sums, and scores that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tercet.scoring.base import Texts, WeightedSum, check_finite
from tercet.types import Message, Sequences, TercetError, TokenRow

TEXTS = Texts(["a", "b"], ["one", "two"], [{}, {}])
SEQUENCES = Sequences.from_rows([TokenRow((1, 2), 1), TokenRow((1, 3), 1)])


class Constant:
    def __init__(self, *values: float, dtype: torch.dtype = torch.float32):
        self.values = torch.tensor(values, dtype=dtype)

    def score(self, sequences: Sequences, texts: Texts) -> Tensor:
        assert sequences is SEQUENCES and texts is TEXTS
        return self.values


def test_weighted_sum() -> None:
    total = WeightedSum([(1.0, Constant(1.0, 2.0)), (-0.5, Constant(4.0, 8.0)), (0.0, Constant(9.0, 9.0))])
    assert total.score(SEQUENCES, TEXTS).tolist() == [-1.0, -2.0]
    assert WeightedSum([(3.0, Constant(1.0, 2.0))]).score(SEQUENCES, TEXTS).tolist() == [3.0, 6.0]


def test_weighted_sum_keeps_the_wider_type() -> None:
    value = 1 / 3
    total = WeightedSum([(1.0, Constant(0.0, 0.0)), (1.0, Constant(value, value, dtype=torch.float64))]).score(SEQUENCES, TEXTS)
    assert total.dtype == torch.float64 and total.tolist() == [value, value]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_must_be_finite(bad: float) -> None:
    fine = torch.tensor([1.0, -2.0])
    assert check_finite(fine, TEXTS, "it") is fine
    with pytest.raises(
        TercetError, match=rf"it gave the score {bad} to 1 of 2 responses, the first being 'two' to the prompt 'b'"
    ):
        check_finite(torch.tensor([1.0, bad]), TEXTS, "it")


def test_of_a_conversation_the_last_turn_is_shown() -> None:
    turns = (Message("user", "hello"), Message("assistant", "yes?"), Message("user", "why"))
    with pytest.raises(TercetError, match="to the prompt 'why'"):
        check_finite(torch.tensor([math.nan]), Texts([turns], ["one"], [{}]), "it")

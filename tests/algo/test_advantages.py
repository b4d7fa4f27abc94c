import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tercet.algo.advantages import combine_score, explained_variance, gae, token_rewards

lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5)
JUNK = [math.nan, math.inf, -math.inf, 1e9]


def mask_of(lens: list[int], width: int | None = None) -> Tensor:
    return torch.arange(width or max(lens)) < torch.tensor(lens)[:, None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# combine_score

FINISHED = torch.tensor([True, False, False])


def test_score_is_clipped_before_the_missing_eos_rule() -> None:
    """Rows 36 and 37: with score 7.5, clip 5 and penalty 1 an unfinished response gets 4, not 5."""
    scores = torch.tensor([7.5, 7.5, -9.0])
    assert combine_score(scores, FINISHED, score_clip=5, missing_eos_penalty=1).tolist() == [5, 4, -6]
    assert combine_score(scores, FINISHED, score_clip=5, missing_eos_score=-8).tolist() == [5, -8, -8]
    assert combine_score(scores, FINISHED, missing_eos_penalty=0.5).tolist() == [7.5, 7.0, -9.5]
    assert combine_score(scores, FINISHED).tolist() == [7.5, 7.5, -9.0]


def test_one_missing_eos_rule_only() -> None:
    with pytest.raises(ValueError, match="not both"):
        combine_score(torch.zeros(3), FINISHED, missing_eos_penalty=1, missing_eos_score=-1)


def test_replaced_score_may_have_been_nan() -> None:
    assert combine_score(torch.tensor([1.0, math.nan, 0.0]), FINISHED, missing_eos_score=-1).tolist() == [1, -1, -1]


# token_rewards


def test_rewards_by_hand() -> None:
    kl = torch.tensor([[1.0, 2.0, math.nan], [-1.0, math.inf, 5.0], [3.0, 3.0, 3.0], [1.0, 1.0, 1.0]]).double()
    rewards = token_rewards(torch.tensor([10.0, 20.0, 30.0, 40.0]).double(), kl, mask_of([2, 1, 0, 3], 3), 0.5)
    assert rewards.tolist() == [[-0.5, 9.0, 0.0], [20.5, 0.0, 0.0], [0.0, 0.0, 0.0], [-0.5, -0.5, 39.5]]


@settings(deadline=None, max_examples=30)
@given(lens=lengths, junk=st.sampled_from(JUNK), extra=st.integers(0, 2))
def test_rewards_sum_to_score_minus_kl(lens: list[int], junk: float, extra: int) -> None:
    mask = mask_of(lens, max(lens) + extra)
    kl, scores = normal(*mask.shape), normal(len(lens), seed=1)
    rewards = token_rewards(scores, kl.masked_fill(~mask, junk), mask, 0.3)
    for i, n in enumerate(lens):
        assert float(rewards[i].sum()) == pytest.approx(float(scores[i] - 0.3 * kl[i, :n].sum()), rel=1e-9, abs=1e-12)
        assert float(rewards[i, n - 1]) == pytest.approx(float(scores[i] - 0.3 * kl[i, n - 1]), rel=1e-9, abs=1e-12)
        assert (rewards[i, n:] == 0).all()


def test_rewards_carry_no_gradient() -> None:
    kl, scores = normal(1, 3).requires_grad_(), normal(1).requires_grad_()
    finished = torch.tensor([False])
    combined = combine_score(scores, finished, missing_eos_penalty=1.0)
    assert not combined.requires_grad
    assert not token_rewards(scores, kl, mask_of([3]), 0.1).requires_grad


# gae


def gae_loop(rewards: Tensor, values: Tensor, length: int, gamma: float, gae_lambda: float) -> list[float]:
    """The definition: A_t = sum over l of (gamma lambda)^l delta_{t+l}, V = 0 from the end on."""
    value = [float(values[t]) for t in range(length)] + [0.0]
    delta = [float(rewards[t]) + gamma * value[t + 1] - value[t] for t in range(length)]
    return [sum((gamma * gae_lambda) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)]


@settings(deadline=None, max_examples=40)
@given(
    lens=lengths,
    junk=st.sampled_from(JUNK),
    extra=st.integers(0, 2),
    gamma=st.sampled_from([1.0, 0.9, 0.0]),
    gae_lambda=st.sampled_from([1.0, 0.95, 0.0]),
)
def test_gae_equals_the_definition(lens: list[int], junk: float, extra: int, gamma: float, gae_lambda: float) -> None:
    mask = mask_of(lens, max(lens) + extra)
    rewards, values = normal(*mask.shape), normal(*mask.shape, seed=1)
    poisoned = (rewards.masked_fill(~mask, junk), values.masked_fill(~mask, junk))
    advantages, returns = gae(*poisoned, mask, gamma, gae_lambda)
    for i, n in enumerate(lens):
        expected = gae_loop(rewards[i], values[i], n, gamma, gae_lambda)
        assert advantages[i, :n].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        expected_returns = [advantage + float(values[i, t]) for t, advantage in enumerate(expected)]
        assert returns[i, :n].tolist() == pytest.approx(expected_returns, rel=1e-9, abs=1e-12)
        assert (advantages[i, n:] == 0).all() and (returns[i, n:] == 0).all()


def test_lambda_1_returns_are_rewards_to_go() -> None:
    rewards, values = normal(1, 4), normal(1, 4, seed=1)
    _, returns = gae(rewards, values, mask_of([4]), 1.0, 1.0)
    assert returns[0].tolist() == pytest.approx([float(rewards[0, t:].sum()) for t in range(4)])


def test_left_padding_and_empty_rows_get_nothing() -> None:
    mask = torch.tensor([[False, True, True], [False, False, False]])
    advantages, returns = gae(torch.ones(2, 3), torch.full((2, 3), math.nan).masked_fill(mask, 0.5), mask, 1.0, 1.0)
    assert advantages.tolist() == [[0.0, 1.5, 0.5], [0.0, 0.0, 0.0]]
    assert returns.tolist() == [[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]]


def test_gae_carries_no_gradient_and_keeps_its_inputs() -> None:
    rewards, values = normal(2, 3), normal(2, 3, seed=1).requires_grad_()
    before = rewards.clone()
    advantages, returns = gae(rewards, values, mask_of([2, 3]), 1.0, 0.95)
    assert not advantages.requires_grad and not returns.requires_grad
    assert torch.equal(rewards, before)
    assert gae(rewards.float(), values.float(), mask_of([2, 3]), 1.0, 0.95)[0].dtype == torch.float32


# explained_variance


def test_explained_variance() -> None:
    returns, mask = normal(2, 3), mask_of([2, 3])
    assert float(explained_variance(returns, returns, mask)) == 1.0
    assert float(explained_variance(torch.full_like(returns, 7.0), returns, mask)) == pytest.approx(0.0)
    assert float(explained_variance(-returns, returns, mask)) == pytest.approx(-3.0)
    assert float(explained_variance(returns + 5, returns, mask)) == pytest.approx(1.0)


def test_explained_variance_of_pads_and_constants() -> None:
    values, returns = torch.tensor([[1.0, 2.0, math.nan]]), torch.tensor([[1.0, 3.0, math.inf]])
    assert float(explained_variance(values, returns, mask_of([2], 3))) == pytest.approx(1 - 0.25 / 1)
    assert float(explained_variance(values, torch.ones(1, 3), mask_of([2], 3))) == 0.0
    assert float(explained_variance(values, returns, mask_of([1], 3))) == 0.0

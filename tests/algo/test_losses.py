import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tercet.algo.losses import counted_prompts, normalisation, policy_loss, ranking_loss, sft_loss, value_loss

JUNK = [math.nan, math.inf, -math.inf, 1e9]
lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def mask_of(lens: list[int], width: int | None = None) -> Tensor:
    return torch.arange(width or max(lens)) < torch.tensor(lens)[:, None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(lens: list[int], extra: int = 0) -> tuple[list[Tensor], Tensor]:
    """Three float64 tensors and the mask, for a loss of three inputs; ratios spread over the clip range."""
    mask = mask_of(lens, max(lens) + extra)
    return [0.5 * normal(*mask.shape, seed=1), 0.5 * normal(*mask.shape, seed=2), normal(*mask.shape, seed=3)], mask


def policy(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    return policy_loss(new, old, advantages, mask, 0.2, count)


def value(new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    return value_loss(new, old, returns, mask, 0.2, count)


def sft(new: Tensor, old: Tensor, unused: Tensor, mask: Tensor, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    return sft_loss(new, mask, count), {}


Loss = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, dict[str, Tensor]]]
TOKEN_LOSSES: list[Loss] = [policy, value, sft]


def value_and_gradient(loss: Loss, inputs: list[Tensor], mask: Tensor, count: int) -> tuple[float, Tensor, dict[str, float]]:
    new = inputs[0].clone().requires_grad_()
    total, stats = loss(new, *inputs[1:], mask, count)
    (gradient,) = torch.autograd.grad(total, new)
    assert not any(stat.requires_grad for stat in stats.values())
    return float(total.detach()), gradient, {name: float(stat) for name, stat in stats.items()}


# what holds for every token loss


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
@settings(deadline=None, max_examples=25)
@given(lens=lengths, junk=st.sampled_from(JUNK), extra=st.integers(0, 2))
def test_pads_change_nothing(loss: Loss, lens: list[int], junk: float, extra: int) -> None:
    inputs, mask = batch_of(lens, extra)
    clean = value_and_gradient(loss, [x.masked_fill(~mask, 0.0) for x in inputs], mask, sum(lens))
    poisoned = value_and_gradient(loss, [x.masked_fill(~mask, junk) for x in inputs], mask, sum(lens))
    assert poisoned[0] == clean[0] and poisoned[2] == clean[2] and math.isfinite(clean[0])
    assert torch.equal(poisoned[1], clean[1])
    assert (poisoned[1][~mask] == 0).all()


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
@pytest.mark.parametrize("sizes", [[8], [4, 4], [2, 2, 2, 2], [1] * 8, [3, 1, 4]])
def test_micro_batches_add_up(loss: Loss, sizes: list[int]) -> None:
    """Row 49: with the minibatch's count, the sum over micro-batches is the minibatch's loss, gradient and statistics."""
    lens = [1, 5, 2, 2, 6, 1, 3, 4]
    inputs, mask = batch_of(lens)
    whole, gradient, stats = value_and_gradient(loss, inputs, mask, sum(lens))
    parts = []
    for rows in torch.arange(8).split(sizes):
        width = max(lens[row] for row in rows)
        parts.append(value_and_gradient(loss, [x[rows, :width] for x in inputs], mask[rows, :width], sum(lens)))
    assert sum(part[0] for part in parts) == pytest.approx(whole, rel=1e-12)
    for name, stat in stats.items():
        assert sum(part[2][name] for part in parts) == pytest.approx(stat, rel=1e-12)
    for rows, part in zip(torch.arange(8).split(sizes), parts, strict=True):
        width = part[1].shape[1]
        assert torch.allclose(part[1], gradient[rows, :width], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
def test_row_order_changes_nothing(loss: Loss) -> None:
    inputs, mask = batch_of([3, 1, 4])
    order = torch.tensor([2, 0, 1])
    one, _, _ = value_and_gradient(loss, inputs, mask, 8)
    other, _, _ = value_and_gradient(loss, [x[order] for x in inputs], mask[order], 8)
    assert one == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
def test_an_empty_micro_batch_adds_0_and_an_empty_minibatch_is_an_error(loss: Loss) -> None:
    inputs, mask = batch_of([2, 2])
    total, gradient, _ = value_and_gradient(loss, inputs, torch.zeros_like(mask), 7)
    assert total == 0 and (gradient == 0).all()
    with pytest.raises(ValueError, match="at least 1; got 0"):
        value_and_gradient(loss, inputs, mask, 0)


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
def test_dtypes_stay(loss: Loss) -> None:
    inputs, mask = batch_of([2, 3])
    for dtype in (torch.float32, torch.float64):
        total, stats = loss(*[x.to(dtype) for x in inputs], mask, 5)
        assert total.dtype == dtype and all(stat.dtype == dtype for stat in stats.values())


# policy_loss


@settings(deadline=None, max_examples=25)
@given(lens=lengths, clip_range=st.sampled_from([0.1, 0.2, 0.5]))
def test_policy_loss_equals_loop(lens: list[int], clip_range: float) -> None:
    (new, old, advantages), mask = batch_of(lens)
    loss, stats = policy_loss(new, old, advantages, mask, clip_range, sum(lens))
    total = active = outside = half_square = k3 = ratios = 0.0
    for i, t in mask.nonzero().tolist():
        ratio, advantage = math.exp(new[i, t] - old[i, t]), float(advantages[i, t])
        clipped = min(max(ratio, 1 - clip_range), 1 + clip_range)
        total += -min(advantage * ratio, advantage * clipped)
        active += advantage * clipped < advantage * ratio
        outside += abs(ratio - 1) > clip_range
        half_square += math.log(ratio) ** 2 / 2
        k3 += ratio - 1 - math.log(ratio)
        ratios += ratio
    assert float(loss) == pytest.approx(total / sum(lens), rel=1e-9)
    expected = {"clipped_active": active, "clipped_ratio": outside, "ratio": ratios}
    expected |= {"approx_kl_half_sq": half_square, "approx_kl": k3}
    assert {name: float(stat) for name, stat in stats.items()} == pytest.approx(expected, rel=1e-9)


def test_policy_gradient_is_0_where_clipped_and_follows_the_advantage() -> None:
    """Ratio 1: gradient -A. Beyond the range in the direction of the advantage: 0; against it: full."""
    new = torch.tensor([[0.0, 0.0, 0.5, 0.5, -0.5, -0.5]]).double().requires_grad_()
    advantages = torch.tensor([[2.0, -3.0, 1.0, -1.0, 1.0, -1.0]]).double()
    loss, stats = policy_loss(new, torch.zeros(1, 6).double(), advantages, torch.ones(1, 6) > 0, 0.2, 1)
    (gradient,) = torch.autograd.grad(loss, new)
    assert gradient[0].tolist() == pytest.approx([-2.0, 3.0, 0.0, math.exp(0.5), -math.exp(-0.5), 0.0])
    assert float(stats["clipped_active"]) == 2 and float(stats["clipped_ratio"]) == 4


def test_first_minibatch_has_ratio_1() -> None:
    """Row 15: with the recorded log-probabilities the statistics are exact, not nearly so."""
    old, mask = normal(2, 3), mask_of([2, 3])
    _, stats = policy_loss(old, old, normal(2, 3, seed=1), mask, 0.2, 5)
    assert float(stats["ratio"]) == 5
    assert all(float(stats[name]) == 0 for name in stats if name != "ratio")


def test_nothing_but_the_new_policy_gets_a_gradient() -> None:
    tensors = [normal(1, 2, seed=seed).requires_grad_() for seed in range(3)]
    policy(*tensors, mask_of([2]), 2)[0].backward()
    assert [x.grad is None for x in tensors] == [False, True, True]
    tensors = [normal(1, 2, seed=seed).requires_grad_() for seed in range(3)]
    value(*tensors, mask_of([2]), 2)[0].backward()
    assert [x.grad is None for x in tensors] == [False, True, True]


# value_loss


@settings(deadline=None, max_examples=25)
@given(lens=lengths, clip=st.sampled_from([None, 0.1, 0.5]))
def test_value_loss_equals_loop(lens: list[int], clip: float | None) -> None:
    (new, old, returns), mask = batch_of(lens)
    loss, stats = value_loss(new, old, returns, mask, clip, sum(lens))
    total, clipped = 0.0, 0
    for i, t in mask.nonzero().tolist():
        v, v_old, target = float(new[i, t]), float(old[i, t]), float(returns[i, t])
        near = v if clip is None else min(max(v, v_old - clip), v_old + clip)
        total += 0.5 * max((v - target) ** 2, (near - target) ** 2)
        clipped += (near - target) ** 2 > (v - target) ** 2
    assert float(loss) == pytest.approx(total / sum(lens), rel=1e-9)
    assert float(stats["value_clipped"]) == clipped


def test_value_gradient() -> None:
    """Gradient v - R; 0 where the value has already moved towards the return by more than the range."""
    new = torch.tensor([[1.0, 0.5, -0.5]]).double().requires_grad_()
    loss, stats = value_loss(new, torch.zeros(1, 3).double(), torch.tensor([[0.9, 1.0, 1.0]]).double(), mask_of([3]), 0.2, 1)
    (gradient,) = torch.autograd.grad(loss, new)
    # 1: clipped to 0.2, error 0.7 > 0.1, so 0. 2: clipped to 0.2, error 0.8 > 0.5, so 0. 3: error 1.5 > 1.2, so -1.5.
    assert gradient[0].tolist() == [0.0, 0.0, -1.5]
    assert float(stats["value_clipped"]) == 2


# sft_loss


def test_sft_loss_by_hand() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, math.nan], [-4.0, 7.0, 7.0]])
    assert float(sft_loss(logprobs, mask_of([2, 1], 3), 4)) == 7 / 4


# ranking_loss


def ranking_loop(scores: list[float], ranks: list[float], groups: list[int], margins: dict[int, float]) -> list[float]:
    """Loss sum, prompts that count, correct pairs, pairs: over python lists, pair by pair."""
    loss, prompts, correct, pairs = 0.0, 0, 0.0, 0
    for prompt in set(groups):
        members = [i for i, group in enumerate(groups) if group == prompt]
        differences = [scores[i] - scores[j] for i in members for j in members if ranks[i] < ranks[j]]
        if differences:
            loss += sum(math.log1p(math.exp(margins[prompt] - d)) for d in differences) / len(differences)
            prompts += 1
            correct += sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences)
            pairs += len(differences)
    return [loss, prompts, correct, pairs]


responses = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 2), st.sampled_from([2, 5, 7])), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(rows=responses, with_margin=st.booleans())
def test_ranking_loss_equals_loop(rows: list[tuple[int, int, int]], with_margin: bool) -> None:
    """Ragged prompts in any order, with ties of ranks and of scores."""
    scores, ranks, groups = (list(column) for column in zip(*rows, strict=True))
    margins = {prompt: 0.3 * prompt if with_margin else 0.0 for prompt in sorted(set(groups))}
    given_margins = torch.tensor(list(margins.values()), dtype=torch.float64) if with_margin else None
    arguments = torch.tensor(ranks).double(), torch.tensor(groups)
    loss, count, stats = ranking_loss(torch.tensor(scores).double(), *arguments, margins=given_margins)
    expected = ranking_loop([float(s) for s in scores], [float(r) for r in ranks], groups, margins)
    actual = [float(loss), int(count), float(stats["correct"]), int(stats["pairs"])]
    assert actual == pytest.approx(expected, rel=1e-9)
    assert counted_prompts(*arguments) == expected[1]
    order = torch.arange(len(rows)).flip(0)
    permuted = ranking_loss(torch.tensor(scores).double()[order], *(x[order] for x in arguments), margins=given_margins)
    assert float(permuted[0]) == pytest.approx(float(loss), rel=1e-12)


def test_ranking_gradient_raises_the_better_response() -> None:
    scores = torch.tensor([0.0, 0.0, 5.0, 5.0]).double().requires_grad_()
    loss, count, stats = ranking_loss(scores, torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1]))
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.tolist() == [0.5, -0.5, 0.0, 0.0]
    assert float(loss.detach()) == pytest.approx(math.log(2)) and int(count) == 1
    assert float(stats["correct"]) == 0.5 and int(stats["pairs"]) == 1


def test_ranking_splits_over_micro_batches_of_whole_prompts() -> None:
    scores, ranks = normal(9), torch.tensor([0, 1, 2, 0, 1, 0, 0, 2, 1.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3])
    whole, count, stats = ranking_loss(scores, ranks, groups)
    parts = [ranking_loss(scores[part], ranks[part], groups[part]) for part in (slice(0, 5), slice(5, 9))]
    assert float(sum(part[0] for part in parts)) == pytest.approx(float(whole), rel=1e-12)
    assert sum(int(part[1]) for part in parts) == int(count) == 3
    assert sum(int(part[2]["pairs"]) for part in parts) == int(stats["pairs"])


def test_ranking_without_any_pair() -> None:
    scores = normal(3).requires_grad_()
    for ranks, groups in [([1.0, 1.0, 1.0], [0, 0, 0]), ([0.0, 1.0, 2.0], [0, 1, 2])]:
        loss, count, stats = ranking_loss(scores, torch.tensor(ranks), torch.tensor(groups))
        assert float(loss.detach()) == int(count) == int(stats["pairs"]) == float(stats["correct"]) == 0
        assert (torch.autograd.grad(loss, scores)[0] == 0).all()
    assert counted_prompts(torch.zeros(0), torch.zeros(0, dtype=torch.long)) == 0


def test_ranking_is_stable_in_float32() -> None:
    """Row 19: log(sigmoid(-90)) is -inf in float32, with NaN gradient."""
    for gap in (-800.0, -90.0, 90.0, 800.0):
        scores = torch.tensor([gap, 0.0], requires_grad=True)
        loss, _, _ = ranking_loss(scores, torch.tensor([0.0, 1.0]), torch.tensor([0, 0]))
        assert float(loss.detach()) == pytest.approx(max(0.0, -gap), abs=1e-30)
        assert torch.autograd.grad(loss, scores)[0].tolist() == ([-1.0, 1.0] if gap < 0 else pytest.approx([0.0, 0.0]))


def test_ranking_refuses_margins_of_another_shape() -> None:
    with pytest.raises(ValueError, match="one entry for each of 1 prompts"):
        ranking_loss(torch.zeros(2), torch.tensor([0.0, 1.0]), torch.tensor([0, 0]), margins=torch.zeros(2))


# normalisation


def test_normalisation_by_hand() -> None:
    """Mean 2, population deviation 2."""
    gain, bias = normalisation(torch.tensor([0.0, 4.0, 0.0, 4.0]))
    assert (gain, bias) == (0.5, -1.0)


@pytest.mark.parametrize("scores", [[], [2.0], [0.1, 0.1, 0.1], [1.0, math.nan], [1.0, math.inf]])
def test_normalisation_refuses(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="cannot normalise"):
        normalisation(torch.tensor(scores))

import math

import pytest
import torch

from tercet.algo.kl import AdaptiveKL, FixedKL, k1, k2, k3, kl_optimum, sequence_kl


def test_estimators_by_hand() -> None:
    logprobs, ref_logprobs = torch.tensor([-1.0, -2.0]).double(), torch.tensor([-1.5, -1.0]).double()
    assert k1(logprobs, ref_logprobs).tolist() == [0.5, -1.0]
    assert k2(logprobs, ref_logprobs).tolist() == [0.125, 0.5]
    assert k3(logprobs, ref_logprobs).tolist() == pytest.approx([math.exp(-0.5) - 0.5, math.e - 2])


def test_equal_policies_have_no_kl() -> None:
    logprobs = torch.randn(3, 4)
    for estimator in (k1, k2, k3):
        assert (estimator(logprobs, logprobs) == 0).all()


def test_k3_keeps_its_digits_near_0() -> None:
    """d = 0.001 in float32: k3 is 5e-7, where exp(-d) - 1 + d, which rounds around 1, is off by up to 6e-8."""
    assert abs(float(k3(torch.tensor([1e-3]), torch.zeros(1))) - 5e-7) < 1e-9


def test_sequence_kl_ignores_pads() -> None:
    kl = torch.tensor([[1.0, -0.5, math.nan], [2.0, math.inf, 1e9]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert sequence_kl(kl, mask).tolist() == [0.5, 2.0]


@pytest.mark.parametrize(("kl", "factor"), [(12.0, 1.01024), (3.0, 0.98976), (6.6, 1.00512), (6.0, 1.0), (-5.0, 0.98976)])
def test_adaptive_by_hand(kl: float, factor: float) -> None:
    controller = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    controller.update(kl, 512)
    assert controller.coef == pytest.approx(0.15 * factor, rel=1e-12)


def test_adaptive_settles_where_the_kl_is_the_target() -> None:
    """A policy whose KL is 0.6 / coef settles at coef = 0.1 for a target of 6."""
    controller = AdaptiveKL(1.0, target=6.0, horizon=1_000)
    for _ in range(500):
        controller.update(0.6 / controller.coef, 64)
    assert controller.coef == pytest.approx(0.1, rel=1e-3)


def test_state_is_taken_over() -> None:
    saved = AdaptiveKL(0.1, 6.0, 1_000)
    saved.update(50.0, 64)
    resumed = AdaptiveKL(0.1, 6.0, 1_000)
    resumed.load_state_dict(saved.state_dict())
    assert resumed.coef == saved.coef != 0.1


def test_fixed_stays() -> None:
    controller = FixedKL(0.05)
    controller.update(100.0, 512)
    assert controller.coef == 0.05 and controller.state_dict() == {"coef": 0.05}
    assert FixedKL(0.0).coef == 0.0


@pytest.mark.parametrize("arguments", [(0, 6, 100), (0.1, 0, 100), (0.1, -6, 100), (0.1, 6, 0), (math.nan, 6, 100)])
def test_adaptive_refuses(arguments: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="KL"):
        AdaptiveKL(*arguments)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=">= 0"):
        FixedKL(-0.1)
    with pytest.raises(ValueError, match="finite"):
        AdaptiveKL(0.1, 6, 1_000).update(math.nan, 8)
    with pytest.raises(ValueError, match="horizon"):
        AdaptiveKL(0.1, 6, 100).update(1.0, 512)
    with pytest.raises(ValueError, match="kl_coef"):
        kl_optimum(torch.ones(1), torch.zeros(1), 0.0)


def test_optimum_is_best_and_identity_holds() -> None:
    """J* - J(pi) = kl_coef KL(pi || pi*) for any policy, so J* is the maximum; several worlds at once."""
    generator = torch.Generator().manual_seed(0)
    ref_probs = torch.rand(3, 5, generator=generator, dtype=torch.float64).softmax(-1)
    rewards = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    optimum, best = kl_optimum(ref_probs, rewards, 0.3)
    assert torch.allclose(optimum.sum(-1), torch.ones(3).double())
    for _ in range(20):
        policy = torch.randn(3, 5, generator=generator, dtype=torch.float64).softmax(-1)
        objective = (policy * (rewards - 0.3 * (policy / ref_probs).log())).sum(-1)
        distance = (policy * (policy / optimum).log()).sum(-1)
        assert torch.allclose(best - objective, 0.3 * distance, rtol=1e-9)


def test_optimum_never_leaves_the_reference() -> None:
    optimum, objective = kl_optimum(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 100.0]), 0.1)
    assert optimum.tolist() == [1.0, 0.0] and float(objective) == 0.0

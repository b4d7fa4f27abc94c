"""The optimizer: AdamW by hand, clipping, broken gradients, exact restore."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tercet.runtime.distributed import World
from tercet.runtime.optim import Optimizer


def optimizer(module: nn.Module, max_grad_norm: float = 1e9, weight_decay: float = 0.0) -> Optimizer:
    return Optimizer(module, weight_decay=weight_decay, max_grad_norm=max_grad_norm, world=World())


def layer(*weights: float) -> nn.Linear:
    module = nn.Linear(len(weights), 1, bias=False)
    module.weight.data = torch.tensor([weights])
    return module


def step(module: nn.Linear, adam: Optimizer, gradient: list[float], rate: float = 0.1) -> float:
    module.weight.grad = torch.tensor([gradient])
    return adam.step(rate)


def test_two_steps_of_adamw_by_hand() -> None:
    """m and v with betas 0.9 and 0.999, corrected for their start at 0; eps 1e-5; decay w -= rate * decay * w before the step."""
    module = layer(1.0, -2.0)
    adam = optimizer(module, weight_decay=0.5)
    weights, first, second = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for count, gradient in enumerate([[0.3, 1e-4], [-0.1, 2e-5]], start=1):
        step(module, adam, gradient)
        for i, g in enumerate(gradient):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g * g
            weights[i] -= 0.1 * 0.5 * weights[i]
            m, v = first[i] / (1 - 0.9**count), second[i] / (1 - 0.999**count)
            weights[i] -= 0.1 * m / (math.sqrt(v) + 1e-5)
    assert module.weight[0].tolist() == pytest.approx(weights, rel=1e-5)


def test_eps_is_1e_5() -> None:
    """At g = 1e-4 the first step is rate * g / (g + 1e-5) = 0.0909...; with eps 1e-8 it would be 0.09999."""
    module = layer(0.0)
    step(module, optimizer(module), [1e-4])
    assert module.weight.item() == pytest.approx(-0.1 / 1.1, rel=1e-4)


def test_gradients_are_scaled_down_to_the_norm_and_the_norm_before_is_returned() -> None:
    module = layer(0.0, 0.0)
    adam = optimizer(module, max_grad_norm=1.0)
    assert step(module, adam, [30.0, 40.0]) == pytest.approx(50.0)
    moments = adam.state()["weight/exp_avg"][0] / 0.1  # after one step the moment is a tenth of the gradient used
    assert moments.tolist() == pytest.approx([0.6, 0.8], rel=1e-4)
    assert moments.norm() <= 1.0 + 1e-6


def test_small_gradients_are_left_alone() -> None:
    module = layer(0.0, 0.0)
    adam = optimizer(module, max_grad_norm=1.0)
    step(module, adam, [0.3, 0.4])
    assert (adam.state()["weight/exp_avg"][0] / 0.1).tolist() == pytest.approx([0.3, 0.4], rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    module = layer(1.0, 2.0)
    adam = optimizer(module, max_grad_norm=1.0, weight_decay=0.1)
    step(module, adam, [0.1, 0.2])
    weights, state = module.weight.detach().clone(), {name: value.clone() for name, value in adam.state().items()}
    assert not math.isfinite(step(module, adam, [bad, 1.0]))
    assert torch.equal(module.weight, weights)
    assert all(torch.equal(value, state[name]) for name, value in adam.state().items())
    assert module.weight.grad is None, "the bad gradient must not be added to the next one"


def test_restored_state_goes_on_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(1, 4, generator=generator).tolist()[0] for _ in range(6)]
    whole = layer(1.0, 2.0, 3.0, 4.0)
    adam = optimizer(whole, max_grad_norm=1.0, weight_decay=0.01)
    for gradient in gradients:
        step(whole, adam, gradient, rate=1e-2)
    begun = layer(1.0, 2.0, 3.0, 4.0)
    adam = optimizer(begun, max_grad_norm=1.0, weight_decay=0.01)
    for gradient in gradients[:3]:
        step(begun, adam, gradient, rate=1e-2)
    saved = {name: value.clone() for name, value in adam.state().items()}
    resumed = layer(*begun.weight[0].tolist())
    adam = optimizer(resumed, max_grad_norm=1.0, weight_decay=0.01)
    adam.load_state(saved)
    for gradient in gradients[3:]:
        step(resumed, adam, gradient, rate=1e-2)
    assert torch.equal(resumed.weight, whole.weight)


def test_without_its_state_it_would_go_on_differently() -> None:
    """So that the test above cannot pass by chance."""
    one, other = layer(1.0), layer(1.0)
    adam = optimizer(one)
    step(one, adam, [1.0])
    other.weight.data = one.weight.data.clone()
    step(one, adam, [-0.3])
    step(other, optimizer(other), [-0.3])
    assert not torch.equal(one.weight, other.weight)


def test_frozen_parameters_are_not_touched() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    module[0].requires_grad_(False)
    before = module[0].weight.clone()
    adam = optimizer(module, weight_decay=0.5)
    module(torch.ones(1, 2)).sum().backward()
    adam.step(0.1)
    assert torch.equal(module[0].weight, before)
    assert {name.split("/")[0] for name in adam.state()} == {"1.weight", "1.bias"}


class Tied(nn.Module):
    """An embedding that is the output layer too."""

    def __init__(self, tied: bool, padding: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(7, 4, padding_idx=padding), nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return (self.head(self.embedding(ids)) - 1).float().square().sum()


@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_a_large_embedding_learns_from_the_rows_looked_up_as_a_small_one_does(
    tied: bool, padding: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches a step, a row twice in one, three steps."""
    found = []
    for large in (False, True):
        monkeypatch.setattr("tercet.runtime.optim._LARGE", 0 if large else 2**25)
        module = Tied(tied, padding)
        adam = optimizer(module, max_grad_norm=0.5)
        norms = []
        for ids in ([1, 1, 3], [2, 5], [6, 6, 6]):
            module(torch.tensor(ids)).backward()
            module(torch.tensor([0, 1])).backward()
            norms.append(adam.step(0.1))
        assert bool(module.embedding._forward_hooks) is large
        assert module.embedding(torch.tensor([1])).requires_grad
        with torch.no_grad():
            assert not module.embedding(torch.tensor([1])).requires_grad
        found.append((norms, adam.weights()))
    (norms, weights), (large_norms, large_weights) = found
    assert large_norms == pytest.approx(norms, rel=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(large_weights[name], weight, rtol=1e-6, atol=1e-6)


def test_an_embedding_that_does_more_than_look_up_keeps_autograds_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(ids)

    monkeypatch.setattr("tercet.runtime.optim._LARGE", 0)
    module = nn.Sequential(Scaled(5, 2))
    optimizer(module)
    module(torch.tensor([4, 4])).sum().backward()
    assert module[0].weight.grad.tolist() == [[0.0, 0.0]] * 4 + [[6.0, 6.0]]

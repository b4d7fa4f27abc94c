"""Inverse-CDF sampling against its definition, and random numbers that are a pure function of their place."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tercet.algo import products
from tercet.generation.sampling import PURPOSES, inverse_cdf, uniforms

BELOW_ONE = 1 - 2.0**-53
VECTORS = json.loads((Path(__file__).parents[1] / "reference_vectors.json").read_text())


def slow(logits: list[float], uniform: float, temperature: float) -> tuple[int, list[float], list[float]]:
    """The first token whose cumulative probability exceeds the number; also probabilities and cumulative sums."""
    top = max(logits)
    weights = [math.exp((value - top) / temperature) for value in logits]
    total = math.fsum(weights)
    cumulative = [math.fsum(weights[: i + 1]) / total for i in range(len(weights))]
    token = next((i for i, value in enumerate(cumulative) if value > uniform), None)
    if token is None:
        token = max(i for i, weight in enumerate(weights) if weight > 0)
    return token, [weight / total for weight in weights], cumulative


def draw(logits: Tensor, uniform: list[float], temperature: float = 1.0) -> tuple[list[int], Tensor]:
    tokens, logprobs = inverse_cdf(logits, torch.tensor(uniform, dtype=torch.float64), temperature)
    return tokens.tolist(), logprobs


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_a_slow_loop(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 2, 5, 255, 256, 257, 700]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    logits = 3 * torch.randn(size, generator=generator, dtype=torch.float64)
    masked = torch.rand(size, generator=generator) < data.draw(st.sampled_from([0.0, 0.5, 0.98]))
    masked[data.draw(st.integers(0, size - 1))] = False
    logits[masked] = -math.inf
    temperature = data.draw(st.sampled_from([0.6, 1.0, 1.3]))
    uniform = data.draw(st.floats(0, 1, exclude_max=True))
    wanted, probabilities, cumulative = slow(logits.tolist(), uniform, temperature)
    tokens, logprobs = draw(logits[None], [uniform], temperature)
    near_an_edge = any(abs(uniform - value) < 1e-12 for value in cumulative)
    assert tokens[0] == wanted or near_an_edge
    assert probabilities[tokens[0]] > 0
    assert logprobs[0].item() == pytest.approx(math.log(probabilities[tokens[0]]), abs=1e-10)


@pytest.mark.parametrize("size", [5, 256, 257, 1000])
@pytest.mark.parametrize("uniform", [0.0, 5e-324, BELOW_ONE])
def test_masked_tokens_are_never_drawn_at_the_edges(size: int, uniform: float) -> None:
    """Mass in one token only, wherever it stands: nothing else may come out, and no index beyond the vocabulary."""
    for place in {0, 1, size // 2, size - 2, size - 1}:
        logits = torch.full((1, size), -math.inf)
        logits[0, place] = 3.0
        tokens, logprobs = draw(logits, [uniform])
        assert tokens == [place] and logprobs.tolist() == [0.0]


@pytest.mark.parametrize("size", [200, 256, 700])
def test_rounding_at_the_end_never_leaves_the_vocabulary(size: int) -> None:
    """A block's sum and its running sum differ in the last bit: a point between them would fall behind the last token."""
    logits = torch.randn(400, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, -3:] = -math.inf
    tokens, logprobs = inverse_cdf(logits, torch.full((400,), BELOW_ONE, dtype=torch.float64), 1.0)
    assert set(tokens.tolist()) <= {size - 4} and bool(logprobs.isfinite().all())


def test_edges_of_the_unit_interval() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0, 0.0, 0.0, -math.inf]], dtype=torch.float64)
    for uniform, token in [(0.0, 1), (0.2499, 1), (0.25, 2), (0.5, 3), (0.75, 4), (BELOW_ONE, 4)]:
        tokens, logprobs = draw(logits, [uniform])
        assert tokens == [token] and logprobs.item() == pytest.approx(math.log(0.25))


def test_five_tokens_come_out_as_often_as_they_should() -> None:
    """Chi-square with 4 degrees of freedom: 18.47 is passed once in a thousand seeds, and the seed is fixed."""
    logits, temperature, count = torch.tensor([1.0, -0.5, 0.3, 2.0, -2.0]), 0.7, 40_000
    _, probabilities, _ = slow(logits.tolist(), 0.0, temperature)
    numbers = uniforms(11, "rollout", 0, range(200), 200).reshape(-1)
    tokens, _ = inverse_cdf(logits.expand(count, 5), numbers, temperature)
    observed = torch.bincount(tokens, minlength=5).tolist()
    chi_square = sum((seen - count * p) ** 2 / (count * p) for seen, p in zip(observed, probabilities))
    assert chi_square < 18.47


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tail_of_a_large_vocabulary_keeps_its_mass(dtype: torch.dtype) -> None:
    """One token of half the mass, then 150,000 equal ones: a running sum in float32 would lose much of them."""
    size = 150_000
    logits = torch.zeros(size, dtype=dtype)
    logits[0] = 12.0  # exactly representable
    exact = math.exp(12.0) / (math.exp(12.0) + size - 1)
    grid = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    tokens, logprobs = inverse_cdf(logits.expand(64, size), grid, 1.0)
    for uniform, token, logprob in zip(grid.tolist(), tokens.tolist(), logprobs.tolist()):
        if uniform < exact:
            assert token == 0 and logprob == pytest.approx(math.log(exact), abs=1e-6)
        else:
            place = 1 + (uniform - exact) / (1 - exact) * (size - 1)
            assert abs(token + 0.5 - place) < 0.6  # the first block's float32 sum of one half is off by 0.05 of a token at most
            assert logprob == pytest.approx(math.log((1 - exact) / (size - 1)), abs=1e-6)
    assert sum(token >= 50_000 for token in tokens.tolist()) == sum(u >= exact + (1 - exact) / 3 for u in grid.tolist())


def test_temperature_of_the_reference_vectors() -> None:
    vector = VECTORS["temperature_logprob"]
    logits = torch.tensor([vector["in"]["logits"]], dtype=torch.float64)
    for token, wanted in enumerate(vector["out"]["logprobs_T"]):
        middle = sum(math.exp(value) for value in vector["out"]["logprobs_T"][:token]) + math.exp(wanted) / 2
        tokens, logprobs = draw(logits, [middle], vector["in"]["T"])
        assert tokens == [token] and logprobs.item() == pytest.approx(wanted, rel=1e-8)
    assert vector["out"]["token_logprob_T"] != pytest.approx(vector["out"]["WRONG_token_logprob_T1"])


def test_greedy_takes_the_likeliest_and_reports_its_probability_at_the_temperature() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 5.5]])
    tokens, logprobs = inverse_cdf(logits, None, 0.5)
    assert tokens.tolist() == [1, 2]
    wanted = [-math.log(1 + math.exp(-4.0) + math.exp(-2.0)), -math.log(1 + math.exp(-1.0) + math.exp(-13.0))]
    assert logprobs.tolist() == pytest.approx(wanted, abs=1e-6)


def test_precision_of_the_logprobs() -> None:
    for dtype, wanted in [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]:
        assert inverse_cdf(torch.zeros(1, 4, dtype=dtype), torch.tensor([0.5], dtype=torch.float64), 1.0)[1].dtype == wanted


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_rows_do_not_touch_each_other(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of them are drawn at a time."""
    monkeypatch.setattr(products, "_PIECE", 600 * rows)
    generator = torch.Generator().manual_seed(0)
    logits, numbers = torch.randn(7, 600, generator=generator), torch.rand(7, generator=generator, dtype=torch.float64)
    together, logprobs = inverse_cdf(logits, numbers, 0.8)
    for row in range(7):
        alone, logprob = inverse_cdf(logits[row : row + 1], numbers[row : row + 1], 0.8)
        assert alone.item() == together[row].item() and logprob.item() == logprobs[row].item()


# Random numbers


def test_uniforms_are_a_pure_function_of_their_place() -> None:
    whole = uniforms(3, "rollout", 5, range(10), 12)
    assert whole.shape == (10, 12) and whole.dtype == torch.float64
    assert bool((whole >= 0).all()) and bool((whole < 1).all())
    torch.manual_seed(123)  # no global state
    assert torch.equal(uniforms(3, "rollout", 5, torch.tensor([7, 2]), 12), whole[[7, 2]])  # any rows, any order
    assert torch.equal(uniforms(3, "rollout", 5, range(4, 6), 12), whole[4:6])  # another rank's share
    assert torch.equal(uniforms(3, "rollout", 5, range(10), 5), whole[:, :5])  # a shorter limit
    assert torch.equal(uniforms(3, "rollout", 5, range(10), 40)[:, :12], whole)
    assert uniforms(3, "rollout", 5, range(0), 12).shape == (0, 12)


def test_uniforms_have_the_values_that_resumed_runs_rely_on() -> None:
    """Changing these changes every sample of every run: stage versions must then be raised."""
    import numpy as np

    bits = np.random.Philox(key=np.array([3, 1], dtype=np.uint64), counter=np.array([0, 0, 8, 2], dtype=np.uint64))
    wanted = [(int(word) >> 11) * 2.0**-53 for word in bits.random_raw(4)]
    assert uniforms(3, "evaluation", 2, range(8, 9), 4)[0].tolist() == wanted


def test_every_argument_changes_every_number() -> None:
    base = uniforms(0, "rollout", 0, range(50), 20)
    others = [uniforms(1, "rollout", 0, range(50), 20), uniforms(0, "rollout", 1, range(50), 20)]
    others += [uniforms(0, purpose, 0, range(50), 20) for purpose in PURPOSES if purpose != "rollout"]
    others += [uniforms(0, "rollout", 0, range(50, 100), 20)]
    streams = torch.cat([base, *others]).reshape(-1)
    assert len(streams.unique()) == len(streams)
    for other in others:
        correlation = torch.corrcoef(torch.stack([base.reshape(-1), other.reshape(-1)]))[0, 1].item()
        assert abs(correlation) < 0.13  # four standard deviations of 1000 pairs


def test_uniforms_are_uniform() -> None:
    """Kolmogorov-Smirnov along tokens, rows and iterations: 1.95 is passed once in a thousand seeds, and the seed is fixed."""
    along_rows = uniforms(0, "rollout", 3, range(4000), 1).reshape(-1)
    along_tokens = uniforms(0, "rollout", 3, range(1), 4000).reshape(-1)
    along_iterations = torch.cat([uniforms(0, "rollout", k, range(1), 1).reshape(-1) for k in range(4000)])
    for sample in (along_rows, along_tokens, along_iterations):
        ordered, steps = sample.sort().values, torch.arange(1, 4001, dtype=torch.float64) / 4000
        distance = torch.maximum(steps - ordered, ordered - (steps - 1 / 4000)).max().item()
        assert distance * 4000**0.5 < 1.95

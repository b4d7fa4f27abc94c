import gc
import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tercet.algo import logprobs as module
from tercet.algo.logprobs import LogitTransform, last_states, logits_logprobs, response_states, token_logprobs


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# response_states, last_states


def test_response_states_by_hand() -> None:
    hidden = torch.arange(10.0).reshape(2, 5, 1)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    states = response_states(hidden, torch.tensor([1, 3]), mask)
    assert states.squeeze(-1).tolist() == [0, 1, 2, 7, 8]


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5), extra=st.integers(0, 2))
def test_state_of_a_response_token_is_the_one_before_it(rows: list[tuple[int, int]], extra: int) -> None:
    """A model whose state holds the position's own index: token prompt_len + t is predicted at prompt_len + t - 1."""
    width = max(prompt + response for prompt, response in rows) + extra
    hidden = torch.arange(width, dtype=torch.float64).expand(len(rows), -1)[..., None].repeat(1, 1, 2)
    prompts = torch.tensor([prompt for prompt, _ in rows])
    responses = torch.tensor([response for _, response in rows])
    mask = torch.arange(int(responses.max())) < responses[:, None]
    states = response_states(hidden, prompts, mask)
    assert states.tolist() == [[prompt + t - 1] * 2 for prompt, response in rows for t in range(response)]
    lengths = torch.tensor([prompt + response for prompt, response in rows])
    assert last_states(hidden, lengths)[:, 0].tolist() == (lengths - 1).tolist()


def test_model_that_copies_the_next_token_has_logprob_0() -> None:
    """Row 9: a state that knows the next token gives log-probability 0 on every response token, and only there."""
    ids = torch.tensor([[1, 4, 2, 3, 0], [2, 2, 0, 1, 4]])
    prompt_lens, vocabulary = torch.tensor([2, 1]), 5
    following = torch.roll(ids, -1, dims=1)
    hidden = 1e3 * torch.nn.functional.one_hot(following, vocabulary).double()
    states = response_states(hidden, prompt_lens, torch.ones(2, 3, dtype=torch.bool))
    targets = torch.stack([ids[i, n : n + 3] for i, n in enumerate(prompt_lens.tolist())])
    logprobs, _ = token_logprobs(states, targets.flatten(), torch.eye(vocabulary, dtype=torch.float64))
    assert logprobs.tolist() == [0.0] * 6


def test_gradient_reaches_only_the_states_that_predict() -> None:
    hidden = normal(1, 6, 2).requires_grad_()
    mask = torch.tensor([[True, True, False, False]])
    response_states(hidden, torch.tensor([4]), mask).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[0, :, 0].tolist() == [0, 0, 0, 1, 1, 0]


# logits_logprobs


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_logprobs_and_entropy_equal_loop(temperature: float) -> None:
    logits, targets = normal(4, 7), torch.tensor([0, 6, 3, 3])
    logprobs, entropy = logits_logprobs(logits, targets, temperature, with_entropy=True)
    assert entropy is not None
    for i in range(4):
        weights = [math.exp(float(logit) / temperature) for logit in logits[i]]
        probs = [weight / sum(weights) for weight in weights]
        assert float(logprobs[i]) == pytest.approx(math.log(probs[targets[i]]), rel=1e-12)
        assert float(entropy[i]) == pytest.approx(-sum(p * math.log(p) for p in probs), rel=1e-12)


def test_precision() -> None:
    logits, targets = normal(3, 5), torch.tensor([0, 1, 2])
    for half in (torch.float16, torch.bfloat16):
        logprobs, entropy = logits_logprobs(logits.to(half), targets, 0.7, with_entropy=True)
        assert entropy is not None and logprobs.dtype == entropy.dtype == torch.float32
        exact, _ = logits_logprobs(logits.to(half).double(), targets, 0.7)
        assert torch.allclose(logprobs.double(), exact, atol=1e-6), "upcast comes before the division by the temperature"
    assert logits_logprobs(logits, targets)[0].dtype == torch.float64
    assert logits_logprobs(logits.float(), targets)[0].dtype == torch.float32


def test_impossible_tokens_and_large_logits() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0], [1e4, 0.0, -1e4]])
    logprobs, entropy = logits_logprobs(logits, torch.tensor([0, 0]), with_entropy=True)
    assert entropy is not None
    assert logprobs.tolist() == pytest.approx([-math.log(2), 0.0])
    assert entropy.tolist() == pytest.approx([math.log(2), 0.0])


def test_entropy_carries_no_gradient() -> None:
    logits = normal(2, 3).requires_grad_()
    logprobs, entropy = logits_logprobs(logits, torch.tensor([0, 1]), with_entropy=True)
    assert entropy is not None and not entropy.requires_grad and logprobs.requires_grad


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be > 0"):
        logits_logprobs(normal(1, 2), torch.tensor([0]), temperature)


# token_logprobs


@pytest.mark.parametrize("narrowest", [1, 4, 4096])
@pytest.mark.parametrize("chunk_elements", [1, 11, 33, 34, 10_000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunks_change_nothing(chunk_elements: int, narrowest: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of states and head are those of one pass, however tokens and vocabulary are cut."""
    monkeypatch.setattr(module, "_NARROWEST", narrowest)
    head, targets = [normal(11, 3, seed=1).requires_grad_()], torch.arange(8)
    head += [normal(11, seed=5).requires_grad_()] if with_bias else []
    states, coefficients = normal(8, 3).requires_grad_(), normal(8, seed=2)
    logits = states @ head[0].T + (head[1] if with_bias else 0.0)
    whole, entropy = logits_logprobs(logits, targets, 0.7, with_entropy=True)
    expected = torch.autograd.grad((whole * coefficients).sum(), [states, *head])
    logprobs, chunked_entropy = token_logprobs(
        states, targets, *head, temperature=0.7, with_entropy=True, chunk_elements=chunk_elements
    )
    assert entropy is not None and chunked_entropy is not None and not chunked_entropy.requires_grad
    assert torch.allclose(logprobs, whole, rtol=1e-12) and torch.allclose(chunked_entropy, entropy, rtol=1e-12)
    gradients = torch.autograd.grad((logprobs * coefficients).sum(), [states, *head])
    for actual, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(actual, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chunk_elements", [11, 10_000])
@pytest.mark.parametrize("transform", [LogitTransform(0.25), LogitTransform(1.0, 3.0), LogitTransform(2.0, 0.7)], ids=str)
def test_scaled_and_capped_logits(transform: LogitTransform, chunk_elements: int, dtype: torch.dtype) -> None:
    """Against the formula written out: scale * cap * tanh(product / cap); a bias that all logits share is none to the cap."""
    states, coefficients, targets = normal(8, 3).requires_grad_(), normal(8, seed=2), torch.arange(8)
    head = [normal(11, 3, seed=1).requires_grad_(), (normal(11, seed=5) + 1.0).requires_grad_()]
    products = states @ head[0].T + head[1]
    logits = products if transform.cap is None else torch.tanh(products / transform.cap) * transform.cap
    assert torch.allclose(transform(products), transform.scale * logits, rtol=1e-12)
    wanted = logits_logprobs(transform.scale * logits, targets, 0.7, with_entropy=True)
    slopes = torch.autograd.grad((wanted[0] * coefficients).sum(), [states, *head])
    inputs = [tensor.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_() for tensor in (states, *head)]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        options: dict[str, Any] = {"temperature": 0.7, "transform": transform, "chunk_elements": chunk_elements}
        found = token_logprobs(inputs[0], targets, *inputs[1:], with_entropy=True, **options)
    found_slopes = torch.autograd.grad((found[0] * coefficients.to(found[0])).sum(), inputs)
    tolerance = 1e-10 if dtype is torch.float64 else 0.03
    for actual, expected in zip((*found, *found_slopes), (*wanted, *slopes), strict=True):
        assert actual is not None and expected is not None
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("count", "multiplied"), [(1, 32), (64, 64), (300, 320)])
def test_tokens_are_multiplied_in_few_numbers(count: int, multiplied: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps half a megabyte for each product of a new number of rows."""
    heights: list[int] = []
    product = module._Head.product
    monkeypatch.setattr(module._Head, "product", lambda self, x, *rest: heights.append(len(x)) or product(self, x, *rest))  # type: ignore[func-returns-value]
    states, weight, bias = normal(count, 3).requires_grad_(), normal(11, 3, seed=1).requires_grad_(), normal(11).requires_grad_()
    targets, coefficients = torch.arange(count) % 11, normal(count, seed=2)
    found, entropy = token_logprobs(states, targets, weight, bias, with_entropy=True)
    wanted, wanted_entropy = logits_logprobs(states @ weight.T + bias, targets, with_entropy=True)
    assert entropy is not None and wanted_entropy is not None and heights == [multiplied]
    torch.testing.assert_close((found, entropy), (wanted, wanted_entropy), rtol=1e-12, atol=1e-12)
    inputs = [states, weight, bias]
    for actual, expected in zip(*(torch.autograd.grad((x * coefficients).sum(), inputs) for x in (found, wanted))):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("elements", [7, 10_000])
def test_large_and_impossible_logits(elements: int) -> None:
    """The highest logit in the first or in the last chunk, a token that cannot come, and one that alone can."""
    bias = torch.tensor([[1e4, 0.0, -1e4, 5.0], [-1e4, -math.inf, 3.0, 1e4]], dtype=torch.float64)
    for row in bias:
        states, targets = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0, 2, 3])
        weight = torch.zeros(4, 2, dtype=torch.float64)
        found = token_logprobs(states, targets, weight, row, with_entropy=True, chunk_elements=elements)
        for one, wanted in zip(found, logits_logprobs(row.expand(3, -1), targets, with_entropy=True)):
            assert one is not None and wanted is not None and torch.allclose(one, wanted, rtol=1e-12)


@pytest.mark.parametrize("impossible", [slice(0, 2), slice(2, 4)])
def test_a_chunk_of_the_vocabulary_that_cannot_come(impossible: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NARROWEST", 2)
    weight, states, targets = normal(5, 3), normal(2, 3, seed=1), torch.tensor([4, 4])
    bias = torch.zeros(5, dtype=torch.float64)
    bias[impossible] = -math.inf
    found = token_logprobs(states, targets, weight, bias, with_entropy=True, chunk_elements=4)
    for one, wanted in zip(found, logits_logprobs(states @ weight.T + bias, targets, with_entropy=True)):
        assert one is not None and wanted is not None and torch.allclose(one, wanted, rtol=1e-12)


@pytest.mark.parametrize(("learns", "kept"), [(False, 0), (True, 1)])
def test_few_logits_alive(learns: bool, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a head that learns no more logits outlive the forward pass than the weight has elements, of a frozen one none."""
    alive: list[weakref.ref[Tensor]] = []
    sizes, most_alive, compute = [], 0, module._Head.product

    def count() -> int:
        gc.collect()
        return sum(reference() is not None for reference in alive)

    def watched(self: module._Head, states: Tensor, weight: Tensor, span: slice) -> Tensor:
        nonlocal most_alive
        logits = compute(self, states, weight, span)
        alive.append(weakref.ref(logits.untyped_storage()))
        sizes.append(logits.numel())
        most_alive = max(most_alive, count())
        return logits

    monkeypatch.setattr(module._Head, "product", watched)
    weight, states = (
        normal(10, 4, dtype=torch.float32).requires_grad_(learns),
        normal(32, 4, dtype=torch.float32).requires_grad_(),
    )
    logprobs, _ = token_logprobs(states, torch.zeros(32, dtype=torch.long), weight, with_entropy=True, chunk_elements=40)
    assert sizes == [4 * 10] * 8, "as many tokens as have room with the whole of so small a vocabulary"
    assert count() == kept
    logprobs.sum().backward()
    assert sizes == [4 * 10] * (16 - kept), "each chunk that was not kept is computed once more in the backward pass"
    assert most_alive <= 2 + kept


def test_the_gradient_of_a_token_that_is_nearly_certain_keeps_its_digits() -> None:
    """1 - p is 3e-4 here: from a p rounded to bfloat16 it would be 0 or 4e-3."""
    weight, states = torch.tensor([[4.0], [-4.0]]).requires_grad_(), torch.ones(1, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = token_logprobs(states, torch.tensor([0]), weight)
    logprobs.backward()
    rest = 1 / (1 + math.exp(8.0))
    assert states.grad is not None and states.grad.item() == pytest.approx(8 * rest, rel=0.01)
    assert weight.grad is not None and weight.grad.flatten().tolist() == pytest.approx([rest, -rest], rel=0.01)


def test_a_frozen_part_of_the_head_gets_no_gradient() -> None:
    head = nn.Linear(3, 7).double()
    head.bias.requires_grad_(False)
    states = normal(4, 3).requires_grad_()
    logprobs, _ = token_logprobs(states, torch.arange(4), head.weight, head.bias, chunk_elements=14)
    logprobs.sum().backward()
    direct = logits_logprobs(head(states.detach()), torch.arange(4))[0]
    assert torch.allclose(logprobs, direct) and head.bias.grad is None and head.weight.grad is not None


def test_autocast_rounds_as_one_pass_does() -> None:
    states, weight, targets = normal(40, 16, dtype=torch.float32), normal(50, 16, seed=1, dtype=torch.float32), torch.arange(40)
    with torch.autocast("cpu", torch.bfloat16):
        whole, _ = token_logprobs(states, targets, weight)
        parts, _ = token_logprobs(states.requires_grad_(), targets, weight, chunk_elements=100)
    assert parts.dtype is whole.dtype is torch.float32
    assert torch.allclose(parts, whole, atol=1e-5)
    parts.sum().backward()
    assert states.grad is not None and states.grad.dtype is torch.float32


@pytest.mark.parametrize("chunk_elements", [8_000_000, 3000])
def test_logits_around_minus_100_keep_their_digits_under_autocast(chunk_elements: int) -> None:
    """As GPT-2's: bfloat16 numbers there are half a nat apart, but what is common to all logits is nothing to a softmax."""
    weight, states = normal(60, 32, seed=1, dtype=torch.float32) / 6, normal(40, 32, dtype=torch.float32)
    weight[:, 0], states[:, 0] = 1.0, -100.0
    targets = torch.arange(40)

    def found(dtype: torch.dtype) -> list[Tensor]:
        w, x = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (weight, states))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not torch.float64):
            logprobs, entropy = token_logprobs(x, targets, w, with_entropy=True, chunk_elements=chunk_elements)
        (logprobs * normal(40).to(logprobs)).sum().backward()
        assert entropy is not None and x.grad is not None and w.grad is not None
        return [tensor.detach().double() for tensor in (logprobs, entropy, x.grad[:, 1:], w.grad[:, 1:])]

    half = found(torch.float32)
    for name, one, exact in zip(("logprobs", "entropies", "states", "weight"), half, found(torch.float64)):
        assert (one - exact).abs().max() < 0.03 * exact.abs().max(), name
    with torch.autocast("cpu", torch.bfloat16):  # a frozen copy holds the rounded weight alone
        frozen, _ = token_logprobs(states, targets, weight.bfloat16(), chunk_elements=chunk_elements)
    assert torch.equal(frozen.double(), half[0])


def test_no_tokens() -> None:
    states = normal(0, 3).requires_grad_()
    empty = torch.zeros(0, dtype=torch.long)
    logprobs, entropy = token_logprobs(states, empty, normal(5, 3), with_entropy=True)
    assert entropy is not None and logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()


@pytest.mark.parametrize("chunk_elements", [1, 10_000])
def test_temperature_must_be_positive_in_chunks_too(chunk_elements: int) -> None:
    with pytest.raises(ValueError, match="temperature must be > 0"):
        token_logprobs(normal(4, 3), torch.arange(4), normal(5, 3), temperature=0.0, chunk_elements=chunk_elements)

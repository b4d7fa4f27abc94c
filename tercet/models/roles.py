"""The roles of a run: each is one module whose forward takes Sequences and returns response-aligned tensors.

Autocast is entered inside these forwards and nowhere else, so all roles compute in the same precision. Under bfloat16 a role that
learns holds float32 weights, which every product rounds; one that is frozen holds the rounded ones alone. Dropout is 0. No
attention mask is passed: in the right-padded layout a causal model's real tokens never see a pad.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tercet.algo.logprobs import LogitTransform, last_states, logits_logprobs, response_states, token_logprobs
from tercet.models.attention import attention_window, use_packed_attention
from tercet.models.fused import fuse_gates, fuse_norms
from tercet.models.kernels import fuse_activations, use_fast_products
from tercet.models.load import embedding_rows
from tercet.models.packing import Packing
from tercet.models.precision import linear_layers, round_lookups, round_weights
from tercet.types import Sequences, TercetError


class _Role(nn.Module):
    """A Hugging Face model with the precision that it computes in."""

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype):
        super().__init__()
        self.model = model.double() if compute_dtype is torch.float64 else model
        self.compute_dtype = compute_dtype
        self.merge: Callable[[], PreTrainedModel] | None = None  # how an adapter and its backbone become one model
        fuse_activations(self.model)
        if compute_dtype is torch.bfloat16:
            round_lookups(self.model)
        with self.autocast():
            if self.model.device.type == "cpu":
                fuse_norms(self.model.base_model)
                fuse_gates(self.model.base_model)
            self._packs = use_packed_attention(self.model) and _is_indifferent_to_packing(self.model.base_model)
        self._window = attention_window(self.model)
        use_fast_products(self.model.base_model)

    @property
    def sees_all(self) -> bool:
        """Whether a token sees all before it and itself, and nothing else goes by the mask."""
        return self._packs and self._window is None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.compute_dtype is torch.bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def hidden(self, sequences: Sequences) -> Tensor:
        """Last hidden states, (B, L, D); what stands at pads means nothing."""
        ids = sequences.input_ids
        if not self._packs or not len(ids) or (self._window is not None and ids.shape[1] > self._window):
            return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return _packed_states(self.model.base_model, ids, sequences.lengths)

    def freeze(self) -> None:
        """No gradients, and under bfloat16 no more digits than matrix products take."""
        self.requires_grad_(False).eval()
        if self.compute_dtype is torch.bfloat16:
            round_weights(self.model)

    def flops(self, tokens: int, head_tokens: int) -> int:
        """Floating-point operations of a forward over `tokens` tokens, `head_tokens` of which reach the head: two for each weight of
        a linear layer and token. Attention's own products, a few per cent on short texts, are left out."""
        head: Any = self.head
        weights = sum(module.weight.numel() for module in linear_layers(self.model.base_model))
        return 2 * (weights * tokens + head.weight.numel() * head_tokens)

    def kept_bytes(self, tokens: int, head_tokens: int) -> int:
        """About what a forward over `tokens` tokens keeps for its backward pass, `head_tokens` of which reach the head."""
        features = sum(sum(module.weight.shape) for module in linear_layers(self.model.base_model))
        head: Any = self.head
        logits = min(head_tokens, head.in_features) * head.out_features if head.weight.requires_grad else 0  # algo/logprobs.py
        return kept_bytes(features, tokens, self.compute_dtype) + logits * self.compute_dtype.itemsize

    def full_precision(self) -> PreTrainedModel:
        """The model to be saved, with float32 weights; of a role that learns."""
        if self.merge is not None:
            return self.merge()
        return copy.deepcopy(self.model).float() if self.compute_dtype is torch.float64 else self.model


def kept_bytes(features: int, tokens: int, dtype: torch.dtype) -> int:
    """About what a forward over `tokens` tokens keeps for its backward pass: the `features` numbers a token that go into a trunk's linear
    layers and come out, and a quarter of that in what lies between."""
    return tokens * features * dtype.itemsize * 5 // 4


class Policy(_Role):
    """A causal language model that gives the log-probabilities of response tokens.

    transform: what it makes of its output layer's products; None if that is something else than LogitTransform knows, and the model
    has to be asked for its logits, all of them at once.
    """

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype = torch.float32):
        super().__init__(model, compute_dtype)
        with self.autocast():
            self.transform = _logit_transform(model)

    def forward(
        self, sequences: Sequences, *, temperature: float = 1.0, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and, on request, entropies of the policy at each response token.

        Returns (B, T) tensors in float32 or wider, 0 outside sequences.response_mask; entropies carry no gradient.
        """
        mask, targets = sequences.response_mask, sequences.response_ids
        with self.autocast():
            if self.transform is None:
                every = self.model(input_ids=sequences.input_ids, use_cache=False).logits
                picked = response_states(every, sequences.prompt_lens, mask)
                logprobs, entropy = logits_logprobs(picked, targets[mask], temperature=temperature, with_entropy=with_entropy)
            else:
                picked = response_states(self.hidden(sequences), sequences.prompt_lens, mask)
                weight, bias = self.head.weight, self.head.bias
                options: Any = {"temperature": temperature, "transform": self.transform, "with_entropy": with_entropy}
                logprobs, entropy = token_logprobs(picked, targets[mask], weight, bias, **options)
        return _spread(logprobs, mask), None if entropy is None else _spread(entropy, mask)

    @property
    def head(self) -> nn.Linear:
        """The output layer: states (N, D) to products (N, V)."""
        return self.model.get_output_embeddings()

    def logits(self, states: Tensor) -> Tensor:
        """Logits (N, V) of states (N, D) under autocast; not of a model without a transform."""
        assert self.transform is not None
        return self.transform(self.head(states))


class ScoreModel(_Role):
    """A causal trunk with a one-label head: a reward model (scores of whole texts) or a value model (values before each token).

    score = the head's output + `offset`, which Hugging Face heads, having no bias, keep as score_offset in config.json.
    """

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype = torch.float32):
        super().__init__(model, compute_dtype)
        self.head = score_head(model)
        with self.autocast():
            _check_score(model, self.head)
        self.offset = float(getattr(model.config, "score_offset", 0.0))

    def forward(self, sequences: Sequences, *, per_token: bool = False) -> Tensor:
        """Scores (B,) read at the last real token; with `per_token` values (B, T), values[:, t] = V(x, y_<t), 0 outside the mask."""
        with self.autocast():
            hidden = self.hidden(sequences)
        if per_token:
            mask = sequences.response_mask
            states = response_states(hidden, sequences.prompt_lens, mask)
            return _spread(self._score(states), mask)
        return self._score(last_states(hidden, sequences.lengths))

    def _score(self, states: Tensor) -> Tensor:
        return self.head(states.to(self.head.weight.dtype)).squeeze(-1) + self.offset

    def normalise(self, gain: float, bias: float) -> None:
        """From now on score = gain * score + bias (Ziegler 2019): the gain goes into the head's weight, the rest into the offset."""
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.mul_(gain)
        self.set_offset(gain * self.offset + bias)

    def set_offset(self, offset: float) -> None:
        self.offset = offset
        self.model.config.score_offset = offset


def score_head(model: PreTrainedModel) -> nn.Linear:
    """The one-label head of a sequence-classification model."""
    for name in ("score", "classifier", "qa_outputs"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            if head.out_features != 1:
                raise TercetError(
                    f"{model.config.name_or_path or 'the reward model'} has {head.out_features} labels, a reward model has one: "
                    "use it in ppo.rewards as {kind: classifier, model: ..., label: ...}"
                )
            return head
    raise TercetError(f"{type(model).__name__} has no linear head named score: it cannot serve as reward or value model")


def init_score_head(head: nn.Linear, generator: torch.Generator | None) -> None:
    """Weight from N(0, 1/(d+1)) (Stiennon 2020); zeros without a generator, so that a new value model starts at 0."""
    with torch.no_grad():
        if generator is None:
            head.weight.zero_()
        else:
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5)


def _packed_states(trunk: Any, ids: Tensor, lengths: Tensor) -> Tensor:
    """Last hidden states (B, L, D) of right-padded texts (B, L), computed end to end."""
    packing = Packing.of(lengths, ids.shape[1])
    return packing.unpack(packing.states(trunk, ids.flatten()[packing.tokens], use_cache=False))


@torch.no_grad()
def _is_indifferent_to_packing(trunk: Any) -> bool:
    """Whether texts that lie end to end get the states that each gets alone: not so where positions are counted or states carried
    from token to token by other means than attention."""
    if "position_ids" not in inspect.signature(trunk.forward).parameters:
        return False
    lengths = torch.tensor([5, 3], device=trunk.device)
    ids = torch.arange(10, device=trunk.device).view(2, 5) % embedding_rows(trunk)
    was_training = trunk.training
    trunk.eval()
    packed = _packed_states(trunk, ids, lengths)
    alone = [trunk(input_ids=row[None, :length], use_cache=False).last_hidden_state[0] for row, length in zip(ids, lengths)]
    trunk.train(was_training)
    tolerance = 0.03 if torch.is_autocast_enabled(trunk.device.type) else 1e-4  # a leak changes a state by about as much as it is
    return all(bool((packed[row, : len(own)] - own).abs().max() <= tolerance * own.abs().max()) for row, own in enumerate(alone))


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


@torch.no_grad()
def _logit_transform(model: PreTrainedModel) -> LogitTransform | None:
    """What the model makes of its output layer's products: found by putting numbers of our own in their place."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    wide = torch.float32 if model.device.type == "mps" else torch.float64
    # From so small that no cap is felt to so large that nothing else is.
    numbers = torch.tensor([1e-6, 0.0, -0.1, 1.0, -10.0, 1e2, -1e6], dtype=wide, device=model.device)
    seen: list[tuple[Tensor, Tensor]] = []

    def replaced(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        seen.append((inputs[0], numbers.repeat(-(-output.numel() // len(numbers)))[: output.numel()].view_as(output)))
        return seen[-1][1]

    probe = torch.arange(4, device=model.device)[None] % embedding_rows(model)
    was_training = model.training
    model.eval()  # a model object of the user's may have dropout
    states = model.base_model(input_ids=probe, use_cache=False).last_hidden_state
    handle = head.register_forward_hook(replaced)
    try:
        logits = model(input_ids=probe, use_cache=False).logits
    finally:
        handle.remove()
        model.train(was_training)
    if len(seen) != 1 or seen[0][0].shape != states.shape or logits.shape != seen[0][1].shape:
        return None
    inputs, products = seen[0]
    scale = float(logits.flatten()[0] / products.flatten()[0])
    if not scale > 0:
        return None
    highest = float(logits.abs().max()) / scale
    transform = LogitTransform(scale, highest if highest < 1e5 else None)
    states = states.to(inputs.dtype)  # some models bring them into the head's
    same_states = bool((inputs - states).abs().max() <= 1e-4 * states.abs().max())
    return transform if same_states and torch.allclose(transform(products), logits.to(products), rtol=1e-5, atol=1e-8) else None


@torch.no_grad()
def _check_score(model: PreTrainedModel, head: nn.Linear) -> None:
    """TercetError if the model's own score is not head(state at the last token): an encoder, or a head with more to it."""
    was_training = model.training
    model.eval()
    probe = torch.tensor([[i for i in range(5) if i != model.config.pad_token_id][:4]], device=model.device)
    expected = head(model.base_model(input_ids=probe, use_cache=False).last_hidden_state[:, -1])
    own = model(input_ids=probe, use_cache=False).logits
    model.train(was_training)
    # In half precision a GPU may multiply one state and four by kernels that add, and round, in another order.
    rtol, atol = (2e-2, 1e-3) if torch.is_autocast_enabled(model.device.type) else (1e-3, 1e-5)
    if own.shape != expected.shape or not torch.allclose(own, expected, rtol=rtol, atol=atol, equal_nan=True):
        raise TercetError(
            f"{model.config.name_or_path or 'the reward model'} ({type(model).__name__}) does not read its score at the last token: "
            "it cannot serve as reward or value model; use it in ppo.rewards as {kind: classifier, model: ...}"
        )

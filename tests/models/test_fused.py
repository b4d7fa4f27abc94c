"""RMSNorm and gated feed-forwards in few passes: transformers' numbers and gradients, and where a norm may round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_zoo import ARCHITECTURES, SHAPES, causal_lm, ragged
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from tercet.models.fused import _FusedGate, _FusedNorm, _Gate, _RMSNorm, fuse_gates, fuse_norms
from tercet.models.roles import Policy

DOUBLE = torch.float64


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def norm_of(kind: Any, width: int, **options: Any) -> Any:
    norm = kind(width, **options).double()
    norm.weight.data = numbers(width, seed=7).detach()
    return norm


def test_a_norm_has_transformers_numbers_and_gradients() -> None:
    norm, x, slope = norm_of(Qwen2RMSNorm, 6, eps=1e-3), numbers(2, 5, 6), numbers(2, 5, 6, seed=3).detach()
    found = []
    for compute in (norm, lambda x: _RMSNorm.apply(x, norm.weight, norm.variance_epsilon, x.dtype)):
        x.grad = norm.weight.grad = None
        given = compute(x)
        given.backward(slope)
        found.append((given.detach(), x.grad, norm.weight.grad))
    for ours, wanted in zip(found[1], found[0]):  # transformers computes in float32 whatever it is given
        assert torch.allclose(ours, wanted, rtol=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, 1e-3, DOUBLE), (x, norm.weight))


def test_a_gate_has_the_gradients_of_silu_times_up() -> None:
    gate, up = numbers(3, 4), numbers(3, 4, seed=1)
    assert torch.allclose(_Gate.apply(gate, up), gate * torch.sigmoid(gate) * up, rtol=1e-14)
    assert torch.autograd.gradcheck(_Gate.apply, (gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama_untied", "qwen3", "mistral"])
def test_a_model_keeps_its_numbers_and_gradients(architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences, found = ragged(SHAPES), []
    for swap in (False, True):
        with monkeypatch.context() as patch:
            if not swap:
                for name in ("fuse_norms", "fuse_gates"):
                    patch.setattr(f"tercet.models.roles.{name}", lambda trunk: None)
            policy = Policy(causal_lm(architecture), dtype)
        assert any(isinstance(module, _FusedNorm | _FusedGate) for module in policy.modules()) is swap
        logprobs = policy(sequences)[0]
        logprobs.sum().backward()
        found.append([logprobs.detach(), *(parameter.grad for parameter in policy.parameters())])
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    for ours, wanted in zip(found[1], found[0]):
        assert (ours - wanted).norm() <= tolerance * wanted.norm() + 1e-6


NORMS = {"llama_tied": 5, "llama_untied": 5, "qwen2": 5, "qwen3": 9, "granite": 5, "mistral": 5}
GATES = {*NORMS, "cohere"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_swapped(architecture: str) -> None:
    """Not Gemma's norms, which have 1 + weight, nor its gates of another activation."""
    policy = Policy(causal_lm(architecture))
    norms = {name: module for name, module in policy.named_modules() if isinstance(module, _FusedNorm)}
    assert len(norms) == NORMS.get(architecture, 0)
    inner = {name for name, norm in norms.items() if norm.feeds_products}
    assert inner == {name for name in norms if "layernorm" in name}, "not the last one, nor those of queries and keys"
    assert sum(isinstance(module, _FusedGate) for module in policy.modules()) == (2 if architecture in GATES else 0)


class OtherRMSNorm(LlamaRMSNorm):
    """As Gemma has it."""

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = super().forward(x)
        return normalised + normalised / self.weight


class OtherMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) + 1)
        return product


def test_modules_of_another_formula_are_left_alone() -> None:
    mlp, norm = OtherMLP(causal_lm("llama_tied").config), nn.Sequential(OtherRMSNorm(8))
    fuse_gates(mlp)
    fuse_norms(norm)
    assert type(mlp) is OtherMLP and type(norm[0]) is OtherRMSNorm


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        normalised: Tensor = super().forward(x * gate)
        return normalised


def test_what_cannot_be_asked_stays_as_it_is() -> None:
    """A norm that wants more than a tensor; and a trunk that takes no embeddings, whose norms do not round."""
    norms = nn.Sequential(GatedRMSNorm(8), LlamaRMSNorm(8))
    fuse_norms(norms)
    assert type(norms[0]) is GatedRMSNorm and isinstance(norms[1], _FusedNorm) and not norms[1].feeds_products
    assert not norms[1]._forward_hooks


class Trunk(nn.Module):
    """A norm whose output goes into a product and, if `also`, into the sum of the residual stream."""

    def __init__(self, also: bool) -> None:
        super().__init__()
        self.embedding, self.norm, self.linear, self.also = nn.Embedding(5, 8), LlamaRMSNorm(8), nn.Linear(8, 8), also

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, inputs_embeds: Tensor, use_cache: bool) -> Any:
        x = self.norm(inputs_embeds)
        output = self.linear(x) + x if self.also else self.linear(x)
        return type("Output", (), {"last_hidden_state": output})


@pytest.mark.parametrize("also", [False, True])
def test_a_norm_rounds_only_if_products_alone_take_what_it_gives(also: bool) -> None:
    trunk = Trunk(also)
    fuse_norms(trunk)
    assert trunk.norm.feeds_products is not also
    x = torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert trunk.norm(x).dtype is (torch.float32 if also else torch.bfloat16)
    assert trunk.norm(x).dtype is torch.float32


def test_a_gated_feed_forward_keeps_one_tensor_less() -> None:
    config = causal_lm("llama_tied").config
    kept: list[int] = []
    for swap in (False, True):
        mlp = LlamaMLP(config)
        if swap:
            fuse_gates(mlp)
        sizes: dict[int, int] = {}
        own = {parameter.data_ptr() for parameter in mlp.parameters()}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes, own: set[int] = own) -> Tensor:
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = mlp(torch.randn(1, 10, 32))
        assert output.requires_grad
        kept.append(sum(sizes.values()))
    inner = 10 * config.intermediate_size
    assert kept == [10 * 32 + 4 * inner, 10 * 32 + 3 * inner]

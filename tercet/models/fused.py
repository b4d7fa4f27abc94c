"""RMSNorm and gated feed-forwards, as most models after GPT-2 have them, each in few passes over memory.

transformers writes both as operations on whole tensors: a norm is six of them forward and some fourteen backward, and every linear layer
behind it rounds its output for itself. A swap is made where a module gives the same numbers as the formula here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation

from tercet.algo.products import product_dtype
from tercet.models.precision import linear_layers


def fuse_norms(trunk: Any) -> None:
    """Let a trunk's RMSNorms compute by `_RMSNorm`, and round at once where linear layers alone take what they give. (Trees with adapters
    are copies of a trunk that was looked at without them.)"""
    norms = [module for module in trunk.modules() if not isinstance(module, _FusedNorm) and _is_rms_norm(module)]
    for norm in norms:
        _swap(norm, _FusedNorm)
    for norm in _feeding_products(trunk, norms) if norms else ():
        norm.feeds_products = True


def fuse_gates(trunk: nn.Module) -> None:
    """Let a trunk's feed-forwards of the kind down(silu(gate(x)) * up(x)) keep one tensor less for the backward pass."""
    for module in trunk.modules():
        if _is_gated(module):
            _swap(module, _FusedGate)


def _swap(module: Any, fused: Any) -> None:
    """Give the module's class another forward."""
    kind: Any = type(module)
    if not issubclass(kind, fused):
        module.__class__ = _with(fused, kind)


@functools.cache
def _with(fused: Any, kind: Any) -> Any:
    return type(kind.__name__, (fused, kind), {})


class _FusedNorm(nn.Module):
    weight: Tensor
    variance_epsilon: float
    feeds_products = False

    def forward(self, x: Tensor) -> Tensor:
        if not x.dtype is self.weight.dtype is torch.float32:  # in float64 transformers' own computes in float32 all the same
            unlike: Tensor = super().forward(x)
            return unlike
        dtype = product_dtype(self.weight) if self.feeds_products else x.dtype
        if torch.is_grad_enabled():
            normalised: Tensor = _RMSNorm.apply(x, self.weight, self.variance_epsilon, dtype)
            return normalised
        return _normalised(x, self.weight, self.variance_epsilon)[0].to(dtype)


def _normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension, and the factor of each row."""
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight), scale


class _RMSNorm(torch.autograd.Function):
    """`_normalised`, in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        normalised, scale = _normalised(x, weight, eps)
        ctx.save_for_backward(x, scale, weight)
        return normalised.to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, scale, weight = ctx.saved_tensors
        slope, unit = gradients[0].to(x.dtype), x * scale
        product = slope * unit
        rows = product.reshape(-1, x.shape[-1])
        along = torch.mv(rows, weight).div_(-x.shape[-1]).view(scale.shape)
        for_x = (slope * weight).addcmul_(unit, along).mul_(scale)
        return for_x, rows.sum(0) if ctx.needs_input_grad[1] else None, None, None


class _FusedGate(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        gated = _Gate.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate, inplace=True).mul_(up)
        product: Tensor = self.down_proj(gated)
        return product


class _Gate(torch.autograd.Function):
    """silu(gate) * up"""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        for_gate = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return for_gate, F.silu(gate).mul_(gradients[0])


@torch.no_grad()
def _is_rms_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon") or weight is None:
        return False
    probe = torch.linspace(-1.0, 2.0, 3 * weight.numel(), dtype=weight.dtype, device=weight.device).view(3, -1)
    unit = probe * (probe.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
    with contextlib.suppress(TypeError, RuntimeError):  # one that wants more than a tensor, or other sizes
        return torch.allclose(module(probe), weight * unit, rtol=1e-5)
    return False


@torch.no_grad()
def _is_gated(module: Any) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, nn.Linear) for part in parts) or type(getattr(module, "act_fn", None)) not in _SILU:
        return False
    gate, up, down = (part for part in parts if part is not None)
    probe = torch.linspace(-1.0, 2.0, 2 * gate.in_features, dtype=gate.weight.dtype, device=gate.weight.device).view(2, -1)
    return torch.equal(module(probe), down(F.silu(gate(probe)) * up(probe)))


_SILU = (nn.SiLU, SiLUActivation)


def _feeding_products(trunk: Any, norms: list[Any]) -> Iterator[Any]:
    """The norms whose output goes into linear layers and nowhere else: as seen in the graph of a few tokens."""
    given: dict[int, tuple[Any, Tensor]] = {}
    taken: dict[int, int] = {}

    def give(module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        given[id(output)] = module, output

    def take(module: Any, inputs: tuple[Any, ...]) -> None:
        key = id(inputs[0])
        if key in given:  # and so alive: nothing else has its id
            taken[key] = taken.get(key, 0) + 1

    handles = [norm.register_forward_hook(give) for norm in norms]
    handles += [linear.register_forward_pre_hook(take) for linear in linear_layers(trunk)]
    try:
        edges = _edges(_few_tokens(trunk, norms[0].weight))
    except Exception:  # a trunk of anybody's, that cannot be asked in this way
        return
    finally:
        for handle in handles:
            handle.remove()
    for key, (norm, output) in given.items():
        if taken.get(key, 0) == edges.get(output.grad_fn, 0) > 0:
            yield norm


def _few_tokens(trunk: Any, like: Tensor) -> Tensor:
    """The last states of three made-up embeddings, with their graph."""
    width = trunk.get_input_embeddings().weight.shape[1]
    probe = torch.linspace(-1.0, 1.0, 3 * width, device=like.device, dtype=like.dtype).view(1, 3, width)
    with torch.enable_grad():
        states: Tensor = trunk(inputs_embeds=probe.requires_grad_(), use_cache=False).last_hidden_state
    return states


def _edges(output: Tensor) -> dict[Any, int]:
    """How many nodes of the graph take what each node of it gives."""
    edges: dict[Any, int] = {}
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            edges[following] = edges.get(following, 0) + 1
            waiting.append(following)
    return edges

"""The same mathematics by faster kernels: swaps made when a model is loaded. Results differ by rounding only."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from tercet.models.attention import active_packing


def fuse_activations(model: PreTrainedModel) -> None:
    """GPT-2's gelu_new is eight element-wise passes in transformers; torch has the same formula as one kernel."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def use_fast_products(model: nn.Module) -> None:
    """Let the linear layers of a model that computes in bfloat16 on a CPU multiply in the shapes that oneDNN is fast at."""
    for module in model.modules():
        if type(module) in _FAST:
            module.__class__ = _FAST[type(module)]


class _FastLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype is not torch.bfloat16:
            return super().forward(x)
        product: Tensor = _Product.apply(x.bfloat16(), self.weight, self.bias)
        return product


class _FastConv1D(Conv1D):
    """GPT-2's linear layer, whose weight is (in, out). Its own product is an addition onto the bias, 1.3 times as long as a product
    with a bias."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype is not torch.bfloat16:
            forwarded: Tensor = super().forward(x)
            return forwarded
        product: Tensor = _Product.apply(x.bfloat16(), self.weight.t(), self.bias)
        return product


_FAST = {nn.Linear: _FastLinear, Conv1D: _FastConv1D}


class _Product(torch.autograd.Function):
    """x (..., i) @ weight (o, i)^T + bias (o,), in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        product = _by_rows(rows, weight, None if bias is None else bias.bfloat16())
        return product.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, len(weight))
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = _by_rows(gradient, weight.t(), None).view(*gradients[0].shape[:-1], rows.shape[1])
        if ctx.needs_input_grad[1]:  # in the memory layout that the weight has
            contiguous = weight.is_contiguous()
            for_weight = _transposed_product(gradient, rows) if contiguous else _transposed_product(rows, gradient).t()
        if ctx.needs_input_grad[2]:
            for_bias = gradient.sum(0, dtype=ctx.bias_dtype)
        return for_x, for_weight, for_bias


def _by_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight^T + bias, some rows at a time where oneDNN gives both halves of the work to one thread: 768 to 1,280 rows to some 768
    columns (1,088 x 3,072 x 768 took 4.6 ms on two threads, in parts 3.1; elsewhere parts took up to three times as long)."""
    lopsided = 640 < len(x) <= 1280 and len(weight) <= 1024 and weight.numel() >= 2**19
    if not lopsided or torch.get_num_threads() == 1:
        return F.linear(x, weight, bias)
    return torch.cat([F.linear(part, weight, bias) for part in x.split(512)])


def _transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """left^T @ right. A large and wide result is faster from a copy of left^T: 768 x 1,088 x 3,072 took 2.5 instead of 3.3 ms."""
    width, height = right.shape[1], left.shape[1]
    transposed = left.t()
    return (transposed.contiguous() if height < width and height * width >= 2**20 else transposed) @ right


def recompute_activations(model: nn.Module) -> None:
    """Let each layer keep its inputs alone for the backward pass and compute the rest anew (Chen 2016). Numbers stay the same.

    Not transformers' own switch: that one asks for training mode, and PPO's models are never in it.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = functools.partial(_recomputed, layer.forward)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    packing = active_packing()  # still in force when the backward pass comes here again

    def again(*args: Any, **kwargs: Any) -> Any:
        with packing.active() if packing is not None else contextlib.nullcontext():
            return forward(*args, **kwargs)

    return checkpoint(again, *args, use_reentrant=False, **kwargs)


@contextlib.contextmanager
def packed_weights(model: nn.Module, rows: int) -> Iterator[None]:
    """Let linear layers that are in bfloat16 on a CPU multiply about `rows` rows at a time from a copy of their weights in oneDNN's
    own layout. For inference alone: the copy neither gives gradients nor follows changes.

    oneDNN brings a weight into that layout at every product, which takes as long as multiplying a few rows: a decoding step of
    GPT-2 with 16 rows took 32 instead of 39 ms.
    """
    chosen: list[Any] = []
    if torch.backends.mkldnn.is_available() and not torch.is_grad_enabled():
        kinds = {*_FAST, *_FAST.values()}
        chosen = [module for module in model.modules() if type(module) in kinds and _is_half_on_cpu(module.weight)]
    for module in chosen:
        weight = module.weight if isinstance(module, nn.Linear) else module.weight.t()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        bias = None if module.bias is None else module.bias.detach().bfloat16()
        module.forward = functools.partial(_packed_product, packed, bias)
    try:
        yield
    finally:
        for module in chosen:
            del module.forward  # the class's own again


def _packed_product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), weight, bias, "none", [], "")
    return product


def _is_half_on_cpu(weight: Any) -> bool:
    return isinstance(weight, Tensor) and weight.dtype is torch.bfloat16 and weight.device.type == "cpu"

"""The same mathematics by faster kernels: swaps made when a model is loaded. Results differ by rounding only."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.pytorch_utils import Conv1D

from tercet.algo.products import (
    contiguous,
    head_centre,
    head_rows,
    linear_product,
    onednn_activates,
    onednn_computes,
    onednn_multiplies,
    packing_pays,
    product_dtype,
    transposed_product,
)
from tercet.models.packing import active_packing


def fuse_activations(model: PreTrainedModel) -> None:
    """GPT-2's gelu_new is eight element-wise passes in transformers; torch and oneDNN have the same formula as one kernel."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, _TanhGELU(approximate="tanh"))


class _TanhGELU(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        if x.numel() < 2**19 or not onednn_activates(x):
            return super().forward(x)
        activated: Tensor = _OneDNNGELU.apply(x)
        return activated


class _OneDNNGELU(torch.autograd.Function):
    """The tanh approximation of GELU by oneDNN, which torch reaches as what follows a convolution, here of each number with a one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        width = x.shape[-1]
        pixels = x.view(1, 1, -1, width).permute(0, 3, 1, 2)  # rows as pixels, columns as channels
        ones = torch.ones(width, 1, 1, 1, dtype=x.dtype)
        activated = torch.ops.mkldnn._convolution_pointwise(pixels, ones, None, [0, 0], [1, 1], [1, 1], width, "gelu", [], "tanh")
        return activated.permute(0, 2, 3, 1).reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(gradients[0], x, approximate="tanh")


def use_fast_products(model: nn.Module) -> None:
    """Let the linear layers of a model multiply on a CPU by oneDNN where that is faster, and in the shapes that it is fast at; and under
    bfloat16 anywhere without rounded weights in memory from the forward pass to the backward pass, as autocast has them."""
    for module in model.modules():
        if type(module) in _FAST:
            module.__class__ = _FAST[type(module)]


class _FastLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x = x.to(product_dtype(self.weight))
        if not _multiplies(x, self.out_features):
            return super().forward(x)
        return _product(x, self.weight, self.bias)


class _FastConv1D(Conv1D):
    """GPT-2's linear layer, whose weight is (in, out). Its own product is an addition onto the bias, 1.3 times as long as a product
    with a bias."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(product_dtype(self.weight))
        if not _multiplies(x, self.nf):
            forwarded: Tensor = super().forward(x)
            return forwarded
        return _product(x, self.weight.t(), self.bias)


def _multiplies(x: Tensor, width: int) -> bool:
    # Of a processor without bfloat16, too: autocast would keep rounded weights until the backward pass.
    return x.dtype is torch.bfloat16 or onednn_multiplies(x, width)


_FAST = {nn.Linear: _FastLinear, Conv1D: _FastConv1D}


def is_linear(module: nn.Module) -> bool:
    """Whether the module is what its class says: routers among nn.Linear's children return more than a product."""
    if type(module) in (*_FAST, *_FAST.values()):
        return True
    if not isinstance(module, nn.Linear):
        return False
    found = module(module.weight.new_zeros(1, module.in_features))
    return isinstance(found, Tensor) and found.shape == (1, module.out_features)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return rows.view(*x.shape[:-1], len(weight))  # here: a view made inside could not be added to in place


class _Product(torch.autograd.Function):
    """rows (n, i) @ weight (o, i)^T + bias (o,), in the precision of rows. A float32 weight is rounded for a bfloat16 forward and again for
    the backward product, lest half a model more be in memory between the two; autograd makes its gradient float32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return linear_product(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (rows, weight), (gradient,) = ctx.saved_tensors, gradients
        for_rows = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_rows = linear_product(gradient, weight.to(rows.dtype).t(), None)
        if ctx.needs_input_grad[1]:  # in the memory layout that the weight has
            in_rows = weight.is_contiguous()
            for_weight = transposed_product(gradient, rows) if in_rows else transposed_product(rows, gradient).t()
        if ctx.needs_input_grad[2]:
            # In the gradient's own precision, summed in float32: to ask for float32 would copy all of it first.
            for_bias = gradient.sum(0)
        return for_rows, for_weight, for_bias


def use_fast_adapters(model: nn.Module) -> None:
    """Let peft's LoRA layers (no dropout, an adapter named "default") be part of the frozen layer's product. peft's own forward casts
    the inputs to float32, goes three times over the outputs, and in bfloat16 loses most of a small adapter."""
    for layer in model.modules():
        if _has_adapter(layer):
            layer.forward = functools.partial(_adapted, layer)


def _has_adapter(layer: nn.Module) -> bool:
    return hasattr(layer, "lora_A") and hasattr(layer, "base_layer")


def _adapted(layer: Any, x: Tensor) -> Tensor:
    """W x + b + scale * B A x"""
    base, down, up = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = base.weight if isinstance(base, nn.Linear) else base.weight.t()
    rows = x.to(product_dtype(weight)).reshape(-1, x.shape[-1])
    product: Tensor = _AdaptedProduct.apply(rows, weight, base.bias, down, up, layer.scaling["default"])
    return product.view(*x.shape[:-1], len(weight))


class _AdaptedProduct(torch.autograd.Function):
    """rows (n, i) @ weight (o, i)^T + bias (o,) + scale * (rows @ down (r, i)^T) @ up (o, r)^T, rounded once, with gradients of rows, down
    and up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
        ctx.scale, dtype = scale, rows.dtype
        weight, low = weight.to(dtype), F.linear(rows, down.to(dtype))
        ctx.save_for_backward(rows, low, weight, down, up)
        return linear_product(rows, weight, None if bias is None else bias.to(dtype), onto=F.linear(low * scale, up.to(dtype)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (rows, low, weight, down, up), (gradient,) = ctx.saved_tensors, gradients
        for_low = (gradient @ up.to(low.dtype)).mul_(ctx.scale)
        for_rows = None
        if ctx.needs_input_grad[0]:
            for_rows = linear_product(gradient, weight.t(), None, onto=for_low @ down.to(low.dtype))
        for_up = (gradient.t() @ low).mul_(ctx.scale).to(up.dtype)
        return for_rows, None, None, (for_low.t() @ rows).to(down.dtype), for_up, None


def recompute_activations(model: nn.Module) -> bool:
    """Let each layer keep its inputs alone for the backward pass and compute the rest anew (Chen 2016). Numbers stay the same. False if
    the model has no layers that this is known of.

    Not transformers' own switch: that one asks for training mode, and PPO's models are never in it.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer.forward)
    return bool(layers)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    packing = active_packing()  # still in force when the backward pass comes here again

    def again(*args: Any, **kwargs: Any) -> Any:
        with packing.active() if packing is not None else contextlib.nullcontext():
            return forward(*args, **kwargs)

    return checkpoint(again, *args, use_reentrant=False, **kwargs)


MOST_PACKED = 2**30  # bytes of copies of weights that are in bfloat16 already


@contextlib.contextmanager
def packed_weights(model: nn.Module, rows: int, dtype: torch.dtype, head: nn.Module | None = None) -> Iterator[None]:
    """Let the linear layers of a model that computes in `dtype` multiply about `rows` rows at a time from a copy of their weights:
    rounded to bfloat16 where it computes so, on a CPU in oneDNN's own layout. For inference alone: the copy neither gives gradients nor
    follows changes. head: the output layer where only a softmax sees its logits, computed without what its rows have in common
    (head_centre). Weights that a frozen model holds in bfloat16 already are copied only if all of them take at most MOST_PACKED bytes.

    oneDNN brings a weight into that layout at every product, which takes as long as multiplying a few rows: a decoding step of
    GPT-2 with 16 rows took 32 instead of 39 ms.
    """
    layers: list[Any] = []
    adapters: dict[Any, Any] = {module.base_layer: module for module in model.modules() if _has_adapter(module)}
    parts = {part["default"] for adapter in adapters.values() for part in (adapter.lora_A, adapter.lora_B)}
    if not torch.is_grad_enabled():
        kinds = (*_FAST, *_FAST.values())
        linear: list[Any] = [module for module in model.modules() if type(module) in kinds and module not in parts]
        frozen = {layer for layer in linear if layer.weight.dtype is torch.bfloat16 and layer is not head}
        if sum(layer.weight.nbytes for layer in frozen) > MOST_PACKED:
            linear = [layer for layer in linear if layer not in frozen]
        layers = [layer for layer in linear if dtype is torch.bfloat16 or packing_pays(layer.weight, rows)]
        # Where oneDNN does not compute, an adapter's columns would be worth no copy of the weight beside them.
        layers = [one for one in layers if one not in adapters or onednn_computes(one.weight.new_empty(0, dtype=dtype))]
    activated = {layer: activation for layer, activation in _activated(model, dtype) if layer in layers}
    forwards: dict[Any, Any] = {activation: _unchanged for activation in activated.values()}
    for layer in layers:
        adapter = adapters.get(layer)
        forwards[adapter or layer] = _packed(layer, adapter, rows, dtype, centred=layer is head, gelu=layer in activated)
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            del module.forward  # the class's own again
            if forward is not None:
                module.forward = forward


def _activated(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The layers of GPT-2 whose products an activation follows that oneDNN applies while it writes them, and that activation."""
    for module in model.modules():
        if type(module) is not GPT2MLP or type(module.act) is not _TanhGELU:
            continue
        layer = getattr(module.c_fc, "base_layer", module.c_fc)
        if onednn_activates(layer.weight.new_empty(0, dtype=dtype)):
            yield layer, module.act


def _unchanged(x: Tensor) -> Tensor:
    return x


_INPUTS = 32  # columns of a weight that oneDNN is fast at a multiple of


def _packed(
    layer: Any, adapter: Any | None, rows: int, dtype: torch.dtype, *, centred: bool, gelu: bool
) -> Callable[[Tensor], Tensor]:
    """What computes the layer's product from a rounded copy of its weight. Beside it stand the columns that an adapter multiplies what
    it has projected down by: then W x + scale * B A x is one product, of x and A x."""
    weight = (layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()).detach()
    weight = head_rows(weight, dtype, head_centre(weight, dtype) if centred else None)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    if adapter is None:
        return _from_copy(weight, bias, rows, gelu=gelu)
    down, up = (part["default"].weight.detach() for part in (adapter.lora_A, adapter.lora_B))
    spare = -len(down) % _INPUTS
    up = F.pad(up * adapter.scaling["default"], (0, spare)).to(dtype)
    whole = _from_copy(torch.cat([contiguous(weight), up], 1), bias, rows, gelu=gelu)
    project = _from_copy(F.pad(down, (0, 0, 0, spare)).to(dtype), None, rows)

    def adapted(x: Tensor) -> Tensor:
        x = x.to(dtype)
        return whole(torch.cat([x, project(x)], -1))

    return adapted


def _from_copy(weight: Tensor, bias: Tensor | None, rows: int, *, gelu: bool = False) -> Callable[[Tensor], Tensor]:
    """What multiplies by the weight, in its precision, from a copy in oneDNN's own layout where it has one."""
    if not onednn_computes(weight):
        return functools.partial(_rounded_product, weight, bias)
    after: tuple[str, list[float], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")
    packed = torch.ops.mkldnn._reorder_linear_weight(contiguous(weight), rows)
    return functools.partial(_packed_product, packed, bias, weight.dtype, after)


def _rounded_product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return F.linear(x.to(weight.dtype), weight, bias)


def _packed_product(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, after: tuple[str, list[float], str], x: Tensor
) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, *after)
    return product

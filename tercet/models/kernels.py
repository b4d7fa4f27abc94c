"""The same mathematics by faster kernels: swaps made when a model is loaded. Results differ by rounding only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

_FLOAT32_ATTENTION = "tercet_sdpa_float32"


def fuse_activations(model: PreTrainedModel) -> None:
    """GPT-2's gelu_new is eight element-wise passes in transformers; torch has the same formula as one kernel."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def split_bias(model: PreTrainedModel) -> None:
    """Let GPT-2's linear layers multiply first and add the bias in place: on a CPU in bfloat16, oneDNN's product onto a bias took
    1.5 times as long (2.5 against 1.7 ms for 1,264 x 768 x 2,304)."""
    for module in model.modules():
        if type(module) is Conv1D:
            module.__class__ = _SplitConv1D


class _SplitConv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        product = x.reshape(-1, x.shape[-1]) @ self.weight
        return product.add_(self.bias.to(product.dtype)).view(*x.shape[:-1], self.nf)


def use_float32_attention(model: PreTrainedModel) -> None:
    """Let a CPU compute attention in float32 under bfloat16 autocast.

    torch's bfloat16 attention backward on the CPU took nine times as long as the float32 one on 40-token texts (540 against 60 ms
    of a 6-million-parameter model's step); the products around it stay in bfloat16. So does decoding, which reads all keys and
    values for one query a row and takes no gradient: half the bytes.
    """
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_FLOAT32_ATTENTION)


def _float32_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if query.shape[2] == 1 and not torch.is_grad_enabled():
        return sdpa_attention_forward(module, query, key.to(query.dtype), value.to(query.dtype), attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast(query.device.type, enabled=False):
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)
    return output.to(query.dtype), None


AttentionInterface.register(_FLOAT32_ATTENTION, _float32_attention)
AttentionMaskInterface.register(_FLOAT32_ATTENTION, sdpa_mask)

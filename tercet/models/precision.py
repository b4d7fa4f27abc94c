"""Which weights are rounded to bfloat16 where products are computed in it: those that products take, and embeddings.

A model that learns keeps them in float32 and rounds them whenever they are used; of a frozen one the rounded ones are all there is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def linear_layers(trunk: nn.Module) -> list[Any]:
    """The layers of the trunk that are matrix products."""
    return [module for module in trunk.modules() if isinstance(module, nn.Linear | Conv1D)]


def round_lookups(model: PreTrainedModel) -> None:
    """Let the input embedding give what one in bfloat16 would, in float32: the sums of the residual stream stay in that."""
    embedding = model.get_input_embeddings()
    if _is_plain(embedding) and _rounded not in embedding._forward_hooks.values():  # adapters' trees are copies of one another
        embedding.register_forward_hook(_rounded)


def rounded_parameters(model: PreTrainedModel) -> set[int]:
    """The ids of the parameters that are rounded."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [*linear_layers(model.base_model), *([] if head is None else [head]), embedding]
    wide = set() if _is_plain(embedding) else {id(parameter) for parameter in embedding.parameters()}
    return {id(parameter) for module in modules for parameter in module.parameters()} - wide


def round_weights(model: PreTrainedModel) -> None:
    """Hold in bfloat16 what is rounded anyway, and the rest in float32."""
    rounded = rounded_parameters(model)
    for parameter in model.parameters():
        # The others are copied, lest one small tensor keeps the checkpoint's whole file in memory.
        kept = parameter.data.bfloat16() if id(parameter) in rounded else parameter.data.to(torch.float32, copy=True)
        parameter.data = kept


def _is_plain(embedding: nn.Module) -> bool:
    """Not one that scales what it looks up (Gemma's): it would do so in half precision."""
    return type(embedding) is nn.Embedding


def _rounded(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.bfloat16().float()

"""Attention of texts that lie end to end (packing.py) and of one query a row (decoding.py), as a kernel of transformers' own interface.

Results differ from the padded layout's by rounding only.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tercet.algo.products import onednn_computes
from tercet.models.decoding import attend
from tercet.models.packing import Apart, Packing, Together, active_packing

_NAME = "tercet"
SHORT = 256  # up to here the weights of all pairs of tokens are small enough to keep in float32
_UNUSUAL = ("softcap", "s_aux", "position_bias")  # what some models add to attention


def use_packed_attention(model: PreTrainedModel) -> bool:
    """Let the model's attention take packed texts. False if it does not go through transformers' interface."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_NAME)
    return model.config._attn_implementation == _NAME


def attention_window(model: PreTrainedModel) -> int | None:
    """Texts longer than this need masks that packing does not know: sliding windows and chunks."""
    config = model.config.get_text_config()
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((window for window in found if window), default=None)


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What transformers calls: query (B, h, L, d), key and value (B, heads, L, d) -> (B, L, h, d)."""
    packing = active_packing()
    if packing is None:
        return _in_float32(module, query, key, value, attention_mask, **kwargs)
    query, key, value = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))
    short = keeps_weights(packing.groups[0].length, _mixing_dtype(value))
    if query.device.type == "cpu" and short and not _is_unusual(kwargs):
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        mixed: Tensor = _ShortTexts.apply(query, key, value, packing, scale)
        return mixed[None], None
    apart = [Apart.apply(x, packing) for x in (query, key, value)]
    outputs = []
    for group in packing.groups:
        q, k, v = (group.of(places, x.shape[1]) for places, x in zip(apart, (query, key, value)))
        output, _ = _in_float32(module, q, k, v, None, **kwargs)
        outputs.append(output.transpose(1, 2).flatten(0, 2))
    mixed = Together.apply(torch.cat(outputs), packing, query.shape[1])
    return mixed[None], None


def keeps_weights(length: int, dtype: torch.dtype) -> bool:
    """Whether the weights of all pairs of tokens are kept for the backward pass, in `dtype`, of texts as long as this. 4 texts of 430
    tokens of GPT-2 in bfloat16: 0.93 of the time of torch's fused kernel, which computes in float32."""
    return length <= SHORT * (2 if dtype is torch.bfloat16 else 1)


def _in_float32(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' own attention; of bfloat16 on a CPU in float32, because torch's backward pass there took nine times as long as
    the float32 one (540 against 60 ms of a 6-million-parameter model's step). Of one query a row, as decoding has it, by ours."""
    dtype = _kernel_dtype(query)
    if query.device.type == "cpu" and query.shape[2] == 1 and not torch.is_grad_enabled():
        by_head = attention_mask is not None and attention_mask.shape[1] > 1
        if query.dtype is torch.bfloat16 and _has_tiles():
            dtype = torch.bfloat16
        elif dtype is torch.float32 and not by_head and not _is_unusual(kwargs):
            scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            with torch.autocast("cpu", enabled=False):
                return attend(query, key.float(), value, attention_mask, scale).to(query.dtype), None
    return _sdpa(dtype, module, query, key, value, attention_mask, **kwargs), None


def cached_keys_dtype(model: PreTrainedModel, states: Tensor) -> torch.dtype:
    """What a cache should hold the keys `states` in: what decoding computes in, lest each step makes them anew."""
    half = states.device.type == "cpu" and states.dtype is torch.bfloat16
    if model.config._attn_implementation != _NAME or (half and _has_tiles()):
        return states.dtype
    return _kernel_dtype(states)


def _kernel_dtype(x: Tensor) -> torch.dtype:
    """What fused attention computes in: float32 or wider on a CPU, autocast's precision elsewhere. (Rotated queries and keys are float32
    under autocast, too: rotary tables are as wide as hidden states.)"""
    kind = x.device.type
    if kind == "cpu":
        return torch.promote_types(x.dtype, torch.float32)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _is_unusual(kwargs: dict[str, Any]) -> bool:
    """Whether attention is asked for more than softmax(scale * Q K^T + mask) V."""
    return kwargs.get("dropout", 0.0) > 0 or any(kwargs.get(name) is not None for name in _UNUSUAL)


def _sdpa(
    dtype: torch.dtype,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Tensor:
    """transformers' own attention, computed in `dtype`."""
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        output, _ = sdpa_attention_forward(module, query.to(dtype), key.to(dtype), value.to(dtype), attention_mask, **kwargs)
    return output.to(query.dtype)


@functools.cache
def _has_tiles() -> bool:
    """Whether the processor has AMX, with which torch's fused kernel in bfloat16 is fast at single queries."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


class _ShortTexts(torch.autograd.Function):
    """softmax(scale * Q K^T, causal) V of each text, query (N, h, d), key and value (N, heads, d).

    As three products whose weights are kept, not block by block: for 16 texts of 79 tokens in float32 forward and backward took 6.4
    ms where torch's fused kernel takes 11.3. Q K^T is computed in float32 or wider, the weights are rounded to the values' precision
    (_mixing_dtype) before they mix values, as in flash attention: of a model of 6 million parameters in bfloat16 the log-probabilities
    are as near to float64's as with all of it in float32 (0.0137 nats), while Q K^T in bfloat16 would make it 0.0146.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
        ctx.packing, ctx.scale = packing, scale
        (h, heads), dtype = (query.shape[1], key.shape[1]), _mixing_dtype(value)
        wide = torch.promote_types(dtype, torch.float32)
        apart = [packing.by_head(x).to(kind) for x, kind in zip((query, key, value), (wide, wide, dtype))]
        mixed = value.new_empty(len(apart[0]), value.shape[2], dtype=dtype)
        kept = []
        with torch.autocast("cpu", enabled=False):
            for q, k, v, into in zip(*(_by_key(packing, x, heads) for x in (*apart, mixed))):
                ahead = _causal(k.shape[1], h // heads, wide)
                weights = torch.baddbmm(ahead, q, k.transpose(1, 2), alpha=scale).softmax(-1).to(dtype)
                torch.bmm(weights, v, out=into)
                kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        return packing.together(mixed, h).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        packing: Packing = ctx.packing
        saved = ctx.saved_tensors  # asked for once only, for the sake of activation checkpointing
        inputs, kept = saved[:3], saved[3:]
        counts, dtype = [x.shape[1] for x in inputs], kept[0].dtype
        h, heads, _ = counts
        apart = [packing.by_head(x).to(dtype) for x in (*inputs, gradients[0])]
        packing.clear_pads(apart[3], h)
        found = [apart[0].new_empty(len(packing.places) * x.shape[1], x.shape[2]) for x in inputs]
        groups = zip(*(_by_key(packing, x, heads) for x in (*apart, *found)))
        for weights, (q, k, v, slope, for_q, for_k, for_v) in zip(kept, groups):
            torch.bmm(weights.transpose(1, 2), slope, out=for_v)
            # Of numbers in bfloat16 it computes in float32, and rounds once.
            scores = torch._softmax_backward_data(torch.bmm(slope, v.transpose(1, 2)), weights, -1, dtype)
            torch.baddbmm(for_q, scores, k, beta=0, alpha=ctx.scale, out=for_q)
            torch.baddbmm(for_k, scores.transpose(1, 2), q, beta=0, alpha=ctx.scale, out=for_k)
        slopes = (packing.together(places, count).to(x.dtype) for places, count, x in zip(found, counts, inputs))
        return *slopes, None, None


def _by_key(packing: Packing, places: Tensor, heads: int) -> list[Tensor]:
    """Each group's part of the places by head (P * h, d), as (rows * heads, (h / heads) * L, d): the queries of a key one below the
    other."""
    each = len(places) // len(packing.places)
    parts = places.split([group.rows * group.length * each for group in packing.groups])
    return [part.view(group.rows * heads, -1, places.shape[1]) for part, group in zip(parts, packing.groups)]


def _mixing_dtype(value: Tensor) -> torch.dtype:
    """What the weights that mix values are held and multiplied in: bfloat16 where values are and oneDNN has it, or float32 or wider."""
    half = value.dtype is torch.bfloat16 and onednn_computes(value)
    return value.dtype if half else torch.promote_types(value.dtype, torch.float32)


@functools.lru_cache(maxsize=32)
def _causal(length: int, queries: int, dtype: torch.dtype) -> Tensor:
    """What forbids to look ahead, for `queries` queries of each key: (queries * L, L) of 0 and -inf."""
    with torch.inference_mode(False):  # it is kept, for training too
        return torch.full((length, length), -torch.inf, dtype=dtype).triu_(1).repeat(queries, 1)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    mask: Tensor | None = None if active_packing() is not None else sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)

"""Attention without pads: texts laid end to end for all that looks at one token at a time, and apart where tokens see each other.

Results differ from the padded layout's by rounding only.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tercet.algo.products import onednn_computes
from tercet.models.decoding import attend

_NAME = "tercet"
_SIMILAR = 0.75  # texts of a group are at least this share of its longest
SHORT = 256  # up to here the weights of all pairs of tokens are small enough to keep in float32
_ROUND = 32  # tokens of a batch are a multiple of this: for each new shape oneDNN compiles new code, and keeps it
_LENGTHS = 8  # of groups are multiples of this: of others oneDNN keeps half a megabyte each, of these a hundredth of that
_UNUSUAL = ("softcap", "s_aux", "position_bias")  # what some models add to attention


@dataclass(frozen=True)
class _Group:
    """Texts of similar length, padded to the longest of them or a little more: `rows` x `length` of the padded places, from `start`."""

    start: int
    rows: int
    length: int

    def of(self, places: Tensor) -> Tensor:
        """This group's part of (P, h, d) as (rows, L, h, d)."""
        return places[self.start : self.start + self.rows * self.length].view(self.rows, self.length, *places.shape[1:])

    def by_head(self, places: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """The same as (rows * heads, (h / heads) * L, d) in `dtype`: the h / heads queries of a key one below the other."""
        picked = self.of(places).unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)
        copied = torch.empty(picked.shape, dtype=dtype, device=places.device).copy_(picked)
        return copied.view(self.rows * heads, -1, places.shape[-1])

    def put(self, x: Tensor, heads: int, places: Tensor) -> None:
        """Write what `by_head` gives back to its places."""
        into = self.of(places).unflatten(2, (heads, -1))
        into.copy_(x.view(self.rows, heads, -1, self.length, x.shape[-1]).permute(0, 3, 1, 2, 4))


@dataclass(frozen=True)
class Packing:
    """How texts of a right-padded batch (B, L) lie end to end, N tokens with `spare` ones at the end that belong to no text.

    For attention the texts stand in P places, in groups of similar length with pads between them.
    """

    shape: tuple[int, int]
    tokens: Tensor  # (N - spare,) the places in B * L of the tokens, text after text
    positions: Tensor  # (N,) each token's place in its own text
    places: Tensor  # (P,) the token at each place; a pad repeats its text's last token, which no other token sees
    pads: Tensor  # the places that are pads
    where: Tensor  # (N,) each token's place; P for the spare ones
    groups: tuple[_Group, ...]  # longest texts first

    @staticmethod
    def of(lengths: Tensor, width: int) -> Packing:
        """The packing of texts with these lengths, (B,) int64, each at least 1, padded to `width`."""
        lens, device = lengths.cpu(), lengths.device
        tokens = (torch.arange(width) < lens[:, None]).flatten().nonzero().squeeze(1)
        spare = -len(tokens) % _ROUND
        offsets, order = lens.cumsum(0) - lens, lens.argsort(descending=True, stable=True)
        groups: list[_Group] = []
        places: list[Tensor] = []
        inside: list[Tensor] = []
        start = 0
        while len(order):
            longest = int(lens[order[0]])
            count = int((lens[order] >= _SIMILAR * longest).sum())
            rows, order = order[:count], order[count:]
            length = longest + -longest % _LENGTHS
            groups.append(_Group(start, len(rows), length))
            steps, last = torch.arange(length), lens[rows, None] - 1
            places.append((offsets[rows, None] + torch.minimum(steps, last)).flatten())
            inside.append((steps <= last).flatten())
            start += len(rows) * length
        every, real = torch.cat(places), torch.cat(inside)
        where = torch.full((len(tokens) + spare,), len(every))
        where[every[real]] = real.nonzero().squeeze(1)
        return Packing(
            (len(lens), width),
            tokens=tokens.to(device),
            positions=F.pad(tokens % width, (0, spare)).to(device),
            places=every.to(device),
            pads=(~real).nonzero().squeeze(1).to(device),
            where=where.to(device),
            groups=tuple(groups),
        )

    def states(self, trunk: Any, ids: Tensor, **options: Any) -> Tensor:
        """The trunk's last hidden states (1, N, D) of the texts' tokens (N - spare,) one after the other."""
        spared = F.pad(ids, (0, len(self.positions) - len(ids)))
        with self.active():
            states: Tensor = trunk(input_ids=spared[None], position_ids=self.positions[None], **options).last_hidden_state
        return states

    def unpack(self, x: Tensor) -> Tensor:
        """(1, N, D) -> (B, L, D), 0 at pads."""
        rows, length = self.shape
        padded = x.new_zeros(rows * length, x.shape[-1])
        return padded.index_copy(0, self.tokens, x[0, : len(self.tokens)]).view(rows, length, -1)

    def together(self, places: Tensor) -> Tensor:
        """What stands at the places, (P + 1, h, d), as tokens (N, h, d); the last row is for the spare tokens."""
        places[-1].zero_()
        return places.index_select(0, self.where)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let attention take its inputs as packed so."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)


_active: ContextVar[Packing | None] = ContextVar("packing", default=None)


def active_packing() -> Packing | None:
    """The packing in force here."""
    return _active.get()


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
    packing = _active.get()
    if packing is None:
        return _in_float32(module, query, key, value, attention_mask, **kwargs)
    query, key, value = (x.transpose(1, 2)[0] for x in (query, key, value))
    short = keeps_weights(packing.groups[0].length, _mixing_dtype(value))
    if query.device.type == "cpu" and short and not _is_unusual(kwargs):
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        mixed: Tensor = _ShortTexts.apply(query, key, value, packing, scale)
        return mixed[None], None
    apart = [x.index_select(0, packing.places) for x in (query, key, value)]
    outputs = []
    for group in packing.groups:
        q, k, v = (group.of(x).transpose(1, 2) for x in apart)
        output, _ = _in_float32(module, q, k, v, None, **kwargs)
        outputs.append(output.flatten(0, 1))
    return packing.together(torch.cat([*outputs, outputs[0][:1]]))[None], None


def keeps_weights(length: int, dtype: torch.dtype) -> bool:
    """Whether the weights of all pairs of tokens are kept for the backward pass, in `dtype`, of texts as long as this. 4 texts of 430
    tokens of GPT-2 in bfloat16: 0.93 of the time of torch's fused kernel, which computes in float32."""
    return length <= SHORT * (2 if dtype is torch.bfloat16 else 1)


def _in_float32(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' own attention; of bfloat16 on a CPU in float32, because torch's backward pass there took nine times as long as
    the float32 one (540 against 60 ms of a 6-million-parameter model's step). Of one query a row, as decoding has it, by ours."""
    half = query.device.type == "cpu" and query.dtype is torch.bfloat16
    dtype = torch.float32 if half else query.dtype
    if query.device.type == "cpu" and query.shape[2] == 1 and not torch.is_grad_enabled():
        by_head = attention_mask is not None and attention_mask.shape[1] > 1
        if half and _has_tiles():
            dtype = torch.bfloat16
        elif dtype is torch.float32 and not by_head and not _is_unusual(kwargs):
            scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            with torch.autocast("cpu", enabled=False):
                return attend(query, key.float(), value, attention_mask, scale).to(query.dtype), None
    return _sdpa(dtype, module, query, key, value, attention_mask, **kwargs), None


def cached_keys_dtype(model: PreTrainedModel, states: Tensor) -> torch.dtype:
    """What a cache should hold the keys `states` in: float32 where decoding asks for float32 scores, lest each step makes them anew."""
    own = model.config._attn_implementation == _NAME
    half = states.device.type == "cpu" and states.dtype is torch.bfloat16
    return torch.float32 if own and half and not _has_tiles() else states.dtype


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
    with torch.autocast(query.device.type, enabled=False) if dtype is not query.dtype else contextlib.nullcontext():
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
        apart = [x.index_select(0, packing.places) for x in (query, key, value)]
        mixed = value.new_empty(len(packing.places) + 1, query.shape[1], value.shape[2])
        kept, heads, dtype = [], key.shape[1], _mixing_dtype(value)
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast("cpu", enabled=False):
            for group in packing.groups:
                q, k, v = (group.by_head(x, heads, kind) for x, kind in zip(apart, (wide, wide, dtype)))
                ahead = _causal(k.shape[1], q.shape[1] // k.shape[1], wide)
                weights = torch.baddbmm(ahead, q, k.transpose(1, 2), alpha=scale).softmax(-1).to(dtype)
                group.put(torch.bmm(weights, v), heads, mixed)
                kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        return packing.together(mixed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        packing: Packing = ctx.packing
        saved = ctx.saved_tensors  # asked for once only, for the sake of activation checkpointing
        inputs, kept, heads = saved[:3], saved[3:], saved[1].shape[1]
        dtype = kept[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        apart = [x.index_select(0, packing.places) for x in inputs]
        slopes = gradients[0].index_select(0, packing.places).index_fill_(0, packing.pads, 0.0)
        found = [x.new_empty(len(packing.places) + 1, *x.shape[1:]) for x in inputs]
        for group, weights in zip(packing.groups, kept):
            q, k, v, slope = (group.by_head(x, heads, dtype) for x in (*apart, slopes))
            for_v = torch.bmm(weights.transpose(1, 2), slope)
            for_weights = torch.bmm(slope, v.transpose(1, 2)).to(wide)
            scores = torch._softmax_backward_data(for_weights, weights.to(wide), -1, wide).mul_(ctx.scale).to(dtype)
            for_q, for_k = torch.bmm(scores, k), torch.bmm(scores.transpose(1, 2), q)
            for gradient, places in zip((for_q, for_k, for_v), found):
                group.put(gradient, heads, places)
        return *(packing.together(places) for places in found), None, None


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
    mask: Tensor | None = None if _active.get() is not None else sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)

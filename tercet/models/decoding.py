"""Attention of one query a row on a CPU, as decoding has it: dot products with, and sums of, rows of the key-value cache as they lie.

Such attention is one pass over memory. A batched product is not: for 64 rows of 57 tokens of GPT-2 two of them took 2.0 ms a layer on two
Zen 4 cores, torch's fused kernel 2.3, what stands here 1.2. torch has both halves for other ends: the dot products that a sparse matrix
asks for, and weighted sums of an embedding's rows.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * Q K^T + mask) V: query (B, h, 1, d), key (B, heads, L, d), value (B, heads, L, e), mask (B or 1, 1, 1, L), added or
    bool, -> (B, 1, h, e) of the values' dtype. Scores and softmax in the keys' precision, float32 or float64, weights rounded to the
    values'; no gradients."""
    rows, h = query.shape[:2]
    (keys, key_room), (values, value_room) = _table(key), _table(value)
    wanted = _wanted(rows, h, key.shape[1], key.shape[2], key_room, key.dtype)
    queries = query.to(key.dtype).reshape(rows * h, -1)
    scores = torch.sparse.sampled_addmm(wanted, queries, keys.t(), beta=0.0, alpha=scale).values().view(rows, h, -1)
    if mask is not None:
        mask = mask[:, 0]
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype is torch.bool else scores.add_(mask)
    weights = scores.softmax(-1).to(value.dtype).flatten()
    starts, places = _places(rows, h, value.shape[1], value.shape[2], value_room)
    # Arguments: no scaling by frequency, 0 for sums, nothing sparse; `starts` holds the end of the last row too.
    mixed: Tensor = torch.embedding_bag(values, places, starts, False, 0, False, weights, True)[0]
    return mixed.view(rows, 1, h, -1)


def _table(states: Tensor) -> tuple[Tensor, int]:
    """(B, heads, L, d) as the rows (n, d) of the memory in which it lies, and how many of them each head has from its first on."""
    rows, heads, length, size = states.shape
    head = states.stride(1)
    if states.stride()[2:] != (size, 1) or head % size or states.stride(0) != heads * head:
        states, head = states.contiguous(), length * size
    room = head // size
    return states.as_strided(((rows * heads - 1) * room + length, size), (size, 1)), room


@functools.lru_cache(maxsize=4)  # one for each step, of which every layer asks the same
def _places(rows: int, h: int, heads: int, length: int, room: int) -> tuple[Tensor, Tensor]:
    """Where each query's (B * h) rows of a table begin in the list of all, and that list, both int32."""
    first = torch.arange(rows * h, dtype=torch.int32).div_(h // heads, rounding_mode="floor") * room
    places = (first[:, None] + torch.arange(length, dtype=torch.int32)).flatten()
    return torch.arange(0, len(places) + 1, length, dtype=torch.int32), places


@functools.lru_cache(maxsize=4)
def _wanted(rows: int, h: int, heads: int, length: int, room: int, dtype: torch.dtype) -> Tensor:
    """The sparse matrix (B * h, n) of the products that are wanted of all queries with all rows of a table."""
    starts, places = _places(rows, h, heads, length, room)
    size = (rows * h, (rows * heads - 1) * room + length)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)  # that the layout may change, once a process
        return torch.sparse_csr_tensor(starts, places, torch.zeros(len(places), dtype=dtype), size, check_invariants=False)

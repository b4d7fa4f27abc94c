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

from tercet.models.rows import as_rows


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * Q K^T + mask) V: query (B, h, 1, d), key (B, heads, L, d), value (B, heads, L, e), mask (B or 1, 1, 1, L), added or
    bool, -> (B, 1, h, e) of the values' dtype. Scores and softmax in the keys' precision, float32 or float64, weights rounded to the
    values'; no gradients."""
    rows, h = query.shape[:2]
    shape = (rows, h, *key.shape[1:3])
    (keys, key_steps), (values, value_steps) = as_rows(key), as_rows(value)
    wanted = _wanted(shape, key_steps, len(keys), key.dtype)
    queries = query.to(key.dtype).reshape(rows * h, -1)
    scores = torch.sparse.sampled_addmm(wanted, queries, keys.t(), beta=0.0, alpha=scale).values().view(rows, h, -1)
    if mask is not None:
        mask = mask[:, 0]
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype is torch.bool else scores.add_(mask)
    weights = scores.softmax(-1).to(value.dtype).flatten()
    starts, places = _places(shape, value_steps)
    # Arguments: no scaling by frequency, 0 for sums, nothing sparse; `starts` holds the end of the last row too.
    mixed: Tensor = torch.embedding_bag(values, places, starts, False, 0, False, weights, True)[0]
    return mixed.view(rows, 1, h, -1)


@functools.lru_cache(maxsize=4)  # one for each step, of which every layer asks the same
def _places(shape: tuple[int, ...], steps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Where each query's (B * h) part of the list of all rows begins, and that list, both int32: of `shape` (B, h, heads, L) and keys or
    values `steps` rows apart."""
    batch, h, heads, length = shape
    row, head, token = (step * torch.arange(count, dtype=torch.int32) for step, count in zip(steps, (batch, heads, length)))
    places = (row[:, None, None] + head.repeat_interleave(h // heads)[:, None] + token).flatten()
    return torch.arange(0, len(places) + 1, length, dtype=torch.int32), places


@functools.lru_cache(maxsize=4)
def _wanted(shape: tuple[int, ...], steps: tuple[int, ...], count: int, dtype: torch.dtype) -> Tensor:
    """The sparse matrix (B * h, count) of the products that are wanted of all queries with all `count` rows of the keys' memory."""
    starts, places = _places(shape, steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)  # that the layout may change, once a process
        size = (len(starts) - 1, count)
        return torch.sparse_csr_tensor(starts, places, torch.zeros(len(places), dtype=dtype), size, check_invariants=False)

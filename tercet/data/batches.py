"""Which rows go together: token rows in flat arrays, an order that a step number alone restores, token-budget cuts."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tercet.types import Sequences, TokenRow

Item = TypeVar("Item")


class TokenStore:
    """N tokenised texts in flat arrays: ids (total tokens,) int32, offsets (N + 1,) int64, prompt_lens (N,) int32, finished (N,) bool
    and lengths (N,) int64, prompt and EOS included."""

    def __init__(
        self, ids: NDArray[np.int32], offsets: NDArray[np.int64], prompt_lens: NDArray[np.int32], finished: NDArray[np.bool_]
    ):
        self.ids, self.offsets, self.prompt_lens, self.finished = ids, offsets, prompt_lens, finished
        self.lengths: NDArray[np.int64] = np.diff(offsets)

    @staticmethod
    def build(rows: Iterable[TokenRow]) -> TokenStore:
        """Collect rows, e.g. from a generator: only the flat arrays stay in memory.

        Raises ValueError unless 1 <= prompt_len <= len(ids).
        """
        ids, offsets, prompt_lens, finished = array("i"), array("q", [0]), array("i"), array("b")
        for number, row in enumerate(rows):
            if not 1 <= row.prompt_len <= len(row.ids):
                raise ValueError(f"row {number}: prompt_len {row.prompt_len} is outside 1..{len(row.ids)}")
            ids.extend(row.ids)
            offsets.append(len(ids))
            prompt_lens.append(row.prompt_len)
            finished.append(row.finished)
        return TokenStore(
            np.array(ids, np.int32), np.array(offsets, np.int64), np.array(prompt_lens, np.int32), np.array(finished, np.bool_)
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sequences(self, indices: Tensor | Sequence[int] | NDArray[np.int64]) -> Sequences:
        """The rows `indices` in that order as one right-padded batch on the CPU."""
        rows = torch.as_tensor(indices, dtype=torch.long).numpy()
        lengths = torch.from_numpy(self.lengths[rows])
        input_ids = torch.zeros(len(rows), int(lengths.max()) if len(rows) else 1, dtype=torch.long)
        for i, row in enumerate(rows):
            ids = self.ids[self.offsets[row] : self.offsets[row + 1]].astype(np.int64)
            input_ids[i, : len(ids)] = torch.from_numpy(ids)
        prompt_lens = torch.from_numpy(self.prompt_lens[rows].astype(np.int64))
        return Sequences(input_ids, prompt_lens, lengths - prompt_lens, torch.from_numpy(self.finished[rows].astype(np.bool_)))


def in_parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last of which may be shorter."""
    remaining = iter(items)
    while part := list(islice(remaining, size)):
        yield part


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """A permutation of 0..n-1, (n,) int64: a pure function of its arguments, whatever was drawn before."""
    digest = hashlib.sha256(
        f"{seed} {epoch}".encode()
    ).digest()  # hashed: seed + epoch would give seed 1 the order of seed 0, shifted
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(n, generator=generator)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Optimizer steps in one pass over n records; the last batch may be smaller."""
    if n < 1 or batch_size < 1:
        raise ValueError(f"n ({n}) and batch_size ({batch_size}) must be at least 1")
    return -(-n // batch_size)


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The records of optimizer step `step`, counted from 0 over all epochs: (<= batch_size,) int64. The step number is all that a
    resumed run needs."""
    epoch, position = divmod(step, steps_per_epoch(n, batch_size))
    return _last_order(n, seed, epoch)[position * batch_size : (position + 1) * batch_size].clone()


_last_order = lru_cache(maxsize=1)(epoch_order)  # of a million records it takes 20 ms, and every step of an epoch asks for it


def microbatches(lengths: Iterable[int], max_tokens: int) -> list[list[int]]:
    """Cut rows into micro-batches, longest rows first, so that rows x longest <= max_tokens; a row longer than that goes alone.

    Deterministic; rows of equal length keep their order; each row appears once. The longest comes first so that memory that
    does not suffice shows at once.
    """
    return microbatches_grouped([[length] for length in lengths], max_tokens)


def microbatches_grouped(group_lengths: Iterable[Sequence[int] | NDArray[np.int64]], max_tokens: int) -> list[list[int]]:
    """The same for groups of rows that stay together (a comparison's K responses): lists of group indices.

    rows x longest counts all rows of all groups of the micro-batch; a group beyond max_tokens goes alone.
    """
    groups = [(max((int(length) for length in lengths), default=0), len(lengths)) for lengths in group_lengths]
    if max_tokens < 1:
        raise ValueError(f"max_tokens ({max_tokens}) must be at least 1")
    batches: list[list[int]] = []
    longest = rows = 0
    for index in sorted(range(len(groups)), key=lambda i: -groups[i][0]):  # sorted is stable
        length, size = groups[index]
        if not batches or (rows + size) * longest > max_tokens:
            batches.append([])
            longest, rows = length, 0
        batches[-1].append(index)
        rows += size
    return batches

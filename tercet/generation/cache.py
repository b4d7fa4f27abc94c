"""A key-value cache whose steps cost the bytes of the new token, not of all that came before."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from tercet.models.attention import cached_keys_dtype

_ROOM = 16  # tokens; for 64 rows of GPT-2 room for all that may come made attention take 1.5 times as long


def room_for(length: int, capacity: int) -> int:
    """Tokens that there is room for while `length` of them are held."""
    return min(-(-length // _ROOM) * _ROOM, capacity)


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, (B, heads, tokens, head size), as views of storage with some room for more, `capacity` tokens at most.

    transformers' own layer concatenates: it copies the whole cache at every token. The room is little because memory is read fastest
    without gaps. With `mask` (B, W) the first update is of the texts of that mask end to end, (1, heads, at least as many as the mask
    has, head size), and later ones give all of the storage, `room_for` tokens, zeros behind those that are there: whoever asks has a
    mask for them. `keys_dtype` says what to hold keys in.
    """

    def __init__(self, capacity: int, mask: Tensor | None, keys_dtype: Callable[[Tensor], torch.dtype]) -> None:
        super().__init__()
        self._capacity = capacity
        self._mask = mask
        self._gives_all = mask is not None
        self._keys_dtype = keys_dtype
        self._length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        dtypes = (self._keys_dtype(key_states), value_states.dtype)
        given = zip((key_states, value_states), dtypes)
        self._storage = [states.new_zeros(*states.shape[:2], 0, states.shape[3], dtype=dtype) for states, dtype in given]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            if self._mask is not None:
                self._take_apart(key_states, value_states, self._mask)
                return key_states, value_states
            self.lazy_initialization(key_states, value_states)
        end = self._length + key_states.shape[2]
        room = room_for(end, self._capacity)
        if room > self._storage[0].shape[2]:
            self._storage = [_widened(storage, self._allocated(room)) for storage in self._storage]
        for storage, states in zip(self._storage, (key_states, value_states)):
            storage[:, :, self._length : end] = states
        self._length = end
        held = self._look()
        keys, values = (storage[:, :, :room] for storage in self._storage) if self._gives_all else held
        return keys, values

    def _allocated(self, room: int) -> int:
        """Tokens to take storage for. Off the CPU all at once: of each size that is outgrown CUDA's allocator keeps the memory, and
        can give it to nothing larger."""
        return room if self.device.type == "cpu" else self._capacity

    def _take_apart(self, keys: Tensor, values: Tensor, mask: Tensor) -> None:
        """Give each text its row, and zeros to pads: what happens to stand there might not be finite."""
        places = mask.flatten().nonzero().squeeze(1)
        apart = []
        for states in (keys, values):
            padded = states.new_zeros(mask.numel(), states.shape[1], states.shape[3])
            padded.index_copy_(0, places, states[0, :, : len(places)].transpose(0, 1))
            apart.append(padded.unflatten(0, mask.shape).transpose(1, 2))
        self._mask = None
        self.update(*apart)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`. Only rows that move are copied: each must come from behind all that are kept."""
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(1)
        assert not len(moved) or int(indices[moved].min()) >= len(indices)
        self._storage = [storage[: len(indices)].index_copy_(0, moved, storage[indices[moved]]) for storage in self._storage]
        self._look()

    def _look(self) -> list[Tensor]:
        held = [storage[:, :, : self._length] for storage in self._storage]
        self.keys, self.values = held
        return held


def _widened(storage: Tensor, room: int) -> Tensor:
    """The storage (B, heads, tokens, d) with zeros behind up to `room` tokens; F.pad would fill all of it with zeros first."""
    rows, heads, held, size = storage.shape
    wider = storage.new_empty(rows, heads, room, size)
    wider[:, :, :held] = storage
    wider[:, :, held:].zero_()
    return wider


def keep_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep the rows (n,) of the cache, in that order; as RoomyLayer.batch_select_indices wants them."""
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.batch_select_indices(rows)
        else:
            # Of linear attention too, for whose states transformers has no batch_select_indices.
            layer.reorder_cache(rows)  # type: ignore[arg-type]


def cache_for(model: PreTrainedModel, capacity: int, mask: Tensor | None = None) -> DynamicCache:
    """An empty cache for at most `capacity` tokens; layers that forget (sliding windows) are transformers' own. `mask` as in
    RoomyLayer, where no layer forgets."""
    cache = DynamicCache(config=model.config)
    keys_dtype = functools.partial(cached_keys_dtype, model)
    cache.layers = [RoomyLayer(capacity, mask, keys_dtype) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache

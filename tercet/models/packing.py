"""How texts lie end to end in a batch without pads, and how attention finds them again, text by text and head by head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tercet.algo.products import spare_rows
from tercet.models.rows import as_rows

_SIMILAR = 0.75  # texts of a group are at least this share of its longest
# Few shapes for oneDNN, as of all products (spare_rows).
_LENGTHS = 8  # lengths of groups are a multiple of this
_ROWS = 4  # and so is a group's number of texts, where it is more than twice this


@dataclass(frozen=True)
class Group:
    """Texts of similar length, padded to the longest of them or a little more: `rows` x `length` of the padded places, from `start`."""

    start: int
    rows: int
    length: int

    def of(self, places: Tensor, heads: int) -> Tensor:
        """This group's part of rows by head, as (rows, heads, L, d)."""
        part = slice(self.start * heads, (self.start + self.rows * self.length) * heads)
        return places[part].view(self.rows, heads, self.length, -1)


@dataclass(frozen=True)
class Packing:
    """How texts of a right-padded batch (B, L) lie end to end, N tokens with `spare` ones at the end that belong to no text.

    For attention the texts stand in P places, in groups of similar length with pads between them, and each group's by head: (P * h, d)
    of texts, heads, tokens.
    """

    shape: tuple[int, int]
    tokens: Tensor  # (N - spare,) the places in B * L of the tokens, text after text
    positions: Tensor  # (N,) each token's place in its own text
    places: Tensor  # (P,) the token at each place; a pad repeats its text's last token, which no other token sees
    pads: Tensor  # (P,) whether it is one
    groups: tuple[Group, ...]  # longest texts first
    _known: dict[tuple[str | int, ...], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(lengths: Tensor, width: int) -> Packing:
        """The packing of texts with these lengths, (B,) int64, each at least 1, padded to `width`."""
        lens, device = lengths.cpu(), lengths.device
        tokens = (torch.arange(width) < lens[:, None]).flatten().nonzero().squeeze(1)
        spare = spare_rows(len(tokens))
        offsets, order = lens.cumsum(0) - lens, lens.argsort(descending=True, stable=True)
        groups: list[Group] = []
        places: list[Tensor] = []
        outside: list[Tensor] = []
        start = 0
        while len(order):
            longest = int(lens[order[0]])
            count = int((lens[order] >= _SIMILAR * longest).sum())
            count += -count % _ROWS if count > 2 * _ROWS else 0  # where fewer are left, those
            rows, order = order[:count], order[count:]
            length = longest + -longest % _LENGTHS
            groups.append(Group(start, len(rows), length))
            steps, last = torch.arange(length), lens[rows, None] - 1
            places.append((offsets[rows, None] + torch.minimum(steps, last)).flatten())
            outside.append((steps > last).flatten())
            start += len(rows) * length
        return Packing(
            (len(lens), width),
            tokens=tokens.to(device),
            positions=F.pad(tokens % width, (0, spare)).to(device),
            places=torch.cat(places).to(device),
            pads=torch.cat(outside).to(device),
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

    def by_head(self, x: Tensor) -> Tensor:
        """Tokens (N, h, d), however they lie in memory, at the places by head (P * h, d)."""
        rows, steps = as_rows(x)
        return rows.index_select(0, self._once(self._rows, x.shape[1], *steps))

    def together(self, places: Tensor, heads: int) -> Tensor:
        """What stands at the places by head (P * h, d), as tokens (N, h, d); 0 for the spare ones."""
        tokens = places.index_select(0, self._once(self._back, heads)).view(len(self.positions), heads, -1)
        tokens[len(self.tokens) :].zero_()
        return tokens

    def clear_pads(self, places: Tensor, heads: int) -> Tensor:
        """What stands at the places by head with 0 at the pads, in place."""
        return places.index_fill_(0, self._once(self._pads, heads), 0.0)

    def _once(self, find: Callable[..., Tensor], *numbers: int) -> Tensor:
        """Indices that all layers ask for."""
        key: tuple[str | int, ...] = (find.__name__, *numbers)
        if key not in self._known:
            self._known[key] = find(*numbers)
        return self._known[key]

    def _rows(self, heads: int, token: int, head: int) -> Tensor:
        """(P * h,) the row that belongs at each place by head, where rows are `token` from token to token and `head` from head to head."""
        shifts = head * torch.arange(heads, device=self.places.device)[:, None]
        return torch.cat([(token * group.of(self.places, 1).squeeze(-1) + shifts).flatten() for group in self.groups])

    def _back(self, heads: int) -> Tensor:
        """(N * h,) where each token's heads stand among the places by head."""
        back = torch.zeros(len(self.positions) * heads, dtype=torch.long, device=self.places.device)
        places = torch.arange(heads * len(self.places), device=self.places.device)
        real = places.index_fill(0, self._once(self._pads, heads), -1) >= 0
        back[self._rows(heads, heads, 1)[real]] = places[real]
        return back

    def _pads(self, heads: int) -> Tensor:
        """The places by head that are pads."""
        pads = [group.of(self.pads, 1).squeeze(-1).expand(-1, heads, -1).flatten() for group in self.groups]
        return torch.cat(pads).nonzero().squeeze(1)

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


class Apart(torch.autograd.Function):
    """Packing.by_head with its gradient: no other token sees a pad, so none flows back from there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing, ctx.heads = packing, x.shape[1]
        return packing.by_head(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.packing.together(gradients[0], ctx.heads), None


class Together(torch.autograd.Function):
    """Packing.together with its gradient."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, packing: Packing, heads: int) -> Tensor:
        ctx.packing, ctx.heads = packing, heads
        return packing.together(places, heads)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.packing.clear_pads(ctx.packing.by_head(gradients[0]), ctx.heads), None, None

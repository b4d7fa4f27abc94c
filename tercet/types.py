"""The nouns that cross rooms: records as the user wrote them, and batches of token sequences.

Layout of every batch: right-padded and contiguous, `[prompt | response | pad]`, so positions are 0..n in every forward and a
causal model needs no attention mask. Masks are carried, never derived from ids; True means "counts".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from tercet.errors import TercetError

__all__ = [
    "Comparison",
    "Demonstration",
    "Experience",
    "Message",
    "Prompt",
    "Sequences",
    "TercetError",
    "Text",
    "TokenRow",
]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


Text = str | tuple[Message, ...]
"""A prompt: plain text, or the turns of a conversation that ends before the assistant's answer."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response to imitate. Plain text for language modelling has the prompt ""."""

    prompt: Text
    response: str
    origin: str = ""  # "file:row", for error messages


@dataclass(frozen=True)
class Comparison:
    """K >= 2 responses to one prompt with their ranks: smaller is better, equal is a tie.

    A chosen/rejected pair is K = 2 with ranks (0, 1). `margin` is subtracted from the score difference of a pair inside the
    ranking loss. `fields` holds the record's other fields (such as `source`).
    """

    prompt: Text
    responses: tuple[str, ...]
    ranks: tuple[float, ...]
    margin: float = 0.0
    fields: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""

    @property
    def prefers(self) -> bool:
        """Whether any response is better than another: nothing can be learned from ties alone."""
        return len(set(self.ranks)) > 1

    def pairs(self) -> list[tuple[str, str]]:
        """(better, worse) of every two responses that are no tie."""
        ranked = list(zip(self.responses, self.ranks))
        return [(better, worse) for better, rank in ranked for worse, other in ranked if rank < other]


@dataclass(frozen=True)
class Prompt:
    """A prompt to sample responses for; `fields` holds the record's other fields, handed to a reward function."""

    prompt: Text
    fields: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""


@dataclass(frozen=True)
class TokenRow:
    """One tokenised text: ids = prompt + response (+ EOS if `finished`), with 1 <= prompt_len <= len(ids)."""

    ids: tuple[int, ...]
    prompt_len: int
    finished: bool = True


@dataclass
class Sequences:
    """A batch of texts, `[prompt | response | pad]`.

    input_ids (B, L) int64, pads are 0; prompt_lens (B,) int64, at least 1; response_lens (B,) int64; finished (B,) bool: ended
    by a stop token, not by the length limit. sampler_logprobs (B, T) float: what the generator reported, None for text that no
    policy sampled. policy_version: the number of optimizer iterations behind the policy that sampled; -1 for such text.
    """

    input_ids: Tensor
    prompt_lens: Tensor
    response_lens: Tensor
    finished: Tensor
    sampler_logprobs: Tensor | None = None
    policy_version: int = -1

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Real tokens of each row, (B,) int64."""
        return self.prompt_lens + self.response_lens

    @property
    def response_mask(self) -> Tensor:
        """(B, T) bool with T = max(response_lens), at least 1: True where the row has a response token, its EOS included."""
        steps = torch.arange(self.max_response, device=self.input_ids.device)
        return steps < self.response_lens[:, None]

    @property
    def max_response(self) -> int:
        """T, the width of response-aligned tensors."""
        return max(1, int(self.response_lens.max())) if len(self) else 1

    @property
    def response_ids(self) -> Tensor:
        """(B, T) int64: response tokens, 0 outside response_mask."""
        steps = torch.arange(self.max_response, device=self.input_ids.device)
        index = (self.prompt_lens[:, None] + steps).clamp(max=self.input_ids.shape[1] - 1)
        return self.input_ids.gather(1, index).masked_fill(~self.response_mask, 0)

    def select(self, rows: Tensor | Sequence[int]) -> Sequences:
        """The given rows, cut to the longest text among them."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.input_ids.device)
        lengths = self.lengths[index]
        width = max(1, int(lengths.max())) if len(index) else 1
        response_width = max(1, int(self.response_lens[index].max())) if len(index) else 1
        logprobs = self.sampler_logprobs
        return Sequences(
            self.input_ids[index, :width],
            self.prompt_lens[index],
            self.response_lens[index],
            self.finished[index],
            None if logprobs is None else logprobs[index, :response_width],
            self.policy_version,
        )

    def to(self, device: torch.device | str) -> Sequences:
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **moved)

    def rows(self) -> list[TokenRow]:
        """The texts one by one, without pads."""
        columns = (self.input_ids, self.prompt_lens, self.response_lens, self.finished)
        each = zip(*(column.tolist() for column in columns))
        return [TokenRow(tuple(ids[: before + after]), before, finished) for ids, before, after, finished in each]

    @staticmethod
    def from_rows(rows: Sequence[TokenRow]) -> Sequences:
        """Pad tokenised texts on the right with id 0."""
        width = max((len(row.ids) for row in rows), default=1)
        input_ids = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            input_ids[i, : len(row.ids)] = torch.tensor(row.ids, dtype=torch.long)
        prompt_lens = torch.tensor([row.prompt_len for row in rows], dtype=torch.long)
        lengths = torch.tensor([len(row.ids) for row in rows], dtype=torch.long)
        finished = torch.tensor([row.finished for row in rows], dtype=torch.bool)
        return Sequences(input_ids, prompt_lens, lengths - prompt_lens, finished)


@dataclass
class Experience:
    """What one rollout hands to the update. Shapes (B, T) are aligned with `sequences.response_mask`; 0 outside it.

    logprobs: log pi_old(y_t) at the sampling temperature, recorded by the training forward. ref_logprobs: the frozen reference's.
    values: V(x, y_<t), before token t. scores (B,): the final combined score. rewards: the KL penalty per token, the score on the
    last token. advantages: whitened. returns: advantages before whitening, plus values.
    """

    sequences: Sequences
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor

    def select(self, rows: Tensor | Sequence[int]) -> Experience:
        """The given rows, cut to the longest response among them."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.logprobs.device)
        sequences = self.sequences.select(index)
        width = sequences.max_response
        aligned = {f.name: getattr(self, f.name)[index, :width] for f in fields(self) if f.name not in ("sequences", "scores")}
        return Experience(sequences=sequences, scores=self.scores[index], **aligned)


@dataclass
class KeptPass:
    """What policy and value model give for a micro-batch, the rows `rows` (n,) of a rollout: log-probabilities and values (n, T) with their
    graphs, or None where the graph was not kept."""

    rows: Tensor
    logprobs: Tensor | None
    values: Tensor | None

    def let_go(self) -> None:
        """Of the graphs, once they have been of use."""
        self.logprobs = None if self.logprobs is None else self.logprobs.detach()
        self.values = None if self.values is None else self.values.detach()

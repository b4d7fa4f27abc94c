"""What turns (prompt, response) into a score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tercet.types import Sequences, TercetError, Text


@dataclass(frozen=True)
class Texts:
    """The texts of a batch, as the user wrote the prompts and without special tokens; fields: the prompts' other fields, by row."""

    prompts: Sequence[Text]
    responses: Sequence[str]
    fields: Sequence[Mapping[str, Any]]


class Scorer(Protocol):
    """Scores finished responses; higher is better."""

    def score(self, sequences: Sequences, texts: Texts) -> Tensor:
        """(B,) float32 or wider, finite. The two arguments describe the same rows: as token ids and as text."""


class WeightedSum:
    """The sum of several scorers, each with its weight."""

    def __init__(self, terms: Sequence[tuple[float, Scorer]]):
        self._terms = terms

    def score(self, sequences: Sequences, texts: Texts) -> Tensor:
        total = torch.zeros(len(sequences), dtype=torch.float32)
        for weight, scorer in self._terms:
            total = total + weight * scorer.score(sequences, texts).cpu()
        return total


def check_finite(scores: Tensor, texts: Texts, source: str) -> Tensor:
    """The scores, or TercetError showing the first response whose score is NaN or infinite."""
    bad = [i for i, value in enumerate(scores.tolist()) if not math.isfinite(value)]
    if bad:
        raise TercetError(
            f"{source} gave the score {scores[bad[0]].item()} to {len(bad)} of {len(scores)} responses, the first being "
            f"{texts.responses[bad[0]][:120]!r} to the prompt {_end_of(texts.prompts[bad[0]])!r}: every score must be a finite number"
        )
    return scores


def _end_of(prompt: Text) -> str:
    return (prompt if isinstance(prompt, str) else prompt[-1].content)[-120:]

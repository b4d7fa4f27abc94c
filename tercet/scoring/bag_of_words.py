"""The linear baseline that a reward model should beat: logistic regression on the words of the two responses."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tercet.data.batches import in_parts
from tercet.scoring.base import Texts
from tercet.types import Comparison, Sequences

MOST_PAIRS = 20_000  # that it is trained on, evenly spread over all; each takes some 20 KiB and a millisecond
_AT_ONCE = 1_000  # responses scored together
_WORD = re.compile(r"\w+|[^\w\s]")


class BagOfWords:
    """score = the sum of the weights of the different words and word pairs of a response (the prompt is not looked at).

    Trained on comparisons with the Bradley-Terry loss and an L2 penalty; a word needs to occur in `minimum` responses. Of more than
    MOST_PAIRS pairs it sees that many.
    """

    def __init__(self, comparisons: Sequence[Comparison], *, l2: float = 3e-4, minimum: int = 3):
        pairs = _pairs(comparisons)
        pairs = pairs[:: max(1, math.ceil(len(pairs) / MOST_PAIRS))]
        counts = Counter(word for better, worse in pairs for response in (better, worse) for word in _features(response))
        self._index = {word: place for place, word in enumerate(sorted(word for word, n in counts.items() if n >= minimum))}
        self.weights = torch.zeros(max(1, len(self._index)))
        if pairs and self._index:
            self._fit(self._matrix([better for better, _ in pairs]) - self._matrix([worse for _, worse in pairs]), l2)

    def _fit(self, differences: Tensor, l2: float) -> None:
        weights = self.weights.requires_grad_(True)
        optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            margins = torch.sparse.mm(differences, weights[:, None]).squeeze(1)
            value = -logsigmoid(margins).mean() + l2 * (weights**2).sum() / 2
            value.backward()
            return value

        optimizer.step(loss)
        self.weights = weights.detach()

    def score_texts(self, responses: Sequence[str]) -> Tensor:
        """(N,) float32."""
        parts = in_parts(responses, _AT_ONCE)
        scores = [torch.sparse.mm(self._matrix(part), self.weights[:, None]).squeeze(1) for part in parts]
        return torch.cat(scores) if scores else torch.zeros(0)

    def score(self, sequences: Sequences, texts: Texts) -> Tensor:
        """A Scorer, so that it can judge."""
        return self.score_texts(texts.responses)

    def accuracy(self, comparisons: Sequence[Comparison]) -> float:
        """The share of pairs in the right order, ties half."""
        pairs = _pairs(comparisons)
        better, worse = self.score_texts([pair[0] for pair in pairs]), self.score_texts([pair[1] for pair in pairs])
        return ((better - worse).sign().mean().item() + 1) / 2 if pairs else 0.5

    def _matrix(self, responses: Sequence[str]) -> Tensor:
        rows, columns = array("q"), array("q")
        for row, text in enumerate(responses):
            columns.extend(self._index[word] for word in _features(text) if word in self._index)
            rows.extend([row] * (len(columns) - len(rows)))
        places = [torch.frombuffer(column, dtype=torch.int64) for column in (rows, columns) if column]
        indices = torch.stack(places) if places else torch.zeros(2, 0, dtype=torch.int64)
        values = torch.ones(indices.shape[1])
        return torch.sparse_coo_tensor(indices, values, (len(responses), len(self.weights)), check_invariants=False).coalesce()


def _features(text: str) -> set[str]:
    words = _WORD.findall(text.lower())
    return {*words, *(f"{first} {second}" for first, second in zip(words, words[1:]))}


def _pairs(comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
    return [pair for record in comparisons for pair in record.pairs()]

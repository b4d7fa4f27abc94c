"""The simulated annotator: Bradley-Terry preferences over the gold score, with ties and a known ceiling of agreement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from tercet.world.gold import gold_score


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


class Annotator:
    """P(a preferred to b) = sigmoid((gold_a - gold_b) / temperature) (Bradley & Terry 1952).

    Ties: where two gold scores differ by less than `tie_band`, the annotator declares a tie with probability `tie_rate`,
    otherwise chooses as above; so the choices that are made follow the formula exactly, in the band and outside. Rankings
    are Plackett-Luce (gold / temperature plus Gumbel noise, whose pairs follow the formula too); a response then ties with
    the one ranked before it under the same rule. The answers depend on `seed` and on the order of the questions.
    """

    def __init__(self, temperature: float = 0.72, tie_band: float = 0.15, tie_rate: float = 0.5, seed: int = 0) -> None:
        if temperature <= 0 or tie_band < 0 or not 0 <= tie_rate <= 1:
            raise ValueError(
                f"need temperature > 0, tie_band >= 0, 0 <= tie_rate <= 1; got {temperature}, {tie_band}, {tie_rate}"
            )
        self.temperature = temperature
        self.tie_band = tie_band
        self.tie_rate = tie_rate
        self._rng = Random(f"annotator/{seed}")

    def probability(self, prompt: str, a: str, b: str) -> float:
        """Probability that `a` is preferred to `b`, given that no tie is declared."""
        return sigmoid((gold_score(prompt, a) - gold_score(prompt, b)) / self.temperature)

    def _tie(self, gold_a: float, gold_b: float) -> bool:
        return abs(gold_a - gold_b) < self.tie_band and self._rng.random() < self.tie_rate

    def compare(self, prompt: str, a: str, b: str) -> int:
        """1 if `a` is preferred, -1 if `b` is, 0 for a tie."""
        if self._tie(gold_score(prompt, a), gold_score(prompt, b)):
            return 0
        return 1 if self._rng.random() < self.probability(prompt, a, b) else -1

    def rank(self, prompt: str, responses: Sequence[str]) -> list[int]:
        """Ranks from 1 (best); equal ranks are ties, and the rank after a tie of two is skipped."""
        golds = [gold_score(prompt, response) for response in responses]
        # 1 - random() lies in (0, 1]; the tiny number keeps log(log) away from log(0) at 1
        noise = [-math.log(1e-300 - math.log(1 - self._rng.random())) for _ in golds]
        order = sorted(range(len(golds)), key=lambda i: -(golds[i] / self.temperature + noise[i]))
        ranks = [0] * len(golds)
        for place, i in enumerate(order):
            tied = place > 0 and self._tie(golds[i], golds[order[place - 1]])
            ranks[i] = ranks[order[place - 1]] if tied else place + 1
        return ranks

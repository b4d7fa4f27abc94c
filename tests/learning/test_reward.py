"""The reward model finds a planted preference and applies it to texts that it has not seen."""

from __future__ import annotations

import random
from pathlib import Path

import tiny
import torch

from tercet.config.training import RewardConfig
from tercet.stages.reward import train_reward_model
from tercet.types import Comparison


def comparisons(count: int, seed: int) -> list[Comparison]:
    """Of two responses of random words the one with the word "kind" in it is better."""
    rng, words, records = random.Random(seed), [word for word in tiny.WORDS if word != "kind"], []
    for _ in range(count):
        plain, liked = ([rng.choice(words) for _ in range(rng.randint(2, 5))] for _ in range(2))
        liked[rng.randrange(len(liked))] = "kind"
        records.append(Comparison(rng.choice(words), (" ".join(plain), " ".join(liked)), (1, 0)))
    return records


def test_the_reward_model_separates_a_planted_preference(tmp_path: Path) -> None:
    model = tiny.value_of(0, torch.float32, vocabulary=300, positions=64, layers=2, scale=0.05)
    config = RewardConfig(epochs=3, batch_size=32, learning_rate=3e-3, max_length=64)
    figures, pairs = train_reward_model(
        tiny.run_of(tmp_path, "reward", dtype=torch.float32),
        config,
        model,
        tiny.template_of(),
        comparisons(512, 0),
        comparisons(200, 1),
        seed=0,
    )
    assert len(pairs) == 200
    assert figures["reward.eval_accuracy_low"] > 0.95

"""The learning rate as a function of the optimizer step."""

from __future__ import annotations

import math


def learning_rate(
    step: int, total_steps: int, base: float, schedule: str, warmup_steps: int = 0, min_ratio: float = 0.0
) -> float:
    """The learning rate of optimizer step `step`, counted from 0, of total_steps.

    During warm-up it rises linearly from base / warmup_steps to base. Then, over the share p of the remaining steps that is
    done, "linear" falls as 1 - p, to 0 (the last step still has base / total_steps without warm-up: lm-human-preferences
    train_policy.py:172-173), "cosine" as (1 + cos(pi p)) / 2 from base to min_ratio * base; "constant" stays at base.
    min_ratio is for "cosine" alone.
    ValueError: unknown schedule, or total_steps is less than 1.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if schedule not in ("linear", "cosine", "constant"):
        raise ValueError(f"unknown learning-rate schedule {schedule!r}: expected linear, cosine or constant")
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if schedule == "constant":
        return base
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return base * (1 - done)
    return base * (min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * done)) / 2)


def usual_rate(parameters: int, minibatch: int) -> float:
    """PPO's learning rate where none is given: 1e-5 for a policy of a billion parameters and minibatches of 512 responses, as one over
    the square root of the former and as the square root of the latter (Malladi 2022), at most 1e-3.

    What was used with 512: 1e-5 for 0.8 billion (Ziegler 2019), 1.5e-5 for 1.3 and 7e-6 for 6.7 (Stiennon 2020).
    """
    return min(1e-3, 1e-5 * math.sqrt(1e9 / max(1, parameters) * minibatch / 512))

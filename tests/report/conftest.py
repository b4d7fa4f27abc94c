"""A made-up run folder, complete and healthy; tests take parts away or spoil them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROMPTS = ("Explain rain to a child.", "Define happiness simply.", "What is sunshine?", "Tell me about trees.")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_object(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def sft_lines(rng: random.Random, steps: int) -> list[dict[str, Any]]:
    lines = []
    for step in range(1, steps + 1):
        loss = 1.1 + 2.4 * math.exp(-5 * step / steps)
        line = {"step": step, "epoch": step / steps, "loss": loss + rng.gauss(0, 0.08), "grad_norm": rng.uniform(0.4, 0.9)}
        line |= {"learning_rate": 1e-3 * (1 - step / steps), "tokens": step * 4096}
        lines.append(line | ({"eval_loss": loss + 0.05} if step % max(1, steps // 8) == 0 else {}))
    return lines


def reward_lines(rng: random.Random, steps: int) -> list[dict[str, Any]]:
    lines = []
    for step in range(1, steps + 1):
        accuracy = 0.86 - 0.36 * math.exp(-6 * step / steps)
        line = {"step": step, "epoch": step / steps, "loss": 1.05 - 0.8 * accuracy, "accuracy": accuracy + rng.gauss(0, 0.05)}
        line |= {"learning_rate": 3e-4, "grad_norm": rng.uniform(1, 2), "margin": 3 * (accuracy - 0.5) + rng.gauss(0, 0.1)}
        extra = {"eval_loss": 1.06 - 0.8 * accuracy, "eval_accuracy": accuracy} if step % max(1, steps // 6) == 0 else {}
        lines.append(line | extra)
    return lines


def ppo_lines(rng: random.Random, iterations: int) -> list[dict[str, Any]]:
    lines = []
    for i in range(1, iterations + 1):
        done = i / iterations
        score, kl = 1.9 * (1 - math.exp(-3 * done)), 9 * (1 - math.exp(-2.5 * done)) + rng.gauss(0, 0.15)
        line = {"iteration": i, "score": score + rng.gauss(0, 0.06), "score_std": 0.9, "reward": score - 0.05 * kl, "kl": kl}
        line |= {"kl_k3": kl, "kl_coef": 0.05, "entropy": 2.1 - 0.8 * done + rng.gauss(0, 0.03), "length": 22 + 3 * done}
        line |= {
            "finished": min(1.0, 0.95 + 0.05 * done),
            "policy_loss": -0.02 + rng.gauss(0, 0.004),
            "value_loss": 0.4 - 0.3 * done,
        }
        line |= {"approx_kl": 0.01, "clip_fraction": 0.12 + rng.gauss(0, 0.02), "value_clip_fraction": 0.05}
        line |= {"explained_variance": 0.75 * done + rng.gauss(0, 0.05), "grad_norm": 0.7, "value_grad_norm": 1.1}
        line |= {
            "learning_rate": 1e-4 * (1 - done),
            "epochs_done": 4,
            "ratio": 1.0,
            "sampler_logprob_gap": 2e-6,
            "distinct2": 0.6,
        }
        extra = (
            {"eval_score": score, "eval_kl": kl, "judge": 0.8 * score, "gold": 0.7 * score}
            if i % max(1, iterations // 8) == 0
            else {}
        )
        lines.append(line | extra)
    return lines


def samples(rng: random.Random, count: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        before = rng.gauss(0, 1)
        after = before + rng.gauss(1.8, 1.1)
        row = {"prompt": PROMPTS[i % 4], "sft": "Rain is water that falls from clouds. It helps plants and fills the rivers."}
        row |= {
            "ppo": "Rain is water from the sky, dear friend. Clouds grow heavy and let it fall, and then the flowers can drink."
        }
        row |= {"sft_score": before, "ppo_score": after, "sft_gold": before * 0.7, "ppo_gold": after * 0.7}
        row |= {"sft_kl": 0.0, "ppo_kl": 8.7, "sft_finished": i % 9 != 0, "ppo_finished": True}
        rows.append(row | ({"group": "new"} if i % 10 == 0 else {}))
    return rows


SUMMARY = {
    "seed": 0,
    "seconds": 187.4,
    "sft.seconds": 20.0,
    "reward.seconds": 60.0,
    "ppo.seconds": 100.0,
    "dtype": "float32",
    "threads": 2,
    "versions.torch": "2.13.0",
    "versions.tercet": "0.1.0",
    "sft.eval_loss": 1.17,
    "reward.eval_accuracy": 0.861,
    "reward.comparisons": 9000,
    "reward.eval_pairs": 2400,
    "reward.eval_accuracy_low": 0.847,
    "reward.eval_accuracy_high": 0.874,
    "sft.score": 0.02,
    "ppo.score": 1.84,
    "ppo.kl": 8.7,
    "sft.finished": 0.951,
    "ppo.finished": 0.993,
    "sft.distinct2": 0.61,
    "ppo.distinct2": 0.55,
    "sft.length": 22.4,
    "ppo.length": 25.1,
    "win_rate": 0.846,
    "win_rate_low": 0.812,
    "win_rate_high": 0.877,
    "gold.sft": 0.03,
    "gold.ppo": 1.31,
    "gold.sft_std": 0.98,
    "win_rate[new]": 0.702,
    "gold.ppo[new]": 0.74,
    "gold.sft[new]": -0.2,
    "ppo.finished[new]": 0.97,
}

POLICIES = {
    "base": {"score": -1.2, "score_std": 1.1, "kl": 4.1, "length": 30.2, "finished": 0.41, "entropy": 2.9, "distinct2": 0.66},
    "sft": {
        "score": 0.02,
        "score_std": 1.0,
        "kl": 0.0,
        "length": 22.4,
        "finished": 0.951,
        "entropy": 2.05,
        "distinct1": 0.31,
        "distinct2": 0.61,
    },
    "ppo": {
        "score": 1.84,
        "score_std": 0.8,
        "kl": 8.7,
        "length": 25.1,
        "finished": 0.993,
        "entropy": 1.3,
        "distinct1": 0.27,
        "distinct2": 0.55,
    },
}

WINS = {
    "reward model": {"win_rate": 0.846, "low": 0.812, "high": 0.877, "n": 500},
    "second reward model": {"win_rate": 0.801, "low": 0.765, "high": 0.836, "n": 500},
    "gold": {"win_rate": 0.788, "low": 0.751, "high": 0.823, "n": 500, "lc_win_rate": 0.77, "lc_low": 0.73, "lc_high": 0.81},
}


def card() -> dict[str, Any]:
    bins = [{"start": 0.5 + i / 10, "end": 0.6 + i / 10, "pairs": 480, "mean": 0.55 + i / 10} for i in range(5)]
    bins = [one | {"accuracy": one["mean"] - 0.01, "low": one["mean"] - 0.05, "high": one["mean"] + 0.03} for one in bins]
    part = {"pairs": 1200, "accuracy": 0.85, "low": 0.83, "high": 0.87}
    histogram = {"counts": [1, 5, 9, 4], "mean": 0.4, "std": 1.0}
    return {
        "pairs": 2400,
        "accuracy": 0.861,
        "accuracy_low": 0.847,
        "accuracy_high": 0.874,
        "chance_low": 0.48,
        "chance_high": 0.52,
        "bag_of_words_accuracy": 0.84,
        "length_accuracy": 0.55,
        "length_correlation": 0.12,
        "calibration_error": 0.012,
        "temperature": 1.04,
        "longer_better": part,
        "longer_worse": part,
        "by_source": [part | {"source": "web"}],
        "by_confidence": bins,
        "by_margin": bins,
        "histograms": {
            "edges": [-2, -1, 0, 1, 2],
            "chosen": histogram,
            "rejected": histogram,
            "demonstrations": histogram,
            "sft": histogram,
        },
    }


def gain(name: str, value: float) -> dict[str, float]:
    return {name: value, f"{name}_gain": value, f"{name}_gain_low": value - 0.1, f"{name}_gain_high": value + 0.1}


def yardstick() -> dict[str, Any]:
    curve = [
        {"n": 2**i, "kl": i * 0.69 - 1 + 0.5**i} | gain("score", 0.4 * i) | gain("judge", 0.3 * i) | gain("gold", 0.3 * i)
        for i in range(7)
    ]
    frontier = [
        {"beta": 1 / i, "kl": i / 10, "effective": 300 - i} | gain("score", i / 5) | gain("gold", i / 6) for i in range(1, 9)
    ]
    return {"prompts": 16, "samples": 64, "curve": curve, "frontier": frontier}


def way() -> dict[str, Any]:
    points = [
        {"iteration": i, "kl": i / 7, "kl_low": i / 8, "kl_high": i / 6}
        | gain("score", i / 32)
        | gain("judge", i / 40)
        | gain("gold", i / 42)
        for i in range(0, 61, 10)
    ]
    return {"prompts": 200, "points": points, "turns": {}}


CONFIG = "name: toy\nseed: 0\nppo:\n  kl:\n    coef: 0.05\n"


def make_run(folder: Path, *, steps: int = 120, iterations: int = 60, count: int = 200) -> Path:
    """Write the run folder and return it."""
    rng = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    write_object(folder / "summary.json", SUMMARY)
    write_lines(folder / "sft/metrics.jsonl", sft_lines(rng, steps))
    write_lines(folder / "reward/metrics.jsonl", reward_lines(rng, steps))
    write_lines(folder / "ppo/metrics.jsonl", ppo_lines(rng, iterations))
    timing = {"tokens_per_s": 5200.0, "peak_memory_mb": 812.0}
    for stage in ("sft", "reward"):
        write_lines(folder / stage / "timings.jsonl", [timing | {"step": i, "seconds": 1.5} for i in range(30)])
    timing |= {"sync_s": 0.1, "generate_s": 0.6, "score_s": 0.2, "update_s": 1.1}
    iterations_ = [timing | {"iteration": i} | ({"evaluate_s": 1.5} if i % 3 == 0 else {}) for i in range(1, 31)]
    write_lines(folder / "ppo/timings.jsonl", iterations_)
    write_lines(folder / "evaluation/samples.jsonl", samples(rng, count))
    write_object(folder / "evaluation/policies.json", POLICIES)
    write_object(folder / "evaluation/wins.json", WINS)
    write_object(folder / "evaluation/path.json", way())
    write_object(folder / "evaluation/best_of_n.json", yardstick())
    write_object(folder / "reward/card.json", card())
    columns = {name: [rng.gauss(1, 1) for _ in range(20)] for name in ("score", "kl", "judge", "gold")}
    steps_between = max(1, iterations // 8)
    write_lines(
        folder / "ppo/evaluations.jsonl",
        [{"iteration": i} | columns for i in range(steps_between, iterations + 1, steps_between)],
    )
    files = {"data.prompts": {"prompts.jsonl": "ab" * 32}}
    for stage in ("sft", "reward"):
        write_object(folder / stage / "done.json", {})
    write_object(folder / "ppo/done.json", {"fingerprint": {"data": files | {"/x/rewards.py": "cd" * 32}}})
    return folder


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Path]:
    """new_run(name="run", steps=, iterations=, count=) -> folder."""

    def build(name: str = "run", **sizes: int) -> Path:
        return make_run(tmp_path / name, **sizes)

    return build

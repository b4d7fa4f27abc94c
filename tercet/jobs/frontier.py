"""What PPO is measured against: best-of-n from the SFT policy, the best that any policy can do, and PPO's own path to the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from tercet.algo.statistics import best_of_n, best_of_n_kl, cluster_interval, tilted, turning_point
from tercet.jobs.kept import Row

Figures = dict[str, Any]
ENOUGH_SAMPLES = 100  # effective samples a prompt, below which importance weights rest on a handful of texts
_BETAS = [4.0 * 0.9**step for step in range(60)]  # from hardly any change to far more than samples can show
_NOT_TO_TURN = ("score", "bag_of_words")  # the trained score is what others are held against; words alone are no judge of style


def best_of_n_figures(draws: Sequence[Row], names: Sequence[str], most: int, seed: int) -> Figures:
    """Best-of-n by score for n = 1, 2, 4, ..., the score and every judge's mean gain over n = 1 with its interval over prompts.

    draws: the same number of rows for each prompt. The KL is that of distinct scores, an upper bound. Where the truth is known ("gold"),
    also the frontier: what no policy can exceed at that KL, by importance weights, as far as the samples reach. Empty without draws.
    """
    if not draws:
        return {}
    columns = {name: _by_prompt(draws, name) for name in names}
    scores = columns["score"]
    prompts, samples = scores.shape
    curve = []
    for n in _powers(min(most, samples)):
        point: Figures = {"n": n, "kl": best_of_n_kl(n)}
        for name, values in columns.items():
            best = torch.tensor([best_of_n(scores[i], values[i], n) for i in range(prompts)], dtype=torch.float64)
            point |= _gain(name, best, values.mean(1), seed)
        curve.append(point)
    found: Figures = {"prompts": prompts, "samples": samples, "curve": curve}
    if "gold" in columns:
        found["frontier"] = _frontier(columns, seed)
    return found


def path_of_ppo(
    sft: Sequence[Row], ppo: Sequence[Row], iterations: int, evaluations: Sequence[Figures], names: Sequence[str], seed: int
) -> Figures:
    """PPO's way from SFT to the end through the evaluations made while it ran, and where a judge turned down on it.

    sft, ppo: rows on the same prompts as the evaluations, each of which holds {"iteration", name: a value for each prompt}; those
    of other prompts or without a judge are left out. Gains are over SFT's responses to the same prompts.
    """
    start = {name: [float(row[name]) for row in sft] for name in (*names, "kl")}
    end = {name: [float(row[name]) for row in ppo] for name in (*names, "kl")}
    between = [one for one in evaluations if 0 < one["iteration"] < iterations and set(start) <= set(one)]
    between = [one for one in between if len(one["kl"]) == len(sft)]
    stops = [(0, start), *((one["iteration"], one) for one in between), (iterations, end)]
    columns = {name: torch.tensor([stop[name] for _, stop in stops], dtype=torch.float64) for name in start}
    points = []
    for place, (iteration, _) in enumerate(stops):
        kl = columns["kl"][place]
        low, high = cluster_interval(kl, torch.ones_like(kl), seed)
        point: Figures = {"iteration": iteration, "kl": float(kl.mean()), "kl_low": low, "kl_high": high}
        for name in names:
            point |= _gain(name, columns[name][place], columns[name][0], seed)
        points.append(point)
    turns = {}
    for name in names:
        turn = None if name in _NOT_TO_TURN else turning_point(columns[name], columns["score"], seed)
        if turn is not None:
            at = {key: stops[place][0] for key, place in (("iteration", turn.peak), ("low", turn.low), ("high", turn.high))}
            falls = {key: value for key, value in asdict(turn).items() if key in ("fall", "fall_low", "fall_high", "rise")}
            turns[name] = at | falls | {"kl": points[turn.peak]["kl"]}
    return {"prompts": len(sft), "points": points, "turns": turns}


def _frontier(columns: dict[str, Tensor], seed: int) -> list[Figures]:
    """Points of the best policies for score - beta * KL, from large beta to small, while the samples can show them."""
    found = []
    for beta in _BETAS:
        gold, divergence, effective = tilted(columns["score"], columns["gold"], beta)
        if effective < ENOUGH_SAMPLES:
            break
        score, _, _ = tilted(columns["score"], columns["score"], beta)
        point: Figures = {"beta": beta, "kl": float(divergence.mean()), "effective": effective}
        point |= _gain("score", score, columns["score"].mean(1), seed) | _gain("gold", gold, columns["gold"].mean(1), seed)
        found.append(point)
    return found


def _gain(name: str, values: Tensor, before: Tensor, seed: int) -> Figures:
    """The mean of values (P,) over prompts, and of their gain over `before` with its 95 % interval."""
    gains = values - before
    low, high = cluster_interval(gains, torch.ones_like(gains), seed)
    return {name: float(values.mean()), f"{name}_gain": float(gains.mean()), f"{name}_gain_low": low, f"{name}_gain_high": high}


def _by_prompt(draws: Sequence[Row], name: str) -> Tensor:
    """(P, N) float64: a value of each draw, prompts in the order in which they first come."""
    rows: dict[int, list[float]] = {}
    for row in draws:
        rows.setdefault(row["place"], []).append(float(row[name]))
    return torch.tensor(list(rows.values()), dtype=torch.float64)


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, itself included."""
    found = [2**power for power in range(most.bit_length()) if 2**power <= most]
    return found if found[-1] == most else [*found, most]

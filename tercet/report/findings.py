"""What a rule says, and the figures that rules share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from tercet.report.causes import CAUSES
from tercet.report.load import Record, RunData, number

Z95 = 1.96
FEW_LINES = 4  # rules over a series say nothing about shorter ones

Level = Literal["error", "warning", "ok"]


@dataclass(frozen=True)
class Finding:
    """One sentence of the verdict. figure: the number it rests on, as text; stage: which stage it speaks of; rule: its name in CAUSES,
    or that of something that is well; advice: what to do about it."""

    level: Level
    title: str
    text: str
    figure: str
    stage: str
    rule: str
    advice: str = ""


Rule = Callable[[RunData], Iterable[Finding]]


def fault(rule: str, value: float, text: str, figure: str, *, stage: str = "", level: Level | None = None) -> Iterable[Finding]:
    """The finding of that cause if the value is beyond one of its thresholds, else nothing. level: in place of the
    threshold's, where more than the value decides."""
    cause = CAUSES[rule]
    found = cause.level(value)
    if found is not None:
        title = cause.title.format(stage=stage and STAGE_NAMES[stage])
        yield Finding(level or found, title, text, figure, stage or cause.stage, rule, cause.advice)


STAGE_NAMES = {"pretrain": "Pretraining", "sft": "SFT", "reward": "The reward model", "ppo": "PPO"}


def on_prompts(run: RunData) -> str:
    """On which prompts the policies were evaluated."""
    return "training prompts (none could be held out)" if run.value("evaluation.held_out") == 0 else "held-out prompts"


def judged_by(run: RunData) -> str:
    """Who gave the headline's win rate, where that is no other judge than the reward that PPO was trained on; else ""."""
    return "by the reward that PPO was trained on" if run.summary.get("win_rate_by") == "the training score" else ""


def interval_of_mean(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high): 95 % interval by Student's t. One value has no spread: the interval is infinite."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = student95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def student95(freedom: int) -> float:
    """As algo/statistics.py has it, for 95 %: Abramowitz and Stegun 1964, 26.7.5."""
    return Z95 + sum(term / freedom**power for power, term in enumerate((2.372, 2.822, 2.556, 1.589), start=1))


def wilson(share: float, count: float) -> tuple[float, float]:
    """95 % interval of a share seen in `count` trials (Wilson 1927)."""
    z2 = Z95 * Z95
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 * math.sqrt(max(0.0, share * (1 - share)) / count + z2 / (4 * count * count)) / (1 + z2 / count)
    return centre - half, centre + half


def accuracy_interval(run: RunData) -> tuple[float, float] | None:
    """The 95 % interval of the reward model's held-out accuracy: as recorded, else from the number of pairs."""
    low, high = run.value("reward.eval_accuracy_low"), run.value("reward.eval_accuracy_high")
    if low is not None and high is not None:
        return low, high
    accuracy, pairs = run.value("reward.eval_accuracy"), run.value("reward.eval_pairs")
    return wilson(accuracy, pairs) if accuracy is not None and pairs else None


def main_samples(run: RunData) -> list[Record]:
    """The samples on held-out prompts of the main group, which the headline's figures are over."""
    return [row for row in run.samples if row.get("main") is not False]


def gains(run: RunData, name: str) -> list[float]:
    """PPO's value minus SFT's, such as its "score", on each held-out prompt of the main group that has both."""
    pairs = ((number(row.get(f"ppo_{name}")), number(row.get(f"sft_{name}"))) for row in main_samples(run))
    return [ppo - sft for ppo, sft in pairs if ppo is not None and sft is not None]


def last(values: list[float], share: float) -> list[float]:
    """The last `share` of a series, at least one value."""
    return values[-max(1, round(len(values) * share)) :]

"""Which stage failed? Stated rules over a run's figures; each finding carries the figure that it rests on.

A rule whose figures are missing says nothing. Errors come before warnings, and earlier stages before later ones: a poor reward
model explains a poor PPO, never the other way round.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from tercet.report.findings import FEW_LINES, Finding, Level, Rule, accuracy_interval, last
from tercet.report.load import STAGES, RunData
from tercet.report.rules_ppo import PPO_RULES
from tercet.report.text import percent, short

SFT_FINISHED_ERROR = 0.5  # share of SFT's responses that end by a stop token
SFT_FINISHED_WARNING = 0.8
SFT_LOSS_RISE = 1.05  # last held-out loss over the lowest
REWARD_LOW = 0.6  # held-out pair accuracy
REWARD_CEILING_GAP = 0.05  # annotator's ceiling minus held-out accuracy
REWARD_OVERFIT_GAP = 0.15  # training accuracy minus held-out accuracy
# explained_variance may lack a value (returns that are all equal); these may not.
MUST_BE_FINITE = ("loss", "grad_norm", "score", "reward", "kl", "entropy", "accuracy")

STAGE_NAMES = {"pretrain": "Pretraining", "sft": "SFT", "reward": "The reward model", "ppo": "PPO"}

__all__ = ["Finding", "verdict"]


def verdict(run: RunData) -> list[Finding]:
    """All findings: errors, then warnings, then what is well; within a level in the order of the stages."""
    found = [finding for rule in RULES for finding in rule(run)]
    if not any(finding.level != "ok" for finding in found):
        found.insert(0, _healthy(run))
    order = {"error": 0, "warning": 1, "ok": 2}
    return sorted(found, key=lambda finding: order[finding.level])  # stable: RULES are in the order of the stages


def _healthy(run: RunData) -> Finding:
    missing = [name for stage, name in (("sft", "SFT"), ("reward", "the reward model"), ("ppo", "PPO")) if not run.ran(stage)]
    if len(missing) == 3:
        return Finding("ok", "Nothing has run yet", "The run folder holds no metrics.", "", "run", "empty")
    if missing:
        text = f"No rule found a fault in what there is. Not run so far: {', '.join(missing)}."
        return Finding("ok", "Healthy so far", text, "", "run", "healthy")
    count = len({key for lines in run.metrics.values() for line in lines for key in line})
    text = f"All three stages ran, and none of the {len(RULES)} checks found a fault."
    return Finding("ok", "Healthy", text, f"{count} metrics read" if count else "", "run", "healthy")


def _not_finite(run: RunData) -> Iterable[Finding]:
    for stage in STAGES:
        broken: dict[str, float] = {}  # metric -> the first step at which it is not finite
        for key in sorted({key for line in run.metrics.get(stage, ()) for key in line if key.endswith(MUST_BE_FINITE)}):
            first_bad = next((x for x, y in zip(*run.series(stage, key), strict=True) if not math.isfinite(y)), None)
            if first_bad is not None:
                broken[key] = first_bad
        if broken:
            first = min(broken, key=broken.__getitem__)
            text = (
                f"{first} is not a finite number at step {short(broken[first])} of {stage}"
                f"{f', and {len(broken) - 1} more with it' if len(broken) > 1 else ''}. "
                "Everything after it is suspect: lower the learning rate, or use float32."
            )
            title = f"{STAGE_NAMES[stage]} produced values that are not numbers"
            yield Finding("error", title, text, f"step {short(broken[first])}", stage, "not_finite")
        skipped = sum(run.finite(stage, "skipped"))
        if skipped > 0:
            text = f"{short(skipped)} minibatches of {stage} were skipped because their loss or gradient was not finite."
            yield Finding("warning", "Minibatches were skipped", text, short(skipped), stage, "skipped")


def _sft_loss(run: RunData) -> Iterable[Finding]:
    losses = run.finite("sft", "eval_loss")
    if len(losses) < 2:
        return
    lowest, end = min(losses), losses[-1]
    if end > losses[0]:
        text = f"Held-out loss went from {short(losses[0])} to {short(end)}: fewer epochs, a lower learning rate or more data."
        yield Finding("error", "SFT made the model worse on held-out text", text, short(end), "sft", "sft_loss_rose")
    elif end > lowest * SFT_LOSS_RISE:
        text = f"Held-out loss was {short(lowest)} at its best and {short(end)} at the end: fewer epochs would do."
        yield Finding("warning", "SFT overfitted", text, short(end), "sft", "sft_overfit")


def _sft_stops(run: RunData) -> Iterable[Finding]:
    finished = run.value("sft.finished")
    if finished is None or finished >= SFT_FINISHED_WARNING:
        return
    text = (
        f"{percent(finished)} of SFT's responses end by a stop token; the others run into the length limit. Either the "
        "demonstrations are cut before their end, or the responses may not be as long as the demonstrations are."
    )
    level: Level = "error" if finished < SFT_FINISHED_ERROR else "warning"
    yield Finding(level, "SFT did not learn to stop", text, percent(finished), "sft", "sft_stop")


def _reward_accuracy(run: RunData) -> Iterable[Finding]:
    accuracy, interval = run.value("reward.eval_accuracy"), accuracy_interval(run)
    if accuracy is None:
        return
    low, high = interval or (accuracy, accuracy)
    between = f" (95 % interval {percent(low)} to {percent(high)})" if interval else ""
    ceiling = run.value("reward.ceiling")
    said = f"It ranks {percent(accuracy)} of held-out pairs as the annotators did{between}"
    if low <= 0.5:
        text = f"{said}; a coin ranks 50 %. PPO against it cannot help: look at the comparisons, or collect more."
        yield Finding(
            "error", "The reward model does not know what people prefer", text, percent(accuracy), "reward", "reward_chance"
        )
    elif accuracy < REWARD_LOW:
        text = f"{said}. That is little to learn from: more comparisons, or clearer ones."
        yield Finding("warning", "The reward model is weak", text, percent(accuracy), "reward", "reward_weak")
    elif ceiling is not None and high < ceiling - REWARD_CEILING_GAP:
        text = f"{said}; the annotators' own agreement allows {percent(ceiling)}."
        yield Finding("warning", "The reward model stays below what is possible", text, percent(accuracy), "reward", "reward_gap")
    else:
        allowed = f"; their own agreement allows {percent(ceiling)}" if ceiling is not None else ""
        text = f"{said}{allowed}."
        yield Finding("ok", "The reward model learned the preferences", text, percent(accuracy), "reward", "reward_good")


def _reward_overfit(run: RunData) -> Iterable[Finding]:
    train, held_out = run.finite("reward", "accuracy"), run.value("reward.eval_accuracy")
    if len(train) < FEW_LINES or held_out is None:
        return
    reached = statistics.fmean(last(train, 0.25))
    if reached - held_out > REWARD_OVERFIT_GAP:
        text = f"It ranks {percent(reached)} of its training pairs, and {percent(held_out)} of held-out ones: train one epoch."
        yield Finding("warning", "The reward model overfitted", text, percent(reached - held_out), "reward", "reward_overfit")


STAGE_NAMES = {"pretrain": "Pretraining", "sft": "SFT", "reward": "The reward model", "ppo": "PPO"}

RULES: tuple[Rule, ...] = (_not_finite, _sft_loss, _sft_stops, _reward_accuracy, _reward_overfit, *PPO_RULES)

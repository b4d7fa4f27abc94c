"""The rules on SFT and the reward model. How rules work: verdict.py; thresholds and advice: causes.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from tercet.report.findings import FEW_LINES, Finding, Rule, accuracy_interval, fault, interval_of_mean, last, main_samples
from tercet.report.load import STAGES, RunData, number
from tercet.report.text import percent, short, show_count, signed

# explained_variance may lack a value (returns that are all equal); these may not.
MUST_BE_FINITE = ("loss", "grad_norm", "score", "reward", "kl", "entropy", "accuracy")
ENOUGH_FOR_TEMPERATURE = 200  # held-out pairs
ENOUGH_FOR_LENGTH = 50


def _not_finite(run: RunData) -> Iterable[Finding]:
    for stage in STAGES:
        broken: dict[str, float] = {}  # metric -> the first step at which it is not finite
        for key in sorted({key for line in run.metrics.get(stage, ()) for key in line if key.endswith(MUST_BE_FINITE)}):
            first_bad = next((x for x, y in zip(*run.series(stage, key), strict=True) if not math.isfinite(y)), None)
            if first_bad is not None:
                broken[key] = first_bad
        if broken:
            first = min(broken, key=broken.__getitem__)
            more = f", and {len(broken) - 1} more with it" if len(broken) > 1 else ""
            text = f"{first} is not a finite number at step {short(broken[first])} of {stage}{more}."
            yield from fault("not_finite", len(broken), text, f"step {short(broken[first])}", stage=stage)
        skipped = sum(run.finite(stage, "skipped")) if stage == "ppo" else max(run.finite(stage, "skipped"), default=0.0)
        text = f"{show_count(int(skipped), 'step')} of {stage} left out: loss or gradient was not finite."
        yield from fault("skipped", skipped, text, short(skipped), stage=stage)


def _sft_loss(run: RunData) -> Iterable[Finding]:
    before, losses = run.finite("sft", "eval_loss_before"), run.finite("sft", "eval_loss")
    if not losses:
        return
    lowest, end = min(losses), losses[-1]
    text = f"Held-out loss went from {short(before[0])} to {short(end)} nats a token." if before else ""
    rose = list(fault("sft_loss_rose", end / before[0], text, short(end))) if before and before[0] > 0 else []
    text = f"Held-out loss was {short(lowest)} at its best and {short(end)} at the end."
    yield from rose or fault("sft_overfit", end / lowest if lowest > 0 else 1.0, text, short(end))


def _sft_none(run: RunData) -> Iterable[Finding]:
    kl = run.value("base.kl")
    if kl is None or run.value("evaluation.greedy"):
        return
    each = [value for row in main_samples(run) if (value := number(row.get("base_kl"))) is not None]
    most = interval_of_mean(each)[2] if each else kl  # of one sample nothing can be said: its interval is infinite
    text = f"The base model's responses lie {short(kl)} nats from the SFT policy, at most {short(most)}: both say the same."
    yield from fault("sft_none", most, text, short(kl))


def _sft_stops(run: RunData) -> Iterable[Finding]:
    finished, cut = run.value("sft.finished"), run.value("sft.truncated")
    if finished is None:
        return
    text = f"{percent(finished)} of SFT's responses end by a stop token; the others run into the length limit."
    if cut:
        text += f" {percent(cut)} of the demonstrations were cut at sft.max_length."
    yield from fault("sft_stop", finished, text, percent(finished))


def _reward_size(run: RunData) -> Iterable[Finding]:
    count, pairs = run.value("reward.comparisons"), run.value("reward.eval_pairs") or 0.0
    if count is None:
        return
    yield from fault(
        "reward_few", count, f"The reward model was trained on {show_count(int(count), 'comparison')}.", short(count)
    )
    text = f"{show_count(int(pairs), 'held-out pair')} to measure it on."
    yield from fault("reward_unmeasured", pairs, text, short(pairs))


def _reward_accuracy(run: RunData) -> Iterable[Finding]:
    accuracy, interval = run.value("reward.eval_accuracy"), accuracy_interval(run)
    if accuracy is None:
        return
    low, high = interval or (accuracy, accuracy)
    between = f" (95 % interval {percent(low)} to {percent(high)})" if interval else ""
    text = f"It ranks {percent(accuracy)} of held-out pairs as the annotators did{between}"
    figure = percent(accuracy)
    found = list(fault("reward_inverted", high, f"{text}: fewer than a coin.", figure))
    found = found or list(fault("reward_chance", low, f"{text}; a coin ranks 50 %.", figure))
    found = found or list(fault("reward_weak", accuracy, f"{text}.", figure))
    measured = not list(fault("reward_unmeasured", run.value("reward.eval_pairs") or 0.0, "", ""))
    if not found and not measured:
        return
    yield from found or [Finding("ok", "The reward model learned the preferences", f"{text}.", figure, "reward", "reward_good")]


def _known_accuracy(run: RunData) -> float | None:
    """The held-out accuracy, None where a coin may be as good: then nothing more can be said of what the model goes by."""
    accuracy, interval = run.value("reward.eval_accuracy"), accuracy_interval(run)
    return accuracy if interval is not None and interval[0] > 0.5 else None


def _reward_length(run: RunData) -> Iterable[Finding]:
    accuracy, alone = _known_accuracy(run), run.value("reward.length_accuracy")
    gap, low, pairs = (run.value(f"reward.{name}") for name in ("over_length", "over_length_low", "eval_pairs"))
    if accuracy is None or alone is None or gap is None or low is None or pairs is None or pairs < ENOUGH_FOR_LENGTH:
        return
    text = f"{percent(accuracy)} of held-out pairs in the right order, {percent(alone)} by length alone."
    found = list(fault("reward_length", gap, text, signed(gap)))
    if not found and low < 0:
        found = list(fault("reward_length", low, f"{text} That may be chance.", signed(gap), level="warning"))
    yield from found


def _reward_misled(run: RunData) -> Iterable[Finding]:
    """On the pairs in which following length is wrong."""
    accuracy = _known_accuracy(run)
    shares = {side: run.card.get(f"longer_{side}") for side in ("worse", "better")}
    known = [
        (share["accuracy"], share["high"], side)
        for side, share in shares.items()
        if isinstance(share, dict) and number(share.get("accuracy")) is not None and number(share.get("high")) is not None
    ]
    if accuracy is None or not known:
        return
    right, high, side = min(known)
    text = f"Where the longer response is {side}, it is right in {percent(right)} of the pairs; over all of them in {percent(accuracy)}."
    yield from fault("reward_misled", high, text, percent(right))


def _reward_overfit(run: RunData) -> Iterable[Finding]:
    train, held_out = run.finite("reward", "accuracy"), run.value("reward.eval_accuracy")
    if len(train) >= FEW_LINES and held_out is not None and held_out >= 0.5:
        reached = statistics.fmean(last(train, 0.25))
        text = f"It ranks {percent(reached)} of its training pairs, and {percent(held_out)} of held-out ones."
        yield from fault("reward_overfit", reached - held_out, text, percent(reached - held_out))


def _reward_confidence(run: RunData) -> Iterable[Finding]:
    temperature, pairs = run.value("reward.temperature"), run.value("reward.eval_pairs")
    if _known_accuracy(run) is not None and temperature is not None and pairs is not None and pairs >= ENOUGH_FOR_TEMPERATURE:
        text = f"Its differences of scores are {short(temperature)} times as large as its held-out accuracy warrants."
        yield from fault("reward_overconfident", temperature, text, short(temperature))


TRAINING_RULES: tuple[Rule, ...] = (
    _not_finite,
    _sft_loss,
    _sft_none,
    _sft_stops,
    _reward_size,
    _reward_accuracy,
    _reward_length,
    _reward_misled,
    _reward_overfit,
    _reward_confidence,
)

"""The rules on PPO and on its outcome. How rules work: verdict.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from tercet.report.findings import FEW_LINES, Finding, Level, Rule, interval_of_mean, last, score_gains
from tercet.report.load import RunData, number
from tercet.report.text import THIN, percent, plain, short, signed

KL_NONE = 0.5  # nats per response
KL_EXPLODED = 60.0
KL_NEGATIVE = -0.5
SAMPLER_GAP = 0.5  # nats a token between sampler and training forward
FINISHED_DROP_ERROR = 0.3  # SFT's finished share minus PPO's
FINISHED_DROP_WARNING = 0.1
ENTROPY_ERROR = 0.1  # last entropy over the first
ENTROPY_WARNING = 0.25
DISTINCT_ERROR = 0.4  # PPO's distinct bigrams over SFT's
DISTINCT_WARNING = 0.7
EXPLAINED_VARIANCE_LOW = 0.05  # median of the last half
CLIP_FRACTION_HIGH = 0.4  # mean of the last half
LENGTH_RATIO_HIGH = 1.8  # PPO's mean length over SFT's
LENGTH_RATIO_LOW = 0.3
GOLD_FALL = 0.2  # fall from the peak, as a share of the rise to it
GOLD_NOISE = 0.1  # and at least this many standard deviations of SFT's gold scores, where they are known


def _sampler(run: RunData) -> Iterable[Finding]:
    gaps = run.finite("ppo", "sampler_logprob_gap")
    if gaps and statistics.median(gaps) > SAMPLER_GAP:
        gap = statistics.median(gaps)
        text = f"Their log-probabilities of the same token lie {short(gap)} nats apart: sampling settings or precision differ."
        yield Finding("error", "The sampler and the policy are not the same model", text, short(gap), "ppo", "sampler_gap")


def final_kl(run: RunData) -> float | None:
    """Policy against reference at the end, nats per response: as evaluated, else the mean of the last tenth of the iterations."""
    evaluated, trained = run.value("ppo.kl"), run.finite("ppo", "kl")
    return evaluated if evaluated is not None else statistics.fmean(last(trained, 0.1)) if trained else None


def _kl(run: RunData) -> Iterable[Finding]:
    kl, win_low = final_kl(run), run.value("win_rate_low")
    if kl is None:
        return
    figure, budget = f"{short(kl)}{THIN}nats", run.value("ppo.kl_budget")
    limit = KL_EXPLODED if budget is None else budget
    if kl < KL_NEGATIVE:
        text = f"A mean KL of {short(kl)} nats cannot be: sampled text and log-probabilities come from different distributions."
        yield Finding("error", "PPO's KL is negative", text, figure, "ppo", "kl_negative")
    elif kl < KL_NONE:
        level: Level = "warning" if win_low is not None and win_low > 0.5 else "error"
        text = f"The KL to the SFT policy is {short(kl)} nats per response: lower kl_coef, raise the learning rate or run longer."
        yield Finding(level, "PPO never left the reference", text, figure, "ppo", "kl_none")
    elif kl > limit:
        named = "the budget of this run" if budget is not None else "a range in which the reward model can be trusted"
        text = (
            f"The KL is {short(kl)} nats per response; {named} ends at {short(limit)}: raise kl_coef or lower the learning rate."
        )
        yield Finding("error", "PPO ran away from the reference", text, figure, "ppo", "kl_exploded")


def _score(run: RunData) -> Iterable[Finding]:
    gains, sft, ppo = score_gains(run), run.value("sft.score"), run.value("ppo.score")
    if len(gains) >= 2:
        gain, low, high = interval_of_mean(gains)
        between = f" (95 % interval {signed(low)} to {signed(high)}, {short(len(gains))} prompts)"
    elif sft is not None and ppo is not None:
        gain = low = high = ppo - sft
        between = ""
    else:
        return
    if low > 0:
        text = f"On held-out prompts the score rose by {short(gain)}{between}."
        yield Finding("ok", "PPO raised the reward", text, signed(gain), "ppo", "score_rose")
    elif high < 0:
        text = f"On held-out prompts the score changed by {signed(gain)}{between}: it learned something else than the reward."
        yield Finding("error", "PPO lowered the reward", text, signed(gain), "ppo", "score_fell")
    else:
        text = f"On held-out prompts the score changed by {signed(gain)}{between}: no gain over SFT can be shown."
        yield Finding("error", "PPO did not raise the reward", text, signed(gain), "ppo", "score_flat")


def _wins(run: RunData) -> Iterable[Finding]:
    rate, low, high = run.value("win_rate"), run.value("win_rate_low"), run.value("win_rate_high")
    if rate is not None:
        low, high = rate if low is None else low, rate if high is None else high
        text = f"Against SFT on held-out prompts it wins {percent(rate)} (95 % interval {percent(low)} to {percent(high)})"
        if high < 0.5:
            yield Finding("error", "PPO's responses are worse than SFT's", f"{text}.", percent(rate), "ppo", "win_rate_low")
        elif low <= 0.5:
            yield Finding(
                "warning",
                "PPO's responses are no better than SFT's",
                f"{text}: an even match.",
                percent(rate),
                "ppo",
                "win_rate_even",
            )
        else:
            yield Finding("ok", "PPO's responses win", f"{text}.", percent(rate), "ppo", "win_rate_good")
    for judge, record in run.wins.items():
        judged, upper = number(record.get("win_rate")), number(record.get("high"))
        if judged is not None and upper is not None and upper < 0.5 and rate is not None and rate >= 0.5:
            text = f"By {plain(judge, 60)} it wins {percent(judged)}, the headline says {percent(rate)}: the reward was gamed."
            yield Finding("error", "A second judge prefers SFT", text, percent(judged), "ppo", "judge_disagrees")


def _over_optimised(run: RunData) -> Iterable[Finding]:
    """Gold (or a judge) turns down while the trained score goes on rising (Gao 2022)."""
    for key, name in (("gold", "gold score"), ("judge", "judge's score")):
        marks = [
            (at, value, score)
            for line in run.metrics.get("ppo", ())
            if (value := number(line.get(key))) is not None
            and (score := number(line.get("eval_score"))) is not None
            and (at := number(line.get("iteration"))) is not None
        ]
        if len(marks) < FEW_LINES:
            continue
        (_, first, _), (_, final, end_score) = marks[0], marks[-1]
        peak_at, peak, peak_score = max(marks, key=lambda mark: mark[1])
        spread = run.value("gold.sft_std") if key == "gold" else None
        fall = peak - final
        if fall > GOLD_FALL * (peak - first) and fall > GOLD_NOISE * (spread or 0.0) and end_score >= peak_score and fall > 0:
            text = (
                f"After iteration {short(peak_at)} the {name} fell from {short(peak)} to {short(final)}, while the trained score "
                f"went from {short(peak_score)} to {short(end_score)}: stop there, or raise kl_coef."
            )
            yield Finding("error", "PPO over-optimised the reward model", text, signed(-fall), "ppo", "over_optimised")
            return
    gold_sft, gold_ppo, sft, ppo = (run.value(key) for key in ("gold.sft", "gold.ppo", "sft.score", "ppo.score"))
    if gold_sft is None or gold_ppo is None:
        return
    if gold_ppo < gold_sft and sft is not None and ppo is not None and ppo > sft:
        text = f"The score rose from {short(sft)} to {short(ppo)}, gold fell from {short(gold_sft)} to {short(gold_ppo)}."
        title = "PPO over-optimised the reward model"
        yield Finding("error", title, text, signed(gold_ppo - gold_sft), "ppo", "over_optimised")


def _stops(run: RunData) -> Iterable[Finding]:
    sft, ppo = run.value("sft.finished"), run.value("ppo.finished")
    if sft is None or ppo is None or sft - ppo <= FINISHED_DROP_WARNING:
        return
    text = f"{percent(sft)} of SFT's responses end by a stop token, and {percent(ppo)} of PPO's: raise the missing-EOS penalty."
    level: Level = "error" if sft - ppo > FINISHED_DROP_ERROR else "warning"
    yield Finding(level, "PPO unlearned to stop", text, percent(ppo), "ppo", "finished_fell")


def _entropy(run: RunData) -> Iterable[Finding]:
    entropy = run.finite("ppo", "entropy")
    if len(entropy) < FEW_LINES:
        return
    start, end = statistics.fmean(entropy[: max(1, len(entropy) // 10)]), statistics.fmean(last(entropy, 0.1))
    if start > 0 and end / start < ENTROPY_WARNING:
        text = (
            f"It fell from {short(start)} to {short(end)} nats per token: the policy says one thing to everybody. Raise kl_coef."
        )
        level: Level = "error" if end / start < ENTROPY_ERROR else "warning"
        yield Finding(level, "PPO's entropy collapsed", text, percent(end / start), "ppo", "entropy_collapse")


def _diversity(run: RunData) -> Iterable[Finding]:
    sft, ppo = run.value("sft.distinct2"), run.value("ppo.distinct2")
    if not sft or ppo is None or ppo / sft >= DISTINCT_WARNING:
        return
    text = f"Distinct bigrams fell from {short(sft)} to {short(ppo)}, {percent(ppo / sft)} of SFT's: its responses look alike."
    level: Level = "error" if ppo / sft < DISTINCT_ERROR else "warning"
    yield Finding(level, "PPO lost diversity", text, percent(ppo / sft), "ppo", "distinct_fell")


def _value_model(run: RunData) -> Iterable[Finding]:
    explained = run.finite("ppo", "explained_variance")
    if len(explained) < FEW_LINES:
        return
    median = statistics.median(last(explained, 0.5))
    if median < EXPLAINED_VARIANCE_LOW:
        text = f"Its explained variance is {short(median)} (median of the last half): raise its learning rate."
        yield Finding("warning", "The value model explains nothing", text, short(median), "ppo", "value_model")


def _clipping(run: RunData) -> Iterable[Finding]:
    clipped = run.finite("ppo", "clip_fraction")
    if len(clipped) < FEW_LINES:
        return
    mean = statistics.fmean(last(clipped, 0.5))
    if mean > CLIP_FRACTION_HIGH:
        text = f"{percent(mean)} of the tokens hit the clip range (mean of the last half): lower the learning rate or ppo_epochs."
        yield Finding("warning", "PPO's steps are too large", text, percent(mean), "ppo", "clip_fraction")


def _length(run: RunData) -> Iterable[Finding]:
    sft, ppo = run.value("sft.length"), run.value("ppo.length")
    if not sft or ppo is None:
        return
    text = f"The mean response went from {short(sft)} to {short(ppo)} tokens"
    if ppo / sft > LENGTH_RATIO_HIGH:
        text += ": check that the reward does not pay for length."
        yield Finding("warning", "PPO's responses blew up in length", text, f"{short(ppo / sft)} ×", "ppo", "length_grew")
    elif ppo / sft < LENGTH_RATIO_LOW:
        text += ": check that the reward does not pay for saying nothing."
        yield Finding("warning", "PPO's responses shrank", text, f"{short(ppo / sft)} ×", "ppo", "length_shrank")


PPO_RULES: tuple[Rule, ...] = (
    _sampler,
    _kl,
    _score,
    _wins,
    _over_optimised,
    _stops,
    _entropy,
    _diversity,
    _value_model,
    _clipping,
    _length,
)

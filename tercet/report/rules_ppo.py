"""The rules on PPO and on its outcome. How rules work: verdict.py; thresholds and advice: causes.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from tercet.report.causes import CAUSES
from tercet.report.findings import FEW_LINES, Finding, Level, Rule, fault, gains, interval_of_mean, judged_by, last, on_prompts
from tercet.report.load import RunData, number
from tercet.report.text import THIN, percent, plain, short, signed

GAINS_OVER_LENGTH = 0.1  # mean lengths must differ by this share before a win can be called one of length


def _sampler(run: RunData) -> Iterable[Finding]:
    gaps = run.finite("ppo", "sampler_logprob_gap")
    if gaps:
        gap = statistics.median(gaps)
        yield from fault(
            "sampler_gap", gap, f"Their log-probabilities of the same token lie {short(gap)} nats apart.", short(gap)
        )


def _score_constant(run: RunData) -> Iterable[Finding]:
    spreads = run.finite("ppo", "score_std")
    if spreads:
        text = f"In no iteration did the scores of a batch differ by more than {short(max(spreads))}."
        yield from fault("score_constant", max(spreads), text, short(max(spreads)))


def final_kl(run: RunData) -> float | None:
    """Policy against reference at the end, nats per response: as evaluated, else the mean of the last tenth of the iterations. (What
    evaluation found at the likeliest tokens is no KL.)"""
    evaluated, trained = None if run.value("evaluation.greedy") else run.value("ppo.kl"), run.finite("ppo", "kl")
    return evaluated if evaluated is not None else statistics.fmean(last(trained, 0.1)) if trained else None


def _kl(run: RunData) -> Iterable[Finding]:
    kl, win_low = final_kl(run), run.value("win_rate_low")
    if kl is None:
        return
    figure = f"{short(kl)}{THIN}nats"
    negative = list(fault("kl_negative", kl, f"A mean KL of {short(kl)} nats cannot be.", figure))
    level: Level = "warning" if win_low is not None and win_low > 0.5 else "error"
    yield from negative or fault(
        "kl_none", kl, f"The KL from the SFT policy is {short(kl)} nats a response.", figure, level=level
    )


def _kl_exploded(run: RunData) -> Iterable[Finding]:
    kl, budget, length, cause = final_kl(run), run.value("ppo.kl_budget"), run.value("ppo.length"), CAUSES["kl_exploded"]
    if kl is None:
        return
    figure, lengths = f"{short(kl)}{THIN}nats", run.finite("ppo", "length")
    length = length if length is not None else lengths[-1] if lengths else None
    if budget is not None:
        if kl > budget:
            text = f"The KL is {short(kl)} nats a response; the budget of this run ends at {short(budget)}."
            yield Finding("error", cause.title, text, figure, "ppo", "kl_exploded", cause.advice)
    elif length:
        text = f"The KL is {short(kl)} nats a response, {short(kl / length)} a token: few of its words would have been SFT's."
        yield from fault("kl_exploded", kl / length, text, figure)


def _score_range(run: RunData) -> Iterable[Finding]:
    low, high, scores = run.value("ppo.score_range_low"), run.value("ppo.score_range_high"), run.finite("ppo", "score")
    if low is not None and high is not None and high > low and scores:
        mean = statistics.fmean(last(scores, 0.1))
        text = f"The mean score is {short(mean)}; texts such as those of its training score {short(low)} to {short(high)}."
        yield from fault("score_range", max(mean - high, low - mean) / (high - low), text, short(mean))


def _score(run: RunData) -> Iterable[Finding]:
    change, sft, ppo = gains(run, "score"), run.value("sft.score"), run.value("ppo.score")
    combined, what = gains(run, "combined"), "the score"
    if combined and combined != change:
        change, what = combined, "the score, clipped and with what an unended response loses,"
    if len(change) >= 2:
        gain, low, high = interval_of_mean(change)
        between = f" (95 % interval {signed(low)} to {signed(high)}, {short(len(change))} prompts)"
    elif sft is not None and ppo is not None:
        gain = low = high = ppo - sft
        between = ""
    else:
        return
    text = f"On {on_prompts(run)} {what} changed by {signed(gain)}{between}."
    found = list(fault("score_fell", high, text, signed(gain)))
    found = found or list(fault("score_flat", low if low != 0 else -1.0, text, signed(gain)))
    yield from found or [Finding("ok", "PPO raised the reward", text, signed(gain), "ppo", "score_rose")]


def _wins(run: RunData) -> Iterable[Finding]:
    rate, low, high = run.value("win_rate"), run.value("win_rate_low"), run.value("win_rate_high")
    if rate is None:
        return
    low, high = rate if low is None else low, rate if high is None else high
    by = judged_by(run) and f", {judged_by(run)}"
    text = f"Against SFT on {on_prompts(run)} it wins {percent(rate)}{by} (95 % interval {percent(low)} to {percent(high)})."
    found = list(fault("win_rate_low", high, text, percent(rate)))
    found = found or list(fault("win_rate_even", low if low != 0.5 else 0.0, text, percent(rate)))
    against = list(_other_judges(run, rate))
    if not found and not against:
        yield Finding("ok", "PPO's responses win", text, percent(rate), "ppo", "win_rate_good")
    yield from found
    if not found:
        yield from _length_controlled(run, rate)
    yield from against


def _other_judges(run: RunData, rate: float) -> Iterable[Finding]:
    for judge, record in run.wins.items():
        if judge == "score":  # no second judge: what PPO is trained on, which has a sentence of its own
            continue
        judged, upper = number(record.get("win_rate")), number(record.get("high"))
        if judged is not None and upper is not None and rate >= 0.5:
            text = f"By {plain(judge, 60)} it wins {percent(judged)}, the headline says {percent(rate)}."
            yield from fault("judge_disagrees", upper, text, percent(judged))


def _length_controlled(run: RunData, rate: float) -> Iterable[Finding]:
    controlled, low = run.value("lc_win_rate"), run.value("lc_win_rate_low")
    sft, ppo = run.value("sft.length"), run.value("ppo.length")
    if controlled is None or low is None or not sft or ppo is None or abs(ppo / sft - 1) < GAINS_OVER_LENGTH:
        return
    high = run.value("lc_win_rate_high")
    between = "" if high is None else f" (95 % interval {percent(low)} to {percent(high)})"
    text = f"It wins {percent(rate)}; where both responses are equally long, {percent(controlled)} is what is left{between}."
    yield from fault("win_by_length", low, text, percent(controlled))


def _over_optimised(run: RunData) -> Iterable[Finding]:
    """Gold (or a judge) turns down while the trained score goes on rising (Gao 2022)."""
    turns = run.path.get("turns")
    known = [(name, turn) for name, turn in turns.items() if isinstance(turn, dict)] if isinstance(turns, dict) else []
    for judge, raw in sorted(known, key=lambda pair: pair[0] != "gold"):
        turn = {key: number(value) for key, value in raw.items()}
        at, low, high, fall, surely = (turn.get(key) for key in ("iteration", "low", "high", "fall", "fall_low"))
        if at is None or fall is None or surely is None:
            continue
        name = {"gold": "the gold score", "judge": "the second reward model's score"}.get(
            judge, f"the score by {plain(judge, 60)}"
        )
        between = f" (95 % interval {short(low)} to {short(high)})" if low is not None and high is not None and low < high else ""
        since = f"After iteration {short(at)}{between}" if at else "From the first evaluation on"
        text = f"{since} {name} fell by {short(fall)}, while the trained score went on rising."
        yield from fault("over_optimised", surely, text, signed(-fall))
        return
    gold, score = (gains(run, key) for key in ("gold", "score"))
    if len(gold) < 2 or len(score) < 2:
        return
    (lost, _, high), (won, low, _) = interval_of_mean(gold), interval_of_mean(score)
    if low > 0:
        text = f"The trained score rose by {short(won)} over SFT's, and the gold score changed by {signed(lost)}."
        yield from fault("over_optimised", -high, text, signed(lost))


def _before_and_after(run: RunData, name: str) -> tuple[float | None, float | None]:
    """SFT's and PPO's figure as evaluated; where PPO did not come so far, that of its first iteration, which SFT sampled, and its last."""
    sft, ppo, trained = run.value(f"sft.{name}"), run.value(f"ppo.{name}"), run.finite("ppo", name)
    return (trained[0], trained[-1]) if ppo is None and len(trained) > 1 else (sft, ppo)


def _stops(run: RunData) -> Iterable[Finding]:
    sft, ppo = _before_and_after(run, "finished")
    changes = gains(run, "finished")
    by_chance = len(changes) >= 2 and interval_of_mean(changes)[2] >= 0
    if sft is not None and ppo is not None and not by_chance:
        text = f"{percent(sft)} of SFT's responses end by a stop token, and {percent(ppo)} of PPO's."
        yield from fault("finished_fell", sft - ppo, text, percent(ppo))


def _entropy(run: RunData) -> Iterable[Finding]:
    entropy = run.finite("ppo", "entropy")
    if len(entropy) < FEW_LINES:
        return
    start, end = statistics.fmean(entropy[: max(1, len(entropy) // 10)]), statistics.fmean(last(entropy, 0.1))
    if start > 0:
        text = f"It fell from {short(start)} to {short(end)} nats a token."
        yield from fault("entropy_collapse", end / start, text, percent(end / start))


def _diversity(run: RunData) -> Iterable[Finding]:
    sft, ppo = _before_and_after(run, "distinct2")
    if sft and ppo is not None:
        text = f"Distinct bigrams fell from {short(sft)} to {short(ppo)}, {percent(ppo / sft)} of SFT's."
        yield from fault("distinct_fell", ppo / sft, text, percent(ppo / sft))


def _repeats(run: RunData) -> Iterable[Finding]:
    sft, ppo = run.value("sft.repetition"), run.value("ppo.repetition")
    if sft is not None and ppo is not None:
        text = f"{percent(ppo)} of the bigrams of a response have stood in it before; in SFT's {percent(sft)}."
        yield from fault("repeats", ppo - sft, text, percent(ppo))


def _value_model(run: RunData) -> Iterable[Finding]:
    explained = run.finite("ppo", "explained_variance")
    if len(explained) >= FEW_LINES:
        median = statistics.median(last(explained, 0.5))
        text = f"Its explained variance is {short(median)} (median of the last half of the iterations)."
        yield from fault("value_model", median, text, short(median))


def _step_size(run: RunData) -> Iterable[Finding]:
    steps = run.finite("ppo", "approx_kl")
    if steps:
        iterations, values = run.series("ppo", "approx_kl")
        largest = max(steps)
        at = iterations[values.index(largest)]
        text = f"In iteration {short(at)} the policy moved {short(largest)} nats a token away from the one that had sampled."
        yield from fault("step_size", largest, text, short(largest))


def _clipping(run: RunData) -> Iterable[Finding]:
    clipped = run.finite("ppo", "clip_fraction")
    if len(clipped) >= FEW_LINES:
        mean = statistics.fmean(last(clipped, 0.5))
        text = f"{percent(mean)} of the tokens were clipped (mean of the last half of the iterations)."
        yield from fault("clip_fraction", mean, text, percent(mean))


def _length(run: RunData) -> Iterable[Finding]:
    sft, ppo = _before_and_after(run, "length")
    if sft and ppo is not None:
        text = f"The mean response went from {short(sft)} to {short(ppo)} tokens."
        for rule in ("length_grew", "length_shrank"):
            yield from fault(rule, ppo / sft, text, f"{short(ppo / sft)} ×")


PPO_RULES: tuple[Rule, ...] = (
    _sampler,
    _score_constant,
    _kl,
    _kl_exploded,
    _score_range,
    _score,
    _wins,
    _over_optimised,
    _stops,
    _entropy,
    _diversity,
    _repeats,
    _value_model,
    _step_size,
    _clipping,
    _length,
)

# Those that can be asked after each iteration: they go by the lines of training alone, and by nothing that is at the end only.
LIVE_RULES: tuple[Rule, ...] = (_sampler, _kl_exploded, _score_range, _entropy, _step_size, _clipping)

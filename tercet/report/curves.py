"""Which curves the page shows, stage by stage, and in which words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tercet.report.findings import interval_of_mean, wilson
from tercet.report.load import RunData, number
from tercet.report.plots import Line, Mark, draw
from tercet.report.text import percent, short


@dataclass(frozen=True)
class Curve:
    """A metric to draw. held_out: the metric's name when measured on held-out data. marks: (flat key or number, label)."""

    key: str
    title: str
    note: str
    held_out: str | None = None
    marks: tuple[tuple[str | float, str], ...] = ()
    share: bool = False  # a share, shown in per cent
    more: bool = False  # shown after the main curves, folded away


@dataclass(frozen=True)
class Plot:
    """A drawn curve: latest is the last value as text; legend holds (css class, label)."""

    title: str
    note: str
    latest: str
    svg: str
    legend: tuple[tuple[str, str], ...]
    more: bool


LEARNING_RATE = Curve("learning_rate", "Learning rate", "as scheduled")
GRADIENT = Curve("grad_norm", "Gradient norm", "before clipping")
LOSS = Curve("loss", "Loss", "nats per token learned from", held_out="eval_loss")

CURVES: dict[str, tuple[Curve, ...]] = {
    "pretrain": (Curve("loss", "Loss", "nats per token", held_out="eval_loss"), GRADIENT, LEARNING_RATE),
    "sft": (LOSS, GRADIENT, LEARNING_RATE),
    "reward": (
        Curve("loss", "Loss", "ranking loss per prompt", held_out="eval_loss", marks=((math.log(2), "a coin"),)),
        Curve(
            "accuracy",
            "Accuracy",
            "pairs ranked as the annotators did",
            held_out="eval_accuracy",
            marks=((0.5, "a coin"),),
            share=True,
        ),
        replace(GRADIENT, more=True),
        replace(LEARNING_RATE, more=True),
    ),
    "ppo": (
        Curve("score", "Training reward", "mean", held_out="eval_score", marks=(("sft.score", "SFT"),)),
        Curve(
            "kl", "KL", "policy against reference, nats per response", held_out="eval_kl", marks=(("ppo.kl_budget", "budget"),)
        ),
        Curve("entropy", "Entropy", "nats per token"),
        Curve("length", "Length", "tokens per response", marks=(("sft.length", "SFT"),)),
        Curve("finished", "Ended by a stop token", "share of responses", marks=(("sft.finished", "SFT"),), share=True),
        Curve("clip_fraction", "Clip fraction", "share of tokens whose clipped loss was the larger one", share=True),
        Curve("explained_variance", "Explained variance", "of the returns, by the value model", marks=((0.0, "nothing"),)),
        Curve("gold", "Gold score", "the truth, on the prompts of evaluation", marks=(("gold.sft", "SFT"),)),
        Curve("judge", "Judge's score", "by a model that PPO never saw"),
        Curve("distinct2", "Distinct bigrams", "share", marks=(("sft.distinct2", "SFT"),), more=True),
        Curve("reward", "Reward", "score minus kl_coef × KL", more=True),
        Curve("score_std", "Spread of the score", "standard deviation in a batch", more=True),
        Curve("kl_coef", "KL coefficient", "price of a nat", more=True),
        Curve("approx_kl", "Step size", "old against new policy, nats per token", more=True),
        Curve("policy_loss", "Policy loss", "clipped surrogate", more=True),
        Curve("value_loss", "Value loss", "clipped squared error", more=True),
        Curve("grad_norm", "Gradient norm, policy", "before clipping", more=True),
        Curve("value_grad_norm", "Gradient norm, value", "before clipping", more=True),
        Curve("sampler_logprob_gap", "Sampler gap", "sampler against training forward, nats", more=True),
        replace(LEARNING_RATE, more=True),
    ),
}


def stage_plots(run: RunData, stage: str) -> list[Plot]:
    """The curves of a stage that has any finite value, in the order above."""
    plots = (_plot(run, stage, curve) for curve in CURVES[stage])
    return [plot for plot in plots if plot is not None]


def _plot(run: RunData, stage: str, curve: Curve) -> Plot | None:
    apart = "evaluation" if stage == "ppo" and run.value("evaluation.held_out") == 0 else "held-out"
    sources = [(curve.key, "training", "main"), (curve.held_out, apart, "held-out")]
    lines = [_line(run, stage, key, label, role) for key, label, role in sources if key]
    lines = [line for line in lines if any(math.isfinite(y) for y in line.ys)]
    if not lines:
        return None
    values = ((run.value(at) if isinstance(at, str) else at, label) for at, label in curve.marks)
    marks = [Mark(y, label) for y, label in values if y is not None]
    show = percent if curve.share else short
    counter = "iteration" if stage == "ppo" else "step"
    svg = draw(
        f"{stage}-{curve.key}".replace("_", "-"),
        lines,
        x_label=counter,
        label=_words(curve, lines, show),
        marks=marks,
        share=curve.share,
    )
    legend = [(line.role, line.label) for line in lines] if len(lines) > 1 or lines[0].role != "main" else []
    legend += [("rule", f"{mark.label} {show(mark.y)}") for mark in marks]
    latest = next(y for y in reversed(lines[-1].ys) if math.isfinite(y))
    return Plot(curve.title, curve.note, show(latest), svg, tuple(legend), curve.more)


def _line(run: RunData, stage: str, key: str, label: str, role: str) -> Line:
    """A metric's series, with 95 % intervals where what was averaged is known: held-out pairs, or held-out prompts in the path of PPO."""
    xs, ys = run.series(stage, key)
    ends: dict[float, tuple[float, float]] = {}
    pairs = run.value("reward.eval_pairs")
    if (stage, key) == ("reward", "eval_accuracy") and pairs:
        ends = {x: wilson(y, pairs) for x, y in zip(xs, ys) if math.isfinite(y)}
    elif stage == "ppo":
        name = key.removeprefix("eval_")
        for one in run.evaluations if key.startswith("eval_") or key in ("gold", "judge") else ():
            at, column = number(one.get("iteration")), one.get(name)
            values = [value for raw in column if (value := number(raw)) is not None] if isinstance(column, list) else []
            if at is not None and values:
                ends[at] = interval_of_mean(values)[1:]
    known = bool(ends) and all(x in ends and math.isfinite(ends[x][0]) for x in xs)
    return Line(xs, ys, label, role, [ends[x][0] for x in xs] if known else (), [ends[x][1] for x in xs] if known else ())


def _words(curve: Curve, lines: Sequence[Line], show: Callable[[float], str]) -> str:
    """What a curve says to somebody who cannot see it."""
    parts = []
    for line in lines:
        ys = [y for y in line.ys if math.isfinite(y)]
        parts.append(
            f"{line.label}: {len(ys)} values, first {show(ys[0])}, last {show(ys[-1])}, "
            f"lowest {show(min(ys))}, highest {show(max(ys))}"
        )
    return f"{curve.title}, {curve.note}. {'; '.join(parts)}."

"""Was PPO worth it? Its path from SFT, best-of-n and the frontier, gain against KL, one plot a judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.ticker import MaxNLocator

from tercet.report.curves import Plot
from tercet.report.load import Record, RunData, number, records
from tercet.report.plots import GRID, INK, RULE, Line, draw_line, dress, paint_svg
from tercet.report.tables import judge_name
from tercet.report.text import THIN, short, signed


@dataclass(frozen=True)
class Comparison:
    """The section: sentences to lead in with, and the plots."""

    sentences: list[str]
    plots: list[Plot]


def comparison(run: RunData) -> Comparison | None:
    """None where the evaluation has left neither a path nor best-of-n."""
    points, curve = records(run.path.get("points")), records(run.best_of_n.get("curve"))
    known = points or curve
    if not known:
        return None
    judges = [key.removesuffix("_gain") for key in known[-1] if key.endswith("_gain")]
    judges.sort(key=lambda name: (["score", "judge", "gold"].index(name) if name in ("score", "judge", "gold") else 3, name))
    plots = [plot for name in judges if (plot := _plot(run, name, more=name == "bag_of_words")) is not None]
    return Comparison(_sentences(run, judges), plots) if plots else None


def equal_n(run: RunData, judge: str) -> tuple[float, bool] | None:
    """(n, beyond): for which n best-of-n from SFT's samples gains as much by that judge as PPO did, between the points by log n; beyond:
    PPO gained more than any n that was measured. None where either is unknown."""
    points, curve = records(run.path.get("points")), records(run.best_of_n.get("curve"))
    gain = number(points[-1].get(f"{judge}_gain")) if points else None
    known = [(number(one.get("n")), number(one.get(f"{judge}_gain"))) for one in curve]
    steps = [(n, value) for n, value in known if n is not None and value is not None]
    if gain is None or not steps:
        return None
    if gain <= steps[0][1]:
        return 1.0, False
    for (n, low), (more, high) in zip(steps, steps[1:]):
        if low < gain <= high:
            return math.exp(math.log(n) + (gain - low) / (high - low) * math.log(more / n)), False
    return steps[-1][0], True


def _sentences(run: RunData, judges: Sequence[str]) -> list[str]:
    points, prompts = records(run.path.get("points")), number(run.best_of_n.get("prompts"))
    said = [
        "Each point is a gain over SFT at its distance from SFT, with its 95 % interval. Further left is cheaper: less of the language "
        "model was given up for the gain."
    ]
    judge = next((name for name in ("judge", "gold", "score") if name in judges), "score")
    found, kl = equal_n(run, judge), number(points[-1].get("kl")) if points else None
    gain, low, high = (number(points[-1].get(f"{judge}_gain{end}")) if points else None for end in ("", "_low", "_high"))
    if gain is not None and gain <= 0 and kl is not None:
        said.append(f"By the {judge_name(judge)} PPO gained nothing: {signed(gain)} at a KL of {short(kl)} nats.")
    elif gain is not None and low is not None and high is not None and low <= 0 and kl is not None:
        said.append(
            f"By the {judge_name(judge)} PPO's gain of {signed(gain)} at a KL of {short(kl)} nats may be chance (95 % interval "
            f"{signed(low)} to {signed(high)}): more held-out prompts would tell."
        )
    elif found is not None and kl is not None:
        n, beyond = found
        much = f"more than the best of {short(n)}" if beyond else f"as much as the best of about {short(round(n))}"
        said.append(
            f"By the {judge_name(judge)} PPO gained {much} of SFT's samples, picked by the training reward, would have, without "
            f"sampling more than once. Its KL is {short(kl)} nats; that of best-of-{short(max(1, round(n)))} is "
            f"{short(math.log(max(1, round(n))) - (max(1, round(n)) - 1) / max(1, round(n)))} (log n - (n - 1)/n, an upper bound)."
        )
    if prompts:
        said.append(f"Best-of-n on {short(prompts)} prompts, PPO on {short(number(run.path.get('prompts')) or 0)}.")
    return said


def _plot(run: RunData, judge: str, more: bool) -> Plot | None:
    path = line_of_gains(records(run.path.get("points")), judge, "PPO, evaluated while training", "main")
    best = line_of_gains(records(run.best_of_n.get("curve")), judge, "best of n from SFT", "held-out")
    name = "what no policy exceeds" if judge == "score" else "the best policies for the score"
    frontier = line_of_gains(records(run.best_of_n.get("frontier")), judge, name, "third", plain_line=True)
    lines = [line for line in (path, best, frontier) if line is not None]
    if not lines:
        return None
    turn = _turn(run, judge)

    def paint(axes: matplotlib.axes.Axes) -> None:
        axes.axhline(0, color=GRID, linewidth=0.9, zorder=1)
        if turn is not None:
            at, low, high = turn
            axes.axvspan(math.sqrt(low), math.sqrt(high), color=RULE, alpha=0.15, linewidth=0, zorder=1)
            axes.axvline(math.sqrt(at), color=RULE, linewidth=0.9, dashes=(4, 3), zorder=1.5)
        paint_gains(axes, lines)

    title, latest = judge_name(judge), lines[0].ys[-1]
    title = title[:1].upper() + title[1:]
    words = "; ".join(
        f"{line.label}: " + ", ".join(f"{signed(y)} at {short(x * x)} nats" for x, y in zip(line.xs, line.ys)) for line in lines
    )
    legend = [(line.role, line.label) for line in lines]
    legend += [("rule", f"turns down at {short(turn[0])}{THIN}nats")] if turn is not None else []
    svg = paint_svg(f"frontier-{judge}", f"{title}, gain over SFT. {words}.", paint)
    return Plot(title, "gain over SFT on the same prompts", signed(latest), svg, tuple(legend), more)


def line_of_gains(points: Sequence[Record], judge: str, label: str, role: str, plain_line: bool = False) -> Line | None:
    """Gains against the root of the KL; None without a point."""
    keys = ("kl", f"{judge}_gain", f"{judge}_gain_low", f"{judge}_gain_high")
    rows = [[number(point.get(key)) for key in keys] for point in points]
    whole = [[value for value in row if value is not None] for row in rows if None not in row]
    if not whole:
        return None
    kls, gains, lows, highs = zip(*whole)
    return Line(
        [math.sqrt(max(0.0, kl)) for kl in kls],
        gains,
        label,
        role,
        () if plain_line else lows,
        () if plain_line else highs,
        plain_line,
    )


def _turn(run: RunData, judge: str) -> tuple[float, float, float] | None:
    """KL at the judge's peak, and the range of KL over the iterations of its interval."""
    turns = run.path.get("turns")
    turn = turns.get(judge) if isinstance(turns, dict) else None
    if not isinstance(turn, dict):
        return None
    at, low, high = (number(turn.get(key)) for key in ("kl", "low", "high"))
    if at is None or low is None or high is None:
        return None
    kls = [
        kl
        for point in records(run.path.get("points"))
        if (kl := number(point.get("kl"))) is not None and low <= (number(point.get("iteration")) or 0.0) <= high
    ]
    return max(0.0, at), max(0.0, min([at, *kls])), max(0.0, max([at, *kls]))


def paint_gains(axes: matplotlib.axes.Axes, lines: Sequence[Line]) -> None:
    """Lines of `line_of_gains`, with whole or round numbers of nats at their places on the root scale."""
    for line in lines:
        draw_line(axes, line)
    dress(axes, "KL from SFT, nats a response (root scale)", lines, share=False)
    most = max(x for line in lines for x in line.xs) ** 2
    found = MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(0, max(most, 1e-3))
    ticks = [value for value in found if 0 <= value <= most * 1.02]
    axes.set_xticks([math.sqrt(value) for value in ticks], [f"{value:g}" for value in ticks], color=INK)

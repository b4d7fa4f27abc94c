"""The reward model's card on the page: reliability, margins, scores of four kinds of text, and what simpler rules reach."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib

from tercet.report.curves import Plot
from tercet.report.load import Record, RunData, number, records
from tercet.report.plots import COLOURS, RULE, Line, draw_line, dress, paint_svg
from tercet.report.tables import Table
from tercet.report.text import MINUS, percent, plain, short, tenths

TEXTS = (
    ("chosen", "main", "chosen"),
    ("rejected", "held-out", "rejected"),
    ("demonstrations", "third", "demonstrations"),
    ("sft", "fourth", "SFT's samples"),
)


def plots(run: RunData) -> list[Plot]:
    """Those that the card has figures for."""
    found = [_reliability(run.card), _margins(run.card), _histogram(run.card)]
    return [plot for plot in found if plot is not None]


def table(run: RunData) -> Table | None:
    """Accuracy of the model, of parts of the pairs, and of simpler rules."""
    card = run.card
    accuracy, pairs = number(card.get("accuracy")), number(card.get("pairs"))
    if accuracy is None or pairs is None:
        return None
    rows = [
        (
            "The reward model",
            "all held-out pairs",
            [tenths(accuracy), _between(card, "accuracy_low", "accuracy_high"), short(pairs)],
        )
    ]
    for name, note in (
        ("longer_better", "the longer response is preferred"),
        ("longer_worse", "the longer response is not preferred"),
    ):
        rows += _part(card.get(name), "Pairs in which", note)
    for part in records(card.get("by_source")):
        rows += _part(part, "Source", plain(part.get("source"), 60) or "none given")
    for key, name, note in (
        ("bag_of_words_accuracy", "Words alone", "a linear model on the same comparisons"),
        ("length_accuracy", "Length alone", "the longer or the shorter, as in training"),
    ):
        value = number(card.get(key))
        if value is not None:
            rows.append((name, note, [tenths(value), "–", short(pairs)]))
    if number(card.get("chance_low")) is not None:
        rows.append(
            (
                "Chance",
                "the same scores, labels dealt at random",
                [tenths(0.5), _between(card, "chance_low", "chance_high"), short(pairs)],
            )
        )
    return Table("Held-out pairs in the annotators' order", ["Accuracy", "95 % interval", "Pairs"], rows)


def sentences(run: RunData) -> list[str]:
    """Calibration and length in words."""
    error, temperature, correlation = (
        number(run.card.get(key)) for key in ("calibration_error", "temperature", "length_correlation")
    )
    said = []
    if error is not None and temperature is not None and not 0.011 < temperature < 99:  # the ends of its search
        said.append(
            f"Its probabilities are off by {percent(error)} on average; how sure it may be cannot be told from these pairs: nearly all of "
            "them are ranked right, or its scores say nothing of them."
        )
    elif error is not None and temperature is not None:
        manner = (
            "well calibrated"
            if 0.8 <= temperature <= 1.25
            else "too sure of itself"
            if temperature > 1
            else "less sure than it could be"
        )
        said.append(
            f"Its probabilities are off by {percent(error)} on average: {manner} (divided by {short(temperature)}, its differences of scores "
            "fit the held-out choices best)."
        )
    if correlation is not None:
        said.append(f"Its scores and the lengths of the responses have a correlation of {short(correlation)}.")
    return said


def _between(record: Record, low: str, high: str) -> str:
    ends = number(record.get(low)), number(record.get(high))
    return "–" if ends[0] is None or ends[1] is None else f"{tenths(ends[0])} to {tenths(ends[1])}"


def _part(part: object, name: str, note: str) -> list[tuple[str, str, list[str]]]:
    if not isinstance(part, dict) or number(part.get("accuracy")) is None:
        return []
    count = number(part.get("pairs"))
    return [
        (
            name,
            note,
            [tenths(number(part["accuracy"]) or 0.0), _between(part, "low", "high"), "–" if count is None else short(count)],
        )
    ]


def _bins(card: Record, key: str) -> Line | None:
    """The accuracies of bins against their means, with intervals."""
    names = ("mean", "accuracy", "low", "high")
    rows = [[number(one.get(name)) for name in names] for one in records(card.get(key))]
    whole = [[value for value in row if value is not None] for row in rows if None not in row]
    if not whole:
        return None
    means, accuracies, lows, highs = zip(*whole)
    return Line(means, accuracies, "accuracy", "main", lows, highs)


def _reliability(card: Record) -> Plot | None:
    line = _bins(card, "by_confidence")
    if line is None:
        return None

    def paint(axes: matplotlib.axes.Axes) -> None:
        axes.plot([0.5, 1], [0.5, 1], color=RULE, linewidth=0.9, dashes=(4, 3), zorder=1.5)
        draw_line(axes, line)
        dress(axes, "the model's probability of its own choice", [line], share=True)
        axes.set_xticks([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], ["50 %", "60 %", "70 %", "80 %", "90 %", "100 %"])

    error = number(card.get("calibration_error"))
    svg = paint_svg("card-reliability", f"Reliability: {_said(line, percent)}.", paint)
    latest = "" if error is None else f"{percent(error)} off"
    return Plot(
        "Can its confidence be believed?", "accuracy by confidence", latest, svg, (("rule", "as often right as it says"),), False
    )


def _margins(card: Record) -> Plot | None:
    line = _bins(card, "by_margin")
    if line is None:
        return None

    def paint(axes: matplotlib.axes.Axes) -> None:
        axes.axhline(0.5, color=RULE, linewidth=0.9, dashes=(4, 3), zorder=1.5)
        draw_line(axes, line)
        dress(axes, "difference of the two scores (fifths of the pairs)", [line], share=True)

    svg = paint_svg("card-margins", f"Accuracy by margin: {_said(line, short)}.", paint)
    return Plot("Accuracy by margin", "how far apart the two scores are", percent(line.ys[-1]), svg, (("rule", "a coin"),), False)


def _said(line: Line, show: Callable[[float], str]) -> str:
    return ", ".join(f"{percent(y)} at {show(x)}" for x, y in zip(line.xs, line.ys))


def _histogram(card: Record) -> Plot | None:
    histograms = card.get("histograms")
    if not isinstance(histograms, dict) or not isinstance(histograms.get("edges"), list):
        return None
    edges = [value for edge in histograms["edges"] if (value := number(edge)) is not None]
    shown: list[tuple[str, str, list[float], float | None]] = []
    for key, role, label in TEXTS:
        part = histograms.get(key)
        counts = (
            [value for count in part.get("counts", ()) if (value := number(count)) is not None] if isinstance(part, dict) else []
        )
        if len(counts) == len(edges) - 1 and sum(counts) > 0:
            shown.append((label, role, [count / sum(counts) for count in counts], number(part.get("mean") if part else None)))
    if len(edges) < 2 or not shown:
        return None

    def paint(axes: matplotlib.axes.Axes) -> None:
        for _, role, shares, _ in shown:
            colour = COLOURS[role]
            axes.stairs(shares, edges, color=colour, linewidth=1.4, zorder=3)
            axes.stairs(shares, edges, color=colour, fill=True, alpha=0.06, linewidth=0, zorder=2)
        dress(axes, "score, as PPO sees it", [Line(edges, [], "")], share=True)
        axes.set_ylim(bottom=0)

    words = "; ".join(f"{label}: mean {short(mean)}" for label, _, _, mean in shown if mean is not None)
    legend = tuple(
        (role, label if mean is None else f"{label} {mean + 0.0:.2f}".replace("-0.00", "0.00").replace("-", MINUS))
        for label, role, _, mean in shown
    )
    svg = paint_svg("card-histogram", f"Scores of four kinds of text. {words}.", paint)
    return Plot("Scores", "share of texts; means below", "", svg, legend, False)

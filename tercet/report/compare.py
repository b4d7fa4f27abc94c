"""Several run folders -> one page: verdicts, figures, settings that differ, and their curves in one plot each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

from tercet.report import tables
from tercet.report.curves import CURVES, Plot
from tercet.report.findings import Finding, judged_by
from tercet.report.frontier import line_of_gains, paint_gains
from tercet.report.load import RunData, load_run, records
from tercet.report.page import fill, sentence, write_page
from tercet.report.plots import COLOURS, Line, dress, paint_svg, smooth, thin
from tercet.report.tables import Table
from tercet.report.text import percent, plain, short
from tercet.report.verdict import verdict

ROLES = ("main", "held-out", "third", "fourth", "fifth", "sixth")
MOST = len(ROLES)
# key of the summary (or policy.figure) -> its name; what of a run is worth a row
FIGURES = {
    "win_rate": "PPO preferred to SFT",
    "lc_win_rate": "the same at equal length",
    "gold.sft": "gold score, SFT",
    "gold.ppo": "gold score, PPO",
    "gold.win_rate": "PPO preferred to SFT by gold",
    "ppo.score": "training reward, PPO",
    "ppo.combined": "the same after its clip and the rule for unended responses",
    "ppo.kl": "KL from SFT, nats a response",
    "ppo.length": "tokens a response, PPO",
    "sft.length": "tokens a response, SFT",
    "ppo.finished": "ended by a stop token, PPO",
    "ppo.distinct2": "distinct bigrams, PPO",
    "ppo.repetition": "repetition, PPO",
    "ppo.perplexity": "perplexity, PPO",
    "reward.eval_accuracy": "reward model's accuracy",
    "reward.comparisons": "comparisons",
    "sft.eval_loss": "SFT's held-out loss",
    "seconds": "seconds",
}
SERIES = ("score", "kl", "entropy", "length", "finished", "explained_variance", "judge", "gold")
GAINS = ("score", "judge", "gold")
NOT_SETTINGS = ("output",)


@dataclass(frozen=True)
class Column:
    """A run in the comparison: its name, unlike any other's, and its colour."""

    name: str
    role: str
    run: RunData
    findings: list[Finding]


def write_comparison(folders: Sequence[Path], target: Path) -> Path:
    """One page for several run folders. Raises FileNotFoundError for a folder that is not there, ValueError for fewer than two or more
    than MOST of them."""
    if not 2 <= len(folders) <= MOST:
        raise ValueError(f"a comparison takes 2 to {MOST} runs, not {len(folders)}")
    names = _names(folders)
    for folder in folders:
        if folder.is_dir() and not (folder / "config.yaml").exists():
            raise FileNotFoundError(f"{folder} is no run folder: it has no config.yaml")
    loaded = [load_run(folder) for folder in folders]
    columns = [Column(name, role, run, verdict(run)) for name, role, run in zip(names, ROLES, loaded)]
    page = fill(
        "compare.html",
        columns=[
            (column.name, column.role, sentence(column.findings, judged_by(column.run)), column.findings[0].level)
            for column in columns
        ],
        figures=_figures(columns),
        settings=_settings(columns),
        gains=[plot for judge in GAINS if (plot := _gains(columns, judge)) is not None],
        curves=[plot for key in SERIES if (plot := _curve(columns, key)) is not None],
        problems=[f"{column.name}: {plain(problem, 300)}" for column in columns for problem in column.run.problems],
    )
    write_page(target, page)
    return target


def settings_of(config: str) -> dict[str, str]:
    """config.yaml as flat keys ("ppo.kl.coef", "ppo.rewards.0.kind") with their values as text; nothing of a file that cannot be read."""
    import yaml  # here, because a run's own report has no use for it

    try:
        values = yaml.safe_load(config)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return dict(_leaves(values, "")) if isinstance(values, dict) else {}


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str]]:
    inside = value.items() if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else ()
    for name, inner in inside:
        yield from _leaves(inner, f"{key}.{name}".removeprefix("."))
    if not inside:  # a value, or an empty list or section
        yield key, {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names; with as many parents as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return [plain(name, 60) for name in names]
    return [f"{plain('/'.join(part[-1:]), 50)} {place + 1}" for place, part in enumerate(parts)]


def _figures(columns: Sequence[Column]) -> Table:
    rows = []
    for key, name in FIGURES.items():
        values = [column.run.value(key) for column in columns]
        if any(value is not None for value in values):
            cells = [tables.show(key, value) for value in values]
            low, high = ([column.run.value(f"{key}_{end}") for column in columns] for end in ("low", "high"))
            for place, (start, end) in enumerate(zip(low, high)):
                if start is not None and end is not None:
                    cells[place] += f" ({percent(start)} to {percent(end)})"
            rows.append((name, "", cells))
    return Table("Figures, with 95 % intervals where they are known", [column.name for column in columns], rows)


def _settings(columns: Sequence[Column]) -> Table | None:
    """The settings in which the runs differ."""
    flat = [settings_of(column.run.config) for column in columns]
    keys = sorted({key for settings in flat for key in settings} - set(NOT_SETTINGS))
    rows = [
        (key, "", [plain(settings.get(key, "–"), 80) for settings in flat])
        for key in keys
        if len({settings.get(key, "null") for settings in flat}) > 1  # what is not set is null, or not there at all
    ]
    return Table("Settings that differ", [column.name for column in columns], rows) if rows else None


def _gains(columns: Sequence[Column], judge: str) -> Plot | None:
    lines = [
        line
        for column in columns
        if (line := line_of_gains(records(column.run.path.get("points")), judge, column.name, column.role)) is not None
    ]
    if not lines:
        return None

    name, paint = tables.judge_name(judge), partial(paint_gains, lines=lines)
    return _plot(f"gain-{judge}", name[:1].upper() + name[1:], "gain over SFT on the same prompts", lines, short, paint)


def _curve(columns: Sequence[Column], key: str) -> Plot | None:
    curve = next(curve for curve in CURVES["ppo"] if curve.key == key)
    lines = [Line(*column.run.series("ppo", key), column.name, column.role) for column in columns]
    lines = [line for line in lines if any(math.isfinite(y) for y in line.ys)]
    if not lines:
        return None

    def paint(axes: matplotlib.axes.Axes) -> None:
        for line in lines:
            average = smooth(line.ys, max(1, len(line.ys) // 20))
            axes.plot(*thin(line.xs, average), color=COLOURS[line.role], linewidth=1.5, zorder=3)
        dress(axes, "iteration", lines, share=curve.share)

    return _plot(f"curve-{key}".replace("_", "-"), curve.title, curve.note, lines, percent if curve.share else short, paint)


def _plot(
    name: str,
    title: str,
    note: str,
    lines: Sequence[Line],
    show: Callable[[float], str],
    paint: Callable[[matplotlib.axes.Axes], None],
) -> Plot:
    last = [(line, next(y for y in reversed(line.ys) if math.isfinite(y))) for line in lines]
    words = "; ".join(f"{line.label}: last {show(y)}" for line, y in last)
    legend = tuple((line.role, f"{line.label} {show(y)}") for line, y in last)
    return Plot(title, note, "", paint_svg(name, f"{title}. {words}.", paint), legend, False)

"""Run folder -> RunData. Every file may be missing, cut short or damaged: what can be read is shown, what cannot is named."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STAGES = ("pretrain", "sft", "reward", "ppo")
COUNTERS = ("iteration", "step")  # what a metrics line is counted by, in order of preference
LARGEST = 1e30  # a value beyond this is as broken as an infinity, and no axis can show it
GROUPED = re.compile(r"^(?P<name>.+?)\[(?P<group>.+)\]$", re.DOTALL)

Record = dict[str, Any]


@dataclass
class RunData:
    """What a run folder holds. Everything is optional; an empty RunData is valid.

    summary: flat keys ("ppo.kl"), values that belong to one group of prompts as "win_rate[group]". metrics and timings: stage ->
    lines in file order. policies: name ("sft", "ppo", "base") -> figures. wins: judge -> {"win_rate", "low", "high", "n"}.
    samples: one record a held-out prompt. evaluations: those made during PPO, each value a list over prompts. card, path, best_of_n:
    the files of that name (docs/metrics.md). prints: stage -> fingerprint of what it was made from. unfinished: the stage that has begun and
    not ended. problems: one sentence for each file or line that could not be read.
    """

    name: str = "run"
    config: str = ""
    summary: Record = field(default_factory=dict)
    metrics: dict[str, list[Record]] = field(default_factory=dict)
    timings: dict[str, list[Record]] = field(default_factory=dict)
    samples: list[Record] = field(default_factory=list)
    policies: dict[str, Record] = field(default_factory=dict)
    wins: dict[str, Record] = field(default_factory=dict)
    evaluations: list[Record] = field(default_factory=list)
    card: Record = field(default_factory=dict)
    path: Record = field(default_factory=dict)
    best_of_n: Record = field(default_factory=dict)
    prints: dict[str, Record] = field(default_factory=dict)
    unfinished: str | None = None
    problems: list[str] = field(default_factory=list)

    def value(self, key: str) -> float | None:
        """A finite figure by its flat key: from the summary, else ("ppo.kl") from the policy of that name; None if unknown."""
        found = number(self.summary.get(key))
        if found is None and "." in key:
            owner, name = key.split(".", 1)
            found = number(self.policies.get(owner, {}).get(name))
        return found

    def series(self, stage: str, key: str) -> tuple[list[float], list[float]]:
        """x and y of a metric, one entry for each line that has the key; y is NaN where the value is not a finite number."""
        xs: list[float] = []
        ys: list[float] = []
        for index, line in enumerate(self.metrics.get(stage, ())):
            if line.get(key) is None:
                continue
            at = next((x for x in (number(line.get(counter)) for counter in COUNTERS) if x is not None), float(index))
            y = number(line[key])
            xs.append(at)
            ys.append(math.nan if y is None else y)
        return xs, ys

    def finite(self, stage: str, key: str) -> list[float]:
        """The finite values of a metric, in order."""
        return [y for y in self.series(stage, key)[1] if math.isfinite(y)]

    def ran(self, stage: str) -> bool:
        """Whether the stage has begun to train, or ended. (Figures alone say nothing: sft.score is there without SFT, too.)"""
        return bool(self.metrics.get(stage)) or f"{stage}.seconds" in self.summary

    def groups(self) -> dict[str, dict[str, float]]:
        """group -> figure -> value, from the summary's "figure[group]" keys."""
        found: dict[str, dict[str, float]] = {}
        for key, raw in self.summary.items():
            match, value = GROUPED.match(key), number(raw)
            if match and value is not None:
                found.setdefault(match["group"], {})[match["name"]] = value
        return found


def number(value: object) -> float | None:
    """A finite float, or None for anything else. Booleans count as 0 and 1: means of `finished` are taken over them."""
    if not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:  # JSON allows integers that no float holds
        return None
    return result if abs(result) <= LARGEST else None  # False for NaN


def records(value: object) -> list[Record]:
    """The records of a list; nothing for anything else."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def load_run(folder: Path) -> RunData:
    """Read a run folder (docs/metrics.md has its files). Raises FileNotFoundError where there is no such folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such run folder; give the folder that `tercet run` wrote.")
    problems: list[str] = []
    run = RunData(name=folder.resolve().name or "run", problems=problems)
    run.config = _text(folder, "config.yaml", problems) or ""
    run.summary = _object(folder, "summary.json", problems)
    for stage in STAGES:
        run.metrics[stage] = _lines(folder, f"{stage}/metrics.jsonl", problems)
        run.timings[stage] = _lines(folder, f"{stage}/timings.jsonl", problems)
    run.samples = _lines(folder, "evaluation/samples.jsonl", problems)
    run.evaluations = _lines(folder, "ppo/evaluations.jsonl", problems)
    run.policies = _records(_object(folder, "evaluation/policies.json", problems))
    run.wins = _records(_object(folder, "evaluation/wins.json", problems))
    run.card = _object(folder, "evaluation/reward_card.json", problems) or _object(folder, "reward/card.json", problems)
    run.path = _object(folder, "evaluation/path.json", problems)
    run.best_of_n = _object(folder, "evaluation/best_of_n.json", problems)
    for stage, place in (*((stage, stage) for stage in STAGES), ("evaluate", "evaluation")):
        run.prints |= _records({stage: _object(folder, f"{place}/done.json", problems).get("fingerprint")})
    ended = {stage for stage in STAGES if (folder / stage / "done.json").exists() or f"{stage}.seconds" in run.summary}
    run.unfinished = next((stage for stage in STAGES if run.metrics[stage] and stage not in ended), None)
    return run


def _text(folder: Path, name: str, problems: list[str]) -> str | None:
    try:
        return (folder / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{name} could not be read: {error.strerror or error}.")
        return None


def _object(folder: Path, name: str, problems: list[str]) -> Record:
    text = _text(folder, name, problems)
    if text is None:
        return {}
    value = _parse(text)
    if isinstance(value, dict):
        return value
    problems.append(f"{name} is not a JSON object and was left out.")
    return {}


def _lines(folder: Path, name: str, problems: list[str]) -> list[Record]:
    text = _text(folder, name, problems) or ""
    # Not splitlines(): that also cuts at U+2028 and its like, which are legal inside a JSON string.
    rows = [row for row in text.split("\n") if row.strip()]
    values = [_parse(row) for row in rows]
    records = [value for value in values if isinstance(value, dict)]
    bad = len(rows) - len(records)
    if bad:
        lines = "1 line of" if bad == 1 else f"{bad} of {len(rows)} lines of"
        problems.append(f"{lines} {name} could not be read and {'was' if bad == 1 else 'were'} left out.")
    return records


def _parse(text: str) -> object:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value


def _records(value: Record) -> dict[str, Record]:
    return {name: record for name, record in value.items() if isinstance(record, dict)}

"""Which held-out samples the page shows, and how they are put."""

from __future__ import annotations

from dataclasses import dataclass

from tercet.report.load import Record, RunData, number
from tercet.report.text import percent, plain, short, signed

PER_GROUP = 20  # samples in each of best, middle and worst
OPEN = 5  # of them, shown at once
PROMPT_CHARACTERS = 800
RESPONSE_CHARACTERS = 1500


@dataclass(frozen=True)
class Response:
    """One policy's answer. figures: (name, value); cut: it ran into the length limit."""

    policy: str
    text: str
    figures: list[tuple[str, str]]
    cut: bool


@dataclass(frozen=True)
class Sample:
    """A prompt with the answers of the policies; gain: PPO's score minus SFT's as text, "" where one is unknown."""

    prompt: str
    group: str
    gain: str
    direction: str
    responses: list[Response]


@dataclass(frozen=True)
class Shelf:
    """Samples under one heading."""

    title: str
    note: str
    samples: list[Sample]


def gain(row: Record) -> float | None:
    """PPO's score minus SFT's; None where one is missing."""
    ppo, sft = number(row.get("ppo_score")), number(row.get("sft_score"))
    return None if ppo is None or sft is None else ppo - sft


def shelves(run: RunData) -> tuple[str, list[Shelf]]:
    """How the samples were chosen, in a sentence, and the samples: worst, middling and best by the change of the score."""
    scored = sorted((row for row in run.samples if gain(row) is not None), key=lambda row: gain(row) or 0.0)
    if not scored:
        rows = run.samples[: 3 * PER_GROUP]
        said = f"The samples carry no scores; shown are the first {len(rows)} of {len(run.samples)}."
        return (said, [Shelf("Samples", "in the order of the file", [_sample(row) for row in rows])]) if rows else ("", [])
    total, size = len(scored), min(PER_GROUP, max(1, len(scored) // 3))
    up = sum(1 for row in scored if (gain(row) or 0.0) > 0)
    if total < 3:
        parts = [("Samples", "by change of the score", scored[::-1])]
    else:
        start = (total - size) // 2
        parts = [
            ("Where PPO gained most", f"the {size} largest gains", scored[: -size - 1 : -1]),
            ("In the middle", f"the {size} around the median", scored[start : start + size][::-1]),
            ("Where PPO lost most", f"the {size} smallest gains", scored[:size]),
        ]
    said = (
        f"{total} held-out prompts, put in order of PPO's score minus SFT's. {percent(up / total)} gained; the median change is "
        f"{signed(gain(scored[total // 2]) or 0.0)}. Shown are the top, the middle and the bottom of that order."
    )
    return said, [Shelf(title, note, [_sample(row) for row in rows]) for title, note, rows in parts]


def _sample(row: Record) -> Sample:
    change = gain(row)
    direction = "" if change is None else "up" if change > 0 else "down" if change < 0 else "same"
    responses = [_response(row, key, name) for key, name in (("base", "Base"), ("sft", "SFT"), ("ppo", "PPO")) if key in row]
    return Sample(
        prompt=plain(row.get("prompt"), PROMPT_CHARACTERS),
        group=plain(row.get("group"), 40),
        gain="" if change is None else signed(change),
        direction=direction,
        responses=responses,
    )


def _response(row: Record, key: str, name: str) -> Response:
    figures = [
        (label, number(row.get(f"{key}_{field}"))) for field, label in (("score", "score"), ("gold", "gold"), ("kl", "KL"))
    ]
    shown = [(label, short(value)) for label, value in figures if value is not None]
    return Response(name, plain(row[key], RESPONSE_CHARACTERS), shown, row.get(f"{key}_finished") is False)

"""Which held-out samples the page shows, how they are put, and where SFT's and PPO's words part."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tercet.report.findings import on_prompts
from tercet.report.load import Record, RunData, number
from tercet.report.tables import POLICY_NAMES
from tercet.report.text import percent, plain, short, signed

PER_GROUP = 20  # samples in each of best, middle and worst
OPEN = 5  # of them, shown at once
PROMPT_CHARACTERS = 800
RESPONSE_CHARACTERS = 1500
MOST_SAMPLES = 400
MOST_CHARACTERS = 600_000  # of all samples together, so that the page stays small
ALIKE = 0.25  # share of words in common, below which two texts are different answers and not versions of one
_WORDS = re.compile(r"(?:\w+|[^\w\s])\s*|\s+")  # with the space after it, so that neighbours are marked as one


@dataclass(frozen=True)
class Response:
    """One policy's answer in pieces (text, whether the other policy does not have it); figures: (name, value); cut: it ran into the
    length limit."""

    policy: str
    pieces: list[tuple[str, bool]]
    figures: list[tuple[str, str]]
    cut: bool


@dataclass(frozen=True)
class Sample:
    """A prompt with the answers of the policies; gain: PPO's score minus SFT's as text, "" where one is unknown; outcome: win, loss, tie
    or "" by the score; order: numbers to sort and filter by, as text for data attributes."""

    prompt: str
    group: str
    gain: str
    outcome: str
    order: dict[str, str]
    responses: list[Response]


@dataclass(frozen=True)
class Shelf:
    """Samples under one heading; open: how many are shown at once."""

    title: str
    note: str
    samples: list[Sample]
    open: int = OPEN


def gain(row: Record) -> float | None:
    """PPO's score minus SFT's; None where one is missing."""
    ppo, sft = number(row.get("ppo_score")), number(row.get("sft_score"))
    return None if ppo is None or sft is None else ppo - sft


def shelves(run: RunData) -> tuple[str, list[Shelf]]:
    """How the samples were chosen, in a sentence, and the samples: best, middling and worst by the change of the score, then others."""
    scored = sorted((row for row in run.samples if gain(row) is not None), key=lambda row: gain(row) or 0.0)
    if not scored:
        rows = _within_budget([], run.samples[: 3 * PER_GROUP])
        said = f"The samples carry no scores; shown are the first {len(rows)} of {len(run.samples)}."
        return (said, [Shelf("Samples", "in the order of the file", [_sample(row) for row in rows])]) if rows else ("", [])
    total, size = len(scored), min(PER_GROUP, max(1, len(scored) // 3))
    up = sum(1 for row in scored if (gain(row) or 0.0) > 0)
    if total < 3:
        parts, others = [("Samples", "by change of the score", scored[::-1])], []
    else:
        start = (total - size) // 2
        parts = [
            ("Where PPO gained most", f"the {size} largest gains", scored[: -size - 1 : -1]),
            ("In the middle", f"the {size} around the median", scored[start : start + size][::-1]),
            ("Where PPO lost most", f"the {size} smallest gains", scored[:size]),
        ]
        others = scored[size:start] + scored[start + size : total - size]
    chosen = [row for _, _, rows in parts for row in rows]
    more = _within_budget(chosen, _spread(others, MOST_SAMPLES - len(chosen)))
    said = (
        f"{total} {on_prompts(run)}, put in order of PPO's score minus SFT's. {percent(up / total)} gained; the median change is "
        f"{signed(gain(scored[total // 2]) or 0.0)}. "
    )
    said += "All of them are here" if len(chosen) + len(more) == total else f"{len(chosen) + len(more)} of them are here"
    said += ", the best and the worst among them. Marked words are those that the other answer does not have."
    found = [Shelf(title, note, [_sample(row) for row in rows]) for title, note, rows in parts]
    if more:
        found.append(Shelf("Others", "between these, in the order of the gain", [_sample(row) for row in more[::-1]], open=0))
    return said, found


def differences(sft: str, ppo: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts in pieces, True where the other text does not have those words at that place. Nothing is marked where the two have too
    little in common for it to mean anything."""
    words, others = _WORDS.findall(sft), _WORDS.findall(ppo)
    matcher = difflib.SequenceMatcher(None, [word.strip() for word in words], [word.strip() for word in others], autojunk=False)
    if matcher.ratio() < ALIKE:
        return [(sft, False)], [(ppo, False)]
    left: list[tuple[str, bool]] = []
    right: list[tuple[str, bool]] = []
    for tag, a, b, c, d in matcher.get_opcodes():
        for pieces, part in ((left, words[a:b]), (right, others[c:d])):
            if part:
                pieces.append(("".join(part), tag != "equal"))
    return left or [("", False)], right or [("", False)]


def _spread(rows: Sequence[Record], most: int) -> list[Record]:
    """At most that many of the rows, evenly apart."""
    if len(rows) <= most:
        return list(rows)
    return [rows[index * len(rows) // most] for index in range(max(0, most))]


def _within_budget(chosen: Sequence[Record], rows: Sequence[Record]) -> list[Record]:
    """Those of the rows that fit beside the chosen ones."""
    room = MOST_CHARACTERS - sum(map(_characters, chosen))
    kept = []
    for row in rows:
        room -= _characters(row)
        if room >= 0:
            kept.append(row)
    return kept


def _characters(row: Record) -> int:
    texts = [(row.get("prompt"), PROMPT_CHARACTERS), *((row.get(key), RESPONSE_CHARACTERS) for key in POLICY_NAMES)]
    return 400 + sum(min(len(text), limit) for text, limit in texts if isinstance(text, str))


def _sample(row: Record) -> Sample:
    change = gain(row)
    outcome = "" if change is None else "win" if change > 0 else "loss" if change < 0 else "tie"
    texts = {key: plain(row[key], RESPONSE_CHARACTERS).removeprefix(" ") for key in POLICY_NAMES if key in row}
    pieces = {key: [(text, False)] for key, text in texts.items()}
    if "sft" in texts and "ppo" in texts:
        pieces["sft"], pieces["ppo"] = differences(texts["sft"], texts["ppo"])
    values = {"gain": change} | {name: number(row.get(f"{key}_score")) for key, name in (("sft", "sft"), ("ppo", "ppo"))}
    values |= {"kl": number(row.get("ppo_kl")), "length": number(row.get("ppo_length"))}
    return Sample(
        prompt=plain(row.get("prompt"), PROMPT_CHARACTERS),
        group=plain(row.get("group"), 40),
        gain="" if change is None else signed(change),
        outcome=outcome,
        order={name: f"{value:.6g}" for name, value in values.items() if value is not None},
        responses=[_response(row, key, name, pieces[key]) for key, name in POLICY_NAMES.items() if key in row],
    )


def _response(row: Record, key: str, name: str, pieces: list[tuple[str, bool]]) -> Response:
    figures = [
        (label, number(row.get(f"{key}_{field}")))
        for field, label in (("score", "score"), ("judge", "judge"), ("gold", "gold"), ("kl", "KL"))
    ]
    shown = [(label, short(value)) for label, value in figures if value is not None]
    return Response(name, pieces, shown, row.get(f"{key}_finished") is False)

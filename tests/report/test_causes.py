"""docs/diagnosis.md says what the code does: its table is the catalogue of causes. To write it anew: python tests/report/test_causes.py"""

import re
from pathlib import Path

import pytest

from tercet.report.causes import CAUSES, Cause

DOCUMENT = Path(__file__).parents[2] / "docs/diagnosis.md"
HEAD = "| cause | stage | what the report says | figure | fault where it is | what to do |\n|---|---|---|---|---|---|\n"


def threshold(cause: Cause) -> str:
    levels = [(level, limit) for level, limit in (("error", cause.error), ("warning", cause.warning)) if limit is not None]
    return ", ".join(f"{cause.sense} {limit:g}: {level}" for level, limit in levels)


def table() -> str:
    rows = [
        f"| {name} | {cause.stage} | {cause.title.format(stage='A stage')} | {cause.figure} | {threshold(cause)} | {cause.advice} |"
        for name, cause in CAUSES.items()
    ]
    return HEAD + "\n".join(rows) + "\n"


def test_the_document_lists_every_cause_with_figure_threshold_and_advice() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert table() in text, "write the table anew, see above"
    assert not re.search(r"^\| \w+ \|", text.replace(table(), ""), flags=re.M), "a row that the code does not know"


@pytest.mark.parametrize(
    ("sense", "error", "warning", "levels"),
    [
        ("below", 0.5, 0.8, {0.4: "error", 0.5: "warning", 0.79: "warning", 0.8: None}),
        ("above", 0.3, 0.1, {0.31: "error", 0.3: "warning", 0.1: None}),
        ("above", None, 2, {9.0: "warning", 2.0: None}),
        ("below", 0, None, {-0.1: "error", 0.0: None}),
    ],
)
def test_levels(sense, error, warning, levels) -> None:
    cause = Cause("ppo", "t", "f", sense, error, warning, "a")
    assert {value: cause.level(value) for value in levels} == levels


def test_every_cause_is_in_order_and_says_what_to_do() -> None:
    stages = [cause.stage for cause in CAUSES.values()]
    assert stages == sorted(stages, key=["any", "sft", "reward", "ppo"].index)
    for name, cause in CAUSES.items():
        assert cause.error is not None or cause.warning is not None, name
        assert cause.advice.endswith(".") and "|" not in cause.figure + cause.advice, name


if __name__ == "__main__":
    text = DOCUMENT.read_text(encoding="utf-8")
    start = text.index(HEAD)
    end = text.index("\n\n", start) + 1
    DOCUMENT.write_text(text[:start] + table() + text[end:], encoding="utf-8")

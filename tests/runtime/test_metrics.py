"""metrics.jsonl: appended, cut back on resume, whole after a kill."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tercet.runtime.metrics import JsonLines, Stopwatch, peak_memory_mb


def test_cut_after_drops_later_lines_and_keeps_the_bytes_of_the_others(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "new/m.jsonl", "step")
    lines.append({"step": 1, "x": 0.1})
    lines.append({"step": 2, "x": 1e-7}, {"step": 3, "x": None})
    before = (tmp_path / "new/m.jsonl").read_bytes()
    lines.cut_after(2)
    assert (tmp_path / "new/m.jsonl").read_bytes() == b"".join(before.splitlines(keepends=True)[:2])
    assert lines.read() == [{"step": 1, "x": 0.1}, {"step": 2, "x": 1e-7}]
    lines.cut_after(0)
    assert lines.read() == []


def test_a_half_written_last_line_goes(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for broken in (b'{"step": 2, "x": 0.', b'{"step"', b'{"step": 2, "x": "\xc3', b"[1]", b"7", b'{"other": 1}'):
        path.write_bytes(b'{"step": 1}\n' + broken)
        JsonLines(path, "step").cut_after(9)
        assert path.read_bytes() == b'{"step": 1}\n'


def test_a_last_line_without_its_newline_is_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    lines = JsonLines(path, "step")
    lines.cut_after(2)
    lines.append({"step": 3})
    assert [row["step"] for row in lines.read()] == [1, 2, 3]


def test_line_separators_inside_a_text_do_not_cut_it(tmp_path: Path) -> None:
    """Sampled responses may hold any character; str.splitlines also cuts at these."""
    lines = JsonLines(tmp_path / "r.jsonl", "iteration")
    rows = [
        {"iteration": 1, "response": f"a{sign}b"} for sign in ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\n")
    ]
    lines.append(*rows)
    lines.cut_after(1)
    assert lines.read() == rows


def test_without_a_file(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "none.jsonl", "step")
    lines.cut_after(3)
    assert lines.read() == [] and not (tmp_path / "none.jsonl").exists()


def test_stopwatch_adds_up_phases() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.phase("sleep"):
            time.sleep(0.01)
    assert 0.02 <= watch.seconds["sleep_s"] < 0.5
    assert json.dumps(watch.seconds)


def test_peak_memory_is_in_mebibytes() -> None:
    assert 10 < peak_memory_mb() < 1e6

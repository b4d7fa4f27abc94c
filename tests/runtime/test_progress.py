"""What the terminal shows fits a terminal of 80 columns."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tercet.runtime import progress


@pytest.mark.parametrize("width", [80, 140])
def test_no_figure_is_cut_off(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=shown, width=width, force_terminal=True, color_system=None))
    with progress.Bar("reward", 1200, done=123) as bar:
        bar.advance(loss=0.264, accuracy=0.812, eval_loss=0.419, eval_accuracy=0.833)
    last = shown.getvalue().split("123/1200")[-1]
    assert "…" not in last and max(len(line) for line in last.replace("\r", "\n").split("\n")) <= width + 10
    for figure in ("124/1200", "loss 0.264", "accuracy 0.812", "eval_loss 0.419", "0.833"):
        assert figure in last
    assert ("━" in last) == (width > 110)

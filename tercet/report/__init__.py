"""Run folder -> one self-contained HTML page. Opens a run folder anywhere: imports neither torch nor any other room."""

from __future__ import annotations

from tercet.report.page import write_report

__all__ = ["write_report"]

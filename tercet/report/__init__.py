"""Run folder -> one self-contained HTML page. Opens a run folder anywhere: imports neither torch nor any other room."""

from __future__ import annotations

from tercet.report.compare import write_comparison
from tercet.report.page import write_report
from tercet.report.verdict import verdict_of

__all__ = ["verdict_of", "write_comparison", "write_report"]

"""The short table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tercet.pipeline import RunResult
from tercet.runtime.progress import FIRST

_ROWS = {
    "score": "training reward",
    "judge": "second reward model's score",
    "gold": "gold score",
    "kl": "KL to SFT, nats per response",
    "length": "length, tokens",
    "finished": "ended by a stop token",
    "distinct2": "distinct bigrams",
}


def print_summary(result: RunResult) -> None:
    """Base, SFT and PPO side by side, the win rate, and where the report is."""
    summary, console = result.summary, Console(highlight=False, quiet=not FIRST)
    policies = [name for name in ("base", "sft", "ppo") if f"{name}.score" in summary]
    if policies:
        prompts = "held-out prompts" if summary.get("evaluation.held_out") != 0 else "training prompts (none could be held out)"
        table = Table(title=f"on {prompts}", title_justify="left", show_edge=False, pad_edge=False)
        table.add_column("")
        for policy in policies:
            table.add_column(policy.upper() if policy != "base" else policy, justify="right")
        for key, label in _ROWS.items():
            values = [summary.get(f"{policy}.{key}", summary.get(f"{key}.{policy}")) for policy in policies]
            if any(value is not None for value in values):
                table.add_row(label, *("" if value is None else f"{value:.3f}" for value in values))
        console.print(table)
    if "reward.eval_accuracy" in summary:
        console.print(
            f"reward model's accuracy on {summary['reward.eval_pairs']} held-out pairs: {_interval(summary, 'reward.eval_accuracy')}"
        )
    for key, label in (("win_rate", f"by {summary.get('win_rate_by', '')}"), ("gold.win_rate", "by the gold score")):
        if key in summary:
            console.print(f"PPO preferred to SFT {label}: {_interval(summary, key)}")
    _print_verdict(summary.get("verdict", []), console)
    report = result.folder / "report.html"
    console.print(f"report: {report}" if report.exists() else f"run folder: {result.folder}", markup=False)


def _print_verdict(verdict: Sequence[Mapping[str, str]], console: Console) -> None:
    """What is wrong, worst first, each with what to do; else that nothing is."""
    faults = [finding for finding in verdict if finding["severity"] != "ok"]
    for finding in faults or verdict[:1]:
        colour = {"error": "red", "warning": "yellow", "ok": "green"}[finding["severity"]]
        console.print(f"[{colour}]{'verdict' if finding['severity'] == 'ok' else finding['severity']}[/]: ", end="")
        console.print(f"{finding['sentence']} {finding['advice']}".strip(), markup=False)


def _interval(summary: Any, key: str) -> str:
    return f"{summary[key]:.3f} (95 % interval {summary[f'{key}_low']:.3f} to {summary[f'{key}_high']:.3f})"

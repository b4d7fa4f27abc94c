"""RunData -> report.html: one file, nothing loaded from anywhere; one script of our own, which filters the samples."""

from __future__ import annotations

import base64
import hashlib
import os
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined

from tercet.report import card, frontier, tables
from tercet.report.curves import Plot, stage_plots
from tercet.report.findings import Finding, judged_by
from tercet.report.load import STAGES, RunData, load_run
from tercet.report.samples import shelves
from tercet.report.text import curly, plain, show_count
from tercet.report.verdict import verdict

CONFIG_CHARACTERS = 200_000
REPORT = "report.html"


def write_report(run_folder: Path) -> Path:
    """Read the run folder, write RUN/report.html atomically, return its path.

    Parts of the run that are missing are left out of the page. Raises FileNotFoundError where there is no such folder.
    """
    target = Path(run_folder) / REPORT
    write_page(target, render(load_run(Path(run_folder))))
    return target


def write_page(target: Path, page: str) -> None:
    """Write it atomically; its folder is made if missing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8", newline="\n")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def render(run: RunData) -> str:
    """The page as a string. All text of the run is escaped by the template; only the drawings, made here, are not."""
    findings = verdict(run)
    stages = [(tables.TITLES[stage], stage, *_split(stage_plots(run, stage))) for stage in STAGES]
    chosen, sample_shelves = shelves(run)
    return fill(
        "template.html",
        script=resource("page.js"),
        name=plain(run.name, 120),
        findings=findings,
        headline=sentence(findings, judged_by(run)),
        figures=tables.headline(run),
        comparison=tables.comparison(run),
        wins=tables.wins(run),
        groups=tables.groups(run),
        stages=[stage for stage in stages if stage[2] or stage[3]],
        chosen=chosen,
        shelves=sample_shelves,
        sample_groups=sorted({sample.group for shelf in sample_shelves for sample in shelf.samples if sample.group}),
        worth=frontier.comparison(run),
        card_sentences=card.sentences(run),
        card_table=card.table(run),
        card_plots=card.plots(run),
        data=tables.data(run),
        time=tables.machine_time(run),
        facts=tables.facts(run),
        all_figures=tables.everything(run),
        command=tables.command(run),
        config=plain(run.config, CONFIG_CHARACTERS),
        problems=[plain(problem, 300) for problem in run.problems],
    )


def fill(template: str, *, script: str = "", **values: object) -> str:
    """A template of this room with the style sheet and the filters of all pages. Only the given script may run: the page names its hash."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["curly"] = curly
    environment.loader = FunctionLoader(resource)
    allowed = "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template(template).render(style=resource("style.css"), script=script, script_hash=allowed, **values)
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate that slipped through must not stop the page


def resource(name: str) -> str:
    """A file of this room."""
    return files("tercet.report").joinpath(name).read_text(encoding="utf-8")


def _split(plots: list[Plot]) -> tuple[list[Plot], list[Plot]]:
    return [plot for plot in plots if not plot.more], [plot for plot in plots if plot.more]


def sentence(findings: list[Finding], by: str) -> str:
    """The verdict in one line: the first thing that went wrong; else that nothing did, and what came of it. by: of `judged_by`."""
    errors = [finding for finding in findings if finding.level == "error"]
    warnings = [finding for finding in findings if finding.level == "warning"]
    if errors:
        more = len(errors) + len(warnings) - 1
        return errors[0].title + (f", and {show_count(more, 'more finding')}" if more else "")
    if warnings:
        return f"{warnings[0].title}" + (f", and {show_count(len(warnings) - 1, 'more warning')}" if len(warnings) > 1 else "")
    won = next((finding.figure for finding in findings if finding.rule == "win_rate_good"), None)
    return findings[0].title + (f": PPO wins {won} against SFT {by}".rstrip() if won else "")

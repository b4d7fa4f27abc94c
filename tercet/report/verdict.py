"""Which stage failed? Stated rules over a run's figures; each finding carries the figure that it rests on.

A rule whose figures are missing says nothing. Errors come before warnings, and earlier stages before later ones: a poor reward
model explains a poor PPO, never the other way round. The causes with their thresholds are in causes.py and docs/diagnosis.md.
"""

from __future__ import annotations

from pathlib import Path

from tercet.report.causes import CAUSES
from tercet.report.findings import STAGE_NAMES, Finding, Rule
from tercet.report.load import COUNTERS, STAGES, Record, RunData, load_run, number
from tercet.report.rules_ppo import PPO_RULES
from tercet.report.rules_training import TRAINING_RULES
from tercet.report.text import short

RULES: tuple[Rule, ...] = (*TRAINING_RULES, *PPO_RULES)


def verdict(run: RunData) -> list[Finding]:
    """All findings: errors, then warnings, then what is well; within a level in the order of the stages."""
    found = [finding for rule in RULES for finding in rule(run)]
    if run.unfinished is not None:
        found = [_unfinished(run, run.unfinished), *(finding for finding in found if finding.rule not in _OF_THE_END)]
    if not any(finding.level != "ok" for finding in found):
        found.insert(0, _healthy(run))
    levels, stages = ("error", "warning", "ok"), ("run", *STAGES)
    return sorted(found, key=lambda finding: (levels.index(finding.level), stages.index(finding.stage)))


def verdict_of(folder: Path) -> list[Record]:
    """The verdict on a run folder, for summary.json: cause, severity, stage, sentence, figure and advice of each finding."""
    return [
        {
            "cause": finding.rule,
            "severity": finding.level,
            "stage": finding.stage,
            "sentence": f"{finding.title}. {finding.text}",
            "figure": finding.figure,
            "advice": finding.advice,
        }
        for finding in verdict(load_run(folder))
    ]


_OF_THE_END = ("kl_none", "score_flat")  # what is well in the middle of a run


def _unfinished(run: RunData, stage: str) -> Finding:
    latest = run.metrics[stage][-1]
    counted = next(
        (f"at {counter} {short(at)}" for counter in COUNTERS if (at := number(latest.get(counter))) is not None),
        "in its beginning",
    )
    text = f"{STAGE_NAMES[stage]} is {counted} and has not ended: what is said here is of what there is so far."
    return Finding(
        "warning",
        "The run is not finished",
        text,
        "",
        "run",
        "unfinished",
        "The same command goes on from there, once whatever stopped it is mended.",
    )


def _healthy(run: RunData) -> Finding:
    names = {"sft": "SFT", "reward": "the reward model", "ppo": "PPO"}
    missing = [name for stage, name in names.items() if not run.ran(stage)]
    whole = "evaluate.seconds" in run.summary  # which is the last stage: what is missing then was not asked for
    if len(missing) == 3:
        return Finding("ok", "Nothing has run yet", "The run folder holds no metrics.", "", "run", "empty")
    if missing and not whole:
        text = f"No rule found a fault in what there is. Not run so far: {', '.join(missing)}."
        return Finding("ok", "Healthy so far", text, "", "run", "healthy")
    count = len({key for lines in run.metrics.values() for line in lines for key in line})
    which = "Every stage of this configuration" if missing else "All three stages"
    without = f" (without {' and '.join(missing)})" if missing else ""
    text = f"{which}{without} ran, and none of the {len(CAUSES)} causes of docs/diagnosis.md was found."
    return Finding("ok", "Healthy", text, f"{count} metrics read" if count else "", "run", "healthy")

"""What goes wrong while PPO runs, in plain words: rules of the verdict over the iterations so far, each said once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tercet.report.findings import Finding, Rule, fault
from tercet.report.load import RunData
from tercet.report.rules_ppo import LIVE_RULES
from tercet.report.text import percent, short

PATIENCE = 20  # iterations in a row in which the value model explains less than nothing
AT_THE_LIMIT, FEW = 0.05, 3  # share of responses that still end by a stop token, in so many iterations in a row


class Watch:
    """Looks at each line of ppo/metrics.jsonl. figures: what the rules need of summary.json (ppo.kl_budget, ppo.score_range_...).

    A resumed run shows it the earlier lines first, so that nothing is said twice.
    """

    def __init__(self, figures: Mapping[str, float]):
        self._run = RunData(summary=dict(figures), metrics={"ppo": []})
        self._said: set[str] = set()

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """Cause -> sentence of what has come true with this line."""
        rows = self._run.metrics["ppo"]
        rows.append(dict(row))
        if len(rows) % max(
            1, len(rows) // 100
        ):  # a long run is looked at every hundredth of it, or looking would cost more and more
            return {}
        findings = [finding for rule in (*LIVE_RULES, *_PATIENT) for finding in rule(self._run)]
        new = {one.rule: f"{one.title}. {one.text} {one.advice}" for one in findings if one.rule not in self._said}
        self._said |= set(new)
        return new


def _explains_nothing(run: RunData) -> Iterable[Finding]:
    """The verdict's rule goes by the last half of a run; while it runs the value model is given its time."""
    explained = run.finite("ppo", "explained_variance")[-PATIENCE:]
    if len(explained) == PATIENCE and max(explained) < 0:
        text = f"Its explained variance has been below 0 for {PATIENCE} iterations, {short(explained[-1])} now."
        yield from fault("value_model", explained[-1], text, short(explained[-1]))


def _at_the_limit(run: RunData) -> Iterable[Finding]:
    """All responses run into ppo.max_new_tokens: unlearned, or never learned."""
    finished = run.finite("ppo", "finished")
    if len(finished) >= FEW and max(finished[-FEW:]) < AT_THE_LIMIT:
        now, before = percent(finished[-1]), percent(finished[0])
        text = f"{now} of the responses end by a stop token, all others at ppo.max_new_tokens; {before} at first."
        lost = list(fault("finished_fell", finished[0] - finished[-1], text, now))
        yield from lost or fault("sft_stop", finished[-1], text, now)


_PATIENT: tuple[Rule, ...] = (_explains_nothing, _at_the_limit)

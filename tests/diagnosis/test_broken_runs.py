"""Real runs that are broken on purpose, each in one way: the verdict names the cause, and nothing of the stages before it.

A run takes 10 to 30 seconds; they share the stages before the one that breaks.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tercet.report.causes import CAUSES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REWARDS = """
def constant(prompts, responses, **fields):
    return [1.0] * len(responses)

def long(prompts, responses, **fields):
    return [len(response.split()) / 10 for response in responses]

def short(prompts, responses, **fields):
    return [-len(response.split()) / 5 for response in responses]

def the(prompts, responses, **fields):
    return [float(response.lower().split().count("the")) for response in responses]
"""
BRIEF = {"iterations": 2, "evaluate_every": 0}  # of PPO, where an earlier stage is what breaks
HALF = {"iterations": 8, "evaluate_every": 0}  # where nothing changes however long it goes on
ENOUGH = 1500  # comparisons to see how a reward model breaks


def few(clinic: Any, count: int) -> dict[str, Any]:
    """The first comparisons alone."""
    return {"comparisons": clinic.write(f"{count}-comparisons", clinic.records("comparisons")[:count])}


def broken_sft(clinic: Any, **changes: Any) -> dict[str, Any]:
    """A break in SFT or before; of what comes after it no more than a report needs."""
    return {"data": few(clinic, 400), "reward": {"judge": False}, "ppo": BRIEF, **changes}


def shuffled(clinic: Any, name: str) -> str:
    """Comparisons whose labels say nothing."""
    rng = random.Random(name)
    rows = [row if rng.random() < 0.5 else row | swapped(row) for row in clinic.records(name)[:ENOUGH]]
    return clinic.write(f"shuffled-{name}", rows)


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    return {"chosen": row["rejected"], "rejected": row["chosen"]}


def longer(clinic: Any, name: str) -> str:
    """Comparisons in which the longer response is always preferred."""
    rows = []
    for row in clinic.records(name)[:ENOUGH]:
        shorter, longest = sorted((row["chosen"], row["rejected"]), key=len)
        if len(shorter) < len(longest):
            rows.append(row | {"chosen": longest, "rejected": shorter})
    return clinic.write(f"longer-{name}", rows)


def rewarded(clinic: Any, name: str, **changes: Any) -> dict[str, Any]:
    """PPO against one of the functions above."""
    path = clinic.folder / f"{name}.py"  # of one test alone
    path.write_text(REWARDS)
    return {"ppo": {"rewards": [{"kind": "function", "function": f"{path}:{name}"}], "kl": {"coef": 0.02}, **changes}}


# name -> (the stage that breaks, what is changed, the causes that the verdict must name)
Change = Callable[[Any], dict[str, Any]]
BREAKS: dict[str, tuple[str, Change, set[str]]] = {
    "texts without an end": (
        "pretrain",
        lambda clinic: broken_sft(
            clinic,
            data=few(clinic, 400) | {"pretrain": clinic.write("1500-pretrain", clinic.records("pretrain")[:1500])},
            pretrain={"max_length": 20},
            sft={"max_length": 20},
        ),
        {"sft_stop"},
    ),
    "SFT that learns nothing": ("sft", lambda clinic: broken_sft(clinic, sft={"learning_rate": 1e-8}), {"sft_none"}),
    "SFT for far too long": (
        "sft",
        lambda clinic: broken_sft(clinic, sft={"learning_rate": 3e-3, "epochs": 12}),
        {"sft_overfit"},
    ),
    "shuffled preference labels": (
        "reward",
        lambda clinic: {
            "data": {name: shuffled(clinic, name) for name in ("comparisons", "eval_comparisons")},
            "ppo": BRIEF,
        },
        {"reward_chance"},
    ),
    "chosen and rejected swapped in training": (
        "reward",
        lambda clinic: {
            "data": {
                "comparisons": clinic.write("swapped", [row | swapped(row) for row in clinic.records("comparisons")[:ENOUGH]])
            },
            "ppo": BRIEF,
        },
        {"reward_inverted"},
    ),
    "20 comparisons": (
        "reward",
        lambda clinic: {"data": few(clinic, 20), "ppo": BRIEF},
        {"reward_few"},
    ),
    "120 comparisons and none to measure with": (
        "reward",
        lambda clinic: {"data": few(clinic, 120) | {"eval_comparisons": None}, "ppo": BRIEF},
        {"reward_few", "reward_unmeasured"},
    ),
    "annotators who look at length alone": (
        "reward",
        lambda clinic: {"data": {name: longer(clinic, name) for name in ("comparisons", "eval_comparisons")}},
        {"reward_length", "over_optimised"},
    ),
    "a reward model trained for 12 epochs": (
        "reward",
        lambda clinic: {"data": few(clinic, 300), "reward": {"epochs": 12}, "ppo": BRIEF},
        {"reward_overfit", "reward_overconfident"},
    ),
    "kl_coef 100": ("ppo", lambda clinic: {"ppo": {"kl": {"coef": 100.0}, "evaluate_every": 0}}, {"kl_none"}),
    "kl_coef 0": (
        "ppo",
        lambda clinic: {"ppo": {"kl": {"coef": 0.0}}},
        {"kl_exploded", "over_optimised", "judge_disagrees", "distinct_fell"},
    ),
    # PPO stops in its second iteration, because all responses are empty; the verdict says what led to it.
    "learning rate x 100": ("ppo", lambda clinic: {"ppo": {"learning_rate": 5e-2}}, {"step_size"}),
    "learning rate / 5000": (
        "ppo",
        lambda clinic: {"ppo": HALF | {"learning_rate": 1e-7}},
        {"kl_none", "score_flat", "win_rate_even"},
    ),
    "value model off": ("ppo", lambda clinic: {"ppo": HALF | {"value_learning_rate": 1e-12}}, {"value_model"}),
    "a constant reward": ("ppo", lambda clinic: rewarded(clinic, "constant", **HALF), {"score_constant", "score_flat"}),
    "a reward for length": (
        "ppo",
        lambda clinic: rewarded(clinic, "long", missing_eos_penalty=None),
        {"length_grew", "finished_fell", "win_rate_low", "over_optimised"},
    ),
    "a reward for saying little": (
        "ppo",
        lambda clinic: rewarded(clinic, "short", kl={"coef": 0.05}, iterations=18),  # it may stop when all responses are empty
        {"length_shrank"},
    ),
    "a reward for one word": (
        "ppo",
        # After 16 iterations 0.65 of SFT's distinct bigrams may be left, just where the rule begins; it depends on the processor.
        lambda clinic: rewarded(clinic, "the", iterations=24),
        {"win_rate_low", "over_optimised", "distinct_fell"},
    ),
}
ORDER = ("any", "sft", "reward", "ppo")


@pytest.mark.parametrize("name", BREAKS)
def test_the_verdict_names_what_was_broken(name: str, clinic: Any, faults: Callable[[Path], dict[str, str]]) -> None:
    stage, change, wanted = BREAKS[name]
    found = faults(clinic.broken(name.replace(" ", "-").replace("/", "by"), stage, change(clinic)))
    assert wanted <= set(found), found
    first = "sft" if stage == "pretrain" else stage
    causes = found.keys() - {"unfinished"}  # no cause, but what a run says that had to stop
    earlier = {cause for cause in causes if ORDER.index(CAUSES[cause].stage) < ORDER.index(first)}
    assert not earlier, f"what was sound is blamed: {earlier}"

"""docs/metrics.md and the files of a run name the same things, both ways: a run with every optional figure on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

import tercet

DOCUMENT = Path(__file__).parents[1] / "docs/metrics.md"
NEVER_HERE = {"skipped"}  # of the supervised stages: written only after a gradient that was not finite
OPTIONAL = {"alarms"}  # of PPO: only where something went wrong
NAMES = {
    "STAGE": "(pretrain|sft|reward|ppo|evaluate)",
    "POLICY": "(base|sft|ppo|best|other)",
    "JUDGE": "(judge|bag_of_words|gold|mine)",
    "GROUP": "(rain|snow)",
    "KEY": r"[\w.]+",
}


def documented() -> dict[str, set[str]]:
    """File (each one that a heading names) -> the names in the first column of the table below it."""
    tables: dict[str, set[str]] = {}
    for section in DOCUMENT.read_text(encoding="utf-8").split("\n## ")[1:]:
        heading, _, text = section.partition("\n")
        cells = [
            line.split("|")[1] for line in text.splitlines() if line.startswith("|") and not line.startswith(("| name |", "|--"))
        ]
        for file in re.findall(r"[\w/]+\.jsonl?", heading.partition(":")[0]):
            tables[file] = {name.strip() for cell in cells for name in cell.split(",")}
    return tables


def pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.sub("|".join(NAMES), lambda match: NAMES[match[0]], re.escape(name)))


def compared(names: set[str], keys: Iterable[str]) -> tuple[list[str], list[str]]:
    """Keys that no name stands for, and names that stand for no key."""
    keys = set(keys)
    unknown = [key for key in keys if not any(pattern(name).fullmatch(key) for name in names)]
    return sorted(unknown), sorted(name for name in names if not any(pattern(name).fullmatch(key) for key in keys))


@pytest.fixture(scope="session")
def rich_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretraining, 600 comparisons and hence a judge, further judges, groups, evaluations during PPO."""
    folder = tmp_path_factory.mktemp("rich")
    prompts = [{"prompt": f"What is {i}?", "kind": "rain" if i % 2 else "snow"} for i in range(120)]
    pairs = [{"prompt": f"What is {i}?", "chosen": "It is fine.", "rejected": "It is", "source": "web"} for i in range(300)]
    pairs += [
        {"prompt": f"What is {i}?", "chosen": "It is", "rejected": "It is a long story.", "source": "staff"} for i in range(300)
    ]
    for name, records in (("prompts", prompts), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "gold.py").write_text("def length(prompts, responses, **fields):\n    return [float(len(r)) for r in responses]\n")
    function = f"{folder}/gold.py:length"
    values: dict[str, Any] = yaml.safe_load((finished_run / "config.yaml").read_text())
    files = {"comparisons": "pairs", "prompts": "prompts"}
    values["data"] |= {key: str(folder / f"{name}.jsonl") for key, name in files.items()}
    values["data"]["pretrain"] = values["data"]["sft"]  # the same words twice: the same tokenizer as the other policy's
    values["pretrain"] |= {"max_length": 32}
    values["reward"] |= {"batch_size": 128}
    values["ppo"] |= {"iterations": 2, "evaluate_every": 1, "best_kl_budget": 1e6, "interpolation": 0.9}
    judges = {"mine": {"kind": "function", "function": function}}
    values["evaluation"] |= {"judges": judges, "gold": function, "group_by": "kind", "prompts": 20}
    values["evaluation"] |= {"policies": {"other": str(finished_run / "ppo/model")}, "best_of_prompts": 2, "best_of_samples": 8}
    values["machine"]["microbatch_tokens"] = 2048
    tercet.run({**values, "output": str(folder / "run")})
    return folder / "run"


def keys_of(run: Path, file: str) -> set[str]:
    if file == "timings.jsonl":
        return set().union(*(keys_of(run, f"{stage}/{file}") for stage in ("pretrain", "sft", "reward", "ppo")))
    text = (run / file).read_text(encoding="utf-8")
    if file.endswith(".jsonl"):
        return {key for line in text.split("\n") if line for key in json.loads(line)}
    content = json.loads(text)
    if file in ("evaluation/policies.json", "evaluation/wins.json"):
        return {key for figures in content.values() for key in figures}
    return {key for record in content for key in record} if isinstance(content, list) else set(content)


@pytest.mark.parametrize("file", sorted(documented()))
def test_names_in_the_files_and_in_the_document(file: str, rich_run: Path) -> None:
    names = documented()[file]
    if file in ("pretrain/metrics.jsonl", "sft/metrics.jsonl"):
        names -= {"accuracy", "eval_accuracy"}  # the table marks them as the reward model's
    if file != "sft/metrics.jsonl":
        names -= {"eval_loss_before"}
    supervised = file.endswith("/metrics.jsonl") and not file.startswith("ppo")
    optional = OPTIONAL | (NEVER_HERE if supervised else set())
    unknown, unused = compared(names - optional, keys_of(rich_run, file) - OPTIONAL)
    assert (unknown, unused) == ([], [])


def test_every_file_of_figures_is_in_the_document(rich_run: Path) -> None:
    files = {str(path.relative_to(rich_run)) for path in rich_run.rglob("*.json*") if "model" not in path.parts}
    files = {
        file
        for file in files
        if not {"value", "best"} & set(Path(file).parts) and not file.endswith(("done.json", "started.json", "probe.json"))
    }
    known = {file for file in documented() if "/" in file} | {"summary.json"}
    assert {file for file in files if not file.endswith("timings.jsonl")} == known


def test_the_comparison_can_fail() -> None:
    assert compared({"a", "POLICY.kl"}, ["a", "b", "sft.kl", "rl.kl"]) == (["b", "rl.kl"], [])
    assert compared({"a", "c", "JUDGE_std"}, ["a"]) == ([], ["JUDGE_std", "c"])
    assert {"step", "loss"} <= documented()["sft/metrics.jsonl"] and "JUDGE" in documented()["ppo/metrics.jsonl"]

"""The data files: determinism, what is held out, schema, budget."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tercet.world import TOPICS, Sizes, generate, gold_score, topic_of
from tercet.world.language import words

SMALL = Sizes(pretrain=3000, demonstrations=600, comparisons=1200, rankings=200, eval_known=1500, eval_new=150)
TRAINING = ("pretrain", "demonstrations", "comparisons", "rankings", "prompts")
FIELDS = {
    "pretrain": {"text"},
    "demonstrations": {"prompt", "response"},
    "comparisons": {"prompt", "chosen", "rejected"},
    "rankings": {"prompt", "responses", "ranks"},
    "prompts": {"prompt", "topic"},
    "eval_comparisons": {"prompt", "chosen", "rejected", "p"},
    "eval_comparisons_new": {"prompt", "chosen", "rejected", "p"},
    "eval_prompts": {"prompt", "topic", "group"},
}
Files = dict[str, list[dict[str, Any]]]


def _read(folder: Path) -> Files:
    return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in FIELDS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    generate(folder, seed=0, sizes=SMALL)
    return folder


@pytest.fixture(scope="module")
def files(folder: Path) -> Files:
    return _read(folder)


def test_the_same_seed_gives_the_same_bytes_in_another_process(folder: Path, tmp_path: Path) -> None:
    code = f"from tercet.world import *; generate({str(tmp_path)!r}, 0, Sizes(**{SMALL.__dict__!r}))"
    # another hash seed: the order of sets must not reach the files
    env = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    for name in [*(f"{name}.jsonl" for name in FIELDS), "world.json"]:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_another_seed_gives_other_data(files: Files, tmp_path: Path) -> None:
    generate(tmp_path, seed=1, sizes=SMALL)
    other = _read(tmp_path)
    assert all(other[name] != files[name] for name in FIELDS)


def test_schema_and_sizes(folder: Path, files: Files) -> None:
    for name, fields in FIELDS.items():
        assert all(set(record) == fields for record in files[name]), name
    for name in ("pretrain", "demonstrations", "comparisons", "rankings"):
        assert len(files[name]) == getattr(SMALL, name)
    assert (len(files["eval_comparisons"]), len(files["eval_comparisons_new"])) == (1500, 150)
    groups = [record["group"] for record in files["eval_prompts"]]
    assert groups.count("known") == 160
    assert groups.count("new") == 40
    world = json.loads((folder / "world.json").read_text())
    assert world["sizes"]["prompts"] == len(files["prompts"])
    assert world["sizes"]["eval_prompts"] == len(files["eval_prompts"])


def test_held_out_prompts_are_in_no_training_file(files: Files) -> None:
    held = {record["prompt"] for name in ("eval_comparisons", "eval_comparisons_new", "eval_prompts") for record in files[name]}
    for name in ("demonstrations", "comparisons", "rankings", "prompts"):
        assert not {record["prompt"] for record in files[name]} & held, name
    assert not any(record["text"].startswith(tuple(held)) for record in files["pretrain"])


def test_new_topics_are_in_no_training_file_and_only_they_are_in_the_new_group(folder: Path, files: Files) -> None:
    new = {topic.key for topic in TOPICS.values() if topic.new}
    for name in TRAINING:
        assert not set(words((folder / f"{name}.jsonl").read_text())) & new, name
    pairs = [r | {"group": "known"} for r in files["eval_comparisons"]] + [
        r | {"group": "new"} for r in files["eval_comparisons_new"]
    ]
    for record in files["eval_prompts"] + pairs:
        topic = topic_of(record["prompt"])
        assert topic is not None
        assert topic.new == (record["group"] == "new")


def test_every_known_topic_is_trained_and_evaluated(files: Files) -> None:
    known = {topic.key for topic in TOPICS.values() if not topic.new}
    assert {record["topic"] for record in files["prompts"]} == known
    assert {topic_of(record["prompt"]).key for record in files["eval_comparisons"]} == known  # type: ignore[union-attr]


def test_probabilities_and_ceiling(folder: Path, files: Files) -> None:
    world = json.loads((folder / "world.json").read_text())
    for group, name in (("known", "eval_comparisons"), ("new", "eval_comparisons_new")):
        best, agreed = [], []
        for record in files[name]:
            chosen, rejected = gold_score(record["prompt"], record["chosen"]), gold_score(record["prompt"], record["rejected"])
            p = 1 / (1 + math.exp((rejected - chosen) / world["annotator"]["temperature"]))
            assert record["p"] == pytest.approx(p)
            best.append(max(p, 1 - p))
            agreed.append(chosen > rejected)
        assert world["ceiling"][group] == pytest.approx(sum(best) / len(best))
        # the gold scorer itself reaches the ceiling, within four standard errors
        assert sum(agreed) / len(agreed) == pytest.approx(world["ceiling"][group], abs=4 * 0.35 / math.sqrt(len(agreed)))
    assert 0.80 <= world["ceiling"]["known"] <= 0.88


def test_rankings_have_four_responses_and_some_ties(files: Files) -> None:
    for record in files["rankings"]:
        assert len(record["responses"]) == len(record["ranks"]) == 4
        assert all(1 <= rank <= 4 for rank in record["ranks"])
    tied = sum(len(set(record["ranks"])) < 4 for record in files["rankings"])
    assert 0.02 < tied / len(files["rankings"]) < 0.6


def test_demonstrations_are_finished_and_about_standard_gold(files: Files) -> None:
    golds = [gold_score(record["prompt"], record["response"]) for record in files["demonstrations"]]
    mean = sum(golds) / len(golds)
    deviation = math.sqrt(sum((gold - mean) ** 2 for gold in golds) / len(golds))
    assert abs(mean) < 0.3
    assert 0.8 < deviation < 1.2
    assert all(record["response"].endswith(".") for record in files["demonstrations"])


def test_the_training_text_is_small_enough_to_be_learned(files: Files) -> None:
    types = {
        piece
        for record in files["pretrain"]
        for piece in record["text"].replace(".", " ").replace(",", " ").replace("?", " ").split()
    }
    assert len(types) <= 400  # a tokenizer of 512-1,024 entries has a token for nearly each
    sizes = Sizes()
    tokens = sum(len(record["text"].split()) * 1.2 for record in files["pretrain"]) / len(files["pretrain"]) * sizes.pretrain
    assert 0.3e6 <= tokens <= 1.0e6
    assert max(len(words(text)) for r in files["comparisons"] for text in (r["chosen"], r["rejected"])) <= 24


def test_pairs_cover_a_few_repetitive_and_gushing_answers(files: Files) -> None:
    from tercet.world import gold_features

    rows = [gold_features(r["prompt"], r[side]) for r in files["comparisons"] for side in ("chosen", "rejected")]
    for name, bad in (("repeated", 0.0), ("kind", 0.31), ("finished", 0.0)):
        if name == "kind":
            share = sum(0 < row["kind"] < bad or row["kind"] < 0 for row in rows) / len(rows)
        else:
            share = sum(row[name] < bad for row in rows) / len(rows)
        assert 0.005 < share < 0.12, (name, share)


def test_the_world_needs_no_tensors() -> None:
    code = "import sys, tercet.world; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})

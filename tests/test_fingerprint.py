"""What counts as a change: contents and not places, everything a stage reads, and by which name it is told."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tercet.config import load_config
from tercet.fingerprint import differences, fingerprints

STAGES = ["sft", "reward", "ppo", "evaluate"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with data, a reward function, a gold function, and folders that stand for models."""
    folder = tmp_path / "project"
    for name in ("model", "classifier", "value", "other"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(f'{{"name": "{name}"}}')
        (folder / name / "model.safetensors").write_bytes(name.encode())
    for name in ("sft", "pairs", "prompts"):
        (folder / f"{name}.jsonl").write_text(f'{{"{name}": 1}}\n')
    (folder / "many").mkdir()
    for i in range(5):
        (folder / f"many/{i}.jsonl").write_text(f'{{"a": {i}}}\n')
    for name in ("score", "gold"):
        (folder / f"{name}.py").write_text(f"def f(prompts, responses, **fields):\n    return '{name}'\n")
    return folder


def prints_of(folder: Path, **sections: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": {"name": str(folder / "model")},
        "data": {"sft": str(folder / "sft.jsonl"), "comparisons": str(folder / "pairs.jsonl"), "prompts": str(folder / "many")},
        "ppo": {
            "rewards": [
                {"kind": "function", "function": f"{folder}/score.py:f"},
                {"kind": "classifier", "model": str(folder / "classifier")},
            ],
            "value_model": str(folder / "value"),
        },
        "evaluation": {"gold": f"{folder}/gold.py:f", "judges": {"mine": {"kind": "classifier", "model": str(folder / "other")}}},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return fingerprints(load_config(values), STAGES)


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[str]]:
    """Stage -> what changed there, without what follows from an earlier stage."""
    told = {
        stage: [line for line in differences(before[stage], after[stage]) if not line.startswith("stage ")] for stage in STAGES
    }
    return {stage: lines for stage, lines in told.items() if lines}


def test_a_project_may_be_moved_as_a_whole(project: Path, tmp_path: Path) -> None:
    before = prints_of(project)
    shutil.move(project, tmp_path / "elsewhere")
    assert prints_of(tmp_path / "elsewhere") == before


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("sft.jsonl", {"sft": ["contents of data.sft changed: sft.jsonl"]}),
        ("pairs.jsonl", {"reward": ["contents of data.comparisons changed: pairs.jsonl"]}),
        ("many/3.jsonl", {stage: ["contents of data.prompts changed: 3.jsonl"] for stage in ("reward", "ppo", "evaluate")}),
        ("model/model.safetensors", {s: ["contents of model.name changed: model.safetensors"] for s in ("sft", "reward", "ppo")}),
        ("score.py", {"ppo": ["contents of ppo.rewards.0.function score.py changed"]}),
        ("classifier/config.json", {"ppo": ["contents of ppo.rewards.1.model changed: config.json"]}),
        ("value/model.safetensors", {"ppo": ["contents of ppo.value_model changed: model.safetensors"]}),
        ("gold.py", {"evaluate": ["contents of evaluation.gold gold.py changed"]}),
        ("other/model.safetensors", {"evaluate": ["contents of evaluation.judges.mine.model changed: model.safetensors"]}),
    ],
)
def test_each_file_counts_where_it_is_read(file: str, told: dict[str, list[str]], project: Path) -> None:
    before = prints_of(project)
    with (project / file).open("a") as opened:
        opened.write(" ")
    after = prints_of(project)
    assert changes(before, after) == told
    first = STAGES.index(next(iter(told)))
    for stage in STAGES[first + 1 :]:  # and every later stage says which earlier one it is
        assert f"stage {STAGES[first]} changed" in list(differences(before[stage], after[stage]))


def test_many_files_are_not_all_named(project: Path) -> None:
    before = prints_of(project)
    for path in (project / "many").iterdir():
        path.write_text("{}\n")
    assert changes(before, prints_of(project))["ppo"] == [
        "contents of data.prompts changed: 0.jsonl, 1.jsonl, 2.jsonl and 2 more"
    ]


def test_judges_and_gold_count_in_ppo_only_where_it_evaluates(project: Path) -> None:
    before = prints_of(project, ppo={"evaluate_every": 5})
    (project / "gold.py").write_text("other")
    assert set(changes(before, prints_of(project, ppo={"evaluate_every": 5}))) == {"ppo", "evaluate"}


@pytest.mark.parametrize(
    "change",
    [{"checkpoint": {"every": 3, "every_minutes": None, "keep": 9}}, {"ppo": {"save_rollouts_every": 3, "kl": {"limit": 1.0}}}],
)
def test_what_cannot_change_a_result_does_not_count(change: dict[str, Any], project: Path) -> None:
    assert prints_of(project, **change) == prints_of(project)


def reward_of(scale: float, name: str = "a") -> Callable[..., list[float]]:
    def reward(prompts: list[str], responses: list[str], **fields: Any) -> list[float]:
        return [scale * response.count(name) for response in responses]

    return reward


def constant(prompts: list[str], responses: list[str], value: float = 1.0, **fields: Any) -> list[float]:
    return [value] * len(responses)


class Rewarding:
    def __init__(self, weight: float):
        self.weight = weight

    def __call__(self, prompts: list[str], responses: list[str], **fields: Any) -> list[float]:
        return [self.weight] * len(responses)

    def half(self, prompts: list[str], responses: list[str], **fields: Any) -> list[float]:
        return [self.weight / 2] * len(responses)


def typed(source: str) -> Callable[..., list[float]]:
    """As typed at a prompt: there is no file to read the source from."""
    names: dict[str, Any] = {}
    exec(source, names)
    function: Callable[..., list[float]] = names["f"]
    return function


def test_another_function_given_in_python_is_another() -> None:
    """Redefined in a notebook under the same name: the old figures must not be taken for the new one's."""
    config = load_config({"model": {"name": "x"}})

    def printed(function: Callable[..., list[float]]) -> str:
        return json.dumps(fingerprints(config, ["ppo"], [function])["ppo"]["data"]["reward function"])

    one: list[Callable[[], Callable[..., list[float]]]] = [
        lambda: reward_of(1.0),
        lambda: reward_of(2.0),
        lambda: reward_of(1.0, "b"),
        lambda: constant,
        lambda: functools.partial(constant, value=2.0),
        lambda: functools.partial(constant, value=3.0),
        lambda: Rewarding(1.0),
        lambda: Rewarding(2.0),
        lambda: Rewarding(1.0).half,
        lambda: typed("def f(prompts, responses, **fields):\n    return [1.0] * len(responses)"),
        lambda: typed("def f(prompts, responses, **fields):\n    return [2.0] * len(responses)"),
        lambda: lambda prompts, responses, **fields: [float(len(response)) for response in responses],
        lambda: lambda prompts, responses, **fields: [-float(len(response)) for response in responses],
    ]
    prints = [printed(make()) for make in one]
    assert prints == [printed(make()) for make in one] and len(set(prints)) == len(prints)


def test_a_function_of_a_module_counts_by_its_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    sections = {"ppo": {"rewards": [{"kind": "function", "function": "score:f"}]}}
    before = prints_of(project, **sections)
    with (project / "score.py").open("a") as opened:
        opened.write(" ")
    assert changes(before, prints_of(project, **sections)) == {"ppo": ["contents of ppo.rewards.0.function score changed"]}


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.model", "merges.txt", "modeling_own.py"])
def test_everything_counts_that_a_model_is_read_from(name: str, project: Path) -> None:
    (project / "model" / name).write_text("a")
    before = prints_of(project)
    (project / "model" / name).write_text("b")
    assert changes(before, prints_of(project))["sft"] == [f"contents of model.name changed: {name}"]


def test_folders_in_the_working_directory_are_not_looked_at(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project has a folder named as a kind of reward."""
    before = prints_of(project)
    monkeypatch.chdir(project)
    assert prints_of(project) == before


def test_a_precision_to_be_chosen_anew_is_no_change(project: Path) -> None:
    """Without config.yaml, `auto` has not come to anything yet."""
    before, after = prints_of(project, machine={"dtype": "float32"}), prints_of(project)
    assert changes(before, after) == {}
    assert changes(before, prints_of(project, machine={"dtype": "bfloat16"}))["sft"] == [
        "machine.dtype was 'float32', is 'bfloat16'"
    ]


def test_a_model_from_scratch_depends_on_the_longest_text_of_any_stage(project: Path) -> None:
    def pretrain(**sections: Any) -> Any:
        values = {"model": {"scratch": {}}, "data": {"pretrain": str(project / "sft.jsonl")}, **sections}
        return fingerprints(load_config(values), ["pretrain"])["pretrain"]

    longer = pretrain(ppo={"max_new_tokens": 900})
    assert list(differences(pretrain(), longer)) == ["model.scratch.positions was 512, is 1156"]


def test_how_long_a_reward_function_may_take_changes_nothing(project: Path) -> None:
    def prints(timeout: float) -> Any:
        term = {"kind": "function", "function": f"{project}/score.py:f", "timeout": timeout}
        data = {name: str(project / f"{name}.jsonl") for name in ("sft", "prompts")}
        values = {"output": "run", "model": {"name": str(project / "model")}, "data": data}
        return fingerprints(load_config({**values, "ppo": {"rewards": [term]}, "evaluation": {"judges": {"mine": term}}}), STAGES)

    assert prints(1.0) == prints(300.0)


def test_a_policy_may_be_called_timeout(project: Path) -> None:
    def prints(name: str) -> Any:
        values = {"output": "run", "model": {"name": str(project / "model")}, "data": {"prompts": str(project / "prompts.jsonl")}}
        return fingerprints(load_config({**values, "evaluation": {"policies": {"timeout": name}}}), ["evaluate"])

    assert prints("gpt2") != prints("gpt3")


def test_a_function_that_is_not_written_in_python_goes_by_its_name(project: Path) -> None:
    config = load_config({"model": {"name": str(project / "model")}, "data": {"prompts": str(project / "prompts.jsonl")}})
    one, same, other = (fingerprints(config, ["ppo"], [call])["ppo"] for call in (len, len, max))
    assert one == same and list(differences(one, other))


def test_runs_with_classifiers_know_how_those_are_read(project: Path) -> None:
    term = {"kind": "classifier", "model": str(project / "classifier")}
    with_one = prints_of(project, ppo={"rewards": [term]})
    without = prints_of(project, ppo={"rewards": [{"kind": "stage"}]}, evaluation={"judges": {}})
    assert "what classifiers read" in with_one["ppo"]["settings"] and "what classifiers read" not in without["ppo"]["settings"]
    assert "what classifiers read" not in with_one["reward"]["settings"]

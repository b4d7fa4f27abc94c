"""What README.md shows works: commands, records, settings, files."""

import json
import re
from pathlib import Path

import pytest
import typer.main
import yaml

import tercet
from tercet.cli import app
from tercet.config import load_config
from tercet.data.records import read_comparisons, read_demonstrations, read_prompts

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_exists_with_its_options():
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    shown = re.findall(r"^    tercet (\w+)(.*)$", README, flags=re.M)
    assert len(shown) >= 5
    for name, rest in shown:
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"(?<= )--[a-z-]+", rest.split("#")[0])) <= options, name


@pytest.mark.parametrize(
    ("name", "read"), [("demonstrations", read_demonstrations), ("comparisons", read_comparisons), ("prompts", read_prompts)]
)
def test_every_record_can_be_read(name, read, tmp_path):
    row = next(line for line in README.splitlines() if line.startswith(f"| {name} |"))
    records = [text for text in re.findall(r"`(\{.*?\})`", row) if "[...]" not in text and '"..."' not in text]
    assert records
    for i, text in enumerate(records):
        (tmp_path / f"{i}.jsonl").write_text(text + "\n")
        assert len(read(tmp_path / f"{i}.jsonl")) == 1


def test_the_settings_are_a_valid_configuration():
    rewards, adapter = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", README, flags=re.S))
    config = load_config({"model": {"name": "gpt2", **adapter["model"]}, **rewards})
    assert config.model.adapter is not None
    assert [term.kind for term in config.ppo.rewards] == ["stage", "classifier", "function"]


def test_the_python_names_exist():
    for name in re.findall(r"tercet\.(\w+)\(", README):
        assert callable(getattr(tercet, name))


def test_the_file_map_names_files_that_exist():
    for row in README.split("## Where things are")[1].splitlines():
        if row.startswith("| tercet/") or row.startswith("| docs/") or row.startswith("| recipes/"):
            first, *others = row.split("|")[1].strip().split(", ")
            assert (ROOT / first).exists(), first
            for other in others:
                assert any((ROOT / base / other).exists() for base in (Path(first).parent, "tercet", ".")), other


def test_the_recipes_are_valid():
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        assert load_config(path).model.name is not None


def test_the_toy_recipe_has_its_data():
    config = load_config(ROOT / "recipes/toy.yaml")
    assert len(read_demonstrations(str(config.data.sft))) == 2 and len(read_comparisons(str(config.data.comparisons))) == 1
    assert json.loads(json.dumps(config.model_dump()))["data"]["prompts"].endswith("prompts.jsonl")

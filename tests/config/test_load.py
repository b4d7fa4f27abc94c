"""Reading a configuration: types, paths, --set, and the commented file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.config import Config, commented_yaml, load_config, parse_yaml, to_yaml
from tercet.types import TercetError

MODEL = {"model": {"name": "gpt2"}}


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("ppo.kl.coef=1e-5", 1e-5),
        ("ppo.kl.coef=0.02", 0.02),
        ("ppo.kl.coef=1", 1.0),
        ("ppo.minibatch_size=null", None),
        ("ppo.minibatch_size=", None),
        ("ppo.minibatch_size=64", 64),
        ("ppo.stop=[END, '###']", ["END", "###"]),
        ("ppo.whiten_advantages=false", False),
        ("machine.threads=3", 3),
        ("machine.threads=auto", "auto"),
        ("model.name=other/model", "other/model"),
        ("sft.learning_rate=2.5E-4", 2.5e-4),
    ],
)
def test_set_is_typed(override: str, wanted: object) -> None:
    value = load_config(MODEL, [override])
    for part in override.partition("=")[0].split("."):
        value = getattr(value, part)
    assert value == wanted and type(value) is type(wanted)


def test_what_is_wrong_with_set_is_not_said_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: {name: gpt2}\nsft: {epochs: 0}\n", encoding="utf-8")
    with pytest.raises(TercetError) as told:
        load_config(file, ["ppo.iteration=3", "ppo.gamma=7"])
    lines = str(told.value).splitlines()
    assert [line.partition(": ")[0] for line in sorted(lines)] == ["--set", "--set", str(file)], lines


def test_set_opens_sections_that_the_file_does_not_have(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: {name: gpt2}\nppo:\n")
    config = load_config(file, ["ppo.kl.coef=0.5", "evaluation.prompts=7"])
    assert (config.ppo.kl.coef, config.evaluation.prompts, config.ppo.iterations) == (0.5, 7, 100)


def test_the_last_set_wins_and_the_source_is_left_alone() -> None:
    source = {"model": {"name": "gpt2"}, "ppo": {"kl": {"coef": 1.0}}}
    assert load_config(source, ["ppo.kl.coef=2", "ppo.kl.coef=3"]).ppo.kl.coef == 3.0
    assert source == {"model": {"name": "gpt2"}, "ppo": {"kl": {"coef": 1.0}}}


def test_yaml_1_2_numbers() -> None:
    assert parse_yaml("[1e-5, 3E4, -1.5e+3, .5e1, 1, 1.5]", "x") == [1e-5, 3e4, -1500.0, 5.0, 1, 1.5]


def test_merge_keys_add_what_is_not_there(tmp_path: Path) -> None:
    text = "\n".join(
        (
            "a: &a {rate: 1, size: 1}",
            "b: &b {<<: *a, rate: 2}",
            "c: {rate: 3, <<: *b}",
            "d: {<<: [*b, {seed: 4}]}",
            "e: {<<: &e {<<: *b, rate: 5}}",
            "f: *e",
        )
    )
    assert parse_yaml(text, "x") == {
        "a": {"rate": 1, "size": 1},
        "b": {"rate": 2, "size": 1},
        "c": {"rate": 3, "size": 1},
        "d": {"rate": 2, "size": 1, "seed": 4},
        "e": {"rate": 5, "size": 1},
        "f": {"rate": 5, "size": 1},
    }
    file = tmp_path / "a.yaml"
    file.write_text("model: {name: gpt2}\nsft: &d {epochs: 2, batch_size: 8}\nreward:\n  <<: *d\n  epochs: 1\n")
    config = load_config(file)
    assert (config.sft.epochs, config.reward.epochs, config.reward.batch_size) == (2, 1, 8)
    for wrong in ("{<<: *a, rate: 1, rate: 2}", "{<<: *a, <<: *a}"):
        with pytest.raises(TercetError, match="given twice"):
            parse_yaml(f"a: &a {{rate: 1}}\nb: {wrong}", "rate")


def test_an_emptied_section_has_its_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: {name: gpt2}\nsft:\nppo:\ndata:\n")
    assert load_config(file) == load_config({**MODEL, "output": str(tmp_path / "run")})


def test_the_commented_file_loads_and_equals_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "tercet.yaml"
    file.write_text(commented_yaml(), encoding="utf-8")
    loaded = load_config(file)
    wanted = Config.model_validate(
        {
            "output": str(tmp_path / "run"),
            "model": {"name": "gpt2"},
            "data": {name: str(tmp_path / f"{file}.jsonl") for name, file in EXAMPLE_FILES.items()},
        }
    )
    assert loaded == wanted


EXAMPLE_FILES = {"sft": "demonstrations", "comparisons": "comparisons", "prompts": "prompts"}


def test_the_commented_file_explains_every_field() -> None:
    lines = commented_yaml().splitlines()[2:]
    assert all("  # " in line for line in lines if line.strip()), "a field without an explanation"
    mentioned = {line.split(":")[0].strip(" #") for line in lines}
    for name in ("gae_lambda", "controller", "normalise_samples", "microbatch_tokens", "vocab_size", "main_group"):
        assert name in mentioned


def test_the_optional_parts_of_the_commented_file_load_when_uncommented(tmp_path: Path) -> None:
    text = commented_yaml().replace("  name: gpt2  #", "  name: null  #")
    text = text.replace("  # scratch:", "  scratch:").replace("  # adapter:", "  adapter:")
    text = "\n".join(line.replace("  #   ", "    ", 1) if line.startswith("  #   ") else line for line in text.splitlines())
    file = tmp_path / "a.yaml"
    file.write_text(text, encoding="utf-8")
    model = load_config(file).model
    scratch = model.scratch
    assert model.adapter is not None and model.adapter.rank == 16
    assert scratch is not None and scratch.architecture == "gpt2" and scratch.vocab_size == 1024


def test_to_yaml_round_trip() -> None:
    config = load_config(
        {**MODEL, "ppo": {"rewards": [{"kind": "function", "function": "a:b", "weight": 0.5}], "stop": ["é\n"]}, "seed": 5},
        ["sft.learning_rate=1e-7"],
    )
    assert load_config(yaml.safe_load(to_yaml(config))) == config
    assert load_config(parse_yaml(to_yaml(config), "x")) == config
    assert load_config(config) == config


class TestPaths:
    def test_in_a_file_they_are_relative_to_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
        (home / "data").mkdir(parents=True)
        elsewhere.mkdir()
        for folder in (home, elsewhere):
            (folder / "only.jsonl").touch()
        (elsewhere / "name").mkdir()
        (home / "data/sft.jsonl").touch()
        (home / "score.py").touch()
        (home / "a.yaml").write_text(
            "model: {name: name}\noutput: out\ndata: {sft: data/sft.jsonl, prompts: only.jsonl, comparisons: owner/set}\n"
            "ppo: {rewards: [{kind: function, function: 'score.py:f'}]}\nevaluation: {gold: 'score.py:g'}\n"
        )
        monkeypatch.chdir(elsewhere)
        config = load_config(Path("../home/a.yaml"))
        assert config.output == str(home / "out")
        assert config.data.sft == str(home / "data/sft.jsonl")
        assert config.data.prompts == str(home / "only.jsonl")
        assert config.data.comparisons == "owner/set", "what is no path may be a hub data set's name"
        assert config.model.name == "name", "a folder that happens to be in the working directory is not the file's"
        assert config.ppo.rewards[0].function == f"{home / 'score.py'}:f"
        assert config.evaluation.gold == f"{home / 'score.py'}:g"

    def test_in_set_they_are_relative_to_the_working_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        home, here = tmp_path / "home", tmp_path / "here"
        for folder in (home, here):
            folder.mkdir()
            (folder / "a.jsonl").touch()
        (home / "a.yaml").write_text("model: {name: gpt2}\ndata: {sft: a.jsonl}\n")
        monkeypatch.chdir(here)
        config = load_config(home / "a.yaml", ["data.prompts=a.jsonl", "output=out"])
        assert config.data.sft == str(home / "a.jsonl")
        assert config.data.prompts == str(here / "a.jsonl")
        assert config.output == str(here / "out")

    def test_a_tilde_is_the_home_folder_wherever_a_file_may_stand(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        rewards = [{"kind": "classifier", "model": "~/c", "label": "good"}, {"kind": "function", "function": "~/r.py:f"}]
        evaluation = {"gold": "~/g.py:f", "judges": {"one": rewards[1]}, "policies": {"other": "~/p"}}
        config = load_config({"model": {"name": "~/m"}, "ppo": {"rewards": rewards}, "evaluation": evaluation})
        assert config.model.name == str(tmp_path / "m") and config.ppo.rewards[0].model == str(tmp_path / "c")
        assert config.ppo.rewards[1].function == config.evaluation.judges["one"].function == f"{tmp_path / 'r.py'}:f"
        assert config.evaluation.gold == f"{tmp_path / 'g.py'}:f" and config.evaluation.policies == {"other": str(tmp_path / "p")}

    def test_a_missing_data_file_is_named_where_it_was_looked_for(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("model: {name: gpt2}\ndata: {sft: missing.jsonl}\n")
        assert load_config(tmp_path / "a.yaml").data.sft == str(tmp_path / "missing.jsonl")


def test_a_configuration_is_frozen() -> None:
    config = load_config(MODEL)
    with pytest.raises(ValueError):
        config.seed = 5  # type: ignore[misc]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_any_yaml_text_gives_values_or_a_tercet_error(text: str) -> None:
    try:
        parse_yaml(text, "x")
    except TercetError as error:
        assert str(error).startswith("x")


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
_KEYS = st.sampled_from(["model", "data", "sft", "ppo", "evaluation", "machine", "checkpoint", "seed", "output", "reward", "x"])
_FIELDS = st.sampled_from(
    ["name", "scratch", "sft", "epochs", "rewards", "kl", "judges", "gold", "threads", "stop", "policy", "use"]
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(_KEYS, _VALUES | st.dictionaries(_FIELDS, _VALUES, max_size=4), max_size=5))
def test_any_mapping_gives_a_configuration_or_a_tercet_error(values: dict[str, object]) -> None:
    try:
        assert isinstance(load_config(values), Config)
    except TercetError as error:
        assert str(error).startswith("configuration: ")

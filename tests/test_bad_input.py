"""Every kind of wrong input through the command line: exit 2, one readable message, no traceback, no file touched.

The tables of wrong data (data/test_wrong_data.py) and wrong configurations (config/test_wrong_configuration.py) say what each message
must hold; here they are given to `tercet run`, with wrong models and wrong wishes for existing runs beside them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from config.test_wrong_configuration import WRONG
from data.test_wrong_data import FILES, PAIRS, PPO, SFT, UNUSABLE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_zoo import bert, bpe_tokenizer, causal_lm, classifier, word_tokenizer, write_checkpoint

from tercet import cli
from tercet.config import load_config
from tercet.pipeline import Pipeline
from tercet.types import TercetError


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> dict[str, Any]:
    """A configuration that would run, on a small model of somebody's."""
    folder = tmp_path_factory.mktemp("model")
    return {
        "model": {"name": write_checkpoint(folder, causal_lm("gpt2"), bpe_tokenizer())},
        "data": {
            "sft": str(tiny_data / "demonstrations.jsonl"),
            "comparisons": str(tiny_data / "comparisons.jsonl"),
            "prompts": str(tiny_data / "prompts.jsonl"),
            "max_prompt_length": 32,
        },
        "sft": {"max_length": 64},
        "reward": {"max_length": 64},
        "ppo": {"max_new_tokens": 16},
        "machine": {"device": "cpu", "threads": 1},
    }


def state(folder: Path) -> dict[str, Any]:
    """Every file's bytes and every folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """`tercet run` on a file of the test's folder must end with 2, one message and an untouched folder; gives the message."""

    def run(config: Path, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["tercet", "run", str(config), *options])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(Pipeline, "_execute", lambda *_: pytest.fail("this was not refused"))
        before = state(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        assert end.value.code == 2, said.err
        assert said.err.startswith("error: ") and said.err.count("error: ") == 1 and "Traceback" not in said.err, said.err
        assert said.out == "" and len(said.err) < 1000, said.err
        assert state(tmp_path) == before
        return said.err.removeprefix("error: ").strip()

    return run


def write(folder: Path, values: dict[str, Any]) -> Path:
    file = folder / "tercet.yaml"
    file.write_text(yaml.safe_dump({**values, "output": str(folder / "run")}))
    return file


def with_data(good: dict[str, Any], reader: Any, path: Path) -> dict[str, Any]:
    key = {SFT: "sft", PAIRS: "comparisons", PPO: "prompts"}[reader]
    return {**good, "data": {**good["data"], key: str(path)}}


@pytest.mark.parametrize("case", FILES)
def test_wrong_data(case: str, good: dict[str, Any], refused: Refused, tmp_path: Path) -> None:
    reader, name, content, needed = FILES[case]
    (tmp_path / name).write_bytes(content)
    message = refused(write(tmp_path, with_data(good, reader, tmp_path / name)))
    assert [part for part in [name, "expected", *needed] if part not in message] == [], message


@pytest.mark.parametrize("case", UNUSABLE)
def test_comparisons_without_a_usable_one(case: str, good: dict[str, Any], refused: Refused, tmp_path: Path) -> None:
    content, reason = UNUSABLE[case]
    (tmp_path / "a.jsonl").write_bytes(content)
    assert reason in refused(write(tmp_path, with_data(good, PAIRS, tmp_path / "a.jsonl")))


@pytest.mark.parametrize(("place", "told"), [("nowhere.jsonl", "no such file"), (".", "no data files"), ("a\0b", "no such file")])
def test_wrong_places(place: str, told: str, good: dict[str, Any], refused: Refused, tmp_path: Path) -> None:
    config = write(tmp_path, good)
    (tmp_path / "empty").mkdir()
    assert told in refused(config, "--set", f"data.sft={json.dumps(str(tmp_path / 'empty') if place == '.' else place)}")


@pytest.mark.parametrize(("text", "parts"), WRONG, ids=[repr(text)[:70] for text, _ in WRONG])
def test_wrong_configurations(text: str, parts: list[str], refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text, encoding="utf-8")
    message = refused(file)
    assert [part for part in parts if part not in message] == [], message


# Wrong models: a function that makes one in a folder, where it is configured, and what the message must hold.
def _of(model: Any, tokenizer: Any = None, **generation: Any) -> Callable[[Path], None]:
    return lambda folder: write_checkpoint(folder, model(), tokenizer and tokenizer(), **generation) and None


def _damaged(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write_checkpoint(folder, causal_lm("gpt2"), bpe_tokenizer())
        change(folder)

    return make


def _edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return _damaged(edit)


def _broken(name: str, content: bytes) -> Callable[[Path], None]:
    return _damaged(lambda folder: (folder / name).write_bytes(content))


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(causal_lm("gpt2").state_dict(), folder / "pytorch_model.bin")


def _not_numbers() -> Any:
    model = causal_lm("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    return model


def _encoder(*labels: str) -> Callable[[Path], None]:
    return _of(lambda: bert(word_tokenizer(), labels=labels or ("only",)), word_tokenizer)


NAME: dict[str, Any] = {"model": {"name": "WRONG"}}
USE: dict[str, Any] = {"reward": {"use": "WRONG"}}
CLASSIFIER: dict[str, Any] = {"ppo": {"rewards": [{"kind": "classifier", "model": "WRONG"}]}}
LABEL: dict[str, Any] = {"ppo": {"rewards": [{"kind": "classifier", "model": "WRONG", "label": "best"}]}}
OLDEST = transformers.__version__.startswith("5.0.")  # makes up a tokenizer for it
POLICY, VALUE = {"ppo": {"policy": "WRONG"}}, {"ppo": {"value_model": "WRONG"}}
MODELS: dict[str, tuple[Callable[[Path], Any], dict[str, Any], list[str]]] = {
    "no such folder": (lambda folder: None, NAME, ["cannot be loaded", "no such folder"]),
    "an empty folder": (Path.mkdir, NAME, ["there is no tokenizer" if OLDEST else "cannot be loaded"]),
    "an encoder": (
        _of(lambda: bert(word_tokenizer()), lambda: word_tokenizer(eos_token="[SEP]")),
        NAME,
        ["saved for another purpose"],
    ),
    "a classifier": (_of(lambda: classifier("llama_untied"), bpe_tokenizer), NAME, ["lacks 1 ", "lm_head"]),
    "no architecture of this name": (_edit("config.json", model_type="gpt7"), NAME, ["gpt7"]),
    "configuration that is no JSON": (_broken("config.json", b"{"), NAME, ["cannot be loaded", "JSON"]),
    "no tokenizer": (_of(lambda: causal_lm("gpt2")), NAME, ["no tokenizer", "tokenizer.json"]),
    "tokenizer that is none": (_broken("tokenizer.json", b"{}"), NAME, ["cannot be loaded as a tokenizer", "is missing"]),
    "tokenizer without EOS": (_edit("tokenizer_config.json", eos_token=None), NAME, ["no end-of-text token", "eos_token"]),
    "vocabulary too small": (_of(lambda: causal_lm("gpt2", 200), bpe_tokenizer), NAME, ["288", "200", "do not belong together"]),
    "weights cut off": (_damaged(_cut), NAME, ["cannot be loaded as a causal language model"]),
    "weights of no bytes": (_broken("model.safetensors", b""), NAME, ["cannot be loaded as a causal language model"]),
    "weights of garbage": (_broken("model.safetensors", b"\xff" * 300), NAME, ["cannot be loaded as a causal language model"]),
    "weights missing": (_damaged(lambda folder: (folder / "model.safetensors").unlink()), NAME, ["cannot be loaded"]),
    "weights of other sizes": (_edit("config.json", n_embd=48), NAME, ["other sizes than its config.json says"]),
    "weights of fewer layers": (_edit("config.json", n_layer=3), NAME, ["lacks 12", "incomplete"]),
    "weights in a pickle": (_damaged(_pickled), NAME, ["cannot be loaded as a causal language model"]),
    "weights that are no numbers": (_of(_not_numbers, bpe_tokenizer), NAME, ["not finite", "another checkpoint"]),
    "code of its own": (
        _edit("config.json", model_type="evil", auto_map={"AutoConfig": "evil.C"}),
        NAME,
        ["model.trust_remote_code: true would allow"],
    ),
    "too few positions": (_of(lambda: causal_lm("gpt2", n_positions=40), bpe_tokenizer), NAME, ["40 positions"]),
    "no chat template": (
        _of(lambda: causal_lm("gpt2"), bpe_tokenizer),
        {"model": {"name": "WRONG", "template": "chat"}},
        ["chat template"],
    ),
    "no classifier of the architecture": (
        _of(lambda: causal_lm("cohere"), bpe_tokenizer),
        NAME,
        ["no sequence classifier", "llama"],
    ),
    "reward model: a language model": (_of(lambda: causal_lm("gpt2"), bpe_tokenizer), USE, ["lacks", "score.weight"]),
    "reward model: several labels": (_of(lambda: classifier("gpt2", num_labels=3), bpe_tokenizer), USE, ["3 labels"]),
    "reward model: an encoder": (_encoder(), USE, ["does not read its score at the last token"]),
    "reward model: vocabulary too small": (_of(lambda: classifier("gpt2", 40)), USE, ["only 40"]),
    "reward model: fewer rows than the model can sample": (
        _of(lambda: classifier("gpt2", 288), bpe_tokenizer),
        {"model": {"name": "PADDED"}, **USE},
        ["288 embedding rows", "the model has 304", "resize_token_embeddings(304)"],
    ),
    "reward model: other ids": (_of(lambda: classifier("gpt2", 300), word_tokenizer), USE, ["other ids"]),
    "reward model: weights cut off": (
        lambda folder: (write_checkpoint(folder, classifier("gpt2"), bpe_tokenizer()), _cut(folder)),
        USE,
        ["cannot be loaded as a sequence-classification model"],
    ),
    "classifier: several labels": (_encoder("bad", "so-so", "good"), CLASSIFIER, ["3 labels", "label"]),
    "classifier: no such label": (_encoder("bad", "good"), LABEL, ["no label 'best'"]),
    "classifier: no such folder": (lambda folder: None, CLASSIFIER, ["cannot be loaded", "no such folder"]),
    "classifier: no tokenizer": (_of(lambda: bert(word_tokenizer())), CLASSIFIER, ["no tokenizer"]),
    "policy: a classifier": (_of(lambda: classifier("llama_untied"), bpe_tokenizer), POLICY, ["lacks 1 ", "lm_head"]),
    "policy: too few positions": (
        _of(lambda: causal_lm("gpt2", n_positions=40), bpe_tokenizer),
        POLICY,
        ["has 40 positions"],
    ),
    "value model: other ids": (_of(lambda: classifier("gpt2", 300), word_tokenizer), VALUE, ["other ids"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_wrong_models(case: str, good: dict[str, Any], refused: Refused, tmp_path: Path) -> None:
    make, changes, needed = MODELS[case]
    make(tmp_path / "wrong")
    write_checkpoint(tmp_path / "padded", causal_lm("gpt2", 304), bpe_tokenizer())
    changes = json.loads(
        json.dumps(changes).replace("WRONG", str(tmp_path / "wrong")).replace("PADDED", str(tmp_path / "padded"))
    )
    message = refused(write(tmp_path, {**good, **{name: {**good.get(name, {}), **section} for name, section in changes.items()}}))
    assert [part for part in needed if part not in message] == [], message
    assert str(tmp_path / "wrong") in message or "the model has" in message, message


# Wrong wishes for a finished run: options, and what the message must hold.
WISHES: dict[str, tuple[list[str], list[str]]] = {
    "another setting": (["--set", "sft.epochs=2"], ["stage sft was finished", "sft.epochs was 1, is 2", "--from sft"]),
    "another seed": (["--set", "seed=9"], ["stage pretrain was finished", "seed was 3, is 9"]),
    "from a stage that is none": (["--from", "polish"], ["--from polish", "pretrain, sft, reward, ppo, evaluate"]),
    "from too late a stage": (["--set", "sft.epochs=2", "--from", "ppo"], ["stage sft was finished"]),
    "a device that is not there": (["--set", "machine.device=cuda:77", "--from", "ppo"], ["machine.device", "try auto"]),
    "a function that is not there": (
        ["--set", "ppo.rewards=[{kind: function, function: 'nowhere.py:f'}]", "--from", "ppo"],
        ["there is no file", "nowhere.py"],
    ),
}


@pytest.mark.parametrize("case", WISHES)
def test_wrong_wishes_for_a_finished_run(case: str, run_copy: Path, refused: Refused, tmp_path: Path) -> None:
    options, needed = WISHES[case]
    values = yaml.safe_load((run_copy / "config.yaml").read_text())
    message = refused(write(tmp_path, values), *options)
    assert [part for part in needed if part not in message] == [], message


def test_there_are_enough_of_them() -> None:
    assert len(FILES) + len(UNUSABLE) + 3 + len(WRONG) + len(MODELS) + len(WISHES) >= 200


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.sampled_from(
    ["model", "data", "sft", "ppo", "kl", "name", "scratch", "rewards", "kind", "epochs", "seed", "judges", "x"]
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=4), inner), max_leaves=12
)
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def loads(source: Any, overrides: list[str]) -> Iterator[str]:
    """Nothing but Tercet's own errors may come out."""
    try:
        load_config(source, overrides)
    except TercetError as error:
        str(error).encode("utf-8", "surrogatepass")
        yield str(error)


@given(values=st.dictionaries(KEYS, VALUES, max_size=4))
@FUZZ
def test_any_values_in_a_configuration_give_only_our_errors(values: dict[str, Any]) -> None:
    list(loads(values, []))
    list(loads({"model": {"name": "gpt2"}, **values}, []))


@given(text=st.text(max_size=60) | st.binary(max_size=60))
@FUZZ
def test_any_text_as_a_configuration_gives_only_our_errors(text: str | bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    assert all(str(file) in message for message in loads(file, []))


@given(
    key=st.text(max_size=12) | st.sampled_from(["ppo.kl.coef", "data.sft", "model.name", "ppo.rewards"]),
    value=st.text(max_size=20),
)
@FUZZ
def test_any_override_gives_only_our_errors(key: str, value: str) -> None:
    list(loads({"model": {"name": "gpt2"}}, [f"{key}={value}"]))

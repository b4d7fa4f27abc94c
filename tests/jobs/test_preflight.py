"""tercet/jobs/preflight.py: mistakes are found before anything is written. Most of its cases: tests/test_bad_input.py, test_doctor.py."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, write_jsonl
from model_zoo import ARCHITECTURES, causal_lm, randomise
from transformers import AutoConfig, AutoModelForCausalLM

from tercet.config import load_config
from tercet.generation import native
from tercet.jobs import preflight
from tercet.jobs.preflight import inspect
from tercet.jobs.workshop import check_room
from tercet.pipeline import Pipeline
from tercet.types import TercetError


def test_only_what_the_stages_need_is_read(tiny_data: Path, tmp_path: Path) -> None:
    values = tiny_config(tiny_data, tmp_path / "run")
    values["data"]["comparisons"] = str(tmp_path / "nowhere.jsonl")
    sources, mistakes = inspect(load_config(values), ["sft"], None, [])
    assert (list(sources), mistakes) == (["sft"], []) and len(sources["sft"]) == 40
    sources, mistakes = inspect(load_config(values), ["sft", "reward", "ppo"], None, [])
    assert list(sources) == ["sft", "prompts"] and len(mistakes) == 1 and "nowhere.jsonl" in mistakes[0]
    assert inspect(load_config(values), [], None, []) == ({}, [])


def test_comparisons_without_any_preference_are_a_mistake_and_one_preference_is_enough(tiny_data: Path, tmp_path: Path) -> None:
    tie = {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}
    for records, count in (([tie], 1), ([tie, tie | {"ranks": [1, 2]}], 0)):
        values = tiny_config(tiny_data, tmp_path / "run")
        values["data"]["comparisons"] = str(write_jsonl(tmp_path / "c.jsonl", records))
        _, mistakes = inspect(load_config(values), ["reward"], None, [])
        assert len(mistakes) == count


def score(prompts: list[Any], responses: list[str], **fields: Any) -> list[float]:
    return [0.0] * len(responses)


@functools.wraps(lambda prompts, responses: [])
def wrapped(*values: Any, **fields: Any) -> list[float]:
    return []


CODE = "def score(prompts, responses, **fields):\n    return [0.0] * len(responses)\n"


@pytest.mark.parametrize("field", ["prompts", "responses"])
@pytest.mark.parametrize("place", ["ppo", "judges", "gold", "evaluate alone", "callable", "nowhere"])
def test_a_field_with_the_name_of_an_argument_is_refused_where_a_function_is_called(
    field: str, place: str, tiny_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "rewards.py").write_text(CODE)
    reference = f"{tmp_path}/rewards.py:score"
    values = tiny_config(tiny_data, tmp_path / "run")
    values["data"]["prompts"] = str(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", field: "x"}] * 2))
    term = {"kind": "function", "function": reference}
    if place == "ppo":
        values["ppo"]["rewards"] = [term]
    elif place == "judges":
        values["evaluation"] = {**values.get("evaluation", {}), "judges": {"mine": term}}
    elif place in ("gold", "evaluate alone"):
        values["evaluation"] = {**values.get("evaluation", {}), "gold": reference}
    pipeline = Pipeline(load_config(values), [score] if place == "callable" else [])
    _, mistakes = pipeline.inspect(["evaluate"] if place == "evaluate alone" else ["ppo"])
    if place == "nowhere":
        assert mistakes == []
    else:
        assert len(mistakes) == 1 and f"p.jsonl:2: the field '{field}' cannot be given to the function" in mistakes[0]
        assert "rename or remove the field" in mistakes[0]


def test_what_a_function_takes_is_no_mistake(tiny_data: Path, tmp_path: Path) -> None:
    values = tiny_config(tiny_data, tmp_path / "run")
    values["data"]["prompts"] = str(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "thing": 1}]))
    for function in (score, wrapped, lambda prompts, responses, thing: [0.0], functools.partial(score, more=1), max):
        assert inspect(load_config(values), ["ppo"], None, [function])[1] == []
    told = inspect(load_config(values), ["ppo"], None, [lambda prompts, responses: [0.0]])[1]
    assert len(told) == 1 and "p.jsonl:1: the field 'thing'" in told[0]
    told = inspect(load_config(values), ["ppo"], None, [lambda prompts, responses, target, thing: [0.0]])[1]
    assert len(told) == 1 and "'target'" in told[0] and "are called thing. Add it to data.prompts" in told[0]


SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None}


@pytest.mark.parametrize(
    ("architecture", "options", "said"),
    [
        (
            "mamba",
            {"state_size": 4, "conv_kernel": 3, "pad_token_id": 0},
            "another log-probability when it is sampled.*such as llama",
        ),
        ("minimax", {**HEADS, "num_local_experts": 2}, "MiniMaxForCausalLM cannot be sampled.*cache of its own.*such as llama"),
        ("openai-gpt", {"n_embd": 32, "n_layer": 2, "n_head": 4}, "OpenAIGPTLMHeadModel cannot be sampled.*such as llama"),
    ],
)
def test_a_model_that_is_another_one_when_it_is_sampled_is_a_mistake(
    architecture: str, options: dict[str, Any], said: str
) -> None:
    torch.manual_seed(0)
    sizes = {key: value for key, value in SMALL.items() if "n_embd" not in options or "token_id" in key or key == "vocab_size"}
    model = randomise(AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes, **options)))
    with pytest.raises(TercetError, match=rf"^m: .*{said}"):
        preflight._check_sampling("m", model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_other_model_passes_without_a_copy_of_its_weights(
    architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "packed_weights", lambda *given: pytest.fail("copied"))
    preflight._check_sampling("m", causal_lm(architecture).to(dtype))


@pytest.mark.parametrize(
    ("fields", "way"), [({"topic": "x"}, "choose one of topic"), ({}, "the prompts have no fields; leave it out")]
)
def test_groups_by_a_field_that_no_prompt_has_are_a_mistake(
    fields: dict[str, str], way: str, tiny_data: Path, tmp_path: Path
) -> None:
    values = tiny_config(tiny_data, tmp_path / "run")
    values["data"]["prompts"] = str(write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"a{i}", **fields} for i in range(40)]))
    values["evaluation"] = {**values.get("evaluation", {}), "group_by": "foo"}
    _, mistakes = Pipeline(load_config(values)).inspect(["evaluate"])
    assert len(mistakes) == 1 and f"no held-out prompt has a field of that name: {way}" in mistakes[0]


@pytest.mark.parametrize(
    ("prompt", "response", "way"), [(200, 100, "data.max_prompt_length=156"), (1, 400, "ppo.max_new_tokens=128")]
)
def test_the_way_out_of_too_few_positions_leads_out(prompt: int, response: int, way: str) -> None:
    data, ppo = {"prompts": "p.jsonl", "max_prompt_length": prompt}, {"max_new_tokens": response}
    with pytest.raises(TercetError, match=f"for example {way}$"):
        check_room(load_config({"model": {"name": "m"}, "data": data, "ppo": ppo}), 256, "the model")

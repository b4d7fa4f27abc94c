"""tercet/jobs/outlook.py: each thing that deserves a warning is found, and its absence is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import bpe_tokenizer, causal_lm

from tercet.algo import products
from tercet.config import load_config
from tercet.data.records import Records, read_comparisons
from tercet.data.template import Template
from tercet.jobs import outlook as module
from tercet.jobs.comparisons import comparison_sets
from tercet.jobs.outlook import leaks, measure, outlook
from tercet.runtime.machine import Machine
from tercet.types import Comparison, Demonstration, Message, Prompt

CPU = Machine(torch.device("cpu"), torch.float32, 1, 64)


def demonstrations(count: int, words: int = 3) -> Records[Demonstration]:
    return Records(Demonstration(f"Question {i}?", "b " * words, f"s:{i}") for i in range(count))


def comparisons(count: int, better: int = 2, worse: int = 2) -> Records[Comparison]:
    return Records(
        Comparison(f"Pair {i}?", ("y " * (better + i % 2), "n " * (worse + (i + 1) % 2)), (0, 1), 0.0, {}, f"c:{i}")
        for i in range(count)
    )


def prompts(count: int, text: str = "What is {}?") -> Records[Prompt]:
    return Records(Prompt(text.format(i), {}, f"p:{i}") for i in range(count))


def contradicted(count: int) -> Records[Comparison]:
    """A third of them once more, with the other response preferred."""
    first = comparisons(count)
    return Records([*first, *(replace(one, responses=one.responses[::-1]) for one in first[: count // 3])])


def tied(count: int, ties: int) -> Records[Comparison]:
    """The last `ties` of them prefer nothing."""
    every = comparisons(count)
    return Records([*every[:-ties], *(replace(one, ranks=(0.0, 0.0)) for one in every[-ties:])])


def repeated(records: Records[Any]) -> Records[Any]:
    """With the prompt at the beginning of each response, too."""
    if isinstance(records[0], Comparison):
        return Records(replace(one, responses=tuple(f"{one.prompt} {text}" for text in one.responses)) for one in records)
    return Records(replace(one, response=f"{one.prompt} {one.response}") for one in records)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    causal_lm("gpt2").save_pretrained(folder)
    return str(folder)


def warnings(
    base: str, sources: dict[str, Any], settings: dict[str, Any] | None = None, machine: Machine = CPU, **tokenizer: Any
) -> list[str]:
    config = load_config({"model": {"name": base}, "data": {"max_prompt_length": 16}, **(settings or {})})
    made = bpe_tokenizer(**tokenizer)
    template = Template(made, config.model.template, 16)
    stages = ["sft", "reward", "ppo"]
    lengths = measure(sources, config, template)
    found = outlook(config, stages, sources, lengths, template, machine, base)
    return [check.text for check in found if check.level == "warning"]


def sound() -> dict[str, Any]:
    return {"sft": demonstrations(40), "comparisons": comparisons(300), "prompts": prompts(40)}


def test_sound_data_give_no_warning(base: str) -> None:
    assert warnings(base, sound()) == []


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_bfloat16_where_the_processor_only_imitates_it(has_bfloat16: bool, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_onednn_has_bfloat16", lambda: has_bfloat16)
    told = warnings(base, sound(), machine=Machine(torch.device("cpu"), torch.bfloat16, 1, 64))
    assert [text.partition(":")[0] for text in told] == ([] if has_bfloat16 else ["machine.dtype"])
    assert warnings(base, sound(), machine=CPU) == []


@pytest.mark.parametrize(
    ("change", "settings", "told"),
    [
        ({"sft": demonstrations(40, words=30)}, {"sft": {"max_length": 32}}, ["40 of 40 texts", "raise it"]),
        ({"comparisons": comparisons(300, 30, 30)}, {"reward": {"max_length": 32}}, ["reward: 600 of 600 texts", "raise it"]),
        ({"prompts": prompts(40, "why " * 20 + "{}")}, {}, ["ppo: 40 of 40 prompts are cut", "data.max_prompt_length"]),
        ({"comparisons": comparisons(300, better=9)}, {}, ["the longer one in 100% of pairs", "balance the lengths"]),
        ({"comparisons": comparisons(300, worse=9)}, {}, ["the longer one in 0% of pairs"]),
        ({"comparisons": comparisons(50)}, {}, ["50 are few", "collect more"]),
        ({"comparisons": Records(comparisons(300), {"they are odd": 4})}, {}, ["4 records are not used because they are odd"]),
        ({"sft": Records([*demonstrations(40), *demonstrations(2)])}, {}, ["2 records stand there more than once", "remove"]),
        ({"comparisons": contradicted(300)}, {}, ["200 of 400 pairs", "the other way round", "rank the two as equal"]),
        ({"comparisons": tied(600, 350)}, {}, ["350 of 600 are ties alone", "prefer"]),
        ({"sft": repeated(demonstrations(40))}, {}, ["data.sft: in 40 of 40 records", "begin with the prompt", "leave it out"]),
        ({"comparisons": repeated(comparisons(300))}, {}, ["data.comparisons: in 300 of 300", "begin with the prompt"]),
        ({"prompts": prompts(10)}, {}, ["data.prompts: nothing is held out", "data.eval_prompts"]),
    ],
)
def test_each_fault_is_named_with_what_to_do(base: str, change: Any, settings: dict[str, Any], told: Sequence[str]) -> None:
    found = warnings(base, sound() | change, settings)
    assert len(found) == 1 and all(part in found[0] for part in told), found


def test_the_test_split_of_a_folder_is_not_trained_on_in_silence(base: str, tmp_path: Path) -> None:
    for names, count in ((["train.jsonl", "test.jsonl"], 1), (["train.jsonl", "more.jsonl"], 0), (["a.jsonl", "test.jsonl"], 0)):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        found = warnings(base, sound(), {"data": {"sft": str(folder), "max_prompt_length": 16}})
        assert len(found) == count and all(
            "test.jsonl is read to train on, too" in text and "data.eval_sft" in text for text in found
        )


def test_the_judge_is_announced_for_the_comparisons_that_the_run_gives_it(base: str, tmp_path: Path) -> None:
    """510 are enough for a judge, but not once a tenth is held out; with a file of their own to measure on, all 510 count."""
    lines = [json.dumps({"prompt": f"Pair {i}?", "chosen": "y", "rejected": "n"}) + "\n" for i in range(510)]
    (tmp_path / "c.jsonl").write_text("".join(lines))
    (tmp_path / "e.jsonl").write_text(lines[0])
    for own in (False, True):
        files = {"comparisons": str(tmp_path / "c.jsonl")} | ({"eval_comparisons": str(tmp_path / "e.jsonl")} if own else {})
        config = load_config({"model": {"name": base}, "data": files})
        sources = {name: read_comparisons(file) for name, file in files.items()}
        template = Template(bpe_tokenizer(), "plain", 16)
        found = outlook(config, ["reward"], sources, measure(sources, config, template), template, CPU, base)
        judge = len(comparison_sets(config).judge)
        assert bool(judge) == own
        told = f"reward: {judge} comparisons go to" if judge else "reward: no second reward model"
        assert any(check.text.startswith(told) for check in found), told


def test_more_threads_than_cores_are_warned_of(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    (told,) = warnings(base, sound(), machine=Machine(torch.device("cpu"), torch.float32, 3, 64))
    assert "3 threads on 2 cores" in told
    assert warnings(base, sound(), machine=Machine(torch.device("cpu"), torch.float32, 2, 64)) == []


def test_pairs_of_one_length_are_not_lopsided(base: str) -> None:
    even = Records(Comparison(f"Pair {i}?", ("y" * 5, "n" * 5), (0, 1), 0.0, {}, f"c:{i}") for i in range(300))
    assert warnings(base, sound() | {"comparisons": even}) == []


def test_more_memory_than_is_free_is_warned_of(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda device: 10 * 2**20)
    found = warnings(base, sound())
    assert [text.split(" needs")[0] for text in found] == ["stage sft", "stage reward", "stage ppo"]
    assert "0.0 GiB are free" in found[0] and "machine.microbatch_tokens" in found[0]
    assert "set model.adapter, set machine.activation_checkpointing," in found[0]
    assert "ppo.rollout_batch_size" in found[2] and "ppo.rollout_batch_size" not in found[0]
    done = warnings(base, sound(), {"model": {"name": base, "adapter": {}}, "machine": {"activation_checkpointing": True}})
    assert not any("model.adapter" in text or "activation_checkpointing" in text for text in done) and len(done) == 3
    monkeypatch.setattr(module, "free_memory", lambda device: None)
    assert warnings(base, sound()) == []


def test_transcripts_under_a_chat_template_are_warned_of(base: str) -> None:
    turns, end = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}",
        "{% if add_generation_prompt %}",
    )
    spoken = [Demonstration(f"\n\nHuman: question {i}?\n\nAssistant:", " yes.") for i in range(3)]
    for template, told in (("chat", True), ("plain", False)):
        config = {"model": {"name": base, "template": template}}
        sources = sound()
        sources["sft"] = type(sources["sft"])([*sources["sft"], *spoken])
        found = warnings(base, sources, config, chat_template=turns + end + "assistant: {% endif %}")
        assert any("data.sft: 3 of" in text and "set model.template: plain" in text for text in found) == told


def test_a_chat_template_whose_end_is_no_stop_is_warned_of(base: str) -> None:
    chat = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    options = {"chat_template": chat, "additional_special_tokens": ["<|im_end|>"]}
    found = warnings(base, sound(), {"model": {"name": base, "template": "chat"}}, **options)
    assert any("'<|im_end|>', which is no stop token" in text and "ppo.stop" in text for text in found), found
    ended = chat.replace("<|im_end|>", "<|endoftext|>")
    found = warnings(base, sound(), {"model": {"name": base, "template": "chat"}}, chat_template=ended)
    assert not any("no stop token" in text for text in found)


def found_leaks(sources: dict[str, Any]) -> list[str]:
    return [check.text for check in leaks(load_config({"model": {"name": "x"}}), sources)]


def test_a_prompt_on_both_sides_is_found_in_every_kind_of_data() -> None:
    for name, records in (("sft", demonstrations), ("comparisons", comparisons), ("prompts", prompts)):
        kept = {name: records(30), module.KINDS[name]: Records(records(60)[40:])}
        assert found_leaks(kept) == []
        both = kept | {module.KINDS[name]: Records(records(60)[27:])}  # 27, 28 and 29 are trained on
        told = found_leaks(both)
        assert (
            len(told) == 1 and f"of the 33 prompts of data.{module.KINDS[name]}" in told[0] and f"(3 in data.{name})" in told[0]
        )


def test_an_earlier_stage_may_not_have_seen_them_either_and_a_later_one_may() -> None:
    asked = Records(Prompt(f"Question {i}?", {}, "") for i in range(5))
    told = found_leaks({"sft": demonstrations(30), "eval_sft": demonstrations(0), "prompts": prompts(30), "eval_prompts": asked})
    assert len(told) == 1 and "(5 in data.sft)" in told[0]
    shown = Records(Demonstration(f"What is {i}?", "x", "") for i in range(5))
    assert found_leaks({"sft": demonstrations(30), "eval_sft": shown, "prompts": prompts(30), "eval_prompts": prompts(0)}) == []


def test_what_is_split_by_hash_does_not_leak_and_turns_count_as_text() -> None:
    same = [f"Question {i}?" for i in range(200)]
    sources = {
        "sft": Records(Demonstration(text, "x", "") for text in same),
        "prompts": Records(Prompt((Message("user", f" {text}"),), {}, "") for text in same),
    }
    assert found_leaks(sources) == []
    told = found_leaks(sources | {"eval_prompts": Records([Prompt("Question 3?", {}, "")])})
    assert len(told) == 1 and "1 in data.sft, 1 in data.prompts" in told[0]


def test_texts_without_a_prompt_are_compared_by_themselves() -> None:
    texts = Records(Demonstration("", f"text {i}", "") for i in range(30))
    assert found_leaks({"sft": texts, "eval_sft": Records([Demonstration("", "another", "")])}) == []
    assert len(found_leaks({"sft": texts, "eval_sft": Records([Demonstration("", "text 3", "")])})) == 1


def test_a_large_file_is_looked_at_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOKED_AT", 10)
    config = load_config({"model": {"name": "x"}, "sft": {"max_length": 8}})
    records = Records([*demonstrations(15, words=1), *demonstrations(15, words=30)])
    found = measure({"sft": records}, config, Template(bpe_tokenizer(), "plain", 16))["sft"]
    assert (found.texts, found.longest, found.cut) == (10, 8, 10)

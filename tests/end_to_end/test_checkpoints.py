"""Every architecture through every stage; what each stage leaves is what transformers alone computes with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import bpe_tokenizer, causal_lm, write_checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from tercet.config import load_config
from tercet.models import roles
from tercet.models.load import load_causal_lm, load_classifier
from tercet.models.roles import Policy, ScoreModel
from tercet.pipeline import Pipeline
from tercet.types import Sequences, TercetError, TokenRow

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END_OF_TURN = 2  # <|im_end|> in the zoo's tokenizer
QUICK = ["gpt2", "gemma2"]
SLOW = ["llama_tied", "llama_untied", "qwen2", "qwen3", "opt", "gpt_neox", "mistral"]
POSITIONS = {"max_position_embeddings": 64}


def base_model(folder: Path, architecture: str) -> str:
    tokenizer = bpe_tokenizer(bos=architecture in ("gemma2", "llama_tied"))
    return write_checkpoint(folder, causal_lm(architecture), tokenizer)


def rows_of(tokenizer: Any) -> list[TokenRow]:
    texts = [("What is rain?", " It is something that makes us calm."), ("Snow", " comes"), ("Describe honey simply.", "")]
    rows = []
    for prompt, response in texts:
        before, after = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, response))
        rows.append(TokenRow((*before, *after, tokenizer.eos_token_id), len(before)))
    return rows


def check_policy(folder: Path) -> None:
    """Log-probabilities of a batch by Tercet's policy, against each text alone through AutoModelForCausalLM."""
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = rows_of(tokenizer)
    with torch.no_grad():
        ours, _ = Policy(load_causal_lm(str(folder))).eval()(Sequences.from_rows(rows))
        for row, logprobs in zip(rows, ours):
            logits = plain(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
            wanted = [float(logits[place - 1, row.ids[place]]) for place in range(row.prompt_len, len(row.ids))]
            assert logprobs[: len(wanted)].tolist() == pytest.approx(wanted, abs=2e-5)


def check_scorer(folder: Path) -> None:
    """Scores of a batch by Tercet, against transformers' batch with its own tokenizer, plus the offset of config.json."""
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    offset = getattr(plain.config, "score_offset", 0.0)
    rows = rows_of(tokenizer)
    with torch.no_grad():
        ours = ScoreModel(load_classifier(str(folder))).eval()(Sequences.from_rows(rows)).tolist()
        batch = tokenizer.pad({"input_ids": [list(row.ids) for row in rows]}, return_tensors="pt")
        together = (plain(**batch).logits[:, 0] + offset).tolist()
        alone = [plain(input_ids=torch.tensor([row.ids])).logits.item() + offset for row in rows]
    assert plain.config.num_labels == 1 and len(set(alone)) == len(alone)
    assert ours == pytest.approx(alone, abs=2e-5) and together == pytest.approx(alone, abs=2e-5)


def check_run(folder: Path) -> None:
    for name in ("sft/model", "ppo/model"):
        check_policy(folder / name)
        generation = GenerationConfig.from_pretrained(folder / name)
        assert (generation.do_sample, generation.temperature, generation.top_k) == (True, 1.0, 0)
    for name in ("reward/model", "ppo/value"):
        check_scorer(folder / name)
    before, after = (AutoModelForCausalLM.from_pretrained(folder / f"{stage}/model") for stage in ("sft", "ppo"))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters())), "PPO trained nothing"
    assert (folder / "report.html").stat().st_size > 10_000 and (folder / "evaluation/wins.json").exists()


@pytest.mark.parametrize("architecture", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_all_stages_from_a_checkpoint(
    architecture: str, runs: Any, lines: Callable[[Path], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs.run(model={"name": base_model(runs.folder / "base", architecture)}, ppo={"kl": {"coef": 0.01}})
    check_run(folder)
    first = lines(folder / "ppo/metrics.jsonl")[0]
    assert abs(first["kl"]) < 1e-5 and first["sampler_logprob_gap"] < 1e-4
    assert "is not known" not in capsys.readouterr().err


def test_all_stages_of_a_model_that_has_to_be_asked_for_its_logits(
    runs: Any, lines: Callable[[Path], list[Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "_logit_transform", lambda model: None)
    folder = runs.run(model={"name": base_model(runs.folder / "base", "gpt2")}, ppo={"kl": {"coef": 0.01}})
    check_run(folder)
    first = lines(folder / "ppo/metrics.jsonl")[0]
    assert abs(first["kl"]) < 1e-5 and first["sampler_logprob_gap"] < 1e-4
    assert "computes all logits at once itself: slower" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("architecture", ["cohere", "granite"])
def test_an_architecture_without_a_classifier_is_refused_before_anything_is_trained(architecture: str, runs: Any) -> None:
    base = base_model(runs.folder / "base", architecture)
    with pytest.raises(TercetError, match=rf"no sequence classifier of the architecture '{architecture}'.*such as llama"):
        runs.run(model={"name": base})
    assert not (runs.folder / "run/sft").exists()
    folder = runs.run(model={"name": base}, data={"comparisons": None, "prompts": None})  # SFT alone needs none
    check_policy(folder / "sft/model")


def test_a_scratch_architecture_without_a_classifier(runs: Any) -> None:
    scratch = {"architecture": "granite", "vocab_size": 300, "options": {"num_hidden_layers": 1, "hidden_size": 32}}
    with pytest.raises(TercetError, match="no sequence classifier of the architecture 'granite'"):
        runs.run(model={"name": None, "scratch": scratch})
    assert not (runs.folder / "run/pretrain").exists()


def chat_files(runs: Any) -> dict[str, str]:
    asked = ["What is rain?", "Tell me of snow", "Is honey sweet?", "Why a song?"]
    system = {"role": "system", "content": "Be kind."}
    turns = [[system, {"role": "user", "content": text}] for text in asked]

    def answer(text: str) -> dict[str, str]:
        return {"role": "assistant", "content": text}

    pairs = [{"chosen": [*turn, answer("A kind word helps.")], "rejected": [*turn, answer("No")]} for turn in turns]
    return {
        "sft": runs.write("chat.jsonl", [{"messages": [*turn, answer("It is warm.")]} for turn in turns]),
        "comparisons": runs.write("chat_pairs.jsonl", pairs),
        "prompts": runs.write("chat_prompts.jsonl", [{"messages": turn} for turn in turns]),
    }


def chat_model(folder: Path) -> str:
    tokenizer = bpe_tokenizer(bos=True, chat_template=CHAT_TEMPLATE)
    return write_checkpoint(folder, causal_lm("qwen2", max_position_embeddings=160), tokenizer, eos_token_id=[0, END_OF_TURN])


class TestChat:
    def test_all_stages(self, runs: Any, lines: Callable[[Path], list[Any]]) -> None:
        base, data = chat_model(runs.folder / "base"), chat_files(runs)
        long = {"max_length": 128}
        folder = runs.run(
            model={"name": base, "template": "chat"},
            data={**data, "max_prompt_length": 96},
            sft={**long, "epochs": 3},
            reward=long,
        )
        check_run(folder)
        for stage in ("sft", "ppo"):
            generation = json.loads((folder / stage / "model/generation_config.json").read_text())
            assert generation["eos_token_id"] == [0, END_OF_TURN]
            assert AutoTokenizer.from_pretrained(folder / stage / "model").chat_template == CHAT_TEMPLATE
        sampled = lines(folder / "ppo/rollouts.jsonl")
        assert all([turn["role"] for turn in row["prompt"]] == ["system", "user"] for row in sampled)
        assert all("<|im_" not in row["response"] for row in sampled), "special tokens are no text"
        shown = lines(folder / "evaluation/samples.jsonl")
        assert shown[0]["prompt"] == "system: Be kind.\nuser: What is rain?"

    def test_a_plain_template_refuses_conversations_before_training(self, runs: Any) -> None:
        data = chat_files(runs)
        with pytest.raises(TercetError, match=r"chat_prompts\.jsonl:1: the prompt is a conversation.*model\.template: chat"):
            runs.run(data={"prompts": data["prompts"]})
        assert not (runs.folder / "run/sft").exists()

    def test_a_scratch_model_has_no_chat_template(self, runs: Any) -> None:
        with pytest.raises(TercetError, match=r"the tokenizer of a model\.scratch has no chat template"):
            runs.run(model={"name": None, "scratch": {"architecture": "gpt2", "vocab_size": 300}, "template": "chat"})
        assert not (runs.folder / "run/pretrain").exists()

    def test_a_template_that_refuses_a_role_is_met_before_training(self, runs: Any) -> None:
        strict = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + (
            "[{{ m.content }}]{% endfor %}"
        )
        tokenizer = bpe_tokenizer(chat_template=strict)
        base = write_checkpoint(runs.folder / "base", causal_lm("gpt2"), tokenizer)
        data = chat_files(runs)
        fine = runs.write("fine.jsonl", [{"prompt": "What?", "response": "That."}])
        with pytest.raises(TercetError, match=r"chat_pairs\.jsonl:1: .*refuses.*system, user.*no system turns"):
            runs.run(model={"name": base, "template": "chat"}, data={**data, "sft": fine, "prompts": None})
        assert not (runs.folder / "run/sft").exists()


class TestLengths:
    def test_texts_beyond_the_models_positions_are_refused_before_training(self, runs: Any) -> None:
        base = base_model(runs.folder / "base", "gpt2")  # 64 positions
        long = runs.write("long.jsonl", [{"prompt": "a", "chosen": "b " * 80, "rejected": "c"}])
        with pytest.raises(
            TercetError, match=r"long\.jsonl:1: 83 tokens, but .*base has 64 positions: lower reward\.max_length to 64"
        ):
            runs.run(model={"name": base}, data={"comparisons": long}, reward={"max_length": 100})
        assert not (runs.folder / "run/sft").exists()
        short = runs.write("short.jsonl", [{"prompt": "a", "response": "b"}])
        runs.run("sft", model={"name": base}, data={"sft": short}, sft={"max_length": 512})  # no text is that long: no error

    @pytest.mark.parametrize("stage", ["pretrain", "sft"])
    def test_texts_beyond_the_positions_of_a_model_from_scratch(self, runs: Any, stage: str) -> None:
        """It is made first, and looked at before anything trains."""
        long = runs.write("long.jsonl", [{"text": "b " * 80}] * 30)
        scratch = {
            "architecture": "gpt2",
            "vocab_size": 300,
            "options": {"n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 64},
        }
        changes = {"data": {stage: long}, stage: {"max_length": 100}, "model": {"name": None, "scratch": scratch}}
        with pytest.raises(TercetError, match=rf"long\.jsonl:1: .* has 64 positions: lower {stage}\.max_length to 64"):
            runs.run(**changes)
        assert not (runs.folder / "run/sft/metrics.jsonl").exists() and not (runs.folder / "run/pretrain/metrics.jsonl").exists()

    def test_from_pretrain_makes_a_model_with_more_room(self, runs: Any) -> None:
        """The one that is there, and will be removed, has too few positions for what is wanted now."""
        options = {"n_layer": 1, "n_embd": 8, "n_head": 1}
        model = {"name": None, "scratch": {"architecture": "gpt2", "vocab_size": 300, "options": options}}
        place = runs.run("pretrain", model=model, pretrain={"max_length": 48}) / "pretrain/model/config.json"
        longer = load_config(runs.settings(model=model, pretrain={"max_length": 48}, ppo={"max_new_tokens": 60}))
        assert json.loads(place.read_text())["n_positions"] == 48
        with pytest.raises(TercetError, match="model.scratch.positions was 48, is 92"):
            Pipeline(longer).run(["pretrain"])
        Pipeline(longer).run(["pretrain"], from_stage="pretrain")
        assert json.loads(place.read_text())["n_positions"] == 92

    def test_demonstrations_longer_than_the_reward_models_positions(self, runs: Any) -> None:
        """They are cut at sft.max_length; for the card's histogram they are at the positions, not at reward.max_length."""
        base = base_model(runs.folder / "base", "gpt2")  # 64 positions
        long = runs.write("long.jsonl", [{"prompt": f"a {i}", "response": "b " * 80} for i in range(8)])
        short = runs.write("short.jsonl", [{"prompt": f"a {i}", "chosen": "b c", "rejected": "c"} for i in range(40)])
        lengths = {"sft": {"max_length": 64}, "reward": {"max_length": 512}}
        folder = runs.run("sft", "reward", model={"name": base}, data={"sft": long, "comparisons": short}, **lengths)
        card = json.loads((folder / "reward/card.json").read_text())
        assert sum(card["histograms"]["demonstrations"]["counts"]) == 8

    def test_a_prompt_that_leaves_no_room_is_refused_before_training(self, runs: Any) -> None:
        pairs = runs.write("pairs.jsonl", [{"prompt": "p " * 40, "chosen": "b", "rejected": "c"}])
        with pytest.raises(TercetError, match=r"pairs\.jsonl:1: no token of the response is left: .* reward\.max_length is 20"):
            runs.run(data={"comparisons": pairs}, reward={"max_length": 20})
        assert not (runs.folder / "run/sft").exists()

    def test_prompt_and_response_beyond_the_positions(self, runs: Any) -> None:
        base = base_model(runs.folder / "base", "gpt2")
        with pytest.raises(TercetError, match=r"make 68 tokens, but the model has 64 positions.*data\.max_prompt_length=56"):
            runs.run(model={"name": base}, data={"max_prompt_length": 60})
        assert not (runs.folder / "run/sft").exists()

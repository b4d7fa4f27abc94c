"""Checkpoints: what is saved loads with transformers alone and gives the same numbers; what cannot be right is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import (
    ARCHITECTURES,
    CLASSIFIERS,
    EOS,
    SHAPES,
    bert,
    bpe_tokenizer,
    causal_lm,
    classifier,
    ragged,
    word_tokenizer,
    write_checkpoint,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from tercet.models.load import (
    check_vocabulary,
    context_length,
    count_parameters,
    embedding_rows,
    load_causal_lm,
    load_classifier,
    load_tokenizer,
    save_classifier,
    save_policy,
    special_tokens,
    stop_token_ids,
)
from tercet.models.roles import ScoreModel
from tercet.types import Sequences, TercetError, TokenRow

TEXTS = ["the sun is warm", f"rain{EOS}a kind word helps{EOS}", f"a b c{EOS}", "THE END"]


# Policies


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_policy_gives_the_same_logits_with_transformers_alone(architecture: str, tmp_path: Path) -> None:
    tokenizer, ids = bpe_tokenizer(), ragged(SHAPES).input_ids
    source = write_checkpoint(tmp_path / "base", causal_lm(architecture), tokenizer)
    model = load_causal_lm(source)
    with torch.no_grad():
        next(model.parameters()).add_(0.01)  # trained a little
        wanted = model(input_ids=ids).logits
    save_policy(model, load_tokenizer(source), tmp_path / "policy", temperature=0.7, stop_ids=[0, 2], card="About it.\n")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, wanted, rtol=0, atol=1e-6)
    assert again.config.vocab_size == 288  # policies are never resized


def test_saved_policy_samples_as_tercet_did(tmp_path: Path) -> None:
    hostile = {"do_sample": True, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    source = write_checkpoint(tmp_path / "base", causal_lm("llama_tied"), bpe_tokenizer(), **hostile, eos_token_id=[0, 2])
    tokenizer = load_tokenizer(source)
    stops = stop_token_ids(source, tokenizer)
    save_policy(load_causal_lm(source), tokenizer, tmp_path / "policy", temperature=0.7, stop_ids=stops, card="About it.\n")
    stored = json.loads((tmp_path / "policy/generation_config.json").read_text())
    assert stored["temperature"] == 0.7 and stored["top_k"] == 0 and stored["eos_token_id"] == [0, 2] and stored["do_sample"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").generation_config
    assert loaded.top_k == 0 and loaded.top_p in (None, 1.0) and loaded.repetition_penalty in (None, 1.0)
    assert loaded.no_repeat_ngram_size in (None, 0)
    saved = AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert saved.pad_token == saved.eos_token == EOS and tokenizer.pad_token is None
    assert (tmp_path / "policy/README.md").read_text() == "About it.\n"
    assert not list((tmp_path / "policy").glob("*.bin"))


def test_a_policy_keeps_a_pad_token_of_its_own(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(pad_token="<|im_end|>")
    save_policy(causal_lm("gpt2"), tokenizer, tmp_path, temperature=1.0, stop_ids=[0], card="")
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == "<|im_end|>"


def test_stop_ids_are_the_tokenizers_and_the_checkpoints(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer()
    several = write_checkpoint(tmp_path / "a", causal_lm("gpt2"), tokenizer, eos_token_id=[2, 5])
    assert stop_token_ids(several, tokenizer) == [0, 2, 5]
    one = write_checkpoint(tmp_path / "b", causal_lm("gpt2"), tokenizer, eos_token_id=7)
    assert stop_token_ids(one, tokenizer) == [0, 7]
    (tmp_path / "b/generation_config.json").unlink()
    assert stop_token_ids(one, tokenizer) == [0]


@pytest.mark.parametrize("named", [True, False], ids=["with a role", "special in tokenizer.json alone"])
def test_a_stop_that_is_a_special_token_is_known_by_its_id(named: bool, tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(**({"additional_special_tokens": ["<|im_end|>"]} if named else {}))
    assert ("<|im_end|>" in tokenizer.all_special_tokens) is named
    assert special_tokens(tokenizer) == {EOS: 0, "<|bos|>": 1, "<|im_end|>": 2}
    source = write_checkpoint(tmp_path, causal_lm("gpt2"), tokenizer)
    assert stop_token_ids(source, tokenizer, ["e", "<|im_end|>"]) == [0, 2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_is_zero_after_loading_and_the_option_sets_it(architecture: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, causal_lm(architecture))

    def rates(model: torch.nn.Module) -> list[float]:
        modules = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        functional = [
            value for m in model.modules() for key, value in vars(m).items() if "drop" in key and isinstance(value, float)
        ]
        return [*modules, *functional]

    assert not any(rates(load_causal_lm(source)))
    assert 0.25 in rates(load_causal_lm(source, dropout=0.25))
    assert load_causal_lm(source).dtype == torch.float32


def test_sizes(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, causal_lm("gpt2"))
    model = load_causal_lm(source)
    assert embedding_rows(model) == 288 and context_length(model) == 64
    layer = 2 * 64 + (32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32)
    assert count_parameters(source) == 288 * 32 + 64 * 32 + 2 * layer + 64


# Scorers


def transformers_scores(folder: Path, texts: list[str], batch_size: int) -> Tensor:
    """What somebody without Tercet gets."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(texts[start : start + batch_size], return_tensors="pt", padding=True)
        with torch.no_grad():
            scores.append(model(**batch).logits.squeeze(-1))
    return torch.cat(scores)


def tercet_scores(scorer: ScoreModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    rows = [TokenRow(tuple(tokenizer(text).input_ids), 1) for text in texts]
    with torch.no_grad():
        return scorer(Sequences.from_rows(rows))


TOKENIZERS: dict[str, dict[str, Any]] = {
    "no pad": {},
    "pad is eos": {"pad_token": EOS},
    "pads on the left": {"padding_side": "left"},
    "its own pad": {"pad_token": "<|im_end|>"},
    "bos": {"bos": True, "pad_token": EOS},
}


@pytest.mark.parametrize("architecture", CLASSIFIERS)
@pytest.mark.parametrize("rows", [288, 300], ids=["exact", "padded vocabulary"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_saved_scorer_scores_alike_with_transformers_alone(architecture: str, rows: int, kind: str, tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(**TOKENIZERS[kind])
    scorer = ScoreModel(classifier(architecture, rows, pad_token_id=tokenizer.pad_token_id))
    scorer.set_offset(-0.5)
    wanted = tercet_scores(scorer, tokenizer, TEXTS)
    assert wanted.std() > 0.05
    save_classifier(scorer.model, tokenizer, tmp_path, card="")
    for batch_size in (1, len(TEXTS)):
        torch.testing.assert_close(transformers_scores(tmp_path, TEXTS, batch_size) - 0.5, wanted, rtol=0, atol=2e-5)
    assert json.loads((tmp_path / "config.json").read_text())["score_offset"] == -0.5
    again = ScoreModel(load_classifier(str(tmp_path)))
    torch.testing.assert_close(tercet_scores(again, tokenizer, TEXTS), wanted, rtol=0, atol=1e-6)


def test_every_row_that_could_be_sampled_is_read_as_a_token(tmp_path: Path) -> None:
    """Rows 288 to 299 have no token, but a policy may sample them: a text that ends with one is scored there, not before it."""
    scorer = ScoreModel(classifier("gpt2", 300))
    ids = torch.tensor([[5, 6, last] for last in range(288, 300)])
    with torch.no_grad():
        wanted = scorer(Sequences(ids, torch.ones(12).long(), torch.full((12,), 2), torch.ones(12).bool()))
    save_classifier(scorer.model, bpe_tokenizer(), tmp_path, card="")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert model.config.pad_token_id == 300 == AutoTokenizer.from_pretrained(tmp_path).pad_token_id
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits.squeeze(-1), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [288, 300])
def test_saving_again_does_not_grow_the_model(rows: int, tmp_path: Path) -> None:
    """PPO's value model starts as the saved reward model and is saved with the policy's tokenizer, which knows no pad."""
    tokenizer, model = bpe_tokenizer(), classifier("gpt2", rows)
    wanted = tercet_scores(ScoreModel(model), tokenizer, TEXTS)
    for place in ("a", "b", "c"):
        save_classifier(model, tokenizer, tmp_path / place, card="")
        model = load_classifier(str(tmp_path / place))
        assert embedding_rows(model) == rows + 1
        torch.testing.assert_close(transformers_scores(tmp_path / place, TEXTS, 4), wanted, rtol=0, atol=1e-5)
    saved = AutoTokenizer.from_pretrained(tmp_path / "c")
    assert len(saved) == rows + 1 and saved("the sun").input_ids == tokenizer("the sun").input_ids
    save_classifier(model, saved, tmp_path / "d", card="")
    assert embedding_rows(model) == rows + 1
    assert tokenizer.pad_token is None and len(tokenizer) == 288  # the one in use is untouched


def test_score_changes_with_eos_though_pad_is_eos(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(pad_token=EOS)
    save_classifier(classifier("gpt2"), tokenizer, tmp_path, card="")
    without, with_eos = transformers_scores(tmp_path, ["the sun", f"the sun{EOS}"], 2).tolist()
    assert abs(without - with_eos) > 1e-3


def test_a_causal_checkpoint_gets_a_new_head_on_request_only(tmp_path: Path) -> None:
    base = causal_lm("llama_untied")
    source = write_checkpoint(tmp_path, base, bpe_tokenizer())
    model = load_classifier(source, num_labels=1)
    for name, weight in base.model.named_parameters():
        assert torch.equal(model.model.get_parameter(name), weight), name  # the trunk is the SFT model's
    assert model.config.num_labels == 1 and model.score.out_features == 1
    with pytest.raises(TercetError, match=r"lacks 1 of the weights.*score\.weight"):
        load_classifier(source)


# What is refused


def one_sentence(error: pytest.ExceptionInfo[TercetError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message and "Traceback" not in message
    for part in parts:
        assert part in message, message


def test_no_such_folder(tmp_path: Path) -> None:
    for load in (load_causal_lm, load_classifier, load_tokenizer, count_parameters):
        with pytest.raises(TercetError) as error:
            load(str(tmp_path / "nothing"))
        one_sentence(error, str(tmp_path / "nothing"))


def test_not_a_causal_language_model(tmp_path: Path) -> None:
    encoder = write_checkpoint(tmp_path / "bert", bert(word_tokenizer()))
    with pytest.raises(TercetError) as error:
        load_causal_lm(encoder)
    one_sentence(error, encoder)
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5/config.json").write_text(json.dumps({"model_type": "t5", "d_model": 8}))
    with pytest.raises(TercetError) as error:
        load_causal_lm(str(tmp_path / "t5"))
    one_sentence(error, "t5", "a causal language model")


def test_an_encoder_with_a_language_model_head_is_not_causal(tmp_path: Path) -> None:
    config = bert(word_tokenizer()).config
    whole = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(0, 0.3)
    source = write_checkpoint(tmp_path, whole)
    with pytest.raises(TercetError) as error:
        load_causal_lm(source)
    one_sentence(error, source, "looks at later tokens")


def test_a_causal_model_of_another_kind_lacks_its_head(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, classifier("llama_untied"))
    with pytest.raises(TercetError) as error:
        load_causal_lm(source)
    one_sentence(error, source, "lm_head.weight")


def test_a_model_that_transformers_cannot_classify_with(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, causal_lm("granite"))
    with pytest.raises(TercetError) as error:
        load_classifier(source, num_labels=1)
    one_sentence(error, source, "a sequence-classification model")


def test_missing_tokenizer(tmp_path: Path) -> None:
    for architecture in ("gpt2", "llama_tied", "opt"):
        source = write_checkpoint(tmp_path / architecture, causal_lm(architecture))
        with pytest.raises(TercetError) as error:
            load_tokenizer(source)
        one_sentence(error, source, "tokenizer")


def test_no_end_of_text_token(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(TercetError) as error:
        load_tokenizer(str(tmp_path))
    one_sentence(error, str(tmp_path), "no end-of-text token", "eos_token")


def test_tokenizer_larger_than_the_model() -> None:
    model = causal_lm("gpt2", 287)
    with pytest.raises(TercetError) as error:
        check_vocabulary(model, bpe_tokenizer(), "here")
    one_sentence(error, "here", "287", "288")
    check_vocabulary(causal_lm("gpt2", 288), bpe_tokenizer(), "here")
    check_vocabulary(causal_lm("gpt2", 300), bpe_tokenizer(), "here")


def test_corrupt_weights(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, causal_lm("gpt2"))
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"\xff" * 200):
        weights.write_bytes(broken)
        with pytest.raises(TercetError) as error:
            load_causal_lm(source)
        one_sentence(error, source, "a causal language model")


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    model = causal_lm("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    source = write_checkpoint(tmp_path, model)
    with pytest.raises(TercetError) as error:
        load_causal_lm(source)
    one_sentence(error, source, "not finite")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (tmp_path / "exploded",)  # type: ignore[return-value]

    source = write_checkpoint(tmp_path, causal_lm("gpt2"))
    (tmp_path / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Bomb()}, tmp_path / "pytorch_model.bin")
    for load in (load_causal_lm, load_classifier):
        with pytest.raises(TercetError) as error:
            load(source)
        one_sentence(error, source)
    assert not (tmp_path / "exploded").exists()


def test_remote_code_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, causal_lm("gpt2"), bpe_tokenizer())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (load_causal_lm, load_classifier, count_parameters):
        with pytest.raises(TercetError) as error:
            load(source)
        one_sentence(error, source, "trust_remote_code")
    assert not (tmp_path / "ran").exists()


def test_copies_are_independent(tmp_path: Path) -> None:
    """The reference is a load of its own: training the policy must not move it."""
    source = write_checkpoint(tmp_path, causal_lm("gpt2"))
    policy, reference = load_causal_lm(source), load_causal_lm(source)
    before = copy.deepcopy(reference.state_dict())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[name], value) for name, value in reference.state_dict().items())


def test_a_tokenizer_of_its_own_code_is_saved_with_the_model(tmp_path: Path) -> None:
    """Trusted when it was loaded; nobody is asked again in the middle of a run."""
    source = Path(write_checkpoint(tmp_path / "source", causal_lm("gpt2"), bpe_tokenizer()))
    (source / "mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\nclass Mine(PreTrainedTokenizerFast):\n    pass\n"
    )
    about = json.loads((source / "tokenizer_config.json").read_text())
    about |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (source / "tokenizer_config.json").write_text(json.dumps(about))
    tokenizer = load_tokenizer(str(source), trust_remote_code=True)
    assert type(tokenizer).__name__ == "Mine"
    save_policy(load_causal_lm(str(source)), tokenizer, tmp_path / "saved", temperature=1.0, stop_ids=[0], card="a card")
    again = load_tokenizer(str(tmp_path / "saved"), trust_remote_code=True)
    assert type(again).__name__ == "Mine" and again("the sun").input_ids == tokenizer("the sun").input_ids

"""Scores from models: stage 2's on the sampled ids, foreign classifiers on text in their own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from model_zoo import SHAPES, bert, bpe_tokenizer, classifier, ragged, randomise, word_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from tercet.models.roles import ScoreModel
from tercet.scoring import model as module
from tercet.scoring.base import Texts
from tercet.scoring.model import ClassifierScorer, RewardModelScorer
from tercet.types import Message, TercetError, Text

RESPONSES = ["rain falls", "the sun is warm and bright and warm", "a kind word", "b"]
PROMPTS = ["the cloud", "rain ", "", "a b c d"]
JOINED = ["the cloud rain falls", "rain the sun is warm and bright and warm", "a kind word", "a b c d b"]


def texts_of(prompts: Sequence[Text], responses: Sequence[str]) -> Texts:
    return Texts(prompts, responses, [{} for _ in prompts])


def score(scorer: Any, prompts: Sequence[Text] = PROMPTS, responses: Sequence[str] = RESPONSES) -> Tensor:
    return scorer.score(ragged([(2, 2)] * len(prompts)), texts_of(prompts, responses))


def alone(model: Any, tokenizer: Any, texts: Sequence[str], label: int = 0, **options: Any) -> Tensor:
    """Each text by itself through transformers."""
    with torch.no_grad():
        return torch.stack([model(**tokenizer(text, return_tensors="pt", **options)).logits[0, label] for text in texts])


# The reward model of stage 2


@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4, 5]], [[5], [0, 3], [4, 2, 1]], [[0], [1], [2], [3], [4], [5]]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reward_model_scores_the_ids_however_they_are_split(
    split: list[list[int]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, sequences = ScoreModel(classifier("llama_tied"), dtype), ragged(SHAPES)
    asked: list[Any] = []
    monkeypatch.setattr(module, "microbatches", lambda lengths, most: asked.append((lengths, most)) or split)  # type: ignore[func-returns-value]
    scores = RewardModelScorer(scorer, 123).score(sequences, texts_of([""] * 6, [""] * 6))
    assert asked == [([12, 2, 15, 12, 3, 10], 123)] and scores.dtype == dtype and not scores.requires_grad
    for row in range(6):
        ids = sequences.input_ids[row : row + 1, : asked[0][0][row]]
        with torch.no_grad():
            wanted = scorer.model(input_ids=ids).logits.item()
        assert scores[row].item() == pytest.approx(wanted, abs=1e-5 if dtype is torch.float32 else 1e-12)


def test_reward_model_gives_the_same_score_twice() -> None:
    """The zoo's GPT-2 has a dropout of 0.1; a scorer is frozen, which puts it in evaluation mode."""
    model = ScoreModel(classifier("gpt2").train())
    model.freeze()
    scorer = RewardModelScorer(model, 99)
    sequences, texts = ragged(SHAPES), texts_of([""] * 6, [""] * 6)
    assert torch.equal(scorer.score(sequences, texts), scorer.score(sequences, texts))


def test_reward_model_with_broken_weights() -> None:
    model = ScoreModel(classifier("gpt2"))
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    scorer = RewardModelScorer(model, 99)
    with pytest.raises(TercetError, match="the reward model gave the score nan to 2 of 2 responses, the first being 'one'"):
        scorer.score(ragged([(2, 2)] * 2), texts_of(["", ""], ["one", "two"]))


# Classifiers from elsewhere


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_encoder_with_its_own_tokenizer(batch_size: int) -> None:
    tokenizer = word_tokenizer()
    model = bert(tokenizer)
    wanted = alone(model, tokenizer, JOINED)
    assert wanted.std() > 0.05
    scores = score(ClassifierScorer(model, tokenizer, label=None, name="clf", batch_size=batch_size))
    torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_roberta_counts_positions_from_beyond_its_pad() -> None:
    """Its 34 positions are room for 32 tokens: pad's id is 1, and the first token has position 2."""
    tokenizer = word_tokenizer()
    config = AutoConfig.for_model(
        "roberta",
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=34,
        pad_token_id=1,
        num_labels=1,
    )
    model = randomise(AutoModelForSequenceClassification.from_config(config))
    long = score(ClassifierScorer(model, tokenizer, label=None, name="clf"), ["the cloud " * 20], ["rain falls"])
    wanted = alone(model, tokenizer, ["the cloud " * 20 + "rain falls"], truncation=True, max_length=32)
    torch.testing.assert_close(long, wanted, rtol=0, atol=1e-5)


def test_dropout_is_off_and_rows_can_come_in_any_order() -> None:
    tokenizer = word_tokenizer()
    scorer = ClassifierScorer(bert(tokenizer).train(), tokenizer, label=None, name="clf")
    first, again = score(scorer), score(scorer)
    assert torch.equal(first, again)
    torch.testing.assert_close(score(scorer, PROMPTS[::-1], RESPONSES[::-1]), first.flip(0), rtol=0, atol=1e-5)
    assert score(scorer, [], []).shape == (0,)


@pytest.mark.parametrize(("label", "index"), [(0, 0), (2, 2), ("good", 2), ("bad", 0), ("1", 1)])
def test_one_of_several_labels_by_name_or_number(label: int | str, index: int) -> None:
    tokenizer = word_tokenizer()
    model = bert(tokenizer, labels=["bad", "so-so", "good"])
    scores = score(ClassifierScorer(model, tokenizer, label=label, name="clf"))
    torch.testing.assert_close(scores, alone(model, tokenizer, JOINED, index), rtol=0, atol=1e-5)


def test_labels_that_do_not_say_which() -> None:
    tokenizer = word_tokenizer()
    model = bert(tokenizer, labels=["bad", "so-so", "good"])
    with pytest.raises(TercetError, match=r"clf has 3 labels.*label:.*0 \(bad\), 1 \(so-so\), 2 \(good\)"):
        ClassifierScorer(model, tokenizer, label=None, name="clf")
    for wrong in ("great", 3, -1, ""):
        with pytest.raises(TercetError, match=r"clf has no label .*2 \(good\)"):
            ClassifierScorer(model, tokenizer, label=wrong, name="clf")


@pytest.mark.parametrize("options", [{}, {"pad_token": "<|endoftext|>"}, {"pad_token": "<|im_end|>", "padding_side": "left"}])
@pytest.mark.parametrize("architecture", ["gpt2", "llama_tied"])
def test_decoder_with_every_kind_of_pad(architecture: str, options: dict[str, Any]) -> None:
    """Without a pad token, with EOS for a pad, and with pads that the tokenizer would put on the left."""
    tokenizer, model = bpe_tokenizer(**options), classifier(architecture)
    wanted = alone(model, bpe_tokenizer(), JOINED)
    scores = score(ClassifierScorer(model, tokenizer, label=None, name="clf"))
    torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-5)


TEMPLATE = "{% for m in messages %}<|bos|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
TALK = (Message("user", "the sun"), Message("assistant", "is warm"), Message("user", "rain"))


def test_conversations_go_through_the_classifiers_own_chat_template() -> None:
    """The template writes the special tokens: the tokenizer's own BOS must not come on top."""
    tokenizer = bpe_tokenizer(bos=True, chat_template=TEMPLATE, pad_token="<|im_end|>")
    model = classifier("gpt2")
    scores = score(ClassifierScorer(model, tokenizer, label=None, name="clf"), [TALK, "the sun"], ["falls", "is warm"])
    written = "<|bos|>user: the sun\n<|bos|>assistant: is warm\n<|bos|>user: rain\n<|bos|>assistant: falls\n"
    wanted = [
        *alone(model, tokenizer, [written], add_special_tokens=False),
        *alone(model, tokenizer, ["the sun is warm"]),  # a plain prompt beside it gets its BOS from the tokenizer
    ]
    torch.testing.assert_close(scores, torch.stack(wanted), rtol=0, atol=1e-5)


def test_conversations_need_a_chat_template() -> None:
    tokenizer = word_tokenizer()
    scorer = ClassifierScorer(bert(tokenizer), tokenizer, label=None, name="clf")
    with pytest.raises(TercetError, match="clf: the prompts are conversations but its tokenizer has no chat template"):
        score(scorer, [TALK], ["falls"])


@pytest.mark.parametrize("model_max_length", [None, 20])
def test_of_a_text_beyond_the_models_positions_the_response_stays(model_max_length: int | None) -> None:
    """The little BERT has 32 positions. Cut at the end, every answer to a long prompt would get one and the same score."""
    options = {} if model_max_length is None else {"model_max_length": model_max_length}
    tokenizer = word_tokenizer(**options)
    model, kept = bert(tokenizer), (model_max_length or 32) - 2 - 2
    prompts, responses = [" ".join(["the", "cloud"] * 40)] * 2, ["rain falls", "sun bright"]
    words = prompts[0].split()[-kept:]
    wanted = alone(model, word_tokenizer(), [" ".join([*words, response]) for response in responses])
    scores = score(ClassifierScorer(model, tokenizer, label=None, name="clf"), prompts, responses)
    torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-5)
    assert abs(scores[0] - scores[1]) > 1e-3


@pytest.mark.parametrize("longest", [None, 6])
def test_a_reward_model_of_tercets_reads_the_end_token_and_adds_its_offset(longest: int | None) -> None:
    """As in stage 2: a response that ended has its end token, one that was cut at the length limit has none."""
    tokenizer, model = bpe_tokenizer(), classifier("gpt2")
    sequences = ragged([(2, 2)] * 4)
    sequences.finished = torch.tensor([True, False, True, True])
    ids = [[*tokenizer(text).input_ids, *[tokenizer.eos_token_id] * ended] for text, ended in zip(JOINED, (1, 0, 1, 1))]
    with torch.no_grad():
        wanted = torch.stack([model(input_ids=torch.tensor([row[-(longest or 99) :]])).logits[0, 0] + 2.5 for row in ids])
    elsewhere = score(ClassifierScorer(model, tokenizer, label=None, name="clf"))
    model.config.score_offset = 2.5
    if longest is not None:
        tokenizer.model_max_length = longest
    scores = ClassifierScorer(model, tokenizer, label=None, name="clf").score(sequences, texts_of(PROMPTS, RESPONSES))
    torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-5)
    assert (elsewhere + 2.5 - scores).abs().max() > 1e-3, "no other model's texts get one"


def test_plain_prompts_go_through_the_chat_template_where_the_policys_do() -> None:
    tokenizer = bpe_tokenizer(bos=True, chat_template=TEMPLATE, pad_token="<|im_end|>")
    model = classifier("gpt2")
    wanted = alone(model, tokenizer, ["<|bos|>user: the sun\n<|bos|>assistant: is warm\n"], add_special_tokens=False)
    scores = score(ClassifierScorer(model, tokenizer, label=None, name="clf", chat=True), ["the sun"], ["is warm"])
    torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-5)
    plain = word_tokenizer()
    encoder = bert(plain)
    assert torch.equal(*(score(ClassifierScorer(encoder, plain, label=None, name="clf", chat=chat)) for chat in (True, False)))


def test_a_broken_classifier_is_named() -> None:
    tokenizer = word_tokenizer()
    model = bert(tokenizer)
    with torch.no_grad():
        model.classifier.weight.fill_(float("inf"))
    with pytest.raises(TercetError, match=r"clf gave the score (nan|-?inf) to 4 of 4"):
        score(ClassifierScorer(model, tokenizer, label=None, name="clf"))


def test_scores_do_not_depend_on_the_policys_ids() -> None:
    tokenizer = word_tokenizer()
    scorer = ClassifierScorer(bert(tokenizer), tokenizer, label=None, name="clf")
    texts = texts_of(PROMPTS, RESPONSES)
    one, other = (scorer.score(ragged(shapes, seed=seed), texts) for seed, shapes in ((0, [(2, 2)] * 4), (5, [(1, 3)] * 4)))
    assert torch.equal(one, other)

"""Tiny models of many architectures with random weights, and tokenizers, all built on the spot."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tercet.algo.logprobs import LogitTransform
from tercet.types import Sequences, TokenRow

LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64}),  # dropout stays at its default, 0.1
    "llama_tied": ("llama", {**LLAMA_LIKE, "tie_word_embeddings": True, "attention_dropout": 0.1}),
    "llama_untied": ("llama", {**LLAMA_LIKE, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**LLAMA_LIKE, "tie_word_embeddings": False}),
    "gemma2": ("gemma2", {**LLAMA_LIKE, "final_logit_softcapping": 3.0, "sliding_window": 4}),  # capped logits
    "cohere": ("cohere", {**LLAMA_LIKE, "logit_scale": 0.25}),  # scaled logits
    "granite": ("granite", {**LLAMA_LIKE, "logits_scaling": 4.0}),  # scaled logits
    "gpt_neox": ("gpt_neox", {**LLAMA_LIKE, "hidden_dropout": 0.1}),
    "opt": (
        "opt",  # learned positions with an offset of 2; layers dropped at random by default in training
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "layerdrop": 0.1,
        },
    ),
    "mistral": ("mistral", {**LLAMA_LIKE, "sliding_window": 4, "tie_word_embeddings": False}),
}
CLASSIFIERS = [name for name in ARCHITECTURES if name not in ("cohere", "granite")]  # transformers has no classifier of these
# What they make of their output layer's products, where that is anything.
TRANSFORMS = {"gemma2": LogitTransform(cap=3.0), "cohere": LogitTransform(scale=0.25), "granite": LogitTransform(scale=0.25)}
EOS = "<|endoftext|>"
CORPUS = ["the sun is warm and bright", "rain falls from a cloud", "a kind word helps", "STOP here. THE END", "a b c d e f g"] * 4


@functools.cache
def _trained(vocabulary: int) -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS, "<|bos|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return bpe.to_str()


def bpe_tokenizer(*, vocabulary: int = 288, bos: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; with `bos` it puts <|bos|> before every text."""
    bpe = Tokenizer.from_str(_trained(vocabulary))
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
        options["bos_token"] = "<|bos|>"
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, clean_up_tokenization_spaces=False, **options)


def word_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """An encoder's tokenizer: whole words between [CLS] and [SEP]."""
    words = sorted({word for line in CORPUS for word in line.lower().replace(".", " .").split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "user", "assistant", ":", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", **options
    )


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights large enough that every part of the network shows in the logits (the usual 0.02 gives nearly uniform ones)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()


def config_of(architecture: str, vocabulary: int, **options: Any) -> Any:
    model_type, settings = ARCHITECTURES[architecture]
    tokens = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return AutoConfig.for_model(model_type, **{**settings, **tokens, **options})


def causal_lm(architecture: str, vocabulary: int = 288, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A causal language model as transformers builds it: dropout as in its configuration."""
    return randomise(AutoModelForCausalLM.from_config(config_of(architecture, vocabulary, **options)), seed)


def classifier(architecture: str, vocabulary: int = 288, seed: int = 0, **options: Any) -> PreTrainedModel:
    config = config_of(architecture, vocabulary, **{"num_labels": 1, **options})
    return randomise(AutoModelForSequenceClassification.from_config(config), seed)


def bert(tokenizer: PreTrainedTokenizerFast, *, labels: Sequence[str] = ("only",), seed: int = 0) -> PreTrainedModel:
    """An encoder with a classification head."""
    config = AutoConfig.for_model(
        "bert",
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    return randomise(AutoModelForSequenceClassification.from_config(config), seed)


def write_checkpoint(folder: Path, model: PreTrainedModel, tokenizer: Any = None, **generation: Any) -> str:
    """Save as anybody's checkpoint; `generation` becomes its generation_config.json."""
    if generation:
        model.generation_config = GenerationConfig(**generation)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def ragged(shapes: Iterable[tuple[int, int]], vocabulary: int = 288, seed: int = 0) -> Sequences:
    """Random texts of (prompt length, response length)."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt_len, response_len in shapes:
        ids = torch.randint(0, vocabulary, (prompt_len + response_len,), generator=generator)
        rows.append(TokenRow(tuple(ids.tolist()), prompt_len))
    return Sequences.from_rows(rows)


SHAPES = [(5, 7), (1, 1), (12, 3), (2, 10), (3, 0), (1, 9)]


def moved(role: Any) -> Any:
    """A role that has learned something: all that learns a little elsewhere."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in role.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return role

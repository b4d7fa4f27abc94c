"""Models and tokenizers from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import CORPUS, EOS, bpe_tokenizer
from torch import Tensor

from tercet.models.load import context_length, embedding_rows, load_tokenizer, new_causal_lm, train_tokenizer
from tercet.types import TercetError


def test_tokenizer_from_scratch_round_trips(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(CORPUS, 300)
    assert len(tokenizer) <= 300 and tokenizer.eos_token == EOS and tokenizer.eos_token_id == 0
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    for text in ("the sun is warm", " leading, trailing ", "tabs\tand\nlines", "Ünïcödé 漢字 🙂", "a , b ' s", ""):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and again(text).input_ids == ids and again.decode(ids) == text
    assert len(tokenizer("the sun is warm").input_ids) < len("the sun is warm")  # it has learned something


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("gpt2", {"n_layer": 1, "n_embd": 16, "n_head": 2}),
        (
            "llama",
            {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "intermediate_size": 16,
            },
        ),
    ],
)
def test_the_same_seed_gives_the_same_weights(architecture: str, options: dict[str, Any]) -> None:
    tokenizer = bpe_tokenizer()

    def weights(seed: int) -> Tensor:
        model = new_causal_lm(architecture, options, tokenizer, positions=20, seed=seed)
        assert context_length(model) == 20 and embedding_rows(model) == 288 and model.dtype == torch.float32
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    state = torch.get_rng_state()
    first = weights(0)
    torch.rand(3)
    assert torch.equal(first, weights(0)) and not torch.equal(first, weights(1))
    torch.set_rng_state(state)
    weights(5)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random state is left alone


def test_options_of_a_model_from_scratch() -> None:
    tokenizer, small = bpe_tokenizer(), {"n_layer": 1, "n_embd": 16, "n_head": 2}
    assert context_length(new_causal_lm("gpt2", {**small, "n_positions": 33}, tokenizer, positions=20, seed=0)) == 33
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("gpt3", {}, "gpt3"),
        ("gpt2", {"n_layers": 2}, "n_layers"),
        ("gpt2", {**small, "n_head": 3}, "model.scratch.options"),
        ("gpt2", {**small, "n_layer": "two"}, "model.scratch.options"),
        ("gpt2", {**small, "n_embd": -4}, "model.scratch.options"),
        ("gpt2", {**small, "n_head": 0}, "model.scratch.options"),
        ("bert", {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}, "bert"),
        ("t5", {}, "t5"),
    ]
    for architecture, options, part in wrong:
        with pytest.raises(TercetError) as error:
            new_causal_lm(architecture, options, tokenizer, positions=20, seed=0)
        assert part in str(error.value) and "\n" not in str(error.value)

"""Where the pretrained model comes from, and how it is held."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from tercet.config.section import Section, setting


class ScratchConfig(Section):
    """A model with random weights and a tokenizer trained on the user's own text, for machines with no network."""

    architecture: str = setting("gpt2", "model_type of the transformers library: gpt2, llama, qwen2, ...")
    vocab_size: int = setting(1024, "entries of the byte-level BPE tokenizer, special tokens included", ge=260)
    options: dict[str, Any] = setting({}, "fields of that architecture's configuration, such as n_layer, n_head, n_embd")


class AdapterConfig(Section):
    """Low-rank adapters (LoRA, Hu 2021) on all linear layers: every stage trains one, on a frozen model that all roles share."""

    rank: int = setting(16, "columns of the two factors", ge=1)
    alpha: int = setting(32, "the product counts alpha / rank times", ge=1)


class ModelConfig(Section):
    """The pretrained causal language model that the run starts from."""

    name: str | None = setting(None, "a Hugging Face name or a folder that AutoModelForCausalLM loads")
    scratch: ScratchConfig | None = setting(None, "instead of a name: a new model with random weights")
    adapter: AdapterConfig | None = setting(None, "train low-rank adapters instead of all weights; {}: with the defaults")
    template: Literal["plain", "chat"] = setting(
        "plain", "plain: prompt and response are one text; chat: the tokenizer's own chat template"
    )
    trust_remote_code: bool = setting(False, "let a model repository run its own Python code")

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.name is None) == (self.scratch is None):
            given = "neither is" if self.name is None else "both are"
            raise ValueError(
                f"exactly one of name and scratch is needed, {given} set: give a model's name or folder, or scratch: {{}}"
            )
        return self

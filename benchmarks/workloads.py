"""The workloads of every benchmark: models with random weights, a tokenizer and prompts, written to a folder once.

Both sides load the same checkpoints and the same prompts, so nothing differs but the code that trains. Imported by Tercet's
workers and by those of the peer, which runs in an environment of its own: it uses torch and transformers only.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

EOS, PAD = 0, 1
# Of policy and value model on both sides: every computation is made and no weight moves, so that response lengths stay as planted. At
# 3e-6 the peer's mean length fell from 26 to 8 tokens within six iterations of `ragged`.
LEARNING_RATE = 1e-10


@dataclass(frozen=True)
class Workload:
    """One PPO iteration: `batch` responses of at most `new_tokens` tokens to prompts of 4 to 32, `epochs` optimizer steps of
    the whole batch, cut into micro-batches of `microbatch` responses."""

    name: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    new_tokens: int
    epochs: int
    microbatch: int
    mean_length: float | None = None  # of a response; None: EOS is as rare as any other token
    architecture: str = (
        "gpt2"  # or qwen2: rotary positions, RMSNorm, two heads of keys and values, gated feed-forwards of 3 x width
    )

    @property
    def microbatch_tokens(self) -> int:
        """What holds `microbatch` of the longest texts."""
        return self.microbatch * (32 + self.new_tokens)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("tiny", 4, 128, 4, 2_048, batch=32, new_tokens=48, epochs=4, microbatch=8),
        Workload("gpt2", 12, 768, 12, 50_257, batch=16, new_tokens=48, epochs=2, microbatch=4),
        Workload("ragged", 12, 768, 12, 50_257, batch=16, new_tokens=96, epochs=2, microbatch=4, mean_length=20.0),
        Workload("qwen", 12, 512, 8, 32_000, batch=16, new_tokens=48, epochs=2, microbatch=4, architecture="qwen2"),
        Workload("small", 4, 256, 4, 8_192, batch=64, new_tokens=64, epochs=1, microbatch=64),
    )
}


def workload_of(name: str) -> Workload:
    """One of WORKLOADS, or a changed one: "small@batch=256"."""
    base, *changes = name.split("@")
    numbers = {key: int(value) for key, _, value in (change.partition("=") for change in changes)}
    return replace(WORKLOADS[base], name=name, **numbers)  # type: ignore[arg-type]


def config_of(workload: Workload) -> PreTrainedConfig:
    """The architecture's own configuration at the workload's size, without dropout."""
    tokens = {"vocab_size": workload.vocabulary, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
    sizes = {"num_hidden_layers": workload.layers, "hidden_size": workload.width, "num_attention_heads": workload.heads}
    if workload.architecture == "qwen2":
        wide = {"intermediate_size": 3 * workload.width, "num_key_value_heads": 2, "max_position_embeddings": 1024}
        return Qwen2Config(**tokens, **sizes, **wide, tie_word_embeddings=True)
    return GPT2Config(**tokens, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def prepare(workload: Workload, folder: Path, prompts: int = 256) -> None:
    """Write policy, reward (also the value model's start), tokenizer and prompts.json to `folder`, unless they are there."""
    if (folder / "prompts.json").exists():
        return
    torch.manual_seed(0)
    config = config_of(workload)
    policy = AutoModelForCausalLM.from_config(config)
    if workload.mean_length is not None:
        plant_eos_rate(policy, 1 / workload.mean_length)
    config.num_labels = 1
    reward = AutoModelForSequenceClassification.from_config(config)
    words = {f"w{i}": i for i in range(workload.vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0", pad_token="w1", padding_side="left")
    for name, model in {"policy": policy, "reward": reward}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(0)
    rows = [[draw.randrange(2, workload.vocabulary) for _ in range(draw.randint(4, 32))] for _ in range(prompts)]
    (folder / "prompts.json").write_text(json.dumps(rows))


@torch.no_grad()
def plant_eos_rate(policy: PreTrainedModel, rate: float) -> None:
    """Raise EOS's logit through the bias of the last layer norm until about `rate` of the tokens are EOS."""
    direction = policy.transformer.wte.weight[EOS] / policy.transformer.wte.weight[EOS].norm()
    probe = torch.randint(2, policy.config.vocab_size, (16, 32))
    low, high = 0.0, 100.0
    for _ in range(20):
        middle = (low + high) / 2
        policy.transformer.ln_f.bias.copy_(middle * direction)
        found = policy(input_ids=probe).logits.softmax(-1)[..., EOS].mean().item()
        low, high = (middle, high) if found < rate else (low, middle)

"""Supervised fine-tuning learns by heart what it is shown eight times over."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch

from tercet.config.training import SFTConfig
from tercet.generation.native import NativeGenerator
from tercet.stages.sft import train_sft
from tercet.types import Demonstration

TOPICS = ["rain", "sun", "kind", "short", "happy", "words", "water", "clouds"]


def test_sft_memorises_eight_examples(tmp_path: Path) -> None:
    """Greedy decoding gives each response back, its end included."""
    template = tiny.template_of()
    records = [
        Demonstration(f"define {topic}", " ".join([TOPICS[(3 * i + j) % 8] for j in range(2 + i % 3)]))
        for i, topic in enumerate(TOPICS)
    ]
    policy = tiny.policy_of(0, torch.float32, vocabulary=300, positions=48, layers=2, width=48, scale=0.05)
    config = SFTConfig(epochs=150, batch_size=8, learning_rate=1e-2, max_length=48, schedule="cosine")
    figures = train_sft(
        tiny.run_of(tmp_path, "sft", dtype=torch.float32), config, policy, template, records, records, loss_on="response", seed=0
    )
    assert figures["sft.eval_loss"] < 0.02
    generator = NativeGenerator(policy, stop_ids=[template.eos_id], max_new_tokens=24)
    answers = generator.sample([template.prompt_ids(record.prompt).ids for record in records], None)
    for record, ids, length in zip(records, answers.response_ids.tolist(), answers.response_lens.tolist()):
        assert template.tokenizer.decode(ids[: length - 1]).strip() == record.response
    assert answers.finished.all()

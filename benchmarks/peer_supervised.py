"""TRL's SFTTrainer and RewardTrainer, ten optimizer steps a turn: python peer_supervised.py sft|reward MODEL RECORDS DTYPE.

Runs in TRL's environment.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from protocol import Turns
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

STEPS = 10


class Turn(TrainerCallback):
    """Ends a turn after every ten steps; `seen` counts real tokens."""

    def __init__(self, turns: Turns):
        self.turns, self.seen = turns, 0

    def on_train_begin(self, *args, **kwargs):
        self.turns.wait()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % STEPS == 0:
            self.turns.wait(tokens=self.seen)
            self.seen = 0


def main(stage: str, model: str, records: str, dtype: str) -> None:
    turns = Turn(Turns())
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = [json.loads(line) for line in Path(records).read_text(encoding="utf-8").split("\n") if line]
    common = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 32,
        "num_train_epochs": 100,
        "max_length": 256,
        "bf16": dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "logging_steps": 10**6,
    }
    if stage == "sft":
        data = Dataset.from_list([{"prompt": row["prompt"], "completion": f" {row['response']}"} for row in rows])
        arguments = SFTConfig(**common)
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            arguments,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[turns],
        )
    else:
        keys = ("prompt", "chosen", "rejected")
        data = Dataset.from_list([{key: row[key] for key in keys} for row in rows])
        scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
        scorer.config.pad_token_id = tokenizer.pad_token_id
        trainer = RewardTrainer(scorer, RewardConfig(**common), train_dataset=data, processing_class=tokenizer, callbacks=[turns])
    collate = trainer.data_collator

    def counting(features):
        batch = collate(features)
        masks = [value for key, value in batch.items() if "attention_mask" in key]
        turns.seen += int(sum(mask.sum() for mask in masks)) if masks else sum(len(row["input_ids"]) for row in features)
        return batch

    trainer.data_collator = counting
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:5])

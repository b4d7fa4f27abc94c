"""TRL's PPOTrainer on a workload, one iteration a turn. Runs in TRL's environment: python peer_ppo.py FOLDER WORKLOAD DTYPE."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from protocol import Turns
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer
from workloads import LEARNING_RATE, WORKLOADS


class Turn(TrainerCallback):
    """TRL calls on_step_end once an iteration."""

    def __init__(self, turns: Turns):
        self.turns = turns

    def on_train_begin(self, *args, **kwargs):
        self.turns.wait()

    def on_step_end(self, *args, **kwargs):
        self.turns.wait()


def main(folder: Path, name: str, dtype: str) -> None:
    turns, workload = Turns(), WORKLOADS[name]
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    weights = torch.bfloat16 if dtype == "pure_bfloat16" else torch.float32
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=weights) for _ in range(2))
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1, dtype=weights) for _ in range(2)
    )
    arguments = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=workload.microbatch,
        gradient_accumulation_steps=workload.batch // workload.microbatch,
        num_mini_batches=1,
        num_ppo_epochs=workload.epochs,
        total_episodes=10**6,
        response_length=workload.new_tokens,
        stop_token="eos",
        temperature=1.0,
        learning_rate=LEARNING_RATE,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=dtype == "bfloat16",
        disable_tqdm=True,
    )
    rows = json.loads((folder / "prompts.json").read_text())
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        eval_dataset=Dataset.from_dict({"input_ids": rows[:64]}),
        callbacks=[Turn(turns)],
    )
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])

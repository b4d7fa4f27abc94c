"""TRL's PPOTrainer from given checkpoints, saving its policy at intervals: peer_learning.py FOLDER SETTINGS, as learning.py says.

Runs in TRL's environment. The reward model's offset, which Tercet keeps in config.json, becomes its head's bias, so that both
sides learn from the same scores.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from protocol import Stations
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Pause(TrainerCallback):
    """TRL calls on_step_end once an iteration."""

    def __init__(self, stations: Stations):
        self.stations, self.policy = stations, None

    def on_train_begin(self, *args, **kwargs):
        self.stations.pass_by(lambda target: None)

    def on_step_end(self, *args, **kwargs):
        self.stations.pass_by(lambda target: self.policy.save_pretrained(target))


def scorer(folder: str) -> nn.Module:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    head = nn.Linear(model.score.in_features, 1)
    head.weight.data.copy_(model.score.weight.data)
    head.bias.data.fill_(getattr(model.config, "score_offset", 0.0))
    model.score = head
    return model


def main(folder: Path, settings: dict) -> None:
    tokenizer = AutoTokenizer.from_pretrained(settings["policy"], padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(settings["policy"], dtype=torch.float32) for _ in range(2))
    rows = json.loads((folder / "prompts.json").read_text())
    options = {"total_episodes": 10**6, "bf16": False, **settings["peer"]}
    arguments = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        stop_token="eos",
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        seed=settings["seed"],
        **options,
    )
    pause = Pause(Stations(folder / "peer", settings["every"], settings["seconds"]))
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=scorer(settings["reward"]),
        value_model=scorer(settings["reward"]),
        train_dataset=Dataset.from_dict({"input_ids": rows["train"]}),
        eval_dataset=Dataset.from_dict({"input_ids": rows["held_out"]}),
        callbacks=[pause],
    )
    pause.policy = policy
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

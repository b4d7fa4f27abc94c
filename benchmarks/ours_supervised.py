"""Tercet's stages 1 and 2, ten optimizer steps a turn: python ours_supervised.py sft|reward MODEL RECORDS DTYPE."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from protocol import Turns

from tercet.config.training import RewardConfig, SFTConfig
from tercet.data.records import read_comparisons, read_demonstrations
from tercet.data.template import Template
from tercet.models.load import count_parameters, load_causal_lm, load_classifier, load_tokenizer, stop_token_ids
from tercet.models.roles import Policy, ScoreModel, init_score_head
from tercet.runtime.distributed import World
from tercet.runtime.machine import resolve
from tercet.runtime.stage import StageRun
from tercet.stages.reward import train_reward_model
from tercet.stages.sft import train_sft

STEPS = 10


class Counted(StageRun):
    """Ends a turn after every ten steps."""

    turns: Turns
    tokens = 0.0

    def log(self, metrics: dict, timings: dict) -> None:
        self.tokens += metrics["tokens"]
        if metrics["step"] % STEPS == 0:
            self.turns.wait(tokens=self.tokens)
            self.tokens = 0.0


def main(stage: str, model: str, records: str, dtype: str) -> None:
    turns = Turns()
    tokenizer = load_tokenizer(model)
    template = Template(tokenizer, "plain", 128, stop_ids=stop_token_ids(model, tokenizer))
    machine = resolve("auto", dtype, "auto", "auto", count_parameters(model))
    machine.apply()
    run = Counted(stage, Path(tempfile.mkdtemp()), World(), machine, 10**9, 1)
    run.turns = turns
    common = {"epochs": 100, "batch_size": 32, "max_length": 256, "eval_every": 10**6}
    turns.wait()
    if stage == "sft":
        policy = Policy(load_causal_lm(model), machine.dtype)
        # The loss on all tokens, as TRL's default has it for this layout, would be less work for neither side: on the response.
        train_sft(run, SFTConfig(**common), policy, template, read_demonstrations(records), [], loss_on="response", seed=0)
    else:
        scorer = ScoreModel(load_classifier(model, num_labels=1), machine.dtype)
        init_score_head(scorer.head, torch.Generator().manual_seed(0))
        train_reward_model(run, RewardConfig(**common), scorer, template, read_comparisons(records), [], seed=0)


if __name__ == "__main__":
    main(*sys.argv[1:5])

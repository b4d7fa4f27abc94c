"""Tercet's PPO on a workload, one iteration a turn: python ours_ppo.py FOLDER WORKLOAD DTYPE[+adapter][+auto]

+adapter: all roles on one backbone; +auto: microbatch_tokens as Tercet chooses it, not as the workload says.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from protocol import Turns
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from workloads import EOS, LEARNING_RATE, workload_of

from tercet.config.ppo import PPOConfig
from tercet.generation.native import NativeGenerator
from tercet.models.adapters import Backbone, Rank
from tercet.models.load import count_parameters
from tercet.models.roles import Policy, ScoreModel
from tercet.runtime.distributed import World
from tercet.runtime.machine import resolve
from tercet.runtime.stage import StageRun
from tercet.scoring.model import RewardModelScorer
from tercet.stages.ppo import train_ppo
from tercet.stages.rollout import Actors, PromptSet


def main(folder: Path, name: str, dtype: str) -> None:
    turns, workload = Turns(), workload_of(name)

    def load() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)

    def scorer_of() -> ScoreModel:
        return ScoreModel(AutoModelForSequenceClassification.from_pretrained(folder / "reward"), machine.dtype)

    dtype, *flags = dtype.split("+")
    parameters = count_parameters(str(folder / "policy"))
    tokens: str | int = "auto" if "auto" in flags else workload.microbatch_tokens
    machine = resolve("auto", dtype, "auto", tokens, parameters, adapter="adapter" in flags)
    machine.apply()
    if "adapter" in flags:
        backbone = Backbone(str(folder), lambda half: load(), machine.dtype, Rank(16, 32))
        policy, reference = backbone.policy(seed=0), backbone.reference
        value_model, reward = backbone.scorer(seed=1), backbone.scorer(seed=2)
    else:
        policy, reference, value_model, reward = (
            Policy(load(), machine.dtype),
            Policy(load(), machine.dtype),
            scorer_of(),
            scorer_of(),
        )
    reference.freeze()
    reward.freeze()
    generator = NativeGenerator(policy, stop_ids=[EOS], max_new_tokens=workload.new_tokens)
    scorer = RewardModelScorer(reward, machine.microbatch_tokens)
    actors = Actors(policy, reference, value_model, generator, scorer)
    rows = json.loads((folder / "prompts.json").read_text())
    prompts = PromptSet(rows, [" ".join(map(str, row)) for row in rows], [{} for _ in rows], lambda ids: " ".join(map(str, ids)))
    config = PPOConfig(
        iterations=10**6,
        rollout_batch_size=workload.batch,
        ppo_epochs=workload.epochs,
        learning_rate=LEARNING_RATE,
        value_learning_rate=LEARNING_RATE,
        max_new_tokens=workload.new_tokens,
        evaluate_every=1,
        save_rollouts_every=0,
    )
    run = StageRun("ppo", Path(tempfile.mkdtemp()), World(), machine, 10**9, 1, counter="iteration")

    def turn(iteration: int) -> dict[str, float]:
        timings = run.timings.read()
        turns.wait(dtype=str(machine.dtype), threads=machine.threads, **(timings[-1] if timings else {}))
        return {}

    turn(0)
    train_ppo(run, config, actors, prompts, seed=0, evaluate=turn)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])

"""The stages as one rank of several: `worker.py FOLDER TOKENS DTYPE`; test_invariance.py starts it with torchrun, and calls it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import tiny
import torch
from safetensors.torch import save_file

from tercet.config.training import RewardConfig, SFTConfig
from tercet.runtime.distributed import World
from tercet.runtime.stage import StageRun
from tercet.stages.evaluate import Judges, Sampling, respond
from tercet.stages.ppo import train_ppo
from tercet.stages.reward import train_reward_model
from tercet.stages.sft import train_sft
from tercet.types import Comparison, Demonstration

WORDS = tiny.WORDS
DEMONSTRATIONS = [Demonstration(" ".join(WORDS[i : i + 3]), " ".join(WORDS[: 1 + i % 5])) for i in range(7)]
COMPARISONS = [
    Comparison(WORDS[i], tuple(" ".join(WORDS[i : i + k]) for k in range(1, 3 + i % 3)), tuple(range(2 + i % 3)))
    for i in range(7)
]
ROWS = len(DEMONSTRATIONS)


def sft(run: StageRun, dtype: torch.dtype, rows: int = 5, turned: bool = False) -> dict[str, torch.Tensor]:
    """`rows` a step; `turned`: the records in the reverse order."""
    policy = tiny.policy_of(3, dtype, vocabulary=300, positions=64)
    config = SFTConfig(epochs=1, batch_size=rows, learning_rate=1e-3, max_length=64)
    records = DEMONSTRATIONS[::-1] if turned else DEMONSTRATIONS
    train_sft(run, config, policy, tiny.template_of(), records, DEMONSTRATIONS[:3], loss_on="response", seed=0)
    return tiny.weights(policy)


def reward(run: StageRun, dtype: torch.dtype, rows: int = 5, turned: bool = False) -> dict[str, torch.Tensor]:
    """`rows` a step; `turned`: the records in the reverse order."""
    model = tiny.value_of(3, dtype, vocabulary=300, positions=64)
    config = RewardConfig(epochs=1, batch_size=rows, learning_rate=1e-3, max_length=64)
    records = COMPARISONS[::-1] if turned else COMPARISONS
    train_reward_model(run, config, model, tiny.template_of(), records, COMPARISONS[:3], seed=0)
    return tiny.weights(model)


def ppo(run: StageRun, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Seven rows over minibatches of one, so that ranks are left without rows; then an evaluation."""
    actors, prompts = tiny.actors_of(dtype=dtype), tiny.prompts_of()
    judges, sampling = Judges(actors.scorer, {}), Sampling(0, 1.0, 4, 2, False, 32)

    def evaluate(iteration: int) -> dict[str, float]:
        actors.generator.sync(version=iteration)
        rows = respond(actors.policy, actors.ref_policy, actors.generator, prompts, judges, sampling, run.world)
        return {"eval_score": sum(row["score"] for row in rows), "eval_kl": sum(row["kl"] for row in rows)}

    for size in (7, 1):
        config = tiny.ppo_config(
            rollout_batch_size=7, minibatch_size=size, ppo_epochs=2, evaluate_every=1, missing_eos_penalty=1.0
        )
        part = StageRun("ppo", run.folder / str(size), run.world, run.machine, 10**9, 1, "iteration")
        train_ppo(part, config, actors, prompts, seed=0, evaluate=evaluate, second_round=size == 1)
    return tiny.weights(actors.policy) | {f"value.{name}": p for name, p in tiny.weights(actors.value_model).items()}


def run_stage(stage: str, folder: Path, tokens: int, dtype: torch.dtype = torch.float64, **options: Any) -> None:
    world = World.start("cpu")
    run = tiny.run_of(folder, stage, world=world, dtype=dtype, tokens=tokens)
    found = {"sft": sft, "reward": reward, "ppo": ppo}[stage](run, dtype, **options)
    save_file({name: value.contiguous() for name, value in found.items()}, folder / f"rank{world.rank}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in ("sft", "reward", "ppo"):
        run_stage(name, Path(sys.argv[1], name), int(sys.argv[2]), getattr(torch, sys.argv[3]))

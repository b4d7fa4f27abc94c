"""Tercet's PPO from given checkpoints, saving its policy at intervals: ours_learning.py FOLDER SETTINGS, as learning.py says."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from protocol import Stations

from tercet.config.ppo import PPOConfig
from tercet.generation.native import NativeGenerator
from tercet.models.interpolation import interpolated
from tercet.models.load import count_parameters, load_causal_lm, load_classifier, load_tokenizer
from tercet.models.roles import Policy, ScoreModel
from tercet.models.storage import parameters_of
from tercet.runtime.distributed import World
from tercet.runtime.machine import resolve
from tercet.runtime.stage import StageRun
from tercet.scoring.model import RewardModelScorer
from tercet.stages.ppo import train_ppo
from tercet.stages.rollout import Actors, PromptSet


def main(folder: Path, settings: dict[str, object]) -> None:
    policy_folder, reward_folder = str(settings["policy"]), str(settings["reward"])
    machine = resolve("auto", "auto", torch.get_num_threads(), "auto", count_parameters(policy_folder))
    machine.apply()
    tokenizer = load_tokenizer(policy_folder)
    policy, reference = (Policy(load_causal_lm(policy_folder), machine.dtype) for _ in range(2))
    value_model, reward = (ScoreModel(load_classifier(reward_folder), machine.dtype) for _ in range(2))
    reference.freeze()
    reward.freeze()
    rows = json.loads((folder / "prompts.json").read_text())["train"]
    prompts = PromptSet(rows, [str(i) for i in range(len(rows))], [{}] * len(rows), lambda ids: str(tokenizer.decode(ids)))
    config = PPOConfig(**{"iterations": 10**4, "save_rollouts_every": 0, "evaluate_every": 1, **settings["ours"]})  # type: ignore[dict-item]
    stop_ids, count, temperature = [int(tokenizer.eos_token_id)], config.max_new_tokens, config.temperature
    generator = NativeGenerator(policy, stop_ids=stop_ids, max_new_tokens=count, temperature=temperature)
    actors = Actors(policy, reference, value_model, generator, RewardModelScorer(reward, machine.microbatch_tokens))
    run = StageRun("ppo", Path(tempfile.mkdtemp()), World(), machine, 10**9, 1, counter="iteration")
    start = parameters_of(policy.model, policy_folder)
    assert start is not None
    stations = Stations(folder / "ours", float(settings["every"]), float(settings["seconds"]))  # type: ignore[arg-type, call-overload]

    def pause(iteration: int) -> dict[str, float]:
        def save(target: Path) -> None:
            with interpolated(policy, start, config.interpolation):
                policy.full_precision().save_pretrained(target)

        stations.pass_by(save)
        return {}

    stations.pass_by(lambda target: None)
    train_ppo(run, config, actors, prompts, seed=int(settings["seed"]), evaluate=pause)  # type: ignore[call-overload]


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

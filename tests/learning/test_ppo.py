"""PPO learns what it is paid for, within the KL that it is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from tercet.stages.ppo import train_ppo
from tercet.stages.rollout import Actors


def share_of(token: str) -> Any:
    return lambda prompts, responses: [r.split().count(token) / len(r.split()) for r in responses]


def learn(actors: Actors, folder: Path, **options: Any) -> list[dict[str, Any]]:
    defaults = {
        "iterations": 50,
        "rollout_batch_size": 48,
        "learning_rate": 2e-3,
        "value_learning_rate": 5e-3,
        "max_new_tokens": 6,
        "save_rollouts_every": 0,
    }
    config = tiny.ppo_config(**(defaults | options))
    run = tiny.run_of(folder, dtype=torch.float32)
    train_ppo(run, config, actors, tiny.prompts_of(), seed=0, evaluate=lambda i: {})
    return [json.loads(line) for line in (folder / "ppo/metrics.jsonl").read_text().splitlines()]


def mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def small(reward: Any) -> Actors:
    return tiny.actors_of(reward, dtype=torch.float32, steps=6, scale=0.08)


def test_ppo_raises_a_planted_tokens_rate_while_the_kl_stays_bounded(tmp_path: Path) -> None:
    rows = learn(small(share_of("2")), tmp_path, kl={"coef": 0.15}, learning_rate=3e-3)
    gain = mean(rows[-10:], "score") - rows[0]["score"]
    assert rows[0]["score"] < 0.4 and gain > 0.25
    # Sampling nothing but the token would cost 8 nats; what is gained must be worth more than what is paid.
    assert 0.1 < mean(rows[-10:], "kl") < 5.0 and 0.15 * mean(rows[-10:], "kl") < gain
    assert mean(rows[-10:], "explained_variance") > rows[0]["explained_variance"]


def test_without_a_reward_the_kl_goes_back_towards_zero(tmp_path: Path) -> None:
    """Section 3, row 19: with the penalty's sign turned round the policy would run away."""
    actors = small(lambda prompts, responses: [0.0] * len(responses))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in actors.policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    config = tiny.ppo_config(
        iterations=40, rollout_batch_size=64, max_new_tokens=6, kl={"coef": 1.0}, learning_rate=2e-3, save_rollouts_every=0
    )
    run = tiny.run_of(tmp_path, dtype=torch.float32)
    train_ppo(run, config, actors, tiny.prompts_of(), seed=0, evaluate=lambda i: {}, second_round=True)
    rows = [json.loads(line) for line in (tmp_path / "ppo/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl"] > 0.3 and abs(mean(rows[-5:], "kl")) < 0.3 * rows[0]["kl"]


@pytest.mark.slow
@pytest.mark.parametrize(("penalty", "ends"), [(2.0, True), (None, False)])
def test_a_policy_that_never_stops_learns_to_with_the_missing_end_penalty(
    tmp_path: Path, penalty: float | None, ends: bool
) -> None:
    actors = small(lambda prompts, responses: [0.0] * len(responses))
    for policy in (actors.policy, actors.ref_policy):
        with torch.no_grad():  # the end token's output row points away from every state: about 1 % a step
            bias = policy.model.transformer.ln_f.bias
            bias.copy_(-3.0 * policy.model.lm_head.weight[tiny.EOS] / policy.model.lm_head.weight[tiny.EOS].norm() ** 2)
    rows = learn(actors, tmp_path, missing_eos_penalty=penalty, kl={"coef": 0.02}, learning_rate=3e-3)
    assert rows[0]["finished"] < 0.2
    assert (mean(rows[-5:], "finished") > 0.9) == ends


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.5, 1.5])
def test_the_adaptive_coefficient_settles_at_its_target(tmp_path: Path, target: float) -> None:
    """The mean KL of the last third is within 20 %."""
    kl = {"controller": "adaptive", "coef": 0.1, "target": target, "horizon": 300}
    rows = learn(small(share_of("2")), tmp_path, kl=kl, iterations=150, schedule="constant", learning_rate=1e-3)
    assert mean(rows[-50:], "kl") == pytest.approx(target, rel=0.2)
    assert rows[-1]["kl_coef"] != 0.1

"""Numbers gone wrong: each is stopped or handled by its rule, and the message says what to change.

Elsewhere: reward functions that raise, hang or return nonsense (scoring/test_function.py), a classifier's scores
(scoring/test_model.py), log-probabilities and values of the rollout (stages/test_rollout.py), a gradient in PPO (stages/test_update.py,
stages/test_ppo.py), prompts beyond the model's positions (end_to_end/test_checkpoints.py).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from tercet.config.training import TrainingConfig
from tercet.runtime.stage import StageRun
from tercet.stages.ppo import train_ppo
from tercet.stages.rollout import Actors
from tercet.stages.supervised import train
from tercet.types import TercetError


class Weight(nn.Module):
    """One number, so that every step can be followed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))


def supervised(run: StageRun, losses: list[float]) -> Weight:
    """Steps whose loss is w times the given numbers; the gradient is that number."""
    module = Weight()

    def compute(step: int) -> dict[str, float]:
        loss: Tensor = module.w * losses[step]
        loss.backward()
        return {"loss": loss.item(), "tokens": 1}

    train(run, module, TrainingConfig(batch_size=1, learning_rate=0.1, schedule="constant"), len(losses), compute, dict)
    return module


class TestSupervised:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_step_without_a_finite_gradient_is_skipped_and_counted(self, bad: float, tmp_path: Path) -> None:
        with_bad = supervised(tiny.run_of(tmp_path / "a", "sft"), [1.0, bad, 1.0])
        without = supervised(tiny.run_of(tmp_path / "b", "sft"), [1.0, 1.0])
        assert with_bad.w.item() == without.w.item(), "as if the step had never been, in the optimizer's moments too"
        rows = [json.loads(line) for line in (tmp_path / "a/sft/metrics.jsonl").read_text().splitlines()]
        assert [row.get("skipped") for row in rows] == [None, 1, 1]

    def test_ten_of_them_end_the_run_with_the_last_checkpoint_kept(self, tmp_path: Path) -> None:
        run = tiny.run_of(tmp_path, "sft", every=2)
        with pytest.raises(TercetError, match=r"sft: 10 steps had a gradient that is not finite .*Lower sft\.learning_rate"):
            supervised(run, [1.0, 1.0] + 20 * [math.nan])
        checkpoint, _ = run.checkpoints.latest()
        assert checkpoint is not None and checkpoint.tensors["model"]["w"].isfinite()
        assert checkpoint.values["skipped"] == checkpoint.step - 2, "the count goes on after a resume"


def ppo(actors: Actors, run: StageRun, **options: Any) -> dict[str, float]:
    return train_ppo(run, tiny.ppo_config(**options), actors, tiny.prompts_of(), seed=3, evaluate=lambda i: {})


class TestPPO:
    FAST = {"iterations": 40, "learning_rate": 0.1, "schedule": "constant", "ppo_epochs": 8}

    def test_an_exploding_kl_ends_the_run_before_it_is_trained_on(self, tmp_path: Path) -> None:
        run = tiny.run_of(tmp_path, every=1)
        wanted = r"iteration (\d+): the KL .* nats a response, .* a token, above ppo\.kl\.limit \(0\.5\).* Raise ppo\.kl\.coef"
        with pytest.raises(TercetError, match=wanted) as caught:
            ppo(tiny.actors_of(), run, kl={"coef": 0.0, "limit": 0.5}, **self.FAST)
        stopped = int(str(caught.value).split("iteration ")[1].split(":")[0])
        rows = run.metrics.read()
        assert [row["iteration"] for row in rows] == list(range(1, stopped)), "up to the iteration before"
        assert all(row["kl"] <= 0.5 * row["length"] for row in rows), "the limit is per response token"
        checkpoint, _ = run.checkpoints.latest()
        assert checkpoint is not None and checkpoint.step == stopped - 1
        # The limit has no part in any result: raised, the same run goes on.
        more = {**self.FAST, "iterations": stopped + 1, "kl": {"coef": 0.0, "limit": None}}
        assert ppo(tiny.actors_of(), tiny.run_of(tmp_path, every=1), **more)["kl"] > 0.5

    def test_nothing_but_empty_responses_end_the_run(self, tmp_path: Path) -> None:
        actors = tiny.actors_of()
        with torch.no_grad():  # both alike, as the check before the first update wants it
            for policy in (actors.policy, actors.ref_policy):
                policy.model.lm_head.weight.zero_()
                policy.model.lm_head.weight[tiny.EOS] = 100 * policy.model.transformer.ln_f.weight
                policy.model.transformer.ln_f.bias.copy_(policy.model.transformer.ln_f.weight)
        prompts = tiny.prompts_of()
        prompts = type(prompts)(
            prompts.ids, prompts.texts, prompts.fields, lambda ids: tiny.spell([i for i in ids if i != tiny.EOS])
        )
        config = tiny.ppo_config()
        with pytest.raises(TercetError, match=r"iteration 1: all 12 responses are empty.* an empty text, raise ppo\.kl\.coef"):
            train_ppo(tiny.run_of(tmp_path), config, actors, prompts, seed=3, evaluate=lambda i: {})

    def test_some_empty_responses_do_not(self, tmp_path: Path) -> None:
        prompts = tiny.prompts_of()
        prompts = type(prompts)(
            prompts.ids, prompts.texts, prompts.fields, lambda ids: tiny.spell([i for i in ids if i != tiny.EOS])
        )
        train_ppo(tiny.run_of(tmp_path), tiny.ppo_config(), tiny.actors_of(), prompts, seed=3, evaluate=lambda i: {})
        rows = [json.loads(line) for line in (tmp_path / "ppo/rollouts.jsonl").read_text().splitlines()]
        assert "" in {row["response"] for row in rows}

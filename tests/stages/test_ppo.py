"""The PPO loop: checks before the first update, the controller, warm-up, what breaks a run, and bit-identical repeats."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from tercet.config.ppo import PPOConfig
from tercet.errors import Interrupted
from tercet.generation.native import NativeGenerator
from tercet.runtime.stage import StageRun
from tercet.stages import ppo
from tercet.stages.ppo import check_first_minibatch, check_first_rollout, train_ppo, weights_hash
from tercet.stages.rollout import Actors
from tercet.stages.update import UpdateProgress
from tercet.types import Sequences, TercetError


def train(actors: Actors, run: StageRun, *, second_round: bool = False, **options: Any) -> dict[str, float]:
    config = tiny.ppo_config(**options)
    return train_ppo(
        run, config, actors, tiny.prompts_of(), seed=3, evaluate=lambda i: {"eval_score": i}, second_round=second_round
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class TopOne:
    """A generator that cuts the tail off the distribution, as a checkpoint's top_k would make it do."""

    def __init__(self, actors: Actors):
        self.inner = actors.generator
        self.version = 0

    def sync(self, version: int) -> None:
        self.version = version

    def sample(self, prompts: list[list[int]], uniforms: Any) -> Sequences:
        self.inner.sync(self.version)
        sequences = self.inner.sample(prompts, None)
        assert sequences.sampler_logprobs is not None
        sequences.sampler_logprobs = torch.zeros_like(sequences.sampler_logprobs)  # the one token has probability 1
        return sequences


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_right_models_pass_every_check_silently(tmp_path: Path, dtype: torch.dtype) -> None:
    metrics = train(tiny.actors_of(dtype=dtype), tiny.run_of(tmp_path, dtype=dtype, tokens=20), minibatch_size=4)
    assert metrics["iteration"] == 2 and metrics["optimizer_steps"] == 12


def test_a_policy_that_is_not_the_reference_is_refused_before_the_first_update(tmp_path: Path) -> None:
    actors = tiny.actors_of()
    with torch.no_grad():
        actors.policy.model.transformer.ln_f.bias[0] += 1e-4
    before = weights_hash(actors.policy)
    with pytest.raises(TercetError, match="policy and the reference differ by up to .* nats a token"):
        train(actors, tiny.run_of(tmp_path))
    assert weights_hash(actors.policy) == before
    train(actors, tiny.run_of(tmp_path / "second"), second_round=True)  # a second round: reported, not an error
    assert lines(tmp_path / "second/ppo/metrics.jsonl")[0]["kl_k3"] > 0


def test_a_generator_with_top_k_is_refused(tmp_path: Path) -> None:
    actors = tiny.actors_of()
    actors.generator = TopOne(actors)
    with pytest.raises(TercetError, match="generator's log-probabilities differ from the training forward's"):
        train(actors, tiny.run_of(tmp_path))


def test_another_temperature_in_the_generator_is_refused(tmp_path: Path) -> None:
    actors = tiny.actors_of()
    actors.generator = NativeGenerator(actors.policy, stop_ids=[0], max_new_tokens=4, temperature=0.7)
    with pytest.raises(TercetError, match="samples from another distribution"):
        train(actors, tiny.run_of(tmp_path))


def test_the_samplers_gap_is_bounded_by_dtype_and_by_the_size_of_the_logits() -> None:
    rollout = tiny.rollout_of(tiny.actors_of(), tiny.ppo_config())

    def passes(gap: float, dtype: torch.dtype, largest_logit: float = 1.0, temperature: float = 1.0) -> bool:
        rollout.metrics["sampler_logprob_gap"] = gap
        try:
            check_first_rollout(rollout, tiny.ppo_config(temperature=temperature), dtype, largest_logit, second_round=False)
        except TercetError:
            return False
        return True

    assert passes(0.9e-10, torch.float64) and not passes(1.1e-10, torch.float64)
    assert passes(0.9e-5, torch.float32) and not passes(1.1e-5, torch.float32)
    # Float32 numbers between 64 and 128 are 2**-17 apart: as many nats as that are lost, a few times over, in logits of 100.
    assert passes(16 * 2.0**-17, torch.float32, 100.0) and not passes(100 * 2.0**-17, torch.float32, 100.0)
    assert passes(0.05, torch.bfloat16, 100.0) and not passes(0.6, torch.bfloat16, 100.0)
    # Logits are divided by the temperature, and what was lost in them with them.
    assert passes(160 * 2.0**-17, torch.float32, 100.0, 0.1) and not passes(1000 * 2.0**-17, torch.float32, 100.0, 0.1)
    assert (
        passes(4.9, torch.bfloat16, 1.0, 0.1)
        and not passes(5.1, torch.bfloat16, 1.0, 0.1)
        and not passes(0.6, torch.bfloat16, 1.0, 2.0)
    )


def test_large_logits_are_no_error(tmp_path: Path) -> None:
    """GPT-2's are around -100, where float32's rounding alone is more than 1e-5; a model this small needs larger ones for that."""
    actors = tiny.actors_of(dtype=torch.float32, steps=8)
    for role in (actors.policy, actors.ref_policy):
        with torch.no_grad():
            role.model.transformer.wte.weight[:, 0] += 1.0
            role.model.transformer.ln_f.bias[0] = -400.0
    train(actors, tiny.run_of(tmp_path, dtype=torch.float32), iterations=1, max_new_tokens=8, rollout_batch_size=48)
    assert 1e-5 < lines(tmp_path / "ppo/metrics.jsonl")[0]["sampler_logprob_gap"] < 1e-3


def test_a_rank_without_rows_has_nothing_to_differ(tmp_path: Path) -> None:
    rollout = tiny.rollout_of(tiny.actors_of(), tiny.ppo_config())
    rollout.experience = rollout.experience.select(torch.zeros(0, dtype=torch.long))
    check_first_rollout(rollout, tiny.ppo_config(), torch.float64, 1.0, second_round=False)
    rollout.metrics["sampler_logprob_gap"] = 1.0  # which is of all ranks
    with pytest.raises(TercetError, match="generator's log-probabilities differ"):
        check_first_rollout(rollout, tiny.ppo_config(), torch.float64, 1.0, second_round=False)


def test_gpt2s_logits_under_bfloat16(tmp_path: Path) -> None:
    """They are around -100, where bfloat16 numbers are half a nat apart: rounded so, neither the sampler's nor the forward's
    log-probabilities would be worth much."""
    actors = tiny.actors_of(dtype=torch.bfloat16, steps=8)
    for role in (actors.policy, actors.ref_policy):
        with torch.no_grad():
            role.model.transformer.wte.weight[:, 0] = 1.0
            role.model.transformer.ln_f.weight[0] = 0.0
            role.model.transformer.ln_f.bias[0] = -100.0
    train(actors, tiny.run_of(tmp_path, dtype=torch.bfloat16), iterations=1, max_new_tokens=8, rollout_batch_size=48)
    first = lines(tmp_path / "ppo/metrics.jsonl")[0]
    assert first["kl"] == 0.0 and 0 < first["sampler_logprob_gap"] < 0.05


def test_a_forward_that_does_not_repeat_is_refused_at_the_first_minibatch(tmp_path: Path) -> None:
    """Section 3, row 15: dropout that is on in the update alone."""
    actors = tiny.actors_of()
    forward = actors.policy.forward

    def noisy(sequences: Sequences, **options: Any) -> Any:
        logprobs, entropy = forward(sequences, **options)
        return logprobs + 0.01 * sequences.response_mask * torch.is_grad_enabled(), entropy

    actors.policy.forward = noisy  # type: ignore[method-assign]
    with pytest.raises(TercetError, match="at the first minibatch of PPO new and old policy should be the same"):
        train(actors, tiny.run_of(tmp_path), minibatch_size=4)
    with pytest.raises(TercetError, match="first minibatch"):  # also where only the value model learns at first
        train(actors, tiny.run_of(tmp_path / "warm"), value_warmup_iterations=1, minibatch_size=4, second_round=True)
    with pytest.raises(TercetError, match="the policy and the reference differ"):  # where one forward serves rollout and update
        train(actors, tiny.run_of(tmp_path / "whole"))


def test_a_gap_that_is_not_a_number_is_no_agreement() -> None:
    rollout = tiny.rollout_of(tiny.actors_of(), tiny.ppo_config())
    check_first_rollout(rollout, tiny.ppo_config(), torch.float64, 1.0, second_round=False)
    rollout.metrics["sampler_logprob_gap"] = math.nan
    with pytest.raises(TercetError, match="generator's log-probabilities differ"):
        check_first_rollout(rollout, tiny.ppo_config(), torch.float64, 1.0, second_round=False)


def test_the_generator_takes_over_the_weights_before_each_rollout(tmp_path: Path) -> None:
    """It matters where the generator samples from a copy of its own, as under bfloat16."""
    actors = tiny.actors_of()
    calls: list[Any] = []
    sync, sample = actors.generator.sync, actors.generator.sample
    actors.generator.sync = lambda version: (calls.append(version), sync(version))[1]  # type: ignore[method-assign,func-returns-value]
    actors.generator.sample = lambda *given: (calls.append("sample"), sample(*given))[1]  # type: ignore[method-assign,func-returns-value]
    train(actors, tiny.run_of(tmp_path), iterations=3)
    assert calls == [0, "sample", 1, "sample", 2, "sample"]


def test_the_first_minibatch_check_names_the_numbers_and_knows_the_dtypes() -> None:
    def progress(ratio: float, approx_kl: float, clipped: float) -> UpdateProgress:
        sums = {"ratio": 100 * ratio, "approx_kl": 100 * approx_kl, "clipped_ratio": 100 * clipped}
        return UpdateProgress(steps=1, tokens=100.0, sums=sums)

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check_first_minibatch(progress(1.0, 0.0, 0.0), dtype)
        for wrong in (progress(1.2, 0.0, 0.0), progress(1.0, 0.01, 0.0), progress(1.0, 0.0, 0.1)):
            with pytest.raises(TercetError, match="ratio"):
                check_first_minibatch(wrong, dtype)
    check_first_minibatch(progress(1.0 + 1e-6, 1e-12, 0.0), torch.float32)
    with pytest.raises(TercetError):
        check_first_minibatch(progress(1.0 + 1e-6, 1e-12, 0.0), torch.float64)
    later = progress(1.2, 0.1, 0.1)
    later.steps = 2
    check_first_minibatch(later, torch.float64)  # after the first step the policies differ, as they should


def test_a_reference_that_changes_is_noticed_at_the_end(tmp_path: Path) -> None:
    actors = tiny.actors_of()

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        with torch.no_grad():
            actors.ref_policy.model.transformer.ln_f.bias[0] += 1e-6
        return [0.0] * len(responses)

    actors.scorer = tiny.FunctionScorer(reward, name="vandal")
    with pytest.raises(AssertionError, match="reference policy's weights changed"):
        train(actors, tiny.run_of(tmp_path), second_round=True)


def test_the_same_seed_gives_bit_identical_metrics_weights_and_samples(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        torch.rand(len(found) * 3 + 1)  # the global generator's state does not matter
        actors = tiny.actors_of()
        train(actors, tiny.run_of(tmp_path / name, tokens=24), iterations=3, minibatch_size=4)
        files = [(tmp_path / name / "ppo" / file).read_bytes() for file in ("metrics.jsonl", "rollouts.jsonl")]
        found.append((weights_hash(actors.policy), weights_hash(actors.value_model), *files))
    assert found[0] == found[1]


def test_another_seed_samples_other_responses(tmp_path: Path) -> None:
    for seed in (1, 2):
        run = tiny.run_of(tmp_path / str(seed))
        train_ppo(run, tiny.ppo_config(), tiny.actors_of(), tiny.prompts_of(), seed=seed, evaluate=lambda i: {})
    assert (tmp_path / "1/ppo/rollouts.jsonl").read_text() != (tmp_path / "2/ppo/rollouts.jsonl").read_text()


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    """Stopped after an optimizer step in the middle of the second iteration, then resumed in fresh models."""
    whole = tiny.actors_of()
    options: dict[str, Any] = {
        "iterations": 3,
        "minibatch_size": 4,
        "kl": {"controller": "adaptive", "coef": 0.1, "horizon": 100},
    }
    train(whole, tiny.run_of(tmp_path / "whole"), **options)
    broken, run, steps = tiny.actors_of(), tiny.run_of(tmp_path / "broken"), 0
    original = ppo._State.after_step

    def after_step(self: Any, *arguments: Any) -> None:
        nonlocal steps
        steps += 1
        run.interrupt.requested = steps == 17
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ppo._State, "after_step", after_step)
        train(broken, run, **options)
    again = tiny.actors_of()
    train(again, tiny.run_of(tmp_path / "broken"), **options)
    for name in ("policy", "value_model", "ref_policy"):
        assert weights_hash(getattr(whole, name)) == weights_hash(getattr(again, name)), name
    for file in ("metrics.jsonl", "rollouts.jsonl"):
        assert (tmp_path / "whole/ppo" / file).read_bytes() == (tmp_path / "broken/ppo" / file).read_bytes()


def test_value_warm_up_holds_policy_and_kl_coefficient(tmp_path: Path) -> None:
    actors = tiny.actors_of()
    start, warm = (weights_hash(actors.policy), weights_hash(actors.value_model)), []

    def evaluate(iteration: int) -> dict[str, float]:
        warm.append((weights_hash(actors.policy), weights_hash(actors.value_model)))
        return {}

    kl = {"controller": "adaptive", "coef": 0.1, "target": 1.0, "horizon": 100}
    config = tiny.ppo_config(iterations=4, value_warmup_iterations=3, kl=kl, evaluate_every=3)
    train_ppo(tiny.run_of(tmp_path), config, actors, tiny.prompts_of(), seed=3, evaluate=evaluate)
    assert warm[0][0] == start[0] and warm[0][1] != start[1]
    assert weights_hash(actors.policy) != start[0]
    rows = lines(tmp_path / "ppo/metrics.jsonl")
    assert [row["kl_coef"] for row in rows] == [0.1] * 4  # the KL of a policy that stands still adapts nothing
    assert [row["learning_rate"] > 0 for row in rows] == [False, False, False, True]


def test_the_adaptive_coefficient_follows_the_rule_after_each_update(tmp_path: Path) -> None:
    kl = {"controller": "adaptive", "coef": 0.1, "target": 0.5, "horizon": 200}
    train(tiny.actors_of(), tiny.run_of(tmp_path), iterations=4, learning_rate=2e-2, schedule="constant", kl=kl)
    rows = lines(tmp_path / "ppo/metrics.jsonl")
    wanted = 0.1
    for row in rows:
        assert row["kl_coef"] == pytest.approx(wanted, rel=1e-12)
        wanted *= 1 + min(0.2, max(-0.2, row["kl"] / 0.5 - 1)) * 12 / 200
    assert rows[0]["kl"] == 0.0 and rows[-1]["kl"] != 0.0


def test_learning_rates_fall_linearly_and_evaluations_and_rollouts_come_when_asked(tmp_path: Path) -> None:
    options = {"iterations": 4, "evaluate_every": 2, "save_rollouts_every": 2, "learning_rate": 1e-3}
    train(tiny.actors_of(), tiny.run_of(tmp_path), **options)
    rows = lines(tmp_path / "ppo/metrics.jsonl")
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert [row.get("eval_score") for row in rows] == [None, 2, None, 4]
    assert [row["iteration"] for row in lines(tmp_path / "ppo/rollouts.jsonl")[::12]] == [1, 3, 4]


def test_a_run_without_any_finite_gradient_stops_with_the_way_out(tmp_path: Path) -> None:
    actors = tiny.actors_of()
    forward = actors.value_model.forward

    def broken(sequences: Sequences, **options: Any) -> Any:
        values = forward(sequences, **options)
        if values.requires_grad:
            values.register_hook(lambda gradient: gradient * float("inf"))
        return values

    actors.value_model.forward = broken  # type: ignore[method-assign]
    with pytest.raises(TercetError, match="no optimizer step had a finite gradient"):
        train(actors, tiny.run_of(tmp_path))


def test_models_given_as_one_object_show_up_as_a_changed_reference(tmp_path: Path) -> None:
    """Section 2: the reference is the policy object. KL would be 0 for ever."""
    actors = tiny.actors_of()
    actors.ref_policy = actors.policy
    with pytest.raises(AssertionError, match="reference policy's weights changed"):
        train(actors, tiny.run_of(tmp_path))
    copied = tiny.actors_of()
    copied.ref_policy = copy.deepcopy(copied.policy)
    copied.ref_policy.freeze()
    train(copied, tiny.run_of(tmp_path / "copied"))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, (1.0, 1.0)),
        ({"learning_rate": 0.5}, (0.5, 0.5)),
        ({"value_learning_rate": 0.5}, (1.0, 0.5)),
        ({"learning_rate": 0.25, "value_learning_rate": 0.5}, (0.25, 0.5)),
    ],
)
def test_learning_rates_that_are_not_given(
    given: dict[str, float], wanted: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy's follows from its own size and the minibatch, the value model's is the policy's."""
    policy = tiny.policy_of()
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(ppo, "usual_rate", lambda *of: asked.append(of) or 1.0)
    assert ppo._rates(PPOConfig.model_validate(given | {"minibatch_size": 32}), 0, policy) == wanted
    assert asked == [(sum(weight.numel() for weight in tiny.weights(policy).values()), 32)]

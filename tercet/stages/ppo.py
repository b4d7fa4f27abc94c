"""Stage 3: PPO with a KL penalty to the SFT policy. Read `train_ppo` first: rollout, update, controller, next iteration."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn

from tercet.algo.kl import AdaptiveKL, FixedKL
from tercet.algo.schedules import learning_rate
from tercet.config.ppo import KLConfig, PPOConfig
from tercet.runtime.checkpoint import Checkpoint
from tercet.runtime.interrupted import Interrupted
from tercet.runtime.metrics import JsonLines, Stopwatch
from tercet.runtime.optim import Optimizer
from tercet.runtime.progress import Bar
from tercet.runtime.stage import StageRun
from tercet.stages.rollout import Actors, PromptSet, Rollout, collect
from tercet.stages.update import Trainables, UpdateProgress, update
from tercet.types import Experience, Sequences, TercetError

Evaluate = Callable[[int], dict[str, float]]


def train_ppo(
    run: StageRun,
    config: PPOConfig,
    actors: Actors,
    prompts: PromptSet,
    *,
    seed: int,
    evaluate: Evaluate,
    second_round: bool = False,
) -> dict[str, float]:
    """Train the policy and the value model in place; returns the last iteration's metrics.

    `evaluate(iteration)` gives figures on held-out prompts. `second_round`: the policy is not the reference to begin with.
    """
    policy_optimizer = Optimizer(actors.policy, weight_decay=0.0, max_grad_norm=config.max_grad_norm, world=run.world)
    value_optimizer = Optimizer(actors.value_model, weight_decay=0.0, max_grad_norm=config.max_grad_norm, world=run.world)
    controller = kl_controller(config.kl)
    reference_hash = weights_hash(actors.ref_policy)
    state = _State(run, config, actors, policy_optimizer, value_optimizer, controller)
    start, rollout, progress = state.restore()
    rollouts = JsonLines(run.folder / "rollouts.jsonl", "iteration")
    if run.world.is_main:
        rollouts.cut_after(start)
    metrics: dict[str, Any] = (run.metrics.read() or [{}])[-1] if start else {}
    with Bar(run.name, config.iterations, done=start, silent=not run.world.is_main) as bar:
        for iteration in range(start, config.iterations):
            stopwatch = Stopwatch()
            with stopwatch.phase("sync"):
                actors.generator.sync(version=iteration)
            if rollout is None:
                rollout = collect(
                    actors,
                    prompts,
                    config,
                    run.world,
                    iteration=iteration,
                    kl_coef=controller.coef,
                    seed=seed,
                    max_tokens=run.machine.microbatch_tokens,
                    stopwatch=stopwatch,
                )
                if iteration == 0:
                    check_first_rollout(rollout, run.machine.dtype, second_round=second_round)
            state.boundary(iteration, rollout, progress)
            rates = _rates(config, iteration)
            trainables = Trainables(actors.policy, actors.value_model, policy_optimizer, value_optimizer, *rates)
            with stopwatch.phase("update"):
                update(
                    rollout.experience,
                    trainables,
                    config,
                    run.world,
                    progress,
                    iteration=iteration,
                    seed=seed,
                    max_tokens=run.machine.microbatch_tokens,
                    boundary=functools.partial(state.after_step, iteration, rollout),
                )
            if trainables.policy_learning_rate is not None:  # a policy that stands still says nothing about the coefficient
                controller.update(rollout.metrics["kl"], config.rollout_batch_size)

            metrics = {"iteration": iteration + 1, **rollout.metrics, **progress.metrics()}
            metrics["learning_rate"] = trainables.policy_learning_rate or 0.0
            last = iteration + 1 == config.iterations
            if (config.evaluate_every and (iteration + 1) % config.evaluate_every == 0) and not last:
                with stopwatch.phase("evaluate"):
                    metrics |= evaluate(iteration + 1)
            if run.world.is_main and config.save_rollouts_every and (last or iteration % config.save_rollouts_every == 0):
                rollouts.append(*rollout.samples)
            tokens = rollout.metrics["length"] * config.rollout_batch_size
            run.log(metrics, {**stopwatch.seconds, "tokens_per_s": tokens / sum(stopwatch.seconds.values())})
            bar.advance(**{name: metrics[name] for name in ("score", "kl", "length", "finished")})
            _stop_if_broken(metrics, run)
            rollout, progress = None, UpdateProgress()
            if last or (iteration + 1) % run.checkpoint_every == 0:
                state.save(iteration + 1, None, progress)
    if weights_hash(actors.ref_policy) != reference_hash:
        raise AssertionError("the reference policy's weights changed during PPO: KL was measured against a moving target")
    return metrics


def kl_controller(config: KLConfig) -> FixedKL:
    """The controller that the configuration names."""
    return AdaptiveKL(config.coef, config.target, config.horizon) if config.controller == "adaptive" else FixedKL(config.coef)


def check_first_rollout(rollout: Rollout, dtype: torch.dtype, *, second_round: bool) -> None:
    """What must hold before the first update, whatever the model: else every later number would be wrong.

    The policy is the reference, so the KL is 0; the generator's log-probabilities are those of the training forward.
    """
    experience = rollout.experience
    difference = (experience.logprobs - experience.ref_logprobs).abs().max().item()
    if difference > {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 1e-5) and not second_round:
        raise TercetError(
            f"before the first update the policy and the reference differ by up to {difference:.2g} nats a token, but they should be the "
            "same model: load both from one checkpoint, with dropout 0; for a second round set ppo.policy"
        )
    gap, limit = rollout.metrics["sampler_logprob_gap"], 0.5 if dtype is torch.bfloat16 else 1e-4
    if not gap <= limit:  # NaN is no agreement either
        raise TercetError(
            f"the generator's log-probabilities differ from the training forward's by up to {gap:.2g} nats (at most {limit:g} are "
            "explained by rounding): the model samples from another distribution than the one that is trained"
        )


def check_first_minibatch(progress: UpdateProgress, dtype: torch.dtype) -> None:
    """After the first optimizer step of the first iteration that moves the policy: its forward was that of the rollout.

    The loss was taken before the step, so each ratio is 1 up to rounding, approx_kl 0, and nothing is clipped. TercetError otherwise.
    """
    if (progress.steps, progress.skipped) != (1, 0):
        return
    limit = {torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, 0.1)  # root mean square over tokens, in nats
    ratio, approx_kl = (progress.sums[name] / progress.tokens for name in ("ratio", "approx_kl"))
    clipped = progress.sums["clipped_ratio"] / progress.tokens
    if abs(ratio - 1) > limit or approx_kl > limit**2 / 2 or clipped > limit / 10:
        raise TercetError(
            f"at the first minibatch of PPO new and old policy should be the same, but the mean ratio is {ratio:.6g} (1 wanted), approx_kl "
            f"{approx_kl:.3g} (0 wanted; at most {limit**2 / 2:.1g} is explained by rounding) and {clipped:.1%} of the ratios are outside "
            "the clip range: the model's forward is not repeatable; set its dropout to 0, or machine.dtype: float32"
        )


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over all parameters' bytes."""
    digest = hashlib.sha256()
    for _, parameter in sorted(module.named_parameters()):
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _rates(config: PPOConfig, iteration: int) -> tuple[float | None, float]:
    """The learning rates of the policy, None while only the value model learns, and of the value model."""
    policy, value = (
        learning_rate(iteration, config.iterations, base, config.schedule, config.warmup_iterations, min_ratio=0.1)
        for base in (config.learning_rate, config.value_learning_rate)
    )
    return (policy if iteration >= config.value_warmup_iterations else None), value


def _stop_if_broken(metrics: dict[str, Any], run: StageRun) -> None:
    if metrics["skipped"] and not metrics["optimizer_steps"]:
        raise TercetError(
            f"iteration {metrics['iteration']}: no optimizer step had a finite gradient, so PPO has broken down; the last checkpoint in "
            f"{run.folder} is kept. Lower ppo.learning_rate and ppo.value_learning_rate, or set machine.dtype: float32"
        )


class _State:
    """What resuming exactly needs: both models, both optimizers, the KL controller, and the phase of the iteration."""

    def __init__(
        self,
        run: StageRun,
        config: PPOConfig,
        actors: Actors,
        policy_optimizer: Optimizer,
        value_optimizer: Optimizer,
        controller: FixedKL,
    ):
        self._run = run
        self._first_policy_iteration = config.value_warmup_iterations
        self._modules: dict[str, nn.Module] = {"policy": actors.policy, "value_model": actors.value_model}
        self._optimizers = {"policy_optimizer": policy_optimizer, "value_optimizer": value_optimizer}
        self._controller = controller

    def restore(self) -> tuple[int, Rollout | None, UpdateProgress]:
        """Iterations done, and the rollout and progress of one that was interrupted between two optimizer steps."""
        checkpoint = self._run.resume()
        if checkpoint is None:
            return 0, None, UpdateProgress()
        for name, module in self._modules.items():
            module.load_state_dict(checkpoint.tensors[name])
        for name, optimizer in self._optimizers.items():
            optimizer.load_state(checkpoint.tensors[name])
        self._controller.load_state_dict(checkpoint.values["kl_controller"])
        progress = UpdateProgress(**checkpoint.values["progress"])
        return checkpoint.step, _rollout_of(checkpoint, self._run.machine.device), progress

    def boundary(self, iteration: int, rollout: Rollout, progress: UpdateProgress) -> None:
        """After the rollout. Nothing of it needs saving: its samples are a function of the weights, the seed and the iteration."""
        if self._run.world.any(self._run.interrupt.requested):
            fresh = progress.steps == progress.skipped == 0
            self.save(iteration, None if fresh else rollout, progress)
            raise Interrupted

    def after_step(self, iteration: int, rollout: Rollout, progress: UpdateProgress) -> None:
        """After an optimizer step. Several ranks stop between iterations only: each holds rows of its own."""
        if iteration == self._first_policy_iteration:
            check_first_minibatch(progress, self._run.machine.dtype)
        if self._run.interrupt.requested and self._run.world.size == 1:
            self.save(iteration, rollout, progress)
            raise Interrupted

    def save(self, iteration: int, rollout: Rollout | None, progress: UpdateProgress) -> None:
        tensors: dict[str, dict[str, Tensor]] = {name: dict(module.state_dict()) for name, module in self._modules.items()}
        tensors |= {name: optimizer.state() for name, optimizer in self._optimizers.items()}
        values: dict[str, Any] = {"kl_controller": self._controller.state_dict(), "progress": asdict(progress)}
        if rollout is not None:
            tensors["experience"] = _tensors_of(rollout.experience)
            values |= {"metrics": rollout.metrics, "samples": rollout.samples, "policy_version": iteration}
        self._run.save(iteration, values, tensors)


def _tensors_of(experience: Experience) -> dict[str, Tensor]:
    own = {f.name: getattr(experience, f.name) for f in fields(experience) if f.name != "sequences"}
    sequences = {f.name: getattr(experience.sequences, f.name) for f in fields(Sequences) if f.name != "policy_version"}
    return own | {f"sequences.{name}": value for name, value in sequences.items() if value is not None}


def _rollout_of(checkpoint: Checkpoint, device: torch.device) -> Rollout | None:
    if "experience" not in checkpoint.tensors:
        return None
    tensors = {name: value.to(device) for name, value in checkpoint.tensors["experience"].items()}
    inner = {name.removeprefix("sequences."): value for name, value in tensors.items() if name.startswith("sequences.")}
    sequences = Sequences(**inner, policy_version=checkpoint.values["policy_version"])
    own = {name: value for name, value in tensors.items() if not name.startswith("sequences.")}
    return Rollout(Experience(sequences=sequences, **own), checkpoint.values["metrics"], checkpoint.values["samples"])

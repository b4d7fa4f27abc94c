"""Stage 3: PPO with a KL penalty to the SFT policy. Read `train_ppo` first: rollout, update, controller, next iteration."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn

from tercet.algo.kl import AdaptiveKL, FixedKL
from tercet.algo.schedules import learning_rate, usual_rate
from tercet.config.ppo import KLConfig, PPOConfig
from tercet.errors import Interrupted
from tercet.models.roles import Policy
from tercet.runtime.checkpoint import Checkpoint
from tercet.runtime.distributed import World
from tercet.runtime.machine import Machine, measured_rate, release_free_memory
from tercet.runtime.metrics import Stopwatch
from tercet.runtime.optim import Optimizer
from tercet.runtime.stage import StageRun
from tercet.stages.rollout import Actors, PromptSet, Rollout, collect
from tercet.stages.update import Trainables, UpdateProgress, update, update_flops
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
    release_free_memory()
    state = _State(run, config, policy_optimizer, value_optimizer, controller)
    rollouts = run.journal("rollouts.jsonl")
    start, rollout, progress = state.restore()
    metrics: dict[str, Any] = (run.metrics.read() or [{}])[-1] if start else {}
    with run.progress(config.iterations, start) as bar:
        for iteration in range(start, config.iterations):
            stopwatch = Stopwatch()
            with stopwatch.phase("sync"):
                actors.generator.sync(version=iteration)
            if rollout is None:  # else one of a run that stopped between two optimizer steps
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
                check_rollout(rollout, config, run)
                if iteration == 0:
                    logit = _largest_logit(actors.policy, prompts.ids[0])
                    check_first_rollout(rollout, config, run.machine.dtype, logit, second_round=second_round)
            state.after_rollout(iteration, rollout, progress)
            rates = _rates(config, iteration, actors.policy)
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
                    after_step=functools.partial(state.after_step, iteration, rollout),
                    kept=rollout.kept,
                )
            if trainables.policy_learning_rate is not None:  # a policy that stands still says nothing about the coefficient
                controller.update(rollout.metrics["kl"], config.rollout_batch_size)
            metrics = {"iteration": iteration + 1, **rollout.metrics, **progress.metrics(), "learning_rate": rates[0] or 0.0}
            last = iteration + 1 == config.iterations
            if config.evaluate_every and (last or (iteration + 1) % config.evaluate_every == 0):
                with stopwatch.phase("evaluate"):
                    metrics |= evaluate(iteration + 1)
            if run.world.is_main and config.save_rollouts_every and (last or iteration % config.save_rollouts_every == 0):
                rollouts.append(*rollout.samples)
            run.log(metrics, {**stopwatch.seconds, **_speeds(stopwatch, rollout, trainables, config, progress, run.machine)})
            bar.advance(score=metrics["score"], KL=metrics["kl"], length=metrics["length"], EOS=metrics["finished"])
            _stop_if_broken(metrics, run)
            rollout, progress = None, UpdateProgress()
            if run.due(iteration + 1) or last:
                state.save(iteration + 1, None, progress)
    if weights_hash(actors.ref_policy) != reference_hash:
        raise AssertionError("the reference policy's weights changed during PPO: KL was measured against a moving target")
    return metrics


def kl_controller(config: KLConfig) -> FixedKL:
    """The controller that the configuration names."""
    return AdaptiveKL(config.coef, config.target, config.horizon) if config.controller == "adaptive" else FixedKL(config.coef)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over all parameters' bytes."""
    digest = hashlib.sha256()
    for _, parameter in sorted(module.named_parameters()):
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _rates(config: PPOConfig, iteration: int, model: Policy) -> tuple[float | None, float]:
    """The learning rates of the policy, None while only the value model learns, and of the value model."""
    usual = usual_rate(sum(parameter.numel() for parameter in model.parameters()), config.minibatch)
    first = usual if config.learning_rate == "auto" else config.learning_rate
    value_first = first if config.value_learning_rate == "auto" else config.value_learning_rate
    policy, value = (
        learning_rate(iteration, config.iterations, base, config.schedule, config.warmup_iterations, min_ratio=0.1)
        for base in (first, value_first)
    )
    return (policy if config.policy_learns(iteration) else None), value


def _speeds(
    stopwatch: Stopwatch,
    rollout: Rollout,
    trainables: Trainables,
    config: PPOConfig,
    progress: UpdateProgress,
    machine: Machine,
) -> dict[str, float]:
    """Tokens a second of the whole iteration, and how much of the machine's arithmetic the update got out of it."""
    needed = update_flops(rollout.experience, trainables, config, progress, rollout.kept)
    achieved = needed / stopwatch.seconds["update_s"]
    return {
        "tokens_per_s": rollout.metrics["length"] * config.rollout_batch_size / sum(stopwatch.seconds.values()),
        "update_gflops": achieved / 1e9,
        "update_utilisation": achieved / measured_rate(machine.dtype, str(machine.device)),
    }


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
        policy_optimizer: Optimizer,
        value_optimizer: Optimizer,
        controller: FixedKL,
    ):
        self._run = run
        self._first_policy_iteration = config.value_warmup_iterations
        self._optimizers = {"policy": policy_optimizer, "value_model": value_optimizer}
        self._controller = controller

    def restore(self) -> tuple[int, Rollout | None, UpdateProgress]:
        """Iterations done, and the rollout and progress of one that was interrupted between two optimizer steps."""
        checkpoint = self._run.resume()
        if checkpoint is None:
            return 0, None, UpdateProgress()
        for name, optimizer in self._optimizers.items():
            optimizer.load_weights(checkpoint.tensors[name])
            optimizer.load_state(checkpoint.tensors[f"{name}_optimizer"])
        self._controller.load_state_dict(checkpoint.values["kl_controller"])
        progress = UpdateProgress(**checkpoint.values["progress"])
        return checkpoint.step, _rollout_of(checkpoint, self._run.machine.device, self._run.world), progress

    def after_rollout(self, iteration: int, rollout: Rollout, progress: UpdateProgress) -> None:
        """After the rollout. Nothing of it needs saving: its samples are a function of the weights, the seed and the iteration."""
        if self._run.world.any(self._run.interrupt.requested):
            fresh = progress.steps == progress.skipped == 0
            self.save(iteration, None if fresh else rollout, progress)
            raise Interrupted

    def after_step(self, iteration: int, rollout: Rollout, progress: UpdateProgress) -> None:
        """After an optimizer step: stop if asked to, and do not lose a long iteration's work to the clock."""
        if iteration == self._first_policy_iteration:
            check_first_minibatch(progress, self._run.machine.dtype)
        stopping = self._run.world.any(self._run.interrupt.requested)
        if stopping or self._run.world.any(self._run.overdue):
            self.save(iteration, rollout, progress)
        if stopping:
            raise Interrupted

    def save(self, iteration: int, rollout: Rollout | None, progress: UpdateProgress) -> None:
        """Everything, with the rollout where its iteration is not over: of all ranks together, so that any number can go on."""
        tensors: dict[str, dict[str, Tensor]] = {name: own.weights() for name, own in self._optimizers.items()}
        tensors |= {f"{name}_optimizer": own.state() for name, own in self._optimizers.items()}
        values: dict[str, Any] = {"kl_controller": self._controller.state_dict(), "progress": asdict(progress)}
        if rollout is not None:
            tensors["experience"] = self._run.world.gather_padded(_tensors_of(rollout.experience))
            values |= {"metrics": rollout.metrics, "samples": rollout.samples, "policy_version": iteration}
        self._run.save(iteration, values, tensors)


def _tensors_of(experience: Experience) -> dict[str, Tensor]:
    own = {f.name: getattr(experience, f.name) for f in fields(experience) if f.name != "sequences"}
    sequences = {f.name: getattr(experience.sequences, f.name) for f in fields(Sequences) if f.name != "policy_version"}
    every = own | {f"sequences.{name}": value for name, value in sequences.items() if value is not None}
    return {name: value.cpu() for name, value in every.items()}  # other ranks' processes would unpickle them onto this rank's GPU


def _rollout_of(checkpoint: Checkpoint, device: torch.device, world: World) -> Rollout | None:
    """This rank's rows of the rollout that the checkpoint holds, if it holds one."""
    if "experience" not in checkpoint.tensors:
        return None
    tensors = {name: value.to(device) for name, value in checkpoint.tensors["experience"].items()}
    inner = {name.removeprefix("sequences."): value for name, value in tensors.items() if name.startswith("sequences.")}
    sequences = Sequences(**inner, policy_version=checkpoint.values["policy_version"])
    own = {name: value for name, value in tensors.items() if not name.startswith("sequences.")}
    experience = Experience(sequences=sequences, **own)
    if world.size > 1:
        experience = experience.select(world.own_rows(len(sequences)))
    return Rollout(experience, checkpoint.values["metrics"], checkpoint.values["samples"])


def check_first_rollout(
    rollout: Rollout, config: PPOConfig, dtype: torch.dtype, largest_logit: float, *, second_round: bool
) -> None:
    """What must hold before the first update, whatever the model: else every later number would be wrong.

    The policy is the reference, so the KL is 0; the generator's log-probabilities are those of the training forward, up to the
    rounding of logits of this size (GPT-2's are around -100; docs/decisions.md has the gaps that were measured), by the temperature.
    """
    experience = rollout.experience
    differences = (experience.logprobs - experience.ref_logprobs).abs()
    difference = differences.max().item() if differences.numel() else 0.0  # a rank of many may have no rows
    if difference > {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 1e-5) and not second_round:
        raise TercetError(
            f"before the first update the policy and the reference differ by up to {difference:.2g} nats a token, but they should be the "
            "same model: load both from one checkpoint, with dropout 0; for a second round set ppo.policy"
        )
    gap, rounding = rollout.metrics["sampler_logprob_gap"], 32 * torch.finfo(dtype).eps * largest_logit / config.temperature
    half = max(0.5, 0.5 / config.temperature)  # whatever the logits' size: what they have in common is left out (head_centre)
    limit = {torch.float64: max(1e-10, rounding), torch.float32: max(1e-5, rounding)}.get(dtype, half)
    if not gap <= limit:  # NaN is no agreement either
        raise TercetError(
            f"the generator's log-probabilities differ from the training forward's by up to {gap:.2g} nats (at most {limit:.2g} are "
            "explained by rounding): the model samples from another distribution than the one that is trained"
        )


@torch.no_grad()
def _largest_logit(policy: Policy, prompt: Sequence[int]) -> float:
    """The largest absolute logit after a prompt's first tokens: what rounding does to log-probabilities is in proportion to it."""
    with policy.autocast():
        logits = policy.model(input_ids=torch.tensor([prompt[:16]], device=policy.device), use_cache=False).logits
    return logits.abs().max().item()


def check_rollout(rollout: Rollout, config: PPOConfig, run: StageRun) -> None:
    """TercetError before the update if there is nothing sensible to learn from: nothing but empty responses, or a KL that exploded."""
    place = f"iteration {rollout.samples[0]['iteration']}"
    kept = f"The checkpoints in {run.folder} are kept"
    if not any(sample["response"].strip() for sample in rollout.samples):
        raise TercetError(
            f"{place}: all {len(rollout.samples)} responses are empty: the policy ends every one at once, with a score of "
            f"{rollout.metrics['score']:.3g}. {kept}. Look at what the reward gives to an empty text, raise ppo.kl.coef or lower "
            "ppo.learning_rate, and run with --from ppo; in the first iteration, look at data.prompts and model.template"
        )
    kl, length = rollout.metrics["kl"], rollout.metrics["length"]
    if config.kl.limit is not None and kl > config.kl.limit * length:
        raise TercetError(
            f"{place}: the KL from the reference is {kl:.3g} nats a response, {kl / length:.3g} a token, above ppo.kl.limit "
            f"({config.kl.limit:g}): the policy has left the reference, where scores mean nothing. {kept}. Raise ppo.kl.coef or lower "
            "ppo.learning_rate and run with --from ppo; or raise ppo.kl.limit to go on"
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

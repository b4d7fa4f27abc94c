"""Tiny random models, prompts and runs that tests of stages, conformance and learning share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from tercet.config.ppo import PPOConfig
from tercet.data.template import Template
from tercet.generation.native import NativeGenerator
from tercet.generation.sampling import uniforms
from tercet.models.load import train_tokenizer
from tercet.models.roles import Policy, ScoreModel
from tercet.runtime.distributed import World
from tercet.runtime.machine import Machine
from tercet.runtime.metrics import Stopwatch
from tercet.runtime.optim import Optimizer
from tercet.runtime.stage import StageRun
from tercet.scoring.base import Texts
from tercet.scoring.function import FunctionScorer
from tercet.stages.rollout import Actors, PromptSet, Rollout, collect
from tercet.stages.update import Trainables, UpdateProgress, update
from tercet.types import Experience, KeptPass, Sequences, TokenRow

EOS = 0
VOCABULARY = 4
PROMPTS = [[1], [2, 3], [3, 1, 2]]


def config_of(
    vocabulary: int = VOCABULARY, width: int = 32, layers: int = 1, scale: float = 0.2, positions: int = 16
) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        initializer_range=scale,
        activation_function="relu",  # the default's powers take most of the time in float64
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )


def policy_of(seed: int = 0, dtype: torch.dtype = torch.float64, frozen: bool = False, **options: Any) -> Policy:
    torch.manual_seed(seed)
    policy = Policy(GPT2LMHeadModel(config_of(**options)).eval(), dtype)
    if frozen:
        policy.freeze()
    return policy


def value_of(seed: int = 1, dtype: torch.dtype = torch.float64, **options: Any) -> ScoreModel:
    torch.manual_seed(seed)
    config = config_of(**options)
    config.num_labels, config.pad_token_id = 1, config.vocab_size
    return ScoreModel(GPT2ForSequenceClassification(config).eval(), dtype)


def spell(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def prompts_of(ids: Sequence[list[int]] = PROMPTS) -> PromptSet:
    return PromptSet(list(ids), [spell(row) for row in ids], [{} for _ in ids], spell)


def length_reward(prompts: list[str], responses: list[str]) -> list[float]:
    """A little of everything: 1.5 for each token 3, -0.25 for each token, prompt-dependent offset."""
    return [1.5 * r.split().count("3") - 0.25 * len(r.split()) + 0.125 * len(p.split()) for p, r in zip(prompts, responses)]


def actors_of(
    reward: Callable[..., list[float]] = length_reward,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    steps: int = 4,
    temperature: float = 1.0,
    stop_ids: Sequence[int] = (EOS,),
    **options: Any,
) -> Actors:
    policy = policy_of(seed, dtype, **options)
    generator = NativeGenerator(policy, stop_ids=list(stop_ids), max_new_tokens=steps, temperature=temperature)
    return Actors(
        policy,
        policy_of(seed, dtype, frozen=True, **options),
        value_of(seed + 1, dtype, **options),
        generator,
        FunctionScorer(reward, name="reward"),
    )


def ppo_config(**options: Any) -> PPOConfig:
    defaults: dict[str, Any] = {
        "iterations": 2,
        "rollout_batch_size": 12,
        "learning_rate": 1e-3,
        "value_learning_rate": 1e-3,
        "max_new_tokens": 4,
        "missing_eos_penalty": None,
        "save_rollouts_every": 1,
    }
    return PPOConfig.model_validate(defaults | options)


def run_of(
    folder: Path,
    name: str = "ppo",
    *,
    world: World | None = None,
    dtype: torch.dtype = torch.float64,
    tokens: int = 4096,
    every: int = 10**9,
) -> StageRun:
    counter = "iteration" if name == "ppo" else "step"
    machine = Machine(torch.device("cpu"), dtype, 1, tokens)
    return StageRun(name, folder / name, world or World(), machine, checkpoint_every=every, checkpoint_keep=1, counter=counter)


def rollout_of(
    actors: Actors,
    config: PPOConfig,
    prompts: PromptSet | None = None,
    *,
    iteration: int = 0,
    kl_coef: float = 0.05,
    seed: int = 0,
    tokens: int = 4096,
    world: World | None = None,
) -> Rollout:
    actors.generator.sync(version=iteration)
    return collect(
        actors,
        prompts or prompts_of(),
        config,
        world or World(),
        iteration=iteration,
        kl_coef=kl_coef,
        seed=seed,
        max_tokens=tokens,
        stopwatch=Stopwatch(),
    )


class Recorder:
    """Stands in for an optimizer: keeps the gradients of each step and changes nothing."""

    def __init__(self, module: torch.nn.Module):
        self.module = module
        self.gradients: list[dict[str, Tensor]] = []

    def step(self, learning_rate: float) -> float:
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.gradients.append({name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named.items()})
        self.module.zero_grad(set_to_none=True)
        return float(torch.cat([g.reshape(-1) for g in self.gradients[-1].values()]).norm())


def optimizer_of(module: torch.nn.Module, max_grad_norm: float = 1.0) -> Optimizer:
    return Optimizer(module, weight_decay=0.0, max_grad_norm=max_grad_norm, world=World())


def update_of(
    experience: Experience,
    actors: Actors,
    config: PPOConfig,
    *,
    policy_optimizer: Any = None,
    value_optimizer: Any = None,
    policy_learning_rate: float | None = 1e-3,
    tokens: int = 4096,
    after_step: Callable[[UpdateProgress], None] = lambda progress: None,
    progress: UpdateProgress | None = None,
    kept: Sequence[KeptPass] = (),
) -> UpdateProgress:
    progress = progress or UpdateProgress()
    trainables = Trainables(
        actors.policy,
        actors.value_model,
        policy_optimizer or optimizer_of(actors.policy),
        value_optimizer or optimizer_of(actors.value_model),
        policy_learning_rate,
        1e-3,
    )
    options: Any = {"iteration": 0, "seed": 0, "max_tokens": tokens, "after_step": after_step, "kept": kept}
    update(experience, trainables, config, World(), progress, **options)
    return progress


def sample(policy: Policy, prompts: list[list[int]], steps: int = 4, seed: int = 0) -> Sequences:
    numbers = uniforms(seed, "rollout", 0, range(len(prompts)), steps)
    return NativeGenerator(policy, stop_ids=[EOS], max_new_tokens=steps).sample(prompts, numbers)


def all_responses(vocabulary: int, steps: int) -> list[tuple[int, ...]]:
    """Every response that can be sampled: EOS ends it at any step, the limit at the last."""
    done: list[tuple[int, ...]] = []
    open_ones: list[tuple[int, ...]] = [()]
    for _ in range(steps):
        longer = [(*start, token) for start in open_ones for token in range(vocabulary)]
        done += [row for row in longer if row[-1] == EOS]
        open_ones = [row for row in longer if row[-1] != EOS]
    return done + open_ones


def sequences_of(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Sequences:
    """(prompt, response) pairs as a batch."""
    rows = [TokenRow((*prompt, *response), len(prompt), response[-1] == EOS) for prompt, response in pairs]
    return Sequences.from_rows(rows)


def texts_of(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Texts:
    return Texts([spell(list(p)) for p, _ in pairs], [spell(list(r)) for _, r in pairs], [{} for _ in pairs])


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def largest_gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of two sets of tensors relative to each one's largest entry."""
    assert a.keys() == b.keys()
    return max(
        float((a[n] - b[n]).abs().max() / a[n].abs().max().clamp(min=1e-30)) if a[n].abs().max() > 1e-12 else 0.0 for n in a
    )


WORDS = ["rain", "is", "water", "that", "falls", "from", "clouds", "sun", "warm"]
WORDS += ["kind", "short", "happy", "words", "explain", "define", "what", "child", "simply"]


def template_of(**options: Any) -> Template:
    """A byte-level tokenizer trained on a few words, EOS id 0."""
    return Template(train_tokenizer([" ".join(WORDS)] * 3, 300), **options)

"""One run's models, prompts and scorers, made from its configuration."""

from __future__ import annotations

import contextlib
import functools
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tercet.config import Config
from tercet.config.ppo import RewardTerm
from tercet.data.records import read_prompts, sides
from tercet.data.template import Template, response_text
from tercet.generation.native import NativeGenerator
from tercet.models.adapters import Backbone, Rank
from tercet.models.interpolation import interpolated
from tercet.models.kernels import recompute_activations
from tercet.models.load import (
    check_vocabulary,
    context_length,
    load_causal_lm,
    load_classifier,
    load_tokenizer,
    save_classifier,
    save_policy,
    special_tokens,
    stop_token_ids,
)
from tercet.models.roles import Policy, ScoreModel
from tercet.models.storage import parameters_of
from tercet.runtime.distributed import World
from tercet.runtime.files import folder_beside, replace_folder
from tercet.runtime.machine import Machine, release_free_memory
from tercet.runtime.progress import console
from tercet.runtime.stage import Interrupt, StageRun, Watch
from tercet.scoring.base import Scorer, WeightedSum
from tercet.scoring.function import FunctionScorer, RewardFunction, load_function
from tercet.scoring.model import ClassifierScorer, RewardModelScorer
from tercet.stages.rollout import PromptSet
from tercet.types import Prompt, TercetError

Role = TypeVar("Role", Policy, ScoreModel)


@dataclass
class Workshop:
    """One run's configuration and machine, and where its models come from."""

    config: Config
    folder: Path
    machine: Machine
    world: World
    interrupt: Interrupt
    base: str  # the pretrained model: a folder or a hub name
    reward_callables: Sequence[RewardFunction] = field(default_factory=tuple)
    watch: Callable[[Mapping[str, float]], Watch] | None = None  # what keeps an eye on PPO, given figures of the run
    _backbone: Backbone | None = None

    def stage_run(self, name: str, folder: str, counter: str = "step") -> StageRun:
        checkpoint = self.config.checkpoint
        return StageRun(
            name,
            self.folder / folder,
            self.world,
            self.machine,
            checkpoint.every,
            checkpoint.keep,
            counter=counter,
            interrupt=self.interrupt,
            checkpoint_minutes=checkpoint.every_minutes,
            trackers=self.config.trackers,
            group=self.folder.name,
        )

    @property
    def sft_source(self) -> str:
        """The SFT policy: this run's, or without demonstrations the model as it came."""
        return str(self.folder / "sft/model") if self.config.data.sft else self.base

    @property
    def reward_source(self) -> str:
        return self.config.reward.use or str(self.folder / "reward/model")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.base, trust_remote_code=self.config.model.trust_remote_code)

    @cached_property
    def template(self) -> Template:
        stop_ids = stop_token_ids(self.base, self.tokenizer, self.config.ppo.stop)
        return Template(self.tokenizer, self.config.model.template, self.config.data.max_prompt_length, stop_ids=stop_ids)

    def backbone(self, source: str) -> Backbone:
        """The frozen model that the adapters of a stage share."""
        assert self.config.model.adapter is not None
        if self._backbone is None or self._backbone.source != source:
            self.leave_backbone()  # that of another stage goes before this one comes
            size = Rank(self.config.model.adapter.rank, self.config.model.adapter.alpha)
            load, trust = functools.partial(self._causal_lm, source), self.config.model.trust_remote_code
            self._backbone = Backbone(source, load, self.machine.dtype, size, trust_remote_code=trust)
        return self._backbone

    def leave_backbone(self) -> None:
        """Let it go with the last role that stands on it."""
        self._backbone = None

    def on_backbone(self, source: str) -> bool:
        """Whether a frozen policy is the backbone of the SFT policy's adapters, alone or with an adapter that this run has trained."""
        if self.config.model.adapter is None:
            return False
        adapter = adapter_folder(Path(source))
        return source == self.sft_source or (self.folder in adapter.parents and adapter.exists())

    def load_policy(self, source: str, *, frozen: bool = False, dropout: float = 0.0, whole: bool = False) -> Policy:
        """A policy to train, or frozen. With model.adapter it shares a backbone, unless `whole`."""
        if self.config.model.adapter is not None and not whole:
            if not frozen:
                return self._to_train(self.backbone(source).policy(seed=self.config.seed).eval())
            if source == self.sft_source:
                return self.backbone(source).reference
            if self.on_backbone(source):
                # What was trained: of the merged checkpoint, rounded to bfloat16, a small adapter may be lost.
                policy = self.backbone(self.sft_source).policy(adapter_folder(Path(source))).eval()
                policy.freeze()
                return policy
        policy = Policy(self._causal_lm(source, dropout, half=self._half(frozen)), self.machine.dtype).eval()
        if policy.transform is None:
            console.print(
                f"{source}: what this model makes of its output layer is not known, so it computes all logits at once itself: slower, and "
                "with more memory than tercet doctor says",
                markup=False,
            )
        if not frozen:
            return self._to_train(policy)
        policy.freeze()
        return policy

    def interpolated(self, policy: Policy) -> contextlib.AbstractContextManager[None]:
        """PPO's policy as it is evaluated and saved: ppo.interpolation of the way from what it began as."""
        source = self.config.ppo.policy or self.sft_source

        def start() -> Callable[[str], Tensor]:
            found = parameters_of(policy.model, source)
            return found or dict(self._causal_lm(source).named_parameters()).__getitem__

        return interpolated(policy, start, self.config.ppo.interpolation)

    def _to_train(self, role: Role) -> Role:
        if self.config.machine.activation_checkpointing and not recompute_activations(role.model):
            console.print(
                "machine.activation_checkpointing: this architecture's layers cannot be computed again, so nothing is saved"
            )
        return role

    def _causal_lm(self, source: str, dropout: float = 0.0, *, half: bool = False) -> PreTrainedModel:
        trust = self.config.model.trust_remote_code
        model = load_causal_lm(source, dropout=dropout, trust_remote_code=trust, rounded=half)
        check_vocabulary(model, self.tokenizer, source)
        return nn.Module.to(model, self.machine.device)

    def _half(self, frozen: bool) -> bool:
        """Whether a role holds rounded weights alone."""
        return frozen and self.machine.dtype is torch.bfloat16

    def load_scorer(self, source: str, *, frozen: bool = True, num_labels: int | None = None) -> ScoreModel:
        """A reward or value model: a checkpoint's, or with `num_labels` a causal language model's trunk and a new head."""
        own = num_labels is not None or self.folder in Path(source).parents
        if self.config.model.adapter is not None and own:
            folder = None if num_labels is not None else adapter_folder(Path(source))
            scorer = self.backbone(self.sft_source).scorer(folder, seed=self.config.seed).eval()
        else:
            trust, half = self.config.model.trust_remote_code, self._half(frozen)
            model = load_classifier(source, num_labels=num_labels, trust_remote_code=trust, rounded=half)
            scorer = ScoreModel(nn.Module.to(model, self.machine.device), self.machine.dtype).eval()
        if not frozen:
            return self._to_train(scorer)
        scorer.freeze()
        return scorer

    def generator(self, policy: Policy) -> NativeGenerator:
        """A generator with the stop rules and the temperature of PPO; it checks that prompt and response fit the model."""
        config = self.config.ppo
        check_room(self.config, context_length(policy.model), "the model")
        # A special token has no text; every other stop is looked for in the text, since tokens such as "end." may hold it.
        special = special_tokens(self.tokenizer)
        return NativeGenerator(
            policy,
            stop_ids=sorted(self.template.stop_ids),
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            truncate_after=config.truncate_after,
            stop_texts=[text for text in config.stop if text not in special],
            decode=lambda ids: response_text(ids, self.tokenizer),
        )

    def prompts(self, *, held_out: bool) -> PromptSet:
        """The prompts to train on, or those held out (all of them where none could be held out)."""
        records = prompt_records(self.config, held_out=held_out)
        found = self.template.prompt_ids_all((record.prompt, record.origin) for record in records)
        return PromptSet(
            [array("i", prompt.ids) for prompt in found],  # a list would take ten times as much for each token
            [record.prompt for record in records],
            [record.fields for record in records],
            lambda row: response_text(row, self.tokenizer),
        )

    def scorer(self, terms: Sequence[RewardTerm]) -> Scorer:
        """What the terms of a score amount to."""
        parts: list[tuple[float, Scorer]] = [(term.weight, self._term(term)) for term in terms]
        return self._sum(parts)

    def reward(self) -> Scorer:
        """The training score: the terms of ppo.rewards, or the functions that the Python API was given."""
        given = [(1.0, FunctionScorer(call, name=getattr(call, "__name__", "reward"))) for call in self.reward_callables]
        return self._sum(given) if given else self.scorer(self.config.ppo.rewards)

    @staticmethod
    def _sum(parts: Sequence[tuple[float, Scorer]]) -> Scorer:
        return parts[0][1] if len(parts) == 1 and parts[0][0] == 1.0 else WeightedSum(parts)

    def _term(self, term: RewardTerm) -> Scorer:
        if term.kind == "stage":
            return self.reward_scorer(self.load_scorer(self.reward_source))
        if term.kind == "function":
            assert term.function is not None
            return FunctionScorer(load_function(term.function), name=term.function, timeout=term.timeout)
        assert term.model is not None
        trust = self.config.model.trust_remote_code
        model = nn.Module.to(load_classifier(term.model, trust_remote_code=trust), self.machine.device)
        tokenizer = load_tokenizer(term.model, trust_remote_code=trust, needs_eos=False)
        chat = self.template.kind == "chat"
        return ClassifierScorer(model, tokenizer, label=term.label, name=term.model, chat=chat)

    def reward_scorer(self, model: ScoreModel) -> RewardModelScorer:
        return RewardModelScorer(model, self.machine.microbatch_tokens)

    def write_model(self, final: Path, save: Any) -> None:
        """Let the first rank write a checkpoint beside its place, then put it there whole."""
        if self.world.is_main:
            release_free_memory()
            temporary = folder_beside(final)
            save(temporary)
            replace_folder(temporary, final)
        self.world.barrier()

    def write_policy(self, policy: Policy, final: Path, about: str) -> None:
        self._write_adapter(policy, final)

        def save(folder: Path) -> None:
            ids, temperature = sorted(self.template.stop_ids), self.config.ppo.temperature
            model = policy.full_precision()
            save_policy(model, self.tokenizer, folder, temperature=temperature, stop_ids=ids, card=model_card(about))

        self.write_model(final, save)

    def write_scorer(self, scorer: ScoreModel, final: Path, about: str) -> None:
        self._write_adapter(scorer, final)

        def save(folder: Path) -> None:
            save_classifier(scorer.full_precision(), self.tokenizer, folder, card=model_card(about))

        self.write_model(final, save)

    def _write_adapter(self, role: Policy | ScoreModel, final: Path) -> None:
        """The adapter alone, beside the merged checkpoint."""
        if role.merge is not None and self._backbone is not None:
            self.write_model(adapter_folder(final), functools.partial(self._backbone.save, role))


def adapter_folder(model: Path) -> Path:
    """Where the adapter lies whose merged model is at `model`."""
    return model.with_name(f"{model.name}-adapter")


def prompt_records(config: Config, *, held_out: bool) -> list[Prompt]:
    """The prompts to train on, or those held out (all of them where none could be held out)."""
    train, evaluation = prompt_sides(config)
    return (evaluation or train)[: config.evaluation.prompts] if held_out else train


def prompt_sides(config: Config) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts to train on, prompts held out); the second may be empty."""
    data = config.data
    assert data.prompts is not None
    return sides(read_prompts, data.prompts, data.eval_prompts, data.held_out)


def check_room(config: Config, positions: int | None, source: str) -> None:
    """TercetError if the longest prompt and the longest response together exceed the positions of a model, named `source`."""
    prompt, response = config.data.max_prompt_length, config.ppo.max_new_tokens
    if positions is not None and prompt + response > positions:
        way = (
            f"data.max_prompt_length={positions - response}"
            if positions > response
            else f"ppo.max_new_tokens={max(1, positions // 2)}"
        )
        raise TercetError(
            f"data.max_prompt_length ({prompt}) and ppo.max_new_tokens ({response}) make {prompt + response} tokens, but {source} has "
            f"{positions} positions: lower one of them, for example {way}"
        )


def model_card(about: str) -> str:
    return f"---\nlibrary_name: transformers\ntags: [tercet]\n---\n{about}\n\nThe run's configuration is config.yaml of its run folder.\n"

"""Stage 1: supervised fine-tuning on demonstrations; with another loss mask also pretraining from scratch on plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tercet.algo.losses import sft_loss
from tercet.config.training import TrainingConfig
from tercet.data.batches import TokenStore, batch_indices, microbatches
from tercet.data.template import Template, tokenise
from tercet.models.roles import Policy
from tercet.runtime.stage import StageRun
from tercet.stages.supervised import train
from tercet.types import Demonstration, Sequences


def train_sft(
    run: StageRun,
    config: TrainingConfig,
    policy: Policy,
    template: Template,
    train_records: Sequence[Demonstration],
    held_out: Sequence[Demonstration],
    *,
    loss_on: str,
    seed: int,
) -> dict[str, float]:
    """Train `policy` in place and return the figures for the summary."""
    store, truncated = tokenise_demonstrations(train_records, template, run.name, config.max_length)
    eval_store, _ = tokenise_demonstrations(held_out, template, run.name, config.max_length)
    lengths, targets = store.lengths, _targets(store, loss_on)

    def loss(sequences: Sequences, count: int) -> Tensor:
        logprobs, _ = policy(sequences)
        return sft_loss(logprobs, sequences.response_mask, count)

    def compute(step: int) -> dict[str, float]:
        rows = batch_indices(len(store), config.batch_size, seed, step).numpy()
        count, total = int(targets[rows].sum()), torch.zeros((), dtype=torch.float64)
        own = rows[run.world.own_rows(len(rows))]
        for part in microbatches(lengths[own], run.machine.microbatch_tokens):
            value = loss(_scored(store.sequences(own[part]), loss_on).to(policy.device), count)
            value.backward()
            total += value.detach().cpu().double()
        return {"loss": run.world.all_sum(total).item(), "tokens": int(lengths[rows].sum())}

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        if len(eval_store) == 0:
            return {}
        count, total = int(_targets(eval_store, loss_on).sum()), torch.zeros((), dtype=torch.float64)
        own = np.arange(len(eval_store))[run.world.own_rows(len(eval_store))]
        for part in microbatches(eval_store.lengths[own], run.machine.microbatch_tokens):
            total += loss(_scored(eval_store.sequences(own[part]), loss_on).to(policy.device), count).cpu().double()
        return {"eval_loss": run.world.all_sum(total).item()}

    also_before = run.name == "sft"  # did it make the base model better?
    last = train(run, policy, config, len(store), compute, evaluate, also_before=also_before)
    figures = {f"{run.name}.records": len(store), f"{run.name}.truncated": truncated / len(store)}
    return figures | {f"{run.name}.{name}": value for name, value in last.items()}


def tokenise_demonstrations(
    records: Sequence[Demonstration], template: Template, stage: str, max_length: int
) -> tuple[TokenStore, int]:
    """The records as token rows, and how many of them had to be cut; `stage` is the section that says max_length."""
    return tokenise(template, [(record.prompt, record.response, record.origin) for record in records], stage, max_length)


def _targets(store: TokenStore, loss_on: str) -> NDArray[np.int64]:
    """How many tokens of each row the loss counts."""
    first = store.prompt_lens if loss_on == "response" else 1
    return store.lengths - first


def _scored(sequences: Sequences, loss_on: str) -> Sequences:
    """With loss on all tokens, everything after the first token counts as response."""
    if loss_on == "response":
        return sequences
    ones = torch.ones_like(sequences.prompt_lens)
    return replace(sequences, prompt_lens=ones, response_lens=sequences.lengths - ones)

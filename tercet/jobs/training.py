"""The training stages with what each needs around its loop: records and models in, checkpoints out.

A job runs in RUN/<stage>, leaves finished checkpoints there and returns the figures for summary.json.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tercet.config import Config
from tercet.data.records import read_demonstrations, sides, split
from tercet.jobs.card import sft_samples, write_card
from tercet.jobs.comparisons import comparison_sets
from tercet.jobs.evaluation import judges_of, main_places, sampling_of
from tercet.jobs.workshop import Workshop, model_card
from tercet.models.load import (
    new_causal_lm,
    save_policy,
    train_tokenizer,
)
from tercet.models.roles import ScoreModel, init_score_head
from tercet.runtime.files import folder_beside, replace_folder, write_json
from tercet.stages.evaluate import Judges, respond
from tercet.stages.ppo import train_ppo
from tercet.stages.reward import normalise, train_reward_model
from tercet.stages.rollout import Actors, PromptSet
from tercet.stages.sft import train_sft
from tercet.types import Demonstration, Sequences, TercetError

Figures = dict[str, Any]


def create_scratch(config: Config, folder: Path) -> None:
    """Train a tokenizer on the run's own text and make a model with random weights."""
    scratch = config.model.scratch
    assert scratch is not None
    sources = [source for source in (config.data.pretrain, config.data.sft) if source]  # one of them at least (config/load.py)
    records = [record for source in sources for record in read_demonstrations(source)]
    tokenizer = train_tokenizer((_whole_text(record) for record in records), scratch.vocab_size)
    model = new_causal_lm(scratch.architecture, scratch.options, tokenizer, positions=config.positions, seed=config.seed)
    temporary = folder_beside(folder)
    save_policy(
        model, tokenizer, temporary, temperature=1.0, stop_ids=[tokenizer.eos_token_id], card=model_card("Random weights.")
    )
    replace_folder(temporary, folder)


def run_pretrain(shop: Workshop) -> Figures:
    """Language modelling from scratch on data.pretrain: every token counts."""
    source = shop.config.data.pretrain
    if source is None:
        return {}
    train, held_out = split(read_demonstrations(source), shop.config.data.held_out)
    policy = shop.load_policy(shop.base, whole=True)
    figures = train_sft(
        shop.stage_run("pretrain", "pretrain"),
        shop.config.pretrain,
        policy,
        shop.template,
        train,
        held_out,
        loss_on="all",
        seed=shop.config.seed,
    )
    shop.write_policy(policy, Path(shop.base), "A language model trained from scratch by Tercet.")
    return figures


def run_sft(shop: Workshop) -> Figures:
    """Stage 1: demonstrations -> sft/model."""
    config = shop.config
    assert config.data.sft is not None
    train, held_out = sides(read_demonstrations, config.data.sft, config.data.eval_sft, config.data.held_out)
    policy = shop.load_policy(shop.base, dropout=config.sft.dropout)
    run = shop.stage_run("sft", "sft")
    figures = train_sft(run, config.sft, policy, shop.template, train, held_out, loss_on=config.sft.loss_on, seed=config.seed)
    shop.write_policy(policy, shop.folder / "sft/model", "Supervised fine-tuning on demonstrations, by Tercet.")
    return figures


def run_reward(shop: Workshop) -> Figures:
    """Stage 2: comparisons -> reward/model, and reward/judge from comparisons that the first never saw."""
    config = shop.config
    assert config.data.comparisons is not None
    comparisons = comparison_sets(config)
    samples = sft_samples(shop)
    figures: Figures = {"reward.dropped": comparisons.dropped}
    roles = (("reward", "reward", comparisons.train), ("judge", "reward/judge", comparisons.judge))
    for seed, (name, folder, records) in enumerate(roles, start=config.seed):
        if not records:
            continue
        model = shop.load_scorer(shop.sft_source, frozen=False, num_labels=1)
        init_score_head(model.head, torch.Generator().manual_seed(seed))
        run = shop.stage_run(name, folder)
        trained, pairs = train_reward_model(run, config.reward, model, shop.template, records, comparisons.held_out, seed=seed)
        if samples is not None:
            trained |= normalise(model, samples, shop.machine.microbatch_tokens)
        if shop.world.is_main:
            write_json(run.folder / "held_out.json", pairs)
        if name == "reward":
            figures |= trained
            scale = trained.get("reward.normalisation_gain", 1.0), trained.get("reward.normalisation_bias", 0.0)
            figures |= write_card(shop, run.folder / "card.json", model, comparisons, pairs, samples, scale)
            _write_probe(shop, model, samples, comparisons.held_out or comparisons.train)
        else:
            figures |= {key.replace("reward.", "judge."): value for key, value in trained.items()}
        about = "A reward model trained on comparisons by Tercet. Score = logit + score_offset of config.json."
        shop.write_scorer(model, run.folder / "model", about)
    return figures


def run_ppo(shop: Workshop) -> Figures:
    """Stage 3: prompts -> ppo/model and ppo/value; ppo/best where policies are evaluated on the way."""
    config = shop.config.ppo
    policy = shop.load_policy(config.policy or shop.sft_source)
    ref_policy = shop.load_policy(shop.sft_source, frozen=True)
    _check_probe(shop)
    value_model = _value_model(shop)
    actors = Actors(policy, ref_policy, value_model, shop.generator(policy), shop.reward())

    run = shop.stage_run("ppo", "ppo", counter="iteration")
    known = _known_limits(shop)
    run.watch = shop.watch(known) if shop.watch is not None else None
    evaluations = run.journal("evaluations.jsonl")

    @functools.cache  # the judges are loaded and fitted only where the run evaluates at all
    def judging() -> tuple[PromptSet, list[int], Judges]:
        held_out = shop.prompts(held_out=True)
        return held_out, main_places(shop.config, held_out), judges_of(shop, actors.scorer)

    def evaluate(iteration: int) -> Figures:
        with shop.interpolated(policy):
            held_out, places, judges = judging()
            actors.generator.sync(version=iteration)
            sampling = sampling_of(shop)
            rows = respond(policy, ref_policy, actors.generator, held_out, judges, sampling, shop.world, places=places)
            columns = {name: [row[name] for row in rows] for name in ("score", "combined", "kl", *judges.others)}
            if shop.world.is_main:
                evaluations.append({"iteration": iteration, **columns})
            means = {name: sum(values) / len(values) for name, values in columns.items()}
            keys = {name: name if name in judges.others else f"eval_{name}" for name in means}
            figures = {keys[name]: value for name, value in means.items()}
            whose = next((name for name in ("judge", *shop.config.evaluation.judges) if name in means), "combined")
            if shop.world.any(shop.world.is_main and is_best(figures, run.metrics.read(), keys[whose], config.best_kl_budget)):
                highest = "score after its clip and the rule for unended responses" if whose == "combined" else f"{whose} score"
                about = f"PPO by Tercet, iteration {iteration}: the highest {highest}."
                shop.write_policy(policy, shop.folder / "ppo/best", about)
                if shop.world.is_main:
                    best = {"iteration": iteration, "kl": means["kl"], "by": whose, "value": means[whose]}
                    write_json(shop.folder / "ppo/best.json", best)
            return figures

    metrics = train_ppo(
        run,
        config,
        actors,
        shop.prompts(held_out=False),
        seed=shop.config.seed,
        evaluate=evaluate,
        second_round=config.policy is not None,
    )
    with shop.interpolated(policy):
        shop.write_policy(
            policy, shop.folder / "ppo/model", "PPO against a reward model with a KL penalty to the SFT policy, by Tercet."
        )
    shop.write_scorer(value_model, shop.folder / "ppo/value", "The value model of PPO, for a next round, by Tercet.")
    figures: Figures = {f"ppo.train_{name}": metrics[name] for name in ("score", "kl", "explained_variance") if name in metrics}
    figures |= known
    best = shop.folder / "ppo/best.json"
    if best.exists():
        figures |= {f"ppo.best_{name}": value for name, value in json.loads(best.read_text(encoding="utf-8")).items()}
    return figures


def _known_limits(shop: Workshop) -> dict[str, float]:
    """What PPO's metrics are held against: the KL budget, and the range of scores of texts such as the reward model was trained on; and
    how far the policies go that are evaluated."""
    config = shop.config.ppo
    found = {"ppo.kl_budget": config.best_kl_budget} if config.best_kl_budget is not None else {}
    found |= {"ppo.interpolation": config.interpolation} if config.interpolation < 1 else {}
    card = shop.folder / "reward/card.json"
    alone = [(term.kind, term.weight) for term in config.rewards] == [("stage", 1.0)] and shop.config.reward.use is None
    if alone and card.exists():
        edges = json.loads(card.read_text(encoding="utf-8"))["histograms"].get("edges", [])
        found |= {"ppo.score_range_low": edges[0], "ppo.score_range_high": edges[-1]} if edges else {}
    return found


def is_best(figures: Figures, earlier: Sequence[Figures], by: str, kl_budget: float | None) -> bool:
    """Whether this evaluation is within the KL budget, and its figure `by` above that of every earlier one that is.

    earlier: lines of PPO's metrics. A resumed run has those up to its checkpoint and computes the later ones again, so that it
    keeps the same policy as one that was never stopped.
    """
    within = [row for row in (*earlier, figures) if by in row and (kl_budget is None or row["eval_kl"] <= kl_budget)]
    return any(row is figures for row in within) and all(figures[by] > row[by] for row in within if row is not figures)


def _write_probe(shop: Workshop, model: ScoreModel, samples: Sequences | None, records: Sequence[Any]) -> None:
    """Eight texts and their scores, for stage 3 to check that it scores them alike."""
    rows = [shop.template.encode(r.prompt, r.responses[0], max_length=shop.config.reward.max_length).row for r in records[:8]]
    sequences = samples.select(range(min(8, len(samples)))) if samples is not None else Sequences.from_rows(rows)
    ids = [row[:length] for row, length in zip(sequences.input_ids.tolist(), sequences.lengths.tolist())]
    scores = [_score_alone(model, *text) for text in zip(ids, sequences.prompt_lens.tolist())]
    if shop.world.is_main:
        write_json(
            shop.folder / "reward/probe.json", {"ids": ids, "prompt_lens": sequences.prompt_lens.tolist(), "scores": scores}
        )


@torch.no_grad()
def _score_alone(model: ScoreModel, ids: list[int], prompt_len: int) -> float:
    """The score of one text in a batch of its own: in bfloat16 the others of a batch change it by what rounding does."""
    row = Sequences(torch.tensor([ids]), torch.tensor([prompt_len]), torch.tensor([len(ids) - prompt_len]), torch.tensor([True]))
    return model(row.to(model.device)).item()


def _check_probe(shop: Workshop) -> None:
    path = shop.folder / "reward/probe.json"
    if shop.config.reward.use or not path.exists() or all(term.kind != "stage" for term in shop.config.ppo.rewards):
        return
    probe = json.loads(path.read_text(encoding="utf-8"))
    model = shop.load_scorer(shop.reward_source)
    tolerance = 0.05 if shop.machine.dtype is torch.bfloat16 else 1e-4
    for ids, prompt_len, wanted in zip(probe["ids"], probe["prompt_lens"], probe["scores"]):
        score = _score_alone(model, ids, prompt_len)
        if abs(score - wanted) > tolerance * max(1.0, abs(wanted)):
            raise TercetError(
                f"{shop.reward_source} gives {score:.5f} to a text that it gave {wanted:.5f} when it was trained: the checkpoint, its "
                "score_offset or the precision has changed since; run `tercet run` with --from reward"
            )


def _value_model(shop: Workshop) -> ScoreModel:
    """The reward model where stage 2 trained one (or a value model of an earlier round), else the SFT trunk with a zero head."""
    config = shop.config.ppo
    if config.value_model is not None:
        return shop.load_scorer(config.value_model, frozen=False)
    foreign = shop.config.reward.use is not None and shop.config.model.adapter is not None  # no trunk to share
    if any(term.kind == "stage" for term in config.rewards) and not foreign:
        return shop.load_scorer(shop.reward_source, frozen=False)
    model = shop.load_scorer(shop.sft_source, frozen=False, num_labels=1)
    init_score_head(model.head, None)
    return model


def _whole_text(record: Demonstration) -> str:
    prompt = record.prompt if isinstance(record.prompt, str) else " ".join(turn.content for turn in record.prompt)
    return f"{prompt} {record.response}"

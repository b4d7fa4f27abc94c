"""Evaluation on held-out prompts: judges, policies, and the files of RUN/evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tercet.config import Config
from tercet.data.records import judge_split, read_comparisons, split
from tercet.jobs.workshop import Workshop
from tercet.runtime.checkpoint import write_json
from tercet.runtime.progress import Bar
from tercet.scoring.bag_of_words import BagOfWords
from tercet.scoring.base import Scorer
from tercet.scoring.function import FunctionScorer, load_function
from tercet.stages.evaluate import Judges, Sampling, compare, groups_of, respond
from tercet.stages.rollout import PromptSet
from tercet.types import Comparison

Figures = dict[str, Any]


def run_evaluate(shop: Workshop) -> Figures:
    """Base, SFT and PPO on held-out prompts -> evaluation/*.json."""
    config = shop.config
    sources = {"base": shop.base, "sft": shop.sft_source, "ppo": str(shop.folder / "ppo/model")}
    if sources["base"] == sources["sft"]:
        del sources["base"]
    ref_policy = shop.load_policy(shop.sft_source, frozen=True)
    judges, sampling, prompts = judges_of(shop, shop.reward()), sampling_of(shop), shop.prompts(held_out=True)
    responses: dict[str, list[dict[str, Any]]] = {}
    with Bar("evaluate", len(sources) * len(prompts), silent=not shop.world.is_main) as bar:
        for name, source in sources.items():
            policy = shop.load_policy(source, frozen=True)
            responses[name] = respond(
                policy, ref_policy, shop.generator(policy), prompts, judges, sampling, shop.world, done=bar.advance_by
            )
    folder = shop.folder / "evaluation"
    names = list(judges.others)
    groups = groups_of(prompts, config.evaluation.group_by)
    wanted = config.evaluation.main_group
    main = groups[wanted] if wanted is not None else list(range(len(prompts)))
    policies, won = compare({name: [rows[i] for i in main] for name, rows in responses.items()}, names, config.seed)
    figures = _flat(policies, won)
    for group, places in groups.items():
        part = compare({name: [rows[i] for i in places] for name, rows in responses.items()}, names, config.seed)
        figures |= {f"{key}[{group}]": value for key, value in _flat(*part).items()}
    if shop.world.is_main:
        write_json(folder / "policies.json", policies)
        write_json(folder / "wins.json", won)
        _write_samples(folder / "samples.jsonl", prompts, responses, names, config.evaluation.group_by)
    return figures


@dataclass(frozen=True)
class ComparisonSets:
    """The comparisons by use: for the reward model, for its judge, held out from both. Always the same for the same files."""

    train: list[Comparison]
    judge: list[Comparison]
    held_out: list[Comparison]
    dropped: int


def comparison_sets(config: Config) -> ComparisonSets:
    """Read and split data.comparisons."""
    data = config.data
    assert data.comparisons is not None
    records = read_comparisons(data.comparisons)
    train, held_out = list(records), list(read_comparisons(data.eval_comparisons)) if data.eval_comparisons else []
    if not data.eval_comparisons:
        train, held_out = split(train, data.held_out)
    train, judge = judge_split(train) if config.reward.judge else (train, [])
    return ComparisonSets(train, judge, held_out, sum(records.dropped.values()))


def judges_of(shop: Workshop, score: Scorer) -> Judges:
    """The training score; the second reward model and a linear one, both from comparisons that the first never saw, where there
    are enough; those that the configuration names."""
    others: dict[str, Scorer] = {}
    judge = shop.folder / "reward/judge/model"
    if judge.exists() and shop.config.data.comparisons is not None:
        others["judge"] = shop.reward_scorer(shop.load_scorer(str(judge)))
        others["bag_of_words"] = BagOfWords(comparison_sets(shop.config).judge)
    others |= {name: shop.scorer([term]) for name, term in shop.config.evaluation.judges.items()}
    if shop.config.evaluation.gold:
        others["gold"] = FunctionScorer(load_function(shop.config.evaluation.gold), name=shop.config.evaluation.gold)
    return Judges(score, others)


def sampling_of(shop: Workshop) -> Sampling:
    config = shop.config
    return Sampling(
        config.seed,
        config.ppo.temperature,
        config.ppo.max_new_tokens,
        config.ppo.rollout_batch_size,
        config.evaluation.greedy,
        shop.machine.microbatch_tokens,
    )


def _flat(policies: dict[str, Any], won: dict[str, Any]) -> Figures:
    """Flat keys for summary.json: ppo.kl, gold.ppo, win_rate, ..."""
    figures: Figures = {}
    judges = [name for name in won if name != "score"]
    for policy, values in policies.items():
        for name, value in values.items():
            stem = name.removesuffix("_std")
            key = f"{stem}.{policy}{'_std' if name.endswith('_std') else ''}" if stem in judges else f"{policy}.{name}"
            figures[key] = value
    for name, values in won.items():
        prefix = "score.win_rate" if name == "score" else f"{name}.win_rate"
        figures |= {prefix: values["win_rate"], f"{prefix}_low": values["low"], f"{prefix}_high": values["high"]}
    headline = "judge" if "judge" in won else "score"
    if won:
        figures |= {
            "win_rate": won[headline]["win_rate"],
            "win_rate_low": won[headline]["low"],
            "win_rate_high": won[headline]["high"],
        }
        figures["win_rate_by"] = "the second reward model" if headline == "judge" else "the training score"
    return figures


def _write_samples(path: Path, prompts: PromptSet, responses: dict[str, Any], judges: list[str], group_by: str | None) -> None:
    lines = []
    for place, prompt in enumerate(prompts.texts):
        text = prompt if isinstance(prompt, str) else "\n".join(f"{turn.role}: {turn.content}" for turn in prompt)
        line: dict[str, Any] = {"prompt": text}
        if group_by is not None:
            line["group"] = str(prompts.fields[place].get(group_by))
        for name, rows in responses.items():
            row = rows[place]
            line[name] = row["response"]
            line |= {f"{name}_{key}": row[key] for key in ("score", "kl", "length", "finished", *judges)}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")

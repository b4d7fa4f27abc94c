"""Evaluation on held-out prompts: judges, policies, and the files of RUN/evaluation."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tercet.algo.advantages import combine_score
from tercet.config import Config
from tercet.jobs.card import card_of_another_run
from tercet.jobs.comparisons import comparison_sets
from tercet.jobs.frontier import best_of_n_figures, path_of_ppo
from tercet.jobs.kept import Kept, Row
from tercet.jobs.workshop import Workshop, prompt_sides
from tercet.runtime.files import write_json, write_text
from tercet.runtime.machine import release_free_memory
from tercet.runtime.metrics import JsonLines
from tercet.runtime.progress import Bar
from tercet.scoring.bag_of_words import BagOfWords
from tercet.scoring.base import Scorer
from tercet.scoring.function import FunctionScorer, load_function
from tercet.stages.evaluate import Journey, Judges, Sampling, answers, compare, draw, groups_of, judged, surprisal
from tercet.stages.rollout import PromptSet

Figures = dict[str, Any]
MOST_OF_N = 64  # best-of-n is given for n up to this


def run_evaluate(shop: Workshop) -> Figures:
    """Base, SFT, PPO and other policies on held-out prompts; best-of-n from SFT -> evaluation/*.json."""
    config, sources = shop.config, policies_of(shop)
    sampling, prompts = sampling_of(shop), shop.prompts(held_out=True)
    groups = groups_of(prompts, config.evaluation.group_by)
    main = main_places(config, prompts)
    chosen = main[: config.evaluation.best_of_prompts]
    total = 2 * len(sources) * len(prompts) + len(chosen) * config.evaluation.best_of_samples
    with Bar("evaluate", total, silent=not shop.world.is_main) as bar:
        # One whole model at a time, so first those that do not stand on the backbone of what judges them.
        order = sorted(sources, key=lambda name: shop.on_backbone(sources[name]))
        if not shop.on_backbone(sources[order[0]]):
            shop.leave_backbone()
        sampled = {name: _answers(shop, name, sources[name], prompts, sampling, bar) for name in order}
        responses, draws, names = _judged(shop, sources, sampled, prompts, sampling, chosen, bar)
    if not shop.on_backbone(shop.base):
        shop.leave_backbone()
    release_free_memory()
    base = shop.load_policy(shop.base, frozen=True)
    for rows in responses.values():
        for row, found in zip(rows, surprisal(base, prompts, rows, sampling, shop.world)):
            row["surprisal"] = found
    del base
    of_main = {name: [rows[i] for i in main] for name, rows in responses.items()}
    policies, won = compare(of_main, names, config.seed)
    figures = _flat(policies, won) | {"evaluation.held_out": float(bool(prompt_sides(config)[1]))}
    figures["evaluation.greedy"] = float(sampling.greedy)
    for group, places in groups.items():
        part = compare({name: [rows[i] for i in places] for name, rows in responses.items()}, names, config.seed)
        figures |= {f"{key}[{group}]": value for key, value in _flat(*part).items()}
    evaluations = JsonLines(shop.folder / "ppo/evaluations.jsonl", "iteration").read() if shop.world.is_main else []
    path = path_of_ppo(of_main["sft"], of_main["ppo"], config.ppo.iterations, evaluations, ["score", *names], config.seed)
    yardstick = best_of_n_figures(draws, ["score", *names], MOST_OF_N, config.seed)
    if config.data.comparisons is not None and config.reward.use is not None:
        figures |= card_of_another_run(shop)
    if shop.world.is_main:
        folder = shop.folder / "evaluation"
        write_json(folder / "policies.json", policies)
        write_json(folder / "wins.json", won)
        write_json(folder / "path.json", path)
        if yardstick:
            write_json(folder / "best_of_n.json", yardstick)
        _write_samples(folder / "samples.jsonl", prompts, responses, names, config.evaluation.group_by, set(main))
    return figures


def policies_of(shop: Workshop) -> dict[str, str]:
    """Name -> checkpoint of every policy to evaluate: no base where it is the SFT policy, the best one where it is not the last."""
    sources = {"base": shop.base, "sft": shop.sft_source, "ppo": str(shop.folder / "ppo/model")}
    if sources["base"] == sources["sft"]:
        del sources["base"]
    best = shop.folder / "ppo/best.json"
    if best.exists() and json.loads(best.read_text(encoding="utf-8"))["iteration"] != shop.config.ppo.iterations:
        sources["best"] = str(shop.folder / "ppo/best")
    return sources | shop.config.evaluation.policies


def main_places(config: Config, prompts: PromptSet) -> list[int]:
    """The places of the prompts that the headline figures are over."""
    wanted = config.evaluation.main_group
    return groups_of(prompts, config.evaluation.group_by)[wanted] if wanted is not None else list(range(len(prompts)))


def _answers(shop: Workshop, name: str, source: str, prompts: PromptSet, sampling: Sampling, bar: Bar) -> list[Row]:
    """A policy's responses; those that an interrupted evaluation has left are taken as they are."""
    kept = Kept(shop, f"{name}.answers", source)  # no policy has a point in its name
    rows = kept.rows()
    if len(rows) == len(prompts):
        bar.advance_by(len(rows))
        return rows
    release_free_memory()  # what sampling the policy before has left
    policy = shop.load_policy(source, frozen=True)
    journey = Journey(rows, kept.keep, bar.advance_by)
    return answers(policy, shop.generator(policy), prompts, sampling, shop.world, journey=journey)


def _judged(
    shop: Workshop,
    sources: Mapping[str, str],
    sampled: dict[str, list[Row]],
    prompts: PromptSet,
    sampling: Sampling,
    places: Sequence[int],
    bar: Bar,
) -> tuple[dict[str, list[Row]], list[Row], list[str]]:
    """All that needs the SFT policy and the judges, who are in memory until it is done: scores and KL of every answer; many samples of
    SFT for each of a few prompts; the judges' names."""
    release_free_memory()  # what sampling the last policy has left
    judges, reference = judges_of(shop, shop.reward()), shop.load_policy(shop.sft_source, frozen=True)
    responses = {}
    for name, source in sources.items():
        kept = Kept(shop, name, source)
        journey = Journey(kept.rows(), kept.keep, bar.advance_by)
        responses[name] = judged(sampled.pop(name), reference, prompts, judges, sampling, shop.world, journey=journey)
    kept, count = Kept(shop, "best_of_n.draws"), shop.config.evaluation.best_of_samples
    journey, generator = Journey(kept.rows(), kept.keep, bar.advance_by), shop.generator(reference)
    draws = draw(generator, prompts, judges, sampling, count, shop.world, places=places, journey=journey)
    return responses, draws, list(judges.others)


def judges_of(shop: Workshop, score: Scorer) -> Judges:
    """The training score; the second reward model and a linear one, both from comparisons that the first never saw, where there
    are enough; those that the configuration names."""
    others: dict[str, Scorer] = {}
    judge = shop.folder / "reward/judge/model"
    if judge.exists() and shop.config.data.comparisons is not None and shop.config.reward.use is None:
        others["judge"] = shop.reward_scorer(shop.load_scorer(str(judge)))
        others["bag_of_words"] = BagOfWords(comparison_sets(shop.config).judge)
    others |= {name: shop.scorer([term]) for name, term in shop.config.evaluation.judges.items()}
    if shop.config.evaluation.gold:
        others["gold"] = FunctionScorer(load_function(shop.config.evaluation.gold), name=shop.config.evaluation.gold)
    ppo = shop.config.ppo
    rules = {name: getattr(ppo, name) for name in ("score_clip", "missing_eos_penalty", "missing_eos_score")}
    return Judges(score, others, functools.partial(combine_score, **rules))


def sampling_of(shop: Workshop) -> Sampling:
    config = shop.config
    return Sampling(
        config.seed,
        config.ppo.temperature,
        config.ppo.max_new_tokens,
        config.evaluation_batch,
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
        figures |= _win_figures(f"{name}.", values)
    if won:
        headline = "judge" if "judge" in won else "score"
        figures |= _win_figures("", won[headline])
        figures["win_rate_by"] = "the second reward model" if headline == "judge" else "the training score"
    return figures


def _win_figures(prefix: str, values: dict[str, float]) -> Figures:
    plain, controlled = f"{prefix}win_rate", f"{prefix}lc_win_rate"
    found = {plain: values["win_rate"], f"{plain}_low": values["low"], f"{plain}_high": values["high"]}
    found |= {controlled: values["lc_win_rate"], f"{controlled}_low": values["lc_low"], f"{controlled}_high": values["lc_high"]}
    return found


def _write_samples(
    path: Path, prompts: PromptSet, responses: dict[str, Any], judges: list[str], group_by: str | None, main: set[int]
) -> None:
    lines = []
    for place, prompt in enumerate(prompts.texts):
        text = prompt if isinstance(prompt, str) else "\n".join(f"{turn.role}: {turn.content}" for turn in prompt)
        line: dict[str, Any] = {"prompt": text}
        if group_by is not None:
            line |= {"group": str(prompts.fields[place].get(group_by)), "main": place in main}
        for name, rows in responses.items():
            row = rows[place]
            line[name] = row["response"]
            line |= {f"{name}_{key}": row[key] for key in ("score", "combined", "kl", "length", "finished", *judges)}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))

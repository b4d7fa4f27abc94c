"""`tercet generate`: responses of a run's policies side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from tercet.config import load_config
from tercet.data.template import response_text
from tercet.generation.sampling import uniforms
from tercet.pipeline import Pipeline
from tercet.runtime.stage import Interrupt
from tercet.stages.rollout import PromptSet
from tercet.types import TercetError


def sample_side_by_side(folder: Path, prompts: Sequence[str], stages: Sequence[str], seed: int) -> None:
    """Print one response of each stage's policy to each prompt, sampled with the same random numbers, with its score."""
    if not (folder / "config.yaml").exists():
        raise TercetError(f"{folder} is no run folder: it has no config.yaml")
    config = load_config(folder / "config.yaml")
    shop = Pipeline(config.model_copy(update={"output": str(folder.resolve())})).workshop(Interrupt())
    sources = {"base": shop.base, "sft": shop.sft_source, "ppo": str(folder / "ppo/model")}
    there = [name for name, source in sources.items() if name == "base" or Path(source).exists()]
    unknown = [stage for stage in stages if stage not in there]
    if unknown:
        raise TercetError(f"--stage {unknown[0]}: this run has {', '.join(there)}")
    ids = [shop.template.prompt_ids(prompt).ids for prompt in prompts]
    batch = PromptSet(ids, list(prompts), [{} for _ in prompts], lambda row: response_text(row, shop.tokenizer))
    numbers = uniforms(seed, "evaluation", 0, range(len(prompts)), config.ppo.max_new_tokens)
    has_reward = config.reward.use is not None or (folder / "reward/model").exists()
    scorer = shop.reward_scorer(shop.load_scorer(shop.reward_source)) if has_reward else None
    console = Console(highlight=False, markup=False)
    rows: list[list[str]] = [[] for _ in prompts]
    for name in stages or there:
        sequences = shop.generator(shop.load_policy(sources[name], frozen=True)).sample(ids, numbers)
        texts = batch.texts_of(sequences, range(len(prompts)))
        scores = scorer.score(sequences, texts) if scorer else torch.full((len(prompts),), float("nan"))
        for row, response, score, finished in zip(rows, texts.responses, scores.tolist(), sequences.finished.tolist()):
            end = "" if finished else " [cut off]"
            row.append(f"  {name:<5}{'' if score != score else f'{score:+.2f}'}  {response.strip()}{end}")
    for prompt, lines in zip(prompts, rows):
        console.print(prompt)
        console.print("\n".join(lines))

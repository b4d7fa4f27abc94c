"""`tercet generate`: responses of a run's policies side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tercet.config import load_config
from tercet.data.template import response_text
from tercet.errors import TercetError
from tercet.generation.sampling import uniforms
from tercet.pipeline import Pipeline
from tercet.runtime.stage import Interrupt
from tercet.stages.rollout import PromptSet


def generate(folder: str | Path, prompts: Sequence[str], stages: Sequence[str] = (), seed: int = 0) -> list[dict[str, Any]]:
    """One response of each policy ("base", "sft", "ppo", "best", those of evaluation.policies; by default the first three) to each prompt.

    All policies use the same random numbers. Each row: prompt, stage, response, finished, score (None without a reward model).
    """
    folder = Path(folder).resolve()
    if not (folder / "config.yaml").exists():
        raise TercetError(f"{folder} is no run folder: it has no config.yaml")
    config = load_config(folder / "config.yaml")
    if config.model.scratch is not None and not (folder / "pretrain/model").exists():
        raise TercetError(
            f"{folder}: its model from scratch is not there (pretrain/model): `tercet pretrain {folder}/config.yaml` makes it"
        )
    try:
        "".join(prompts).encode()
    except UnicodeEncodeError:
        raise TercetError("--prompt: it holds bytes that are no UTF-8 text") from None
    shop = Pipeline(config.model_copy(update={"output": str(folder)})).workshop(Interrupt())
    sources = {"base": shop.base, "sft": shop.sft_source, "ppo": str(folder / "ppo/model")}
    usual, more = list(sources), {"best": str(folder / "ppo/best")} | config.evaluation.policies
    sources |= more
    # What lies elsewhere was looked at before the run.
    missing = [name for name, source in sources.items() if folder in Path(source).parents and not Path(source).exists()]
    there = [name for name in sources if name not in missing]
    unknown = [stage for stage in stages if stage not in there]
    if unknown:
        raise TercetError(f"--stage {unknown[0]}: this run has {', '.join(there)}")
    ids = [shop.template.prompt_ids(prompt).ids for prompt in prompts]
    if [] in [list(prompt) for prompt in ids]:
        raise TercetError("--prompt: an empty text is no token for this model, so there is nothing to go on from: give some text")
    batch = PromptSet(ids, list(prompts), [{} for _ in prompts], lambda row: response_text(row, shop.tokenizer))
    numbers = uniforms(seed, "evaluation", 0, range(len(prompts)), config.ppo.max_new_tokens)
    has_reward = config.reward.use is not None or (folder / "reward/model").exists()
    scorer = shop.reward_scorer(shop.load_scorer(shop.reward_source)) if has_reward else None
    rows = []
    for name in stages or [name for name in usual if name in there]:
        sequences = shop.generator(shop.load_policy(sources[name], frozen=True)).sample(ids, numbers)
        texts = batch.texts_of(sequences, range(len(prompts)))
        scores = scorer.score(sequences, texts).tolist() if scorer else [None] * len(prompts)
        for prompt, response, score, finished in zip(prompts, texts.responses, scores, sequences.finished.tolist()):
            rows.append({"prompt": prompt, "stage": name, "response": response, "finished": finished, "score": score})
    return rows


def sample_side_by_side(folder: Path, prompts: Sequence[str], stages: Sequence[str], seed: int) -> None:
    """Print what `generate` gives, prompt by prompt."""
    rows, console = generate(folder, prompts, stages, seed), Console(highlight=False, markup=False)
    for prompt in dict.fromkeys(prompts):
        console.print(prompt)
        for row in rows:
            if row["prompt"] == prompt:
                score = "" if row["score"] is None else f"{row['score']:+.2f}"
                end = "" if row["finished"] else " [cut off]"
                console.print(f"  {row['stage']:<5}{score}  {row['response'].strip()}{end}")

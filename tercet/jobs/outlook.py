"""What deserves a look before training: tokenizer, cut texts, lengths, duplicates, leaks, lopsided pairs, memory.

`tercet run` shows the warnings among it, `tercet doctor` all of it. Mistakes that stop a run are in jobs/preflight.py.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Any, Literal

import torch
from transformers import AutoConfig

from tercet.algo.products import onednn_computes
from tercet.config import Config
from tercet.data.files import data_files
from tercet.data.records import TURN, judge_split, split
from tercet.data.template import Template
from tercet.jobs.memory import GIB, Need, Shape, load_of, needs
from tercet.models.load import special_tokens
from tercet.runtime.machine import Machine, free_memory
from tercet.types import Comparison, Demonstration

MANY_CUT = 0.1  # share of texts cut at max_length above which training sees mostly beginnings
LOPSIDED = 0.65  # share of pairs whose longer response is chosen (or rejected) above which length alone tells a lot
CONTRADICTED = 0.05  # share of pairs that are there the other way round above which data are at odds with themselves
REPEATED = 0.5  # share of records whose responses begin with their prompt above which that is no chance
_OTHER_SPLIT = re.compile(r"(test|eval|valid|dev)")  # how files that are to be measured on are called beside train.jsonl
FEW_COMPARISONS = 200  # as in the verdict's rule reward_few
LOOKED_AT = 2_000  # records of each file that are tokenised here
# Which sources hold records of one kind, in the order of the stages: what is trained on, and what is measured on.
KINDS = {"sft": "eval_sft", "comparisons": "eval_comparisons", "prompts": "eval_prompts"}


@dataclass(frozen=True)
class Check:
    """One thing looked at: "ok", "warning" (the run goes on) or "error" (it would fail)."""

    level: Literal["ok", "warning", "error"]
    text: str


@dataclass(frozen=True)
class Lengths:
    """Of a sample of one source's texts, in tokens. cut, prompt_cut: how many lost their end, or the prompt's beginning."""

    longest: int
    mean: float
    texts: int
    cut: int
    prompt_cut: int


def outlook(
    config: Config,
    stages: Sequence[str],
    sources: Mapping[str, Any],
    lengths: Mapping[str, Lengths],
    template: Template,
    machine: Machine,
    base: str,
) -> Iterator[Check]:
    """Every check, in the order of the stages. sources: what preflight.inspect has read; lengths: what `measure` found in them."""
    yield from _tokenizer(template)
    yield from _cuts(config, lengths)
    for name in KINDS:
        if name in sources:
            yield from _counts(name, sources, config)
    if "comparisons" in sources:
        yield from _comparisons(config, sources)
    yield from leaks(config, sources)
    if template.kind == "chat":
        yield from _transcripts(sources)
    if (
        machine.device.type == "cpu"
        and machine.dtype is torch.bfloat16
        and not onednn_computes(torch.empty(0, dtype=machine.dtype))
    ):
        yield Check(
            "warning",
            "machine.dtype: this processor has no bfloat16 and only imitates it, many times slower than float32: set machine.dtype: auto",
        )
    if machine.device.type == "cpu" and machine.threads > (os.cpu_count() or machine.threads):
        yield Check(
            "warning",
            f"machine.threads: {machine.threads} threads on {os.cpu_count()} cores wait for one another: set machine.threads: auto",
        )
    free = free_memory(machine.device)
    for need in memory(config, stages, lengths, machine, base):
        if free is not None and need.total > free:
            yield Check(
                "warning",
                f"stage {need.stage} needs about {need.total / GIB:.1f} GiB and {free / GIB:.1f} GiB are free: "
                + _less_memory(need.stage, config),
            )


def _less_memory(stage: str, config: Config) -> str:
    """What makes a stage smaller and is not done yet."""
    ways = ["lower machine.microbatch_tokens", "take a smaller model"]
    if stage != "evaluate" and not config.machine.activation_checkpointing:
        ways.insert(0, "set machine.activation_checkpointing")
    if stage != "pretrain" and config.model.adapter is None:
        ways.insert(0, "set model.adapter")
    if sampled := sampled_at_once(config, stage):
        ways.insert(-1, f"lower {sampled[0]}")
    return f"{', '.join(ways[:-1])}, or {ways[-1]}"


def sampled_at_once(config: Config, stage: str) -> tuple[str, int] | None:
    """The setting that says how many responses a stage samples together, if it samples any, and its value."""
    rollout = "ppo.rollout_batch_size", config.ppo.rollout_batch_size
    evaluated = "evaluation.batch_size", config.evaluation_batch
    if stage == "ppo" and config.ppo.evaluate_every:
        return max(rollout, evaluated, key=lambda one: one[1])
    return {"evaluate": evaluated, "reward": rollout, "ppo": rollout}.get(stage)


def memory(config: Config, stages: Sequence[str], lengths: Mapping[str, Lengths], machine: Machine, base: str) -> list[Need]:
    """What each stage needs on this machine, by the lengths of its texts."""
    limits = {"pretrain": config.pretrain.max_length, "sft": config.sft.max_length, "reward": config.reward.max_length}
    names = {"pretrain": "pretrain", "sft": "sft", "reward": "comparisons"}
    texts = {stage: lengths[names[stage]].longest if names.get(stage) in lengths else limits.get(stage, 0) for stage in stages}
    shape = Shape.of(
        AutoConfig.from_pretrained(base, trust_remote_code=config.model.trust_remote_code),
        trust_remote_code=config.model.trust_remote_code,
    )
    longest_prompt = lengths["prompts"].longest if "prompts" in lengths else config.data.max_prompt_length
    return needs(shape, load_of(config, machine, texts, longest_prompt))


def measure(sources: Mapping[str, Any], config: Config, template: Template) -> dict[str, Lengths]:
    """The lengths of the texts of every source that is trained on or sampled from."""
    return {name: _lengths(name, sources[name], config, template) for name in ("pretrain", *KINDS) if name in sources}


def _lengths(name: str, records: Sequence[Any], config: Config, template: Template) -> Lengths:
    """Of at most LOOKED_AT records, evenly spread over the source."""
    sample = records[:: math.ceil(len(records) / LOOKED_AT)]
    if name == "prompts":
        prompts = list(template.prompt_ids_all((record.prompt, record.origin) for record in sample))
        sizes = [len(prompt.ids) for prompt in prompts]
        return Lengths(max(sizes), sum(sizes) / len(sizes), len(sizes), 0, sum(prompt.was_cut for prompt in prompts))
    limit = {"pretrain": config.pretrain, "sft": config.sft, "comparisons": config.reward}[name].max_length
    texts = (
        (record.prompt, response, record.origin)
        for record in sample
        for response in (record.responses if isinstance(record, Comparison) else [record.response])
    )
    encoded = list(template.encode_all(texts, max_length=limit))
    sizes = [len(one.row.ids) for one in encoded]
    cut, prompt_cut = sum(one.truncated for one in encoded), sum(one.prompt_cut for one in encoded)
    return Lengths(max(sizes), sum(sizes) / len(sizes), len(sizes), cut, prompt_cut)


def _tokenizer(template: Template) -> Iterator[Check]:
    tokenizer = template.tokenizer
    bos = "BOS is added at the start" if template.bos_id is not None else "no BOS is added"
    stops = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in sorted(template.stop_ids))
    yield Check("ok", f"template {template.kind}; {bos}; responses end at {stops}; pads are never read, whatever token they are")
    if template.kind == "chat":
        row = template.encode("a", "b").row
        special = set(special_tokens(tokenizer).values()) - template.stop_ids
        stray = [tokenizer.convert_ids_to_tokens(i) for i in row.ids[row.prompt_len : -1] if i in special]
        if stray:
            yield Check(
                "warning",
                f"the chat template ends a response with {stray[-1]!r}, which is no stop token, so that responses will go on after it: add "
                "it to ppo.stop, or to eos_token_id in the model's generation_config.json",
            )


def _cuts(config: Config, lengths: Mapping[str, Lengths]) -> Iterator[Check]:
    limits = {"pretrain": config.pretrain.max_length, "sft": config.sft.max_length, "comparisons": config.reward.max_length}
    for name, limit in limits.items():
        if name in lengths:
            found, stage = lengths[name], "reward" if name == "comparisons" else name
            many = found.cut > MANY_CUT * found.texts
            share, advice = f"{found.cut} of {found.texts} texts ({found.cut / found.texts:.1%})", ""
            if many:
                advice = " and get no EOS: raise it, or shorten them, or no response is learned to its end"
            yield Check("warning" if many else "ok", f"{stage}: {share} are cut at {stage}.max_length ({limit}){advice}")
            yield from _prompt_cuts(stage, found, config)
    if "prompts" in lengths:
        found = lengths["prompts"]
        limit = config.ppo.max_new_tokens
        yield Check("ok", f"ppo: the longest of {found.texts} prompts has {found.longest} tokens, a response at most {limit}")
        yield from _prompt_cuts("ppo", found, config)


def _prompt_cuts(stage: str, found: Lengths, config: Config) -> Iterator[Check]:
    if found.prompt_cut > MANY_CUT * found.texts:
        yield Check(
            "warning",
            f"{stage}: {found.prompt_cut} of {found.texts} prompts are cut to their last {config.data.max_prompt_length} tokens: raise "
            "data.max_prompt_length, or shorten them",
        )


def _counts(name: str, sources: Mapping[str, Any], config: Config) -> Iterator[Check]:
    train, held_out = sides_of(name, sources, config)
    own = KINDS[name] in sources
    where = f"data.{KINDS[name]} to measure on" if own else "held out by the prompt's hash"
    yield Check("ok", f"data.{name}: {len(train)} records to train on and {len(held_out)} {where}")
    repeated = len(sources[name]) - len({_content(record) for record in sources[name]})
    if repeated:
        yield Check(
            "warning", f"data.{name}: {repeated} records stand there more than once: remove the copies, or they count double"
        )
    twice = sum(_repeats_its_prompt(record) for record in sources[name])
    if twice > REPEATED * len(sources[name]):
        yield Check(
            "warning",
            f"data.{name}: in {twice} of {len(sources[name])} records the responses begin with the prompt, which stands before them anyway: "
            "leave it out of them",
        )
    path = getattr(config.data, name)
    files = [file.name for file in data_files(path)] if os.path.isdir(path or "") else []
    others = [file for file in files if _OTHER_SPLIT.match(file)]
    if others and any(file.startswith("train") for file in files):
        yield Check(
            "warning",
            f"data.{name}: of that folder {others[0]} is read to train on, too: name the file with the training records, and that one as "
            f"data.{KINDS[name]}",
        )
    if not held_out:
        yield Check(
            "warning",
            f"data.{name}: nothing is held out, so nothing can be measured on texts that were not trained on: set data.{KINDS[name]}, or "
            "give at least 20 records with different prompts, and data.held_out",
        )


def _transcripts(sources: Mapping[str, Any]) -> Iterator[Check]:
    """Whole conversations in one text, where a chat template will write them as one turn of the user's."""
    for name in KINDS:
        records = sources.get(name, ())
        found = sum(isinstance(record.prompt, str) and TURN.search(record.prompt) is not None for record in records)
        if found:
            yield Check(
                "warning",
                f"data.{name}: {found} of {len(records)} prompts are transcripts (Human: ... Assistant: ...), which the chat template writes "
                "as one turn of the user: set model.template: plain, or give each conversation as a list of messages",
            )


def _comparisons(config: Config, sources: Mapping[str, Any]) -> Iterator[Check]:
    records = sources["comparisons"]
    for reason, count in records.dropped.items():
        yield Check("warning", f"data.comparisons: {count} records are not used because {reason}: repair or remove them")
    preferring = sum(record.prefers for record in records)
    if preferring < len(records) / 2:
        yield Check(
            "warning",
            f"data.comparisons: {len(records) - preferring} of {len(records)} are ties alone, of which nothing is learned: give more that "
            "prefer one response",
        )
    if preferring < FEW_COMPARISONS:
        yield Check(
            "warning",
            f"data.comparisons: {preferring} are few; a reward model from under {FEW_COMPARISONS} is mostly noise: collect more",
        )
    # As jobs/comparisons.py does.
    judge = judge_split(sides_of("comparisons", sources, config)[0])[1] if config.reward.judge else []
    second = f"{len(judge)} comparisons go to a second reward model that judges the first" if judge else "no second reward model"
    yield Check("ok", f"reward: {second}")
    pairs = [(record.prompt, *pair) for record in records for pair in record.pairs()]
    said = set(pairs)
    denied = sum((prompt, worse, better) in said for prompt, better, worse in pairs)
    if denied > CONTRADICTED * len(pairs):
        yield Check(
            "warning",
            f"data.comparisons: {denied} of {len(pairs)} pairs stand there the other way round as well: no reward model can be right on "
            "both; keep the one that is meant, or rank the two as equal",
        )
    lengths = [(len(better), len(worse)) for _, better, worse in pairs]
    longer = sum((better > worse) + (better == worse) / 2 for better, worse in lengths) / len(lengths)
    ratio = median(better for better, _ in lengths) / max(1, median(worse for _, worse in lengths))
    lopsided = max(longer, 1 - longer) > LOPSIDED
    advice = ": balance the lengths, or the reward model will learn to count words and PPO to use that" if lopsided else ""
    yield Check(
        "warning" if lopsided else "ok",
        f"reward: the preferred response is the longer one in {longer:.0%} of pairs (median length ratio {ratio:.2f}){advice}",
    )


def _repeats_its_prompt(record: Any) -> bool:
    """Whether each response begins with the prompt's text."""
    texts = record.responses if isinstance(record, Comparison) else [getattr(record, "response", "")]
    asked = record.prompt.strip() if isinstance(record.prompt, str) else ""
    return bool(asked) and all(text.strip().startswith(asked) for text in texts)


def leaks(config: Config, sources: Mapping[str, Any]) -> Iterator[Check]:
    """A warning for each set of held-out records whose prompts stand in a file of the same or an earlier stage: what is measured on them
    has learned from them."""
    sides = {name: sides_of(name, sources, config) for name in KINDS if name in sources}
    trained = {name: {_asked(record) for record in train} for name, (train, _) in sides.items()}
    for place, (name, (_, held_out)) in enumerate(sides.items()):
        asked = {_asked(record) for record in held_out}
        found = {other: len(asked & trained[other]) for other in list(sides)[: place + 1] if asked & trained[other]}
        if found:
            title = f"data.{KINDS[name]}" if KINDS[name] in sources else f"the held-out part of data.{name}"
            where = ", ".join(f"{count} in data.{other}" for other, count in found.items())
            yield Check(
                "warning",
                f"of the {len(asked)} prompts of {title} some are trained on too ({where}): what is measured on them is not held out; "
                "remove them from one side",
            )


def sides_of(name: str, sources: Mapping[str, Any], config: Config) -> tuple[Sequence[Any], Sequence[Any]]:
    """Records to train on, and held out."""
    if KINDS[name] in sources:
        return sources[name], sources[KINDS[name]]
    return split(sources[name], config.data.held_out)


def _asked(record: Any) -> str:
    """A record's prompt as a text; of a record that is one text, that text."""
    if isinstance(record, Demonstration) and record.prompt == "":
        return record.response.strip()
    if isinstance(record.prompt, str):
        return str(record.prompt).strip()
    turns: Iterable[str] = chain.from_iterable((turn.role, turn.content) for turn in record.prompt)
    return record.prompt[0].content.strip() if len(record.prompt) == 1 else "\0".join(turns)


def _content(record: Any) -> object:
    return (record.prompt, getattr(record, "response", None), getattr(record, "responses", None), getattr(record, "ranks", None))

"""`tercet doctor`: what can be known to be wrong before hours are spent, from the data, the tokenizer and the model's sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from rich.console import Console

from tercet.config import Config
from tercet.data.records import AnyRecord, judge_split, read_comparisons, read_demonstrations, read_prompts, split
from tercet.data.template import Template
from tercet.pipeline import Pipeline
from tercet.types import Comparison, TercetError

MANY_CUT = 0.1  # share of records cut at max_length above which training sees mostly beginnings
LOPSIDED = 0.65  # share of pairs whose longer response is chosen (or rejected) above which length alone tells a lot
FEW_COMPARISONS = 200


@dataclass(frozen=True)
class Check:
    """One thing looked at: "ok", "warning" (the run goes on) or "error" (it would fail)."""

    level: Literal["ok", "warning", "error"]
    text: str


def examine(config: Config) -> bool:
    """Print every check; False if any is an error."""
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    console, fine = Console(highlight=False), True
    for check in checks(config):
        console.print(f"[{colours[check.level]}]{check.level:>7}[/]  ", end="")
        console.print(check.text, markup=False)
        fine &= check.level != "error"
    return fine


def checks(config: Config) -> Iterator[Check]:
    """All checks in the order of the stages; reading errors become checks, so that one run shows all of them."""
    try:
        stages = Pipeline(config).stages()
    except TercetError as error:
        yield Check("error", str(error))
        return
    yield Check("ok" if stages else "error", f"stages: {', '.join(stages) or 'none, because there is no data'}")
    try:
        template, positions = _template(config)
    except TercetError as error:
        yield Check("error", str(error))
        return
    if template is not None:
        bos = "BOS is added at the start" if template.bos_id is not None else "no BOS is added"
        yield Check(
            "ok", f"template {template.kind}; EOS id {template.eos_id}, {bos}; responses end at ids {sorted(template.stop_ids)}"
        )
    for part in (_demonstrations, _comparisons, _prompts):
        try:
            yield from part(config, template, positions)
        except TercetError as error:
            yield Check("error", str(error))


def _template(config: Config) -> tuple[Template | None, int | None]:
    """The template and the model's positions; neither exists yet for a model from scratch."""
    if config.model.scratch is not None:
        return None, None
    from transformers import AutoConfig

    from tercet.models.load import load_tokenizer, stop_token_ids

    name, trust = str(config.model.name), config.model.trust_remote_code
    tokenizer = load_tokenizer(name, trust_remote_code=trust)
    template = Template(tokenizer, config.model.template, config.data.max_prompt_length, stop_ids=stop_token_ids(name, tokenizer))
    text_config = AutoConfig.from_pretrained(name, trust_remote_code=trust).get_text_config()
    return template, getattr(text_config, "max_position_embeddings", None)


def _demonstrations(config: Config, template: Template | None, positions: int | None) -> Iterator[Check]:
    if config.data.sft is None:
        return
    records = read_demonstrations(config.data.sft)
    yield from _counts("data.sft", records, config)
    if template is not None:
        encoded = [template.encode(r.prompt, r.response, max_length=config.sft.max_length, origin=r.origin) for r in records]
        yield _cut_share("sft", sum(one.truncated for one in encoded), len(encoded), config.sft.max_length)
        yield from _positions("sft.max_length", max(len(one.row.ids) for one in encoded), positions)


def _comparisons(config: Config, template: Template | None, positions: int | None) -> Iterator[Check]:
    if config.data.comparisons is None:
        return
    records = read_comparisons(config.data.comparisons)
    yield from _counts("data.comparisons", records, config)
    for reason, count in records.dropped.items():
        yield Check("warning", f"data.comparisons: {count} records are not used because {reason}")
    if len(records) < FEW_COMPARISONS:
        yield Check(
            "warning", f"data.comparisons: {len(records)} are few; a reward model from under {FEW_COMPARISONS} is mostly noise"
        )
    judge = judge_split(records)[1] if config.reward.judge else []
    yield Check(
        "ok",
        f"reward: {len(judge)} comparisons go to a second reward model that judges the first" if judge else "reward: no judge",
    )
    yield _length_balance(records)
    if template is not None:
        encoded = [
            template.encode(r.prompt, response, max_length=config.reward.max_length, origin=r.origin)
            for r in records
            for response in r.responses
        ]
        yield _cut_share("reward", sum(one.truncated for one in encoded), len(encoded), config.reward.max_length)
        yield from _positions("reward.max_length", max(len(one.row.ids) for one in encoded), positions)


def _prompts(config: Config, template: Template | None, positions: int | None) -> Iterator[Check]:
    if config.data.prompts is None:
        return
    records = read_prompts(config.data.prompts)
    yield from _counts("data.prompts", records, config)
    if config.data.eval_prompts is not None:
        held_out = {record.prompt for record in read_prompts(config.data.eval_prompts)}
        leaked = sum(record.prompt in held_out for record in records)
        if leaked:
            yield Check(
                "warning", f"{leaked} prompts of data.prompts stand in data.eval_prompts too: the evaluation is not held out"
            )
    if template is not None:
        encoded = [template.prompt_ids(record.prompt, record.origin) for record in records]
        cut = sum(one.was_cut for one in encoded)
        longest = max(len(one.ids) for one in encoded)
        yield Check(
            "warning" if cut > MANY_CUT * len(encoded) else "ok",
            f"ppo: {cut} of {len(encoded)} prompts are cut to data.max_prompt_length ({config.data.max_prompt_length}); longest {longest}",
        )
        yield from _positions("ppo.max_new_tokens with the longest prompt", longest + config.ppo.max_new_tokens, positions)


def _counts(name: str, records: Sequence[AnyRecord], config: Config) -> Iterator[Check]:
    train, held_out = split(records, config.data.held_out)
    repeated = len(records) - len({_key(record) for record in records})
    yield Check(
        "ok", f"{name}: {len(records)} records, {len(train)} to train on and {len(held_out)} held out by the prompt's hash"
    )
    if repeated:
        yield Check("warning", f"{name}: {repeated} records stand there more than once")


def _key(record: AnyRecord) -> object:
    return (record.prompt, getattr(record, "response", None), getattr(record, "responses", None))


def _cut_share(stage: str, cut: int, count: int, limit: int) -> Check:
    level: Literal["ok", "warning"] = "warning" if cut > MANY_CUT * count else "ok"
    advice = f": raise {stage}.max_length" if level == "warning" else ""
    return Check(
        level, f"{stage}: {cut} of {count} texts ({cut / count:.1%}) are cut at max_length ({limit}) and get no EOS{advice}"
    )


def _positions(what: str, longest: int, positions: int | None) -> Iterator[Check]:
    if positions is not None and longest > positions:
        yield Check("error", f"{what}: {longest} tokens, but the model has {positions} positions: lower it, or use another model")


def _length_balance(records: Sequence[Comparison]) -> Check:
    pairs = [
        (len(better), len(worse))
        for record in records
        for better, rank in zip(record.responses, record.ranks)
        for worse, other in zip(record.responses, record.ranks)
        if rank < other
    ]
    if not pairs:
        return Check("error", "data.comparisons: every comparison is a tie, so there is nothing to learn")
    longer = sum(better > worse for better, worse in pairs) / len(pairs)
    ratio = median(better for better, _ in pairs) / max(1, median(worse for _, worse in pairs))
    level: Literal["ok", "warning"] = "warning" if max(longer, 1 - longer) > LOPSIDED else "ok"
    return Check(
        level, f"reward: the preferred response is the longer one in {longer:.0%} of pairs (median length ratio {ratio:.2f})"
    )

"""What a stage would trip over, looked at before the first one trains: records, functions, the machine, architectures, checkpoints,
templates, lengths. Everything found here stops the run; what only deserves a warning is in jobs/outlook.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from tercet.config import Config
from tercet.data.records import read_comparisons, read_demonstrations, read_prompts
from tercet.data.template import Template, require_response
from tercet.errors import named_by
from tercet.generation.native import NativeGenerator
from tercet.jobs.workshop import check_room, prompt_records
from tercet.models.load import (
    check_vocabulary,
    context_length,
    count_parameters,
    embedding_rows,
    load_causal_lm,
    load_classifier,
    load_tokenizer,
    stop_token_ids,
)
from tercet.models.precision import round_weights
from tercet.models.roles import Policy, ScoreModel
from tercet.runtime.machine import resolve
from tercet.runtime.trackers import check_installed
from tercet.scoring.function import RewardFunction, load_function
from tercet.scoring.model import ClassifierScorer
from tercet.stages.reward import require_preference
from tercet.types import Comparison, Prompt, TercetError, Text

Sources = dict[str, Any]  # the Records of each file, by its key in the data section
Records = Mapping[str, Sequence[Any]]  # by stage

STAGE_DATA: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "pretrain": (read_demonstrations, ("pretrain",)),
    "sft": (read_demonstrations, ("sft", "eval_sft")),
    "reward": (read_comparisons, ("comparisons", "eval_comparisons")),
    "ppo": (read_prompts, ("prompts", "eval_prompts")),
}


def inspect(
    config: Config, stages: Sequence[str], base: str | None, functions: Sequence[str | RewardFunction]
) -> tuple[Sources, list[str]]:
    """Read every record, function and checkpoint that these stages will use. Returns the records and all mistakes, in sentences; after
    mistakes in the data, models are not looked at.

    base: the pretrained model, None while a scratch model is not made yet; functions: "file.py:name" or "module:name", or what
    the Python API was given.
    """
    sources: Sources = {}
    mistakes: list[str] = []
    for stage in stages:
        read, names = STAGE_DATA.get(stage, (read_prompts, ()))
        for name in names:
            path = getattr(config.data, name)
            try:
                with named_by(f"data.{name}"):
                    sources |= {name: read(path)} if path is not None else {}
            except TercetError as error:
                mistakes.append(str(error))
    if not mistakes:
        try:
            _check(config, stages, base, functions, sources)
        except TercetError as error:
            mistakes.append(str(error))
    return sources, mistakes


def _check(
    config: Config, stages: Sequence[str], base: str | None, functions: Sequence[str | RewardFunction], sources: Sources
) -> None:
    if functions and ("ppo" in stages or "evaluate" in stages):
        read = [record for name in ("prompts", "eval_prompts") for record in sources.get(name, ())]
        prompts = read or prompt_records(config, held_out=True)
        for named in functions:
            function = load_function(named) if isinstance(named, str) else named
            _check_fields(function, named if isinstance(named, str) else getattr(named, "__name__", "reward"), prompts)
    if "comparisons" in sources:
        require_preference(sources["comparisons"])
    if stages:
        resolve(config.machine.device, config.machine.dtype, 1, 1, parameters=0)  # a device that is not there
        check_installed(config.trackers)
        check_models(config, stages, base, sources)


def _check_fields(function: RewardFunction, name: str, prompts: Iterable[Prompt]) -> None:
    """The function is called as function(prompts, responses, **fields): a field may have the name of one of the first two."""
    try:
        call = signature(function, follow_wrapped=False)  # of the outermost function, which is what is called
    except (TypeError, ValueError):  # compiled functions may have none
        return
    origins: dict[str, str] = {}
    for prompt in prompts:
        for field in prompt.fields:
            origins.setdefault(field, prompt.origin)
    for field, origin in origins.items():
        try:
            call.bind_partial([], [], **{field: []})
        except TypeError as error:
            raise TercetError(
                f"{origin}: the field {field!r} cannot be given to the function {name} ({error}), which is called as function(prompts, "
                "responses, **fields): rename or remove the field, or change the function's arguments"
            ) from None
    try:
        call.bind([], [], **{field: [] for field in origins})
    except TypeError as error:
        raise TercetError(
            f"the function {name} cannot be called ({error}): no prompt has such a field; those of the prompts are called "
            f"{', '.join(sorted(origins)) or 'nothing, for there are none'}. Add it to data.prompts, or give the argument a default"
        ) from None


def check_models(config: Config, stages: Sequence[str], base: str | None, sources: Sources) -> None:
    """TercetError for what can be known to be wrong with models and texts. `base`: None while a scratch model is not made yet.

    Checkpoints from elsewhere are loaded for it, one after the other: seconds, against the hours of the stages before them.
    """
    _check_classifier_exists(config, stages)
    if "ppo" in stages or "evaluate" in stages:
        _check_group(config)
    records = {
        stage: [record for name in names for record in sources.get(name, ())]
        for stage, (_, names) in STAGE_DATA.items()
        if stage in stages
    }
    conversations = [record for stage in records for record in records[stage] if not isinstance(record.prompt, str)]
    if config.model.template == "plain" and conversations:
        raise TercetError(
            f"{conversations[0].origin}: the prompt is a conversation, which the template 'plain' cannot write; set model.template: chat"
        )
    if base is None:
        if config.model.template == "chat":
            raise TercetError(
                "model.template is chat, but the tokenizer of a model.scratch has no chat template: set it to plain"
            )
        if "ppo" in stages or "evaluate" in stages:
            _check_foreign(config, None, 0, conversations=False)
        return
    trust = config.model.trust_remote_code
    with named_by("model.name" if config.model.scratch is None else "model.scratch"):
        count_parameters(base, trust)  # an explained error where the configuration cannot be read
        tokenizer = load_tokenizer(base, trust_remote_code=trust)
        model = load_causal_lm(base, trust_remote_code=trust, as_stored=True)
        check_vocabulary(model, tokenizer, base)
    stop_ids = stop_token_ids(base, tokenizer, config.ppo.stop)
    template = Template(tokenizer, config.model.template, config.data.max_prompt_length, stop_ids=stop_ids)
    _check_turns(template, records)
    _check_lengths(config, template, base, records)
    if any(stage in stages for stage in ("reward", "ppo", "evaluate")):
        _check_sampling(base, model)
    if "ppo" in stages or "evaluate" in stages:
        conversing = any(not isinstance(record.prompt, str) for record in records.get("ppo", ()))
        _check_foreign(config, tokenizer, embedding_rows(model), conversing)


def _check_classifier_exists(config: Config, stages: Sequence[str]) -> None:
    """Reward and value model are sequence classifiers, which transformers has for most causal architectures but not for all."""
    from_reward = any(term.kind == "stage" for term in config.ppo.rewards)
    if not ("reward" in stages or "ppo" in stages and config.ppo.value_model is None and not from_reward):
        return
    scratch, trust = config.model.scratch, config.model.trust_remote_code
    if scratch is not None:
        try:
            found = AutoConfig.for_model(scratch.architecture)
        except ValueError:
            return  # what it is and what to do is said where the model is made
    else:
        with named_by("model.name"):
            count_parameters(str(config.model.name), trust)
        found = AutoConfig.from_pretrained(str(config.model.name), trust_remote_code=trust)
    own_code = getattr(found, "auto_map", None) or {}
    if type(found) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and "AutoModelForSequenceClassification" not in own_code:
        raise TercetError(
            f"{config.model.name or 'model.scratch'}: transformers has no sequence classifier of the architecture {found.model_type!r}, "
            "and the reward model and the value model would be one: choose a model of another architecture, such as llama or qwen2"
        )


def _check_group(config: Config) -> None:
    evaluation = config.evaluation
    if evaluation.group_by is None:
        return
    held_out = prompt_records(config, held_out=True)
    if not any(evaluation.group_by in record.fields for record in held_out):
        known = sorted({name for record in held_out for name in record.fields})
        raise TercetError(
            f"evaluation.group_by is {evaluation.group_by!r}, but no held-out prompt has a field of that name: "
            + (f"choose one of {', '.join(known)}" if known else "the prompts have no fields; leave it out")
        )
    if evaluation.main_group is None:
        return
    values = sorted({str(record.fields.get(evaluation.group_by)) for record in held_out})
    if evaluation.main_group not in values:
        raise TercetError(
            f"evaluation.main_group is {evaluation.main_group!r}, but the held-out prompts' field {evaluation.group_by!r} has the values "
            f"{', '.join(values)}: choose one of them"
        )


def _check_turns(template: Template, records: Records) -> None:
    """A chat template may refuse roles and orders of turns: try one record of each kind."""
    if template.kind != "chat":
        return
    seen = set()
    for record in (record for some in records.values() for record in some):
        kind = (type(record), _roles(record.prompt))
        if kind not in seen:
            seen.add(kind)
            template.prompt_ids(record.prompt, record.origin)
            for response in _responses(record)[:1]:
                template.encode(record.prompt, response, origin=record.origin)


def _roles(prompt: Text) -> tuple[str, ...]:
    return (prompt and "text",) if isinstance(prompt, str) else tuple(turn.role for turn in prompt)


def _responses(record: Any) -> Sequence[str]:
    return record.responses if isinstance(record, Comparison) else [record.response] if hasattr(record, "response") else []


def _check_lengths(config: Config, template: Template, base: str, records: Records) -> None:
    """Texts that leave no room for a response, or have more tokens than the model has positions.

    Texts are tokenised here only where the limits of the configuration allow such a mistake at all.
    """
    text_config = AutoConfig.from_pretrained(base, trust_remote_code=config.model.trust_remote_code).get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    longest_prompt = config.data.max_prompt_length
    limits = {"pretrain": config.pretrain.max_length, "sft": config.sft.max_length, "reward": config.reward.max_length}
    for stage, limit in limits.items():
        if longest_prompt < limit and (positions is None or limit <= positions):
            continue
        texts = [(one.prompt, response, one.origin) for one in records.get(stage, ()) for response in _responses(one)]
        for (_, _, origin), (row, _, _) in zip(texts, template.encode_all(texts, max_length=limit)):
            require_response(row, stage, limit, origin)
            if positions is not None and len(row.ids) > positions:
                raise TercetError(
                    f"{origin}: {len(row.ids)} tokens, but {base} has {positions} positions: lower {stage}.max_length to {positions}"
                )
    if records.get("ppo"):
        check_room(config, positions, "the model")


def _check_foreign(config: Config, tokenizer: PreTrainedTokenizerBase | None, rows: int, conversations: bool) -> None:
    """Checkpoints that the configuration names beside the model, which has `rows` embedding rows. tokenizer: None while a scratch model
    is not made yet; they are only loaded then."""
    _check_scorers(config, tokenizer, rows)
    _check_policies(config, tokenizer)
    trust = config.model.trust_remote_code
    classifiers = {
        (str(term.model), term.label): key for key, term in reversed(config.terms.items()) if term.kind == "classifier"
    }
    for (source, label), key in classifiers.items():
        with named_by(key):
            own = load_tokenizer(source, trust_remote_code=trust, needs_eos=False)
            ClassifierScorer(load_classifier(source, trust_remote_code=trust), own, label=label, name=source)
            if conversations and own.chat_template is None:
                raise TercetError(
                    f"{source}: the prompts are conversations but its tokenizer has no chat template to write them with"
                )


def _check_scorers(config: Config, tokenizer: PreTrainedTokenizerBase | None, rows: int) -> None:
    trust, uses_stage = config.model.trust_remote_code, any(term.kind == "stage" for term in config.terms.values())
    way_out = "a reward model with a tokenizer of its own belongs into ppo.rewards as {kind: classifier, model: ...}"
    for key, source in (("reward.use", config.reward.use if uses_stage else None), ("ppo.value_model", config.ppo.value_model)):
        if source is None:
            continue
        with named_by(key):
            scorer = ScoreModel(load_classifier(source, trust_remote_code=trust))
            if tokenizer is None:
                continue
            check_vocabulary(scorer.model, tokenizer, source)
            if embedding_rows(scorer.model) < rows:
                raise TercetError(
                    f"{source}: it has {embedding_rows(scorer.model)} embedding rows, but the model has {rows} and can sample each of them: "
                    f"give it as many with resize_token_embeddings({rows}), and save it"
                )
            _check_same_ids(source, tokenizer, trust, way_out)


def _check_policies(config: Config, tokenizer: PreTrainedTokenizerBase | None) -> None:
    trust = config.model.trust_remote_code
    others = {f"evaluation.policies.{name}": source for name, source in config.evaluation.policies.items()}
    for key, source in {"ppo.policy": config.ppo.policy, **others}.items():
        if source is None:
            continue
        with named_by(key):
            policy = load_causal_lm(source, trust_remote_code=trust, as_stored=True)
            if tokenizer is not None:
                check_vocabulary(policy, tokenizer, source)
                _check_same_ids(source, tokenizer, trust, "take one that was trained from the same model")
            check_room(config, context_length(policy), source)
            _check_sampling(source, policy)


def _check_sampling(source: str, model: PreTrainedModel) -> None:
    """TercetError if what the model gives token by token, with a key-value cache, is not what it gives for the whole text: two prompts of
    different length, a few tokens."""
    name, dtype = type(model).__name__, model.dtype
    try:
        if dtype is torch.bfloat16:
            round_weights(model)  # which leaves the norms in float32
        policy = Policy(model, dtype)
        generator = NativeGenerator(policy, stop_ids=[], max_new_tokens=3, copies=False)
        ids = [place % embedding_rows(model) for place in range(4)]
        sequences = generator.sample([ids[:3], ids[3:]], None)
        with torch.no_grad():
            logprobs, _ = policy(sequences)
    except Exception as error:  # every architecture fails in its own way
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TercetError(
            f"{source}: {name} cannot be sampled ({first}): take a model of another architecture, such as llama; if this is a common one, "
            "please report it"
        ) from None
    assert sequences.sampler_logprobs is not None
    gap = (sequences.sampler_logprobs - logprobs).abs().max().item()
    if not gap <= (limit := 0.5 if dtype is torch.bfloat16 else 0.05):
        raise TercetError(
            f"{source}: {name} gives a token another log-probability when it is sampled than when it reads the whole text (by up to "
            f"{gap:.2g} nats; at most {limit:g} are rounding): it carries states from token to token that are not in a key-value cache. "
            "Take a model of another architecture, such as llama"
        )


def _check_same_ids(source: str, tokenizer: PreTrainedTokenizerBase, trust: bool, way_out: str) -> None:
    """These models read the ids that the policy samples: under another vocabulary they would read another text."""
    try:
        theirs = load_tokenizer(source, trust_remote_code=trust, needs_eos=False).get_vocab()
    except TercetError:
        return  # a checkpoint without a tokenizer says nothing
    differing = sorted(token for token, place in tokenizer.get_vocab().items() if theirs.get(token) != place)
    if differing:
        raise TercetError(
            f"{source}: its tokenizer has other ids than the model's for {len(differing)} tokens, such as {differing[0]!r}: it would read "
            f"another text; {way_out}"
        )

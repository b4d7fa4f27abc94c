"""The whole configuration: reading, `--set`, errors that name the way out, and the commented file of `tercet init`."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError, model_validator
from pydantic.fields import FieldInfo

from tercet.config.data import DataConfig
from tercet.config.evaluation import CheckpointConfig, EvaluationConfig, MachineConfig
from tercet.config.model import ModelConfig
from tercet.config.ppo import PPOConfig, RewardTerm
from tercet.config.section import Path, Section, setting
from tercet.config.training import PretrainConfig, RewardConfig, SFTConfig
from tercet.errors import TercetError


class Config(Section):
    """One run: data, models, the stages and the machine."""

    output: Path = setting("run", "the run folder: everything that the run writes")
    seed: int = setting(0, "of every random number", ge=0, lt=2**31)
    model: ModelConfig = setting(..., "the pretrained model")
    data: DataConfig = setting(DataConfig(), "the user's files")
    pretrain: PretrainConfig = setting(PretrainConfig(), "language modelling from scratch, where data.pretrain is given")
    sft: SFTConfig = setting(SFTConfig(), "stage 1")
    reward: RewardConfig = setting(RewardConfig(), "stage 2")
    ppo: PPOConfig = setting(PPOConfig(), "stage 3")
    evaluation: EvaluationConfig = setting(EvaluationConfig(), "after training")
    checkpoint: CheckpointConfig = setting(CheckpointConfig(), "exact-resume state")
    machine: MachineConfig = setting(MachineConfig(), "device, precision and threads")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = setting(
        [], "where metrics go beside the run folder; W&B writes files only, unless WANDB_MODE=online is set"
    )

    @property
    def positions(self) -> int:
        """How many tokens a model from scratch must have room for."""
        sampled = self.data.max_prompt_length + self.ppo.max_new_tokens
        return max(sampled, self.pretrain.max_length, self.sft.max_length, self.reward.max_length)

    @property
    def terms(self) -> dict[str, RewardTerm]:
        """Everything that gives scores, but for the gold one, by its key."""
        terms = {f"ppo.rewards[{place}]": term for place, term in enumerate(self.ppo.rewards)}
        return terms | {f"evaluation.judges.{name}": term for name, term in self.evaluation.judges.items()}

    @property
    def evaluation_batch(self) -> int:
        """Responses that evaluation samples at once."""
        return self.evaluation.batch_size or self.ppo.rollout_batch_size

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_are_defaults(cls, values: Any) -> Any:
        # `sft:` with all its lines deleted is None in YAML.
        if not isinstance(values, dict):
            return values
        plain = ("output", "seed", "model")
        return {key: value for key, value in values.items() if value is not None or key in plain or key not in cls.model_fields}

    @model_validator(mode="after")
    def _scratch_has_text(self) -> Config:
        if self.model.scratch is None and self.data.pretrain is not None:
            raise ValueError(
                "data.pretrain is for a scratch model but model.name is set: use model.scratch, or remove data.pretrain"
            )
        if self.model.scratch is not None and self.data.pretrain is None and self.data.sft is None:
            raise ValueError("model.scratch needs text to train its tokenizer on: set data.pretrain or data.sft")
        return self

    @model_validator(mode="after")
    def _a_budget_needs_a_divergence(self) -> Config:
        if self.evaluation.greedy and self.ppo.best_kl_budget is not None:
            raise ValueError(
                "ppo.best_kl_budget is about the KL of sampled responses, but evaluation.greedy takes the likeliest tokens: remove one of "
                "the two"
            )
        return self

    @model_validator(mode="after")
    def _adapters_share_one_model(self) -> Config:
        if self.model.adapter is not None and self.ppo.policy is not None:
            raise ValueError(
                "ppo.policy is a model of its own, but with model.adapter all roles share one: remove one of the two"
            )
        if self.model.adapter is not None and self.sft.dropout:
            raise ValueError("sft.dropout is for training all weights, but model.adapter is set: set sft.dropout: 0")
        return self


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where 1.1 surprises: 1e-5 is a number, a key given twice is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Looks for keys given twice here, before merge keys (<<) add those that may stand there too: the mapping's own win."""
        node = super().compose_mapping_node(anchor)
        keys = [_key(self, key) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise TercetError(f"{node.start_mark.name}: the key {twice!r} is given twice: remove one of them")
        return node


def _key(loader: _Loader, key: yaml.ScalarNode) -> Any:
    return key.value if key.tag == "tag:yaml.org,2002:merge" else loader.construct_object(key)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, name: str) -> Any:
    """YAML text to plain values; TercetError names the line that cannot be read."""
    loader = None
    try:
        loader = _Loader(text)
        loader.name = name
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise TercetError(
            f"{name}{line}: this is not valid YAML ({getattr(error, 'problem', None) or str(error).splitlines()[0]})"
        ) from None
    finally:
        if loader is not None:
            loader.dispose()


def load_config(source: str | FilePath | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration.

    `source` is a YAML file, a mapping or a Config; `overrides` are "section.key=value" with values in YAML. Paths in a file are
    relative to the file, paths in overrides and mappings to the working directory; in the result all are absolute.
    """
    if isinstance(source, Config):
        name, values, base = "configuration", source.model_dump(), FilePath.cwd()
    elif isinstance(source, Mapping):
        name, values, base = "configuration", dict(source), FilePath.cwd()
    elif isinstance(source, str | os.PathLike):
        name, values, base = str(source), _read(FilePath(source)), FilePath(source).resolve().parent
    else:
        raise TercetError(f"the configuration is a {type(source).__name__}: give a YAML file, a mapping or a Config")
    values = _absolute_paths({"output": Config.model_fields["output"].default, **values}, base)
    for override in overrides:
        _apply(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        given = tuple(f"{override.partition('=')[0].strip()}{end}" for override in overrides for end in (":", ".", " "))
        raise TercetError(
            "\n".join(f"{'--set' if line.startswith(given) else name}: {line}" for line in _explain(error))
        ) from None


def to_yaml(config: Config) -> str:
    """The configuration with every value explicit."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=130, allow_unicode=True)


def commented_yaml() -> str:
    """A configuration file with every field, its default and its explanation."""
    return "".join(
        [
            "# Tercet: SFT -> reward model -> PPO. Run with: tercet run tercet.yaml\n",
            "# Paths are relative to this file. Every field is listed with its default; delete what you do not change.\n\n",
            *_commented(Config, indent=""),
        ]
    )


_EXAMPLES = {
    ("model", "name"): "gpt2",
    ("data", "sft"): "demonstrations.jsonl",
    ("data", "comparisons"): "comparisons.jsonl",
    ("data", "prompts"): "prompts.jsonl",
}


def _commented(section: type[Section], indent: str, parent: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        inner = _section_of(info)
        if inner is not None and not info.is_required() and info.default is None:
            yield f"{indent}# {name}:  # {info.description}\n"
            yield from (f"{indent}# {line[len(indent) :]}" for line in _commented(inner, indent + "  "))
        elif inner is not None:
            yield f"{indent}{name}:  # {info.description}\n"
            yield from _commented(inner, indent + "  ", name)
            yield "" if indent else "\n"
        else:
            default = info.get_default(call_default_factory=True)
            value = _EXAMPLES.get((parent, name), [d.model_dump() for d in default] if _is_section_list(default) else default)
            text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()
            yield f"{indent}{name}: {text}  # {info.description}\n"


def _is_section_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Section)


def _section_of(info: FieldInfo, inside_containers: bool = False) -> type[Section] | None:
    """The section that a field holds: itself, `Section | None`, or the elements of a list or mapping."""
    container = get_origin(info.annotation) in (list, dict)
    kinds = get_args(info.annotation) if not container or inside_containers else ()
    return next((kind for kind in (info.annotation, *kinds) if isinstance(kind, type) and issubclass(kind, Section)), None)


def _read(path: FilePath) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TercetError(f"{path}: no such file; `tercet init` writes a configuration to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise TercetError(f"{path}: cannot be read: {reason}") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        found = "an empty file" if values is None else type(values).__name__
        raise TercetError(f"{path}: expected sections such as `model:` and `data:`, found {found}; see `tercet init`")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise TercetError(f"--set {override}: expected section.key=value, for example --set ppo.kl.coef=0.02")
    node: Any = values
    for depth, part in enumerate(parts[:-1]):
        child = node.get(part)
        if child is None:
            child = {}
        elif not isinstance(child, dict):
            place = ".".join(parts[: depth + 1])
            hint = f"a list: give all of it, as in --set '{place}=[...]'" if isinstance(child, list) else "not a section"
            raise TercetError(f"--set {override}: {place} is {hint}")
        node[part] = dict(child)
        node = node[part]
    alone: Any = parse_yaml(text, f"--set {key}")
    for part in reversed(parts):
        alone = {part: alone}
    alone = _absolute_paths(alone, FilePath.cwd())
    for part in parts:
        alone = alone[part]
    node[parts[-1]] = alone


def _absolute_paths(values: dict[str, Any], base: FilePath) -> dict[str, Any]:
    """Make the values that name files absolute. What may be a hub's name stays as it is, unless there is such a path."""
    absolute: dict[str, Any] = _located(values, _PLACES, base)
    return absolute


def _located(value: Any, place: Any, base: FilePath) -> Any:
    """`value` with what stands at the places of files made absolute."""
    if isinstance(value, dict) and isinstance(place, dict):
        return {key: _located(inner, place.get(key, place.get("*")), base) for key, inner in value.items()}
    if isinstance(value, list) and isinstance(place, list):
        return [_located(inner, place[0], base) for inner in value]
    return place(value, base) if callable(place) and isinstance(value, str) and value else value


def _file(value: str, base: FilePath) -> str:
    return str((base / os.path.expanduser(value)).resolve()) if not os.path.isabs(value) else value


def _file_or_name(value: str, base: FilePath) -> str:
    meant = value.startswith((".", "~")) or value.endswith((".jsonl", ".json", ".csv", ".parquet", ".gz"))
    return _file(value, base) if meant or (base / value).exists() else value


def _function(value: str, base: FilePath) -> str:
    file, _, name = value.rpartition(":")
    return f"{_file(file, base)}:{name}" if file.endswith(".py") else value


_TERM = {"model": _file_or_name, "function": _function}
_PLACES = {
    "output": _file,
    "model": {"name": _file_or_name},
    "data": dict.fromkeys(DataConfig.model_fields, _file_or_name),
    "reward": {"use": _file_or_name},
    "ppo": {"policy": _file_or_name, "value_model": _file_or_name, "rewards": [_TERM]},
    "evaluation": {"gold": _function, "judges": {"*": _TERM}, "policies": {"*": _file_or_name}},
}


def _explain(error: ValidationError) -> Iterator[str]:
    told: set[tuple[str, ...]] = set()
    for problem in error.errors():
        path = _place(problem["loc"])
        if tuple(path) in told:
            continue  # each member of a union complains
        told.add(tuple(path))
        if problem["type"] == "extra_forbidden":
            yield _unknown_key(path)
        elif problem["type"] == "missing":
            yield f"{'.'.join(path)} is missing: {_section_at(path[:-1]).model_fields[path[-1]].description}"
        elif problem["type"] == "model_type":
            keys = ", ".join(_section_at(path).model_fields)
            yield f"{'.'.join(path)}: expected a section (found {problem['input']!r}), whose keys are {keys}"
        else:
            found = problem["input"]
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "literal_error" and len(path) < len(problem["loc"]):
                kind = str(_section_at(path[:-1]).model_fields[path[-1]].annotation)  # unions with `auto`, of rates and of counts
                message += " or a number above 0" if "float" in kind else " or a whole number of at least 1"
            shown = "" if isinstance(found, dict | Section) else f" (found {found!r})"
            if problem["type"] == "list_type" and isinstance(found, dict):
                shown = " (found a single mapping: put [ ] around it)"
            yield f"{'.'.join(path)}: {message}{shown}" if path else f"{message}{shown}"


def _place(location: tuple[int | str, ...]) -> list[str]:
    """Where an error is, without the names that pydantic gives to the members of a union ("int", "literal['auto']")."""
    section: type[Section] | None = Config
    path: list[str] = []
    for part in location:
        info = section.model_fields.get(str(part)) if section is not None else None
        if info is not None:
            section = _section_of(info, inside_containers=True)
        elif section is None and isinstance(part, str):
            continue
        path.append(str(part))
    return path


def _section_at(path: Sequence[str]) -> type[Section]:
    section: type[Section] = Config
    for part in path:
        inner = _section_of(section.model_fields[part], inside_containers=True) if part in section.model_fields else None
        section = inner or section
    return section


def _unknown_key(path: Sequence[str]) -> str:
    known = list(_section_at(path[:-1]).model_fields)
    near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.7)
    flat = {"_".join(place[-depth:]): ".".join(place) for place in _all_keys(Config) for depth in (2, 1)}
    elsewhere = difflib.get_close_matches(path[-1], flat, n=1, cutoff=0.8)
    if near:
        hint = f"did you mean {'.'.join([*path[:-1], near[0]])}?"
    elif elsewhere:
        hint = f"did you mean {flat[elsewhere[0]]}?"
    else:
        hint = f"known here: {', '.join(known)}"
    return f"{'.'.join(path)}: unknown key; {hint}"


def _all_keys(section: type[Section], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, info in section.model_fields.items():
        yield (*prefix, name)
        inner = _section_of(info)
        if inner is not None:
            yield from _all_keys(inner, (*prefix, name))

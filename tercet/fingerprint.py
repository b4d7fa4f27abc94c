"""What a stage's results follow from: its version, its settings, its data's contents, the stages before it."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import json
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tercet.config import Config
from tercet.errors import named_by

STAGES = ("pretrain", "sft", "reward", "ppo", "evaluate")
# Bumped when a stage's results change for the same configuration and data; tests/test_golden.py holds the results.
VERSIONS = {"pretrain": 3, "sft": 4, "reward": 3, "ppo": 4, "evaluate": 5}

_SAMPLING = ["ppo.temperature", "ppo.max_new_tokens", "ppo.stop", "ppo.truncate_after", "data.prompts", "data.eval_prompts"]
_COMMON = ["model", "seed", "machine.dtype", "data.max_prompt_length", "data.held_out"]
# What each stage's results depend on, beside the stages before it: prefixes of configuration keys.
_DEPENDS = {
    "pretrain": [*_COMMON, "pretrain", "data.pretrain", "data.sft"],
    "sft": [*_COMMON, "sft", "data.sft", "data.eval_sft"],
    "reward": [*_COMMON, "reward", "data.comparisons", "data.eval_comparisons", *_SAMPLING],
    "ppo": [*_COMMON, "ppo", "reward.use", "data.prompts", "data.eval_prompts"],
    "evaluate": ["seed", "evaluation", *_SAMPLING],
}
# What evaluations inside the PPO stage depend on beside that; the rest of the section is of the stage after it.
_INSIDE = [f"evaluation.{name}" for name in ("prompts", "greedy", "judges", "gold", "group_by", "main_group")]
# And the card of a reward model from elsewhere, which is written there.
_CARD = ["reward", "data.comparisons", "data.eval_comparisons", "data.held_out"]
_NO_EFFECT = ("ppo.save_rollouts_every", "ppo.kl.limit", "evaluation.batch_size")
_CLASSIFIERS = 2  # as VERSIONS, of those runs alone that have classifiers from elsewhere
# What may be named by a path here: folders with a model, "file.py:name". Their contents count, and not where they are kept.
_PATHS: tuple[str, ...] = ("model.name", "reward.use", "ppo.policy", "ppo.value_model", "ppo.rewards")
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")
_PATHS += ("evaluation.policies", "evaluation.judges", "evaluation.gold")


def fingerprints(
    config: Config, stages: Sequence[str], reward_callables: Sequence[Callable[..., list[float]]] = ()
) -> dict[str, dict[str, Any]]:
    """The fingerprint of each of the stages, given in order: {"version", "settings", "data", "upstream"}, all of it JSON."""
    flat = dict(_flatten(config.model_dump(mode="json")))
    prints: dict[str, dict[str, Any]] = {}
    contents, folders = cache(_contents), cache(_contents_of_folder)  # several stages read the same files
    for stage in stages:
        depends = [*_DEPENDS[stage], *(_INSIDE if stage == "ppo" and config.ppo.evaluate_every else [])]
        depends += _CARD if stage == "evaluate" and config.reward.use is not None else []
        keys = [key for key in flat if _under(key, depends) and key not in _NO_EFFECT and not _is_timeout(key, flat)]
        settings: dict[str, Any] = {}
        data: dict[str, Any] = {}
        for key in keys:
            with named_by(key):
                if key.startswith("data.") and isinstance(flat[key], str):
                    data[key] = contents(flat[key])
                else:
                    settings[key] = _named(flat[key], key, data, folders) if _under(key, _PATHS) else flat[key]
        if stage == "pretrain":
            settings["model.scratch.positions"] = config.positions
        if stage in ("pretrain", "sft") and config.ppo.stop:
            settings["ppo.stop"] = config.ppo.stop  # special tokens among them end the texts of these stages too
        if settings.get("ppo.interpolation") == 1.0:
            settings.pop("ppo.interpolation")  # runs from before there was such a setting are as they were
        if flat["machine.dtype"] == "auto":
            settings.pop("machine.dtype", None)
        if stage in ("ppo", "evaluate") and any(term.kind == "classifier" for term in config.terms.values()):
            settings["what classifiers read"] = _CLASSIFIERS
        if reward_callables and stage in ("ppo", "evaluate"):
            data["reward function"] = {
                f"{place + 1} {getattr(call, '__qualname__', type(call).__name__)}": digest(_what_it_does(call))
                for place, call in enumerate(reward_callables)
            }
        upstream = {name: digest(prints[name]) for name in stages[: stages.index(stage)]}
        prints[stage] = {"version": VERSIONS[stage], "settings": settings, "data": data, "upstream": upstream}
    return prints


def _is_timeout(key: str, flat: Mapping[str, Any]) -> bool:
    """Whether the key is a reward function's timeout: what it may take, not what it gives."""
    term, _, name = key.rpartition(".")
    return name == "timeout" and f"{term}.kind" in flat


def differences(there: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """In words, what changed between two fingerprints of one stage; nothing if they are the same."""
    if there["version"] != wanted["version"]:
        yield f"stage version was {there['version']}, is {wanted['version']}"
    for part, noun in (("settings", ""), ("data", "contents of "), ("upstream", "stage ")):
        before, now = there[part], wanted[part]
        for key in sorted(before.keys() | now.keys()):
            chosen_anew = key == "machine.dtype" and key not in now  # auto, and the run folder no longer says what it came to
            if before.get(key) != now.get(key) and not chosen_anew:
                changed = f"changed{_files_of(before.get(key), now.get(key))}"
                yield f"{noun}{key} " + (f"was {before.get(key)!r}, is {now.get(key)!r}" if part == "settings" else changed)


def _files_of(before: Any, now: Any) -> str:
    """Of two sets of files with their hashes, those that differ, in words; nothing where they are no such sets."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return ""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return f": {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _named(value: Any, key: str, data: dict[str, Any], folders: Callable[[Path], dict[str, str]]) -> Any:
    """The value with its paths replaced by names; what they hold is added to `data`, under the key."""
    if isinstance(value, list):
        return [_named(item, f"{key}.{place}", data, folders) for place, item in enumerate(value)]
    if isinstance(value, dict):
        return {
            name: _named(item, f"{key}.{name}", data, folders)
            for name, item in value.items()
            if not (name == "timeout" and "kind" in value)
        }
    if not isinstance(value, str):
        return value
    file, _, function = value.rpartition(":")
    if not file.endswith(".py") and file and key.endswith((".function", ".gold")):
        data[f"{key} {file}"] = _contents_of_code(_file_of_module(file))
        return value
    if file.endswith(".py"):
        data[f"{key} {Path(file).name}"] = _contents_of_code(Path(file))
        return f"{Path(file).name}:{function}"
    if not key.endswith((".kind", ".label")) and Path(value).is_dir():
        data[key] = folders(Path(value))
        return Path(value).name
    return value


def _what_it_does(call: Any) -> list[Any]:
    """A Python function as JSON: its source (its code where there is none), and what plain values are bound to it."""
    if isinstance(call, functools.partial):
        return ["partial", _what_it_does(call.func), _plain([call.args, call.keywords])]
    function = getattr(call, "__func__", call)
    if not hasattr(function, "__code__"):
        if not hasattr(type(call).__call__, "__code__"):  # a function that is not written in Python
            return ["built in", f"{getattr(call, '__module__', '')}.{getattr(call, '__qualname__', type(call).__qualname__)}"]
        return ["object", _what_it_does(type(call).__call__), _plain(getattr(call, "__dict__", {}))]
    try:
        does = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError, SyntaxError):  # typed at a prompt
        does = _code(function.__code__)
    bound = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    return [does, _plain([function.__defaults__, function.__kwdefaults__, bound])]


def _code(code: types.CodeType) -> str:
    """What a function computes, without where it was written."""
    constants = [_code(part) if isinstance(part, types.CodeType) else repr(part) for part in code.co_consts]
    return f"{code.co_code.hex()} {constants} {code.co_names}"


def _plain(value: Any) -> Any:
    """Numbers, texts and containers of them; anything else by its type's name, as its text may differ from process to process."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


def functions_of(config: Config) -> list[str]:
    """The Python functions that the configuration names."""
    return [text for text in (*(term.function for term in config.terms.values()), config.evaluation.gold) if text]


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _under(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _contents(source: str) -> dict[str, str]:
    from tercet.data.files import fingerprint

    return fingerprint(source)


def _contents_of_code(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"


def _file_of_module(name: str) -> Path:
    """The file that `import name` would read; one that is not there for what has none."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        found = None
    finally:
        sys.path.pop(0)
    return Path(found.origin) if found is not None and found.origin else Path("missing.py")


def _contents_of_folder(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES)
    prints = {}
    for path in files:
        with path.open("rb") as file:
            prints[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return prints

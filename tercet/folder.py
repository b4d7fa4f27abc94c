"""What is in a run folder before a run begins: another run's choices and results, or files that no run has made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tercet.config import Config, parse_yaml
from tercet.errors import TercetError

FOLDERS = {"pretrain": "pretrain", "sft": "sft", "reward": "reward", "ppo": "ppo", "evaluate": "evaluation"}


def with_earlier_choices(config: Config) -> Config:
    """Take over what `auto` came to when this run folder was begun, so that a resumed run computes alike."""
    earlier = earlier_machine(Path(config.output))
    if earlier is None:
        return config
    chosen = {key: earlier[key] for key, value in config.machine.model_dump().items() if value == "auto" and key in earlier}
    return config.model_copy(update={"machine": config.machine.model_copy(update=chosen)})


def with_own_base(config: Config) -> Config:
    """A model that Python gave lies in the run folder: where that was moved, it is looked for there."""
    name = Path(config.model.name or "")
    own = Path(config.output) / name.name
    if not name.name.startswith("base-") or name.exists() or not own.is_dir():
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"name": str(own)})})


def require_no_others_files(folder: Path) -> None:
    """TercetError if a run here would write over files that no run has made: a project's own folder as output, for one."""
    written = folder / "config.yaml"
    if has_begun(folder):
        return
    if written.exists():
        values = parse_yaml(written.read_text(encoding="utf-8"), str(written))
        if isinstance(values, dict) and set(values) >= set(Config.model_fields) and values["output"] == str(folder):
            return  # a run wrote it and was stopped before its first stage
    found = [name for name in ("config.yaml", "summary.json", "report.html", *FOLDERS.values()) if (folder / name).exists()]
    if found == ["pretrain"] and all(path.name.removeprefix(".").startswith("model") for path in (folder / "pretrain").iterdir()):
        return  # a model from scratch is made before anything else is written
    if found:
        raise TercetError(
            f"output: {folder} holds no run, but has {found[0]!r} already, which a run would write over: choose a folder of its own, such as "
            f"{folder / 'run'}"
        )


def has_begun(folder: Path) -> bool:
    """Whether a run has begun a stage there."""
    return any((folder / own / mark).exists() for own in FOLDERS.values() for mark in ("started.json", "done.json"))


def require_own_folder(source: Path, output: Path) -> None:
    """TercetError if `source` is the configuration that a run wrote into its folder, and that folder is now somewhere else than its
    `output` says: what is meant for the copy would be done to the original."""
    folder = source.resolve().parent
    if source.name == "config.yaml" and has_begun(folder) and folder != output.resolve():
        raise TercetError(
            f"{source}: its run folder was moved or copied, for its output is {output}: add --set output={folder} to go on here, or "
            f"--set output={output} to go on there"
        )


def earlier_machine(folder: Path) -> dict[str, Any] | None:
    """The machine that a run folder was made with, whatever is asked for now; None before it has a configuration."""
    path = folder / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise TercetError(f"output: {folder} is a file, a run needs a folder: choose another name")
    if not path.exists():
        return None
    values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    earlier = values.get("machine") if isinstance(values, dict) else None
    if not isinstance(earlier, dict):
        raise TercetError(
            f"{path} has no machine section: it was damaged from outside; delete it to have the machine chosen anew"
        )
    return earlier


def read_json(path: Path) -> Any:
    """What a file of the run folder holds, None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise TercetError(
            f"{path} is not valid JSON: it was damaged from outside; delete it to have its stage looked at anew"
        ) from None

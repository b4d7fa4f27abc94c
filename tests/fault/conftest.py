"""The undisturbed run that every disturbed one must equal, as a whole and stage by stage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fault.harness import FOLDERS, Fault, contents, tercet, write_configuration

Stages = Callable[[str], "Undisturbed"]


@dataclass(frozen=True)
class Undisturbed:
    """What a command does that nothing disturbs: the folder it starts from (configuration, data, run folder so far), the files of the
    run folder at its end, the changes on the way one by one, and the processor time."""

    command: str
    before: Path
    files: dict[str, Any]
    changes: list[str]
    cpu_seconds: float

    def copy(self, folder: Path) -> Path:
        """The same start in a new folder; gives its configuration, whose output is FOLDER/run."""
        shutil.copytree(self.before, folder)
        config = folder / "tercet.yaml"
        config.write_text(config.read_text().replace(str(self.before), str(folder)))
        return config


def observe(command: str, before: Path, folder: Path) -> Undisturbed:
    """Let the command run in a copy, with its changes written down; then without."""
    found, seconds = [], 0.0
    for place, fault in (
        ("watched", Fault("count", folder=str(folder / "watched/run"), record=str(folder / "record"))),
        ("left", None),
    ):
        config = Undisturbed(command, before, {}, [], 0.0).copy(folder / place)
        status, output = tercet(command, config, log=folder / f"{place}.log", fault=fault)
        assert status == 0, output
        found.append(contents(folder / place / "run"))
        seconds = float((folder / f"{place}.log.cpu").read_text())
    assert found[0] == found[1], "the run itself is not repeatable"
    return Undisturbed(command, before, found[0], (folder / "record").read_text().splitlines(), seconds)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The whole run, from nothing."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "before").mkdir()
    write_configuration(folder / "before")
    return observe("run", folder / "before", folder)


@pytest.fixture(scope="session")
def stages(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """stages("ppo"): that stage alone, from a run folder with those before it; "evaluate": the rest of the run, with its report."""
    finished = undisturbed.before.parent / "watched"

    @cache
    def stage(name: str) -> Undisturbed:
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(undisturbed.before, folder / "before")
        config = folder / "before/tercet.yaml"
        config.write_text(config.read_text().replace(str(undisturbed.before), str(folder / "before")))
        (folder / "before/run").mkdir()
        shutil.copy(finished / "run/config.yaml", folder / "before/run")
        for earlier in list(FOLDERS)[: list(FOLDERS).index(name)]:
            shutil.copytree(finished / "run" / FOLDERS[earlier], folder / "before/run" / FOLDERS[earlier])
        seen = observe("run" if name == "evaluate" else name, folder / "before", folder)
        same = [file for file, content in seen.files.items() if file != "summary.json" and content != undisturbed.files[file]]
        assert same == [], "a stage alone gives what it gives in the whole run"
        return seen

    return stage

"""The undisturbed run that every disturbed one must equal."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fault.harness import Fault, contents, tercet, write_configuration


@dataclass(frozen=True)
class Undisturbed:
    """A finished run: its configuration, its files, its changes to the run folder one by one, the processor time it took."""

    config: Path
    files: dict[str, Any]
    changes: list[str]
    cpu_seconds: float

    def copy(self, folder: Path) -> Path:
        """The same configuration and data in a new folder, with its output there."""
        shutil.copytree(self.config.parent, folder, ignore=shutil.ignore_patterns("run", "*.log", "record"))
        file = folder / "tercet.yaml"
        file.write_text(file.read_text().replace(str(self.config.parent), str(folder)))
        return file


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_configuration(folder)
    fault = Fault("count", folder=str(folder / "run"), record=str(folder / "record"))
    status, output = tercet("run", config, log=folder / "first.log", fault=fault)
    assert status == 0, output
    files = contents(folder / "run")
    shutil.rmtree(folder / "run")
    status, output = tercet("run", config, log=folder / "second.log")
    assert status == 0, output
    assert contents(folder / "run") == files, "the run itself is not repeatable"
    cpu_seconds = float((folder / "second.log.cpu").read_text())
    yield Undisturbed(config, files, (folder / "record").read_text().splitlines(), cpu_seconds)

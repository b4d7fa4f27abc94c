"""Files and folders whole or not at all; what is said of a failing disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from tercet.runtime.files import disk_errors_explained, folder_beside, remove_folder, replace_folder, write_json
from tercet.types import TercetError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_json_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a/b.json"
    write_json(path, {"x": 1})

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 1}


def test_replace_folder(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "old/more").touch()
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert names(tmp_path) == ["old"] and names(tmp_path / "old") == ["file"]
    assert (tmp_path / "old/file").read_text() == "new"


def test_a_folder_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the fault suite: killed while the old model was removed, the run was stuck on a model without its tokenizer."""
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)

    def dies(path: Path, **_: Any) -> None:
        if path.exists():
            next(path.iterdir()).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            replace_folder(tmp_path / "new", tmp_path / "old")
    assert names(tmp_path) == [".old.removed", "old"] and (tmp_path / "old/file").read_text() == "new"
    remove_folder(tmp_path / "old")
    assert names(tmp_path) == [], "and the next removal takes along what that one left"
    remove_folder(tmp_path / "old")


def test_a_folder_to_write_in_is_empty(tmp_path: Path) -> None:
    (tmp_path / ".model.writing").mkdir()
    (tmp_path / ".model.writing/of_a_killed_process").touch()
    assert names(folder_beside(tmp_path / "model")) == [] and folder_beside(tmp_path / "a/model").is_dir()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/run/a.json"),
            r"^/run/a.json: No space left on device\. .* make room",
        ),
        (OSError(errno.EROFS, "Read-only file system"), r"^RUN: Read-only file system\. .* choose another output"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), r"^RUN: No space left on device\. .* make room"),
        (Exception("Disk quota exceeded (os error 122)"), r"^RUN: Disk quota exceeded\. .* quota"),
    ],
)
def test_a_failing_disk_is_one_message(error: Exception, told: str) -> None:
    with pytest.raises(TercetError, match=told) as caught, disk_errors_explained(Path("RUN")):
        raise error
    assert "the last checkpoint are kept" in str(caught.value) and "the same command goes on" in str(caught.value)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), ValueError("os error 28"), TercetError("mine")])
def test_other_errors_are_left_alone(error: Exception) -> None:
    """A file that should be there and is not is our own mistake: a traceback says more about it."""
    with pytest.raises(type(error)) as caught, disk_errors_explained(Path("RUN")):
        raise error
    assert caught.value is error

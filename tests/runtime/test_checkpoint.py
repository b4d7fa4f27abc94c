"""Exact-resume state on disk: whole or not there, checked, pruned, never pickle."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tercet.runtime import checkpoint as module
from tercet.runtime.checkpoint import Checkpoints, random_state, restore_random_state, seed_everything
from tercet.types import TercetError


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, {"at": step}, {"model": {"w": torch.full((3,), float(step))}})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    half = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    wide, whole, flags = torch.tensor(0.1, dtype=torch.float64), torch.arange(4), torch.tensor([True, False])
    view = torch.arange(6.0).view(2, 3).t()  # not contiguous
    values = {"a": 0.1 + 0.2, "b": [1, None, "é\u2028"], "c": {"d": True}}
    checkpoints.save(7, values, {"one": {"half": half, "wide": wide}, "two": {"whole": whole, "flags": flags, "view": view}})
    found, complaints = checkpoints.latest()
    assert found is not None and complaints == []
    assert (found.step, found.values) == (7, values)
    for group, name, wanted in (("one", "half", half), ("one", "wide", wide), ("two", "whole", whole), ("two", "view", view)):
        assert found.tensors[group][name].dtype == wanted.dtype
        assert torch.equal(found.tensors[group][name], wanted)


def test_tied_tensors_are_both_there(tmp_path: Path) -> None:
    weight = torch.arange(3.0)
    Checkpoints(tmp_path, keep=1).save(1, {}, {"model": {"a": weight, "b": weight}})
    found, _ = Checkpoints(tmp_path, keep=1).latest()
    assert found is not None and torch.equal(found.tensors["model"]["a"], found.tensors["model"]["b"])


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path, keep=1), 3)
    assert names(tmp_path) == ["step-000000003"]
    assert names(tmp_path / "step-000000003") == ["manifest.json", "model.safetensors", "state.json"]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15, 20):
        save(checkpoints, step)
    assert names(tmp_path) == ["step-000000015", "step-000000020"]


def test_nothing_there() -> None:
    assert Checkpoints(Path("/nonexistent/checkpoints"), keep=1).latest() == (None, [])


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, file: str, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 5)
    save(checkpoints, 10)
    path = tmp_path / "step-000000010" / file
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    found, complaints = checkpoints.latest()
    assert found is not None and found.step == 5 and found.tensors["model"]["w"].tolist() == [5.0] * 3
    assert len(complaints) == 1 and "step-000000010 is damaged" in complaints[0]


def test_a_damaged_newer_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    """With keep=1 the pruning by number alone would keep the damaged one and remove the one just written."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 10)
    (tmp_path / "step-000000010/state.json").write_text("{}")
    save(checkpoints, 6)  # gone on from the beginning, stopped early
    found, complaints = checkpoints.latest()
    assert found is not None and found.step == 6 and complaints == []


@pytest.mark.parametrize("moment", ["save_file", "os.replace", "_hash"])
def test_a_failed_save_leaves_what_was_there(tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 5)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os if moment == "os.replace" else module, moment.removeprefix("os."), full)
        with pytest.raises(OSError, match="No space"):
            save(checkpoints, 10)
    found, complaints = checkpoints.latest()
    assert found is not None and found.step == 5 and complaints == []
    save(checkpoints, 10)
    assert names(tmp_path) == ["step-000000005", "step-000000010"], "the leftovers of the failed save are gone"


def test_dying_between_the_two_renames_of_a_rewrite_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An iteration that is interrupted twice writes the same step twice."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 5)
    real = os.replace

    def dies(source: Any, target: Any) -> None:
        if ".writing" in str(source):
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            save(checkpoints, 5)
    assert ".replaced-step-000000005" in names(tmp_path) and "step-000000005" not in names(tmp_path)
    checkpoints.recover()
    found, _ = checkpoints.latest()
    assert found is not None and found.step == 5
    save(checkpoints, 5)
    assert names(tmp_path) == ["step-000000005"]


def test_dying_after_the_two_renames_of_a_rewrite_does_not_block_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was moved aside is still there: to move the same name there once more would fail."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 5)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", lambda path, **_: None)  # dies before any cleaning up
        save(checkpoints, 5)
    assert names(tmp_path) == [".replaced-step-000000005", "step-000000005"]
    save(checkpoints, 5)
    assert names(tmp_path) == ["step-000000005"]
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", lambda path, **_: None)
        save(checkpoints, 5)
    checkpoints.recover()
    assert names(tmp_path) == ["step-000000005"]


@pytest.mark.parametrize("number", [1, 99], ids=["older", "newer"])
def test_another_format_is_refused_with_a_way_out(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "FORMAT", number)
        save(Checkpoints(tmp_path, keep=1), 5)
    with pytest.raises(TercetError, match=rf"format {number}, this version of Tercet reads 2.*--from"):
        Checkpoints(tmp_path, keep=1).latest()


def test_strange_names_in_the_folder_are_passed_over(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path, keep=1), 5)
    (tmp_path / "step-000000009 (copy)").mkdir()
    found, _ = Checkpoints(tmp_path, keep=1).latest()
    assert found is not None and found.step == 5


def test_random_state_round_trip() -> None:
    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.normal(), random.random(), random.gauss(0, 1)

    seed_everything(11)
    random.gauss(0, 1)  # leaves a cached value behind, and so does numpy's
    np.random.normal()
    state = json.loads(json.dumps(random_state()))
    first = draw()
    assert draw() != first
    restore_random_state(state)
    assert draw() == first


def test_seed_everything_sets_all_three() -> None:
    draws = []
    for seed in (1, 1, 2):
        seed_everything(seed)
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2]))

"""Exact-resume state: safetensors and JSON, written beside and renamed into place, checked by hash when read. Never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tercet.errors import TercetError

FORMAT = 1


@dataclass
class Checkpoint:
    """What one checkpoint holds: JSON values, and groups of named tensors."""

    step: int
    values: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


class Checkpoints:
    """The checkpoints of one stage, in RUN/<stage>/checkpoints; `keep` of them, the newest."""

    def __init__(self, folder: Path, *, keep: int):
        self._folder = folder
        self._keep = keep

    def save(self, step: int, values: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        """Write atomically: a reader sees the whole checkpoint or none of it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob(".writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = self._folder / f".writing-{step:09d}"
        temporary.mkdir()
        for group, named in tensors.items():
            save_file(
                {name: value.detach().cpu().contiguous().clone() for name, value in named.items()},
                temporary / f"{group}.safetensors",
            )
        state = {"format": FORMAT, "step": step, "values": values}
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        hashes = {path.name: _hash(path) for path in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(hashes), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        final = self._path(step)
        replaced = self._folder / f".replaced-{final.name}"
        if final.exists():  # an iteration that was interrupted twice: the one saved before stays until this one is in place
            os.replace(final, replaced)
        os.replace(temporary, final)
        _sync(self._folder)
        shutil.rmtree(replaced, ignore_errors=True)
        steps = self._steps()
        # Steps beyond this one were damaged, or the run would have gone on from them: they must not count as kept.
        for old in [*(s for s in steps if s > step), *[s for s in steps if s <= step][: -self._keep]]:
            shutil.rmtree(self._path(old), ignore_errors=True)

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, and a sentence for each newer one that is not."""
        complaints: list[str] = []
        for replaced in self._folder.glob(".replaced-step-*"):  # the process died between two renames
            final = self._folder / replaced.name.removeprefix(".replaced-")
            if not final.exists():
                os.replace(replaced, final)
        for step in reversed(self._steps()):
            try:
                return self._read(self._path(step)), complaints
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                complaints.append(
                    f"{self._path(step)} is damaged ({error}); going back to the one before it, or to the beginning"
                )
        return None, complaints

    def clear(self) -> None:
        """Remove them all: the stage is finished."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self, path: Path) -> Checkpoint:
        hashes = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, wanted in hashes.items():
            if _hash(path / name) != wanted:
                raise ValueError(f"{name} does not match its checksum")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise TercetError(
                f"{path} has checkpoint format {state['format']}, this version of Tercet reads {FORMAT}: "
                "finish the run with the version that began it, or start the stage anew with --from"
            )
        tensors = {Path(name).stem: load_file(path / name) for name in hashes if name.endswith(".safetensors")}
        return Checkpoint(state["step"], state["values"], tensors)

    def _steps(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        numbers = (path.name.removeprefix("step-") for path in self._folder.glob("step-*"))
        return sorted(int(number) for number in numbers if number.isdecimal())

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:09d}"


def seed_everything(seed: int) -> None:
    """Start torch's, numpy's and Python's global generators from a seed: what dropout and users' functions draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's global generators, as JSON values."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo everything that drew from the global generators since `random_state`."""
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in its place; the old one is gone only when the new one is complete on disk."""
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _sync(final.parent)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

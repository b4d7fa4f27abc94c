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

from tercet.errors import OtherFormat
from tercet.runtime.files import sync

FORMAT = 2  # 2: the random states of every rank
CPU = torch.device("cpu")


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
            save_file(_apart(named), temporary / f"{group}.safetensors")
        state = {"format": FORMAT, "step": step, "values": values}
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        hashes = {path.name: _hash(path) for path in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(hashes), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        final = self._path(step)
        replaced = self._folder / f".replaced-{final.name}"
        if final.exists():  # an iteration that was interrupted twice: the one saved before stays until this one is in place
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(final, replaced)
        os.replace(temporary, final)
        sync(self._folder)
        shutil.rmtree(replaced, ignore_errors=True)
        steps = self._steps()
        # Steps beyond this one were damaged, or the run would have gone on from them: they must not count as kept.
        for old in [*(s for s in steps if s > step), *[s for s in steps if s <= step][: -self._keep]]:
            shutil.rmtree(self._path(old), ignore_errors=True)

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, and a sentence for each newer one that is not."""
        complaints: list[str] = []
        for step in reversed(self._steps()):
            try:
                return self._read(self._path(step)), complaints
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                complaints.append(
                    f"{self._path(step)} is damaged ({error}); going back to the one before it, or to the beginning"
                )
        return None, complaints

    def recover(self) -> None:
        """Put back what a process that died between the two renames of `save` had moved aside. For one rank alone, before reading."""
        for replaced in self._folder.glob(".replaced-step-*"):
            final = self._folder / replaced.name.removeprefix(".replaced-")
            if final.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                os.replace(replaced, final)

    def _read(self, path: Path) -> Checkpoint:
        hashes = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, wanted in hashes.items():
            if _hash(path / name) != wanted:
                raise ValueError(f"{name} does not match its checksum")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise OtherFormat(
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


def random_state(device: torch.device = CPU) -> dict[str, Any]:
    """The states of torch's, numpy's and Python's global generators and of the device's own, as JSON values."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state().tolist(),
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    if device.type == "cuda":  # dropout on a GPU draws from the GPU's generator
        state["cuda"] = torch.cuda.get_rng_state(device).tolist()
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state().tolist()
    return state


def restore_random_state(state: dict[str, Any], device: torch.device = CPU) -> None:
    """Undo everything that drew from the global generators since `random_state`."""
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(torch.tensor(state["mps"], dtype=torch.uint8))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def _apart(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each in memory that no other one shares, as the file format demands; copied only where they are not."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in named.items():
        value = tensor.detach().cpu().contiguous()
        memory = value.untyped_storage()
        found[name] = value.clone() if memory.data_ptr() in taken or memory.nbytes() > value.nbytes else value
        taken.add(memory.data_ptr())
    return found


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

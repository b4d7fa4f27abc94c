"""Checkpoints tensor by tensor: what their files hold, and models that are read or saved with one tensor more in memory than they need."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def stored_tensors(source: str) -> dict[str, Path]:
    """The file that holds each tensor of a checkpoint, a folder or a hub name; empty if it is not stored as safetensors."""
    single = _file(source, _FILE)  # where both are, transformers reads this one
    if single is not None:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    index = _file(source, _INDEX)
    if index is None:
        return {}
    files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    paths = {file: _file(source, file) for file in set(files.values())}
    return {name: path for name, file in files.items() if (path := paths[file]) is not None}


def _file(source: str, name: str) -> Path | None:
    with contextlib.suppress(OSError):  # whatever is wrong is said where the model is loaded
        found = cached_file(source, name)
        return None if found is None else Path(found)
    return None


def stored_in_bfloat16(source: str) -> bool:
    """Whether all that a checkpoint holds is in bfloat16, so that a model in that dtype is the same."""
    found = set()
    for path in set(stored_tensors(source).values()):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found == {"BF16"}


def saves_piecewise(
    model: PreTrainedModel, source: str, finish: Callable[[str, Tensor], Tensor], own: Mapping[str, Tensor]
) -> bool:
    """Let `save_pretrained` of a model on the meta device write finish(name, tensor) of each of its tensors, in float32, from those that
    the checkpoint `source` has, and `own` ones as they are. False if the checkpoint has other names for them (then nothing is
    changed): transformers brings those into the model's order only when it loads all of them."""
    places = _places(model, source)
    if any(name not in places and name not in own for name in _saved_names(model)) or _ties_differ(model, places):
        return False

    def read(name: str) -> Tensor:
        if name in own:
            return own[name]
        return finish(name, _tensor(*places[name]))

    model.__dict__["save_pretrained"] = functools.partial(_save, model, read)
    return True


def parameters_of(model: PreTrainedModel, source: str) -> Callable[[str], Tensor] | None:
    """What gives each parameter of a model, by its name there, as the checkpoint `source` has it, one in memory at a time; None if the
    checkpoint has other names for them."""
    places = _places(model, source)
    if any(name not in places for name, _ in model.named_parameters()) or _ties_differ(model, places):
        return None
    return lambda name: _tensor(*places[name])


@torch.no_grad()
def reads_piecewise(model: PreTrainedModel, source: str, dtypes: Callable[[Tensor], torch.dtype]) -> bool:
    """Give a model whose parameters are on the meta device those of the checkpoint `source`, each in dtypes(parameter): no file is in
    memory beside the model. False if transformers has to read it: the checkpoint has other names for them, tensors of other shapes, or
    several for what the model ties. The model is of no use then."""
    places = _places(model, source)
    if _ties_differ(model, places):
        return False
    for name in _saved_names(model):
        layer, _, last = name.rpartition(".")
        module = model.get_submodule(layer)
        wanted = getattr(module, last)
        found = _tensor(*places[name]) if name in places else None
        if found is None or found.shape != wanted.shape:
            return False
        if isinstance(wanted, nn.Parameter):
            setattr(module, last, nn.Parameter(found.to(dtypes(wanted))))
        else:
            wanted.copy_(found)
    model.tie_weights()
    return not any(parameter.is_meta for parameter in model.parameters())


def _places(model: PreTrainedModel, source: str) -> dict[str, tuple[Path, str]]:
    """The tensors of a model that a checkpoint has, tied ones under each of their names: files, and their names there."""
    stored, prefix = stored_tensors(source), f"{model.base_model_prefix}."
    found = {}
    for name in [*_saved_names(model), *_tied_names(model)]:
        key = name if name in stored else name.removeprefix(prefix)  # a base model's checkpoint has no prefix
        if key in stored:
            found[name] = stored[key], key
    return found


def _tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Every further name of a tied parameter -> its first."""
    first: dict[int, str] = {}
    pairs = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: other for name, other in pairs.items() if name != other}


def _ties_differ(model: PreTrainedModel, places: Mapping[str, tuple[Path, str]]) -> bool:
    """Whether the checkpoint has different tensors for what the configuration ties: transformers leaves them apart."""
    both = [(places[name], places[other]) for name, other in _tied_names(model).items() if name in places and other in places]
    return any(not torch.equal(_tensor(*one), _tensor(*other)) for one, other in both)


def _saved_names(model: PreTrainedModel) -> list[str]:
    """One name for each tensor that belongs into a checkpoint."""
    names = [name for name, _ in model.named_parameters()]  # of tied ones the first
    return names + sorted(model.state_dict().keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)})


def _save(model: PreTrainedModel, read: Callable[[str], Tensor], folder: Path) -> None:
    PreTrainedModel.save_pretrained(model, folder, state_dict={})  # everything but the weights
    state = model.state_dict()
    _write(folder / _FILE, {name: state[name].shape for name in _saved_names(model)}, read)


def _tensor(path: Path, name: str) -> Tensor:
    """One tensor of a file, which is opened for it alone: what was read of an open file counts as this process's memory."""
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _write(path: Path, shapes: Mapping[str, torch.Size], read: Callable[[str], Tensor]) -> None:
    """A safetensors file of float32 tensors of these shapes, with one of them in memory at a time: the library's own writer wants them all
    at once. Rows that read(name) does not have are 0."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            tensor = read(name).detach().float().cpu().contiguous()
            assert tensor.shape[1:] == shape[1:] and tensor.dim() == len(shape) and (not shape or len(tensor) <= shape[0]), name
            tensor.numpy().tofile(file)
            missing = math.prod(shape) - tensor.numel()
            file.write(bytes(4 * missing))

"""Metrics to TensorBoard, Weights & Biases or trackio: the numbers of every line of metrics.jsonl, under the line's own step.

Each stage is a run of its own, so that steps count from 1 in each; they share a group named after the run folder. Nothing goes over
the network unless the user's environment says so: W&B writes files (WANDB_MODE=online uploads), the other two are local.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tercet.errors import TercetError
from tercet.runtime.files import write_json

Send = Callable[[dict[str, float], int], None]


class Tracker:
    """Where a stage's metrics go beside its folder. kind: "tensorboard", "wandb" or "trackio"; group: the run; stage: its name there.

    after: the highest step that an earlier process has sent, 0 if there was none. A resumed stage computes the steps after its checkpoint
    again, with the same results: those that were sent already are not sent twice.
    """

    def __init__(self, kind: str, folder: Path, group: str, stage: str, after: int):
        self._stage = stage
        self._after = after
        self._send, self._close = _OPENERS[kind](folder, group, stage)

    def send(self, step: int, row: Mapping[str, Any]) -> None:
        """The numbers of a line of metrics."""
        if step > self._after:
            numbers = {f"{self._stage}/{key}": float(value) for key, value in row.items() if isinstance(value, int | float)}
            self._send(numbers, step)

    def close(self) -> None:
        self._close()


def check_installed(names: Sequence[str]) -> None:
    """TercetError if the package of one of these trackers is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise TercetError(
                f"trackers: {name} is not installed: pip install {name} (or pip install 'tercet[trackers]' for all), or remove it there"
            )


def _tensorboard(folder: Path, group: str, stage: str) -> tuple[Send, Callable[[], None]]:
    # In the stage's folder, so that redoing the stage begins anew. `tensorboard --logdir RUN` finds all stages.
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def send(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # a kill must not lose what will not be sent again

    return send, writer.close


def _wandb(folder: Path, group: str, stage: str) -> tuple[Send, Callable[[], None]]:
    run = importlib.import_module("wandb").init(
        project="tercet",
        group=group,
        name=f"{group} {stage}",
        id=_run_id(folder),
        resume="allow",
        dir=str(folder),
        mode=os.environ.get("WANDB_MODE", "offline"),
        reinit="create_new",
    )
    return lambda numbers, step: run.log(numbers, step=step), run.finish


def _trackio(folder: Path, group: str, stage: str) -> tuple[Send, Callable[[], None]]:
    name = f"{group} {stage} {_run_id(folder)}"
    run = importlib.import_module("trackio").init(project="tercet", name=name, group=group, resume="allow", embed=False)
    return lambda numbers, step: run.log(numbers, step=step), run.finish


def _run_id(folder: Path) -> str:
    """A name that a resumed stage finds again; a stage that is redone gets another one, because its folder is new."""
    path = folder / "tracker.json"
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:8]})
    return str(json.loads(path.read_text(encoding="utf-8"))["id"])


_OPENERS: dict[str, Callable[[Path, str, str], tuple[Send, Callable[[], None]]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}

"""`tercet doctor`: what can be known to be wrong before hours are spent, and how much memory and time each stage will take.

The checks are those of `tercet run` (jobs/preflight.py: mistakes, jobs/outlook.py: what deserves a warning); the dry run at the end
takes a step or two of each stage on a few records, by the same code, in a temporary folder.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tercet.config import Config, load_config
from tercet.data.files import write_parquet
from tercet.errors import TercetError
from tercet.jobs.memory import GIB, Need
from tercet.jobs.outlook import KINDS, Check, Lengths, measure, memory, outlook, sides_of
from tercet.jobs.workshop import Workshop
from tercet.pipeline import Pipeline
from tercet.runtime.machine import free_memory, measured_rate
from tercet.runtime.metrics import JsonLines
from tercet.runtime.progress import console
from tercet.runtime.stage import Interrupt
from tercet.types import Comparison, Demonstration, Text

MOST_RECORDS = 64  # per step of the dry run
DRY_RUN_S = 20.0  # of arithmetic, at the machine's measured rate, in one stage: larger models take fewer records
TRAINING = ("pretrain", "sft", "reward", "ppo")


def examine(config: Config, *, quick: bool = False) -> bool:
    """Print every check, and a table of memory and time by stage; False if any check is an error. quick: without the dry run."""
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    out, fine = Console(highlight=False), True
    doctor = Doctor(config)
    for check in doctor.checks(quick=quick):
        out.print(f"[{colours[check.level]}]{check.level:>7}[/]  ", end="")
        out.print(check.text, markup=False)
        fine &= check.level != "error"
    if doctor.needs:
        out.print(_table(doctor.needs, doctor.seconds))
    return fine


class Doctor:
    """One examination. `needs` and `seconds` are there when `checks` has come to its end: memory, and time as far as it was measured."""

    def __init__(self, config: Config):
        self._config = config
        self.needs: list[Need] = []
        self.seconds: dict[str, float] = {}

    def checks(self, *, quick: bool = False) -> Iterator[Check]:
        """Mistakes; if there are none, what deserves a look, then the dry run."""
        try:
            pipeline = Pipeline(self._config)
            stages = pipeline.stages()
            records, mistakes = pipeline.inspect(stages)
        except TercetError as error:
            yield Check("error", str(error))
            return
        yield from (Check("error", mistake) for mistake in mistakes)
        if not stages:
            yield Check("error", "there is nothing to do: set data.sft, data.comparisons or data.prompts")
        if mistakes or not stages:
            return
        yield Check("ok", f"stages: {', '.join(stages)}")
        with _workplace(_place(pipeline.folder)) as place, _quiet():
            folder = place / "run"
            try:
                shop = Pipeline(pipeline.config.model_copy(update={"output": str(folder)})).workshop(Interrupt())
                lengths = measure(records, shop.config, shop.template)
                yield from outlook(shop.config, stages, records, lengths, shop.template, shop.machine, shop.base)
            except TercetError as error:
                yield Check("error", str(error))
                return
            yield from self._dry_run(shop, stages, records, lengths, quick)

    def _dry_run(
        self, shop: Workshop, stages: Sequence[str], records: Mapping[str, Any], lengths: Mapping[str, Lengths], quick: bool
    ) -> Iterator[Check]:
        self.needs = memory(shop.config, stages, lengths, shop.machine, shop.base)
        reason = "it was not asked for" if quick else _obstacle(shop, self.needs)
        if reason:
            yield Check("ok" if quick else "warning", f"no dry run, because {reason}")
            return
        small = _small(shop, records, lengths)
        try:
            Pipeline(small).run([stage for stage in stages if stage in TRAINING])
        except TercetError as error:
            yield Check("error", f"dry run: {error}")
            return
        steps = {
            stage: JsonLines(Path(small.output) / stage / "metrics.jsonl", "step").read() for stage in stages if stage in TRAINING
        }
        broken = [stage for stage, rows in steps.items() if rows and rows[-1].get("skipped")]
        for stage in broken:
            yield Check(
                "error", f"dry run: {stage} had a gradient that is not finite in its first steps: set machine.dtype: float32"
            )
        if not broken:
            yield Check("ok", "dry run: every stage took its first steps, and what must hold before the first update holds")
        self.seconds = _seconds(shop.config, small, records)


def _obstacle(shop: Workshop, needs: Sequence[Need]) -> str | None:
    """Why a dry run would do harm."""
    free = free_memory(shop.machine.device)
    largest = max(needs, key=lambda need: need.total)
    if free is not None and largest.total > free:
        return f"stage {largest.stage} would need more memory than is free"
    trained = max(need.weights + need.training for need in needs)
    space, room = 4 * trained, shutil.disk_usage(shop.folder.parent).free  # four checkpoints and one exact-resume state at most
    return f"it would need {space / GIB:.0f} GiB of disk and {room / GIB:.0f} GiB are free" if space > room else None


def _small(shop: Workshop, records: Mapping[str, Any], lengths: Mapping[str, Lengths]) -> Config:
    """The same run on a few records and for two steps a stage; nothing moves, because the learning rates are next to nothing."""
    config, folder = shop.config, shop.folder
    tokens = max([found.mean for found in lengths.values()] + [1.0])
    rate = measured_rate(shop.machine.dtype, str(shop.machine.device))
    affordable = DRY_RUN_S * rate / (6 * _parameters(shop) * tokens)
    count = int(min(MOST_RECORDS, max(1.0, affordable)))
    values = config.model_dump()
    for name, own in records.items():
        if name == "comparisons":
            own = [record for record in own if record.prefers]
        if name in ("pretrain", *KINDS):
            values["data"][name] = str(_write(folder / name, own[:: max(1, len(own) // (2 * count))][: 2 * count]))
    values["data"] |= dict.fromkeys(KINDS.values()) | {"held_out": 0.0}
    for stage in ("pretrain", "sft", "reward"):
        batch = min(count, values[stage]["batch_size"])
        values[stage] |= {"batch_size": batch, "epochs": 1, "learning_rate": 1e-12, "warmup_steps": 0}
    values["reward"] |= {"normalise_samples": 0, "judge": False}
    rows = min(count, config.ppo.rollout_batch_size)
    rates = {"learning_rate": 1e-12, "value_learning_rate": 1e-12, "warmup_iterations": 0, "value_warmup_iterations": 0}
    values["ppo"] |= {
        "iterations": 2,
        "rollout_batch_size": rows,
        "minibatch_size": _divisor(rows, config.ppo.minibatch),
        **rates,
    }
    values["ppo"] |= {"evaluate_every": 0, "best_kl_budget": None, "save_rollouts_every": 0}
    values["evaluation"] |= {"group_by": None, "main_group": None}
    return load_config(values | {"trackers": []})


def _seconds(config: Config, small: Config, records: Mapping[str, Any]) -> dict[str, float]:
    """Seconds that each stage will take, in proportion to the last step of the dry run."""
    folder, found = Path(small.output), {}
    counts = {"pretrain": "pretrain", "sft": "sft", "reward": "comparisons"}
    for stage, name in counts.items():
        timings, mine, theirs = (
            JsonLines(folder / stage / "timings.jsonl", "step").read(),
            getattr(config, stage),
            getattr(small, stage),
        )
        if timings and name in records:
            found[stage] = timings[-1]["seconds"] / theirs.batch_size * len(records[name]) * mine.epochs
    timings = JsonLines(folder / "ppo/timings.jsonl", "iteration").read()
    if timings:
        rows, last = small.ppo.rollout_batch_size, timings[-1]
        sampled, update = (last["generate_s"] + last["score_s"]) / rows, last["update_s"] / rows
        evaluation = config.evaluation
        train, held_out = sides_of("prompts", records, config)
        prompts = min(evaluation.prompts, len(held_out or train))
        looks = -(-config.ppo.iterations // config.ppo.evaluate_every) if config.ppo.evaluate_every else 0
        found["ppo"] = config.ppo.iterations * config.ppo.rollout_batch_size * (sampled + update) + looks * prompts * sampled
        policies = 3 + len(evaluation.policies)
        found["evaluate"] = (policies * prompts + evaluation.best_of_prompts * evaluation.best_of_samples) * sampled
    return found


def _table(needs: Sequence[Need], seconds: Mapping[str, float]) -> Table:
    table = Table(title="about what each stage will take", title_justify="left", title_style="")
    for column in ("stage", "memory, GiB", "models", "training", "working", "process", "time"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for need in needs:
        parts = (need.total, need.weights, need.training, need.working, need.other)
        table.add_row(need.stage, *(f"{part / GIB:.2f}" for part in parts), _duration(seconds.get(need.stage)))
    return table


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _parameters(shop: Workshop) -> int:
    from tercet.models.load import count_parameters

    return count_parameters(shop.base, shop.config.model.trust_remote_code)


def _divisor(rows: int, at_most: int) -> int:
    return max(size for size in range(1, min(rows, at_most) + 1) if rows % size == 0)


def _place(folder: Path) -> Path:
    """The nearest folder above the run folder that is there: on the disk where the run will be."""
    return next(parent for parent in folder.absolute().parents if parent.is_dir())


@contextlib.contextmanager
def _workplace(place: Path) -> Iterator[Path]:
    """A temporary folder in `place`; TercetError where none can be made."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=".tercet-doctor-", dir=place)
    except OSError as error:
        raise TercetError(
            f"output: nothing can be written in {place} ({error.strerror}): make it writable, or choose another output"
        ) from None
    with folder as name:
        yield Path(name)


def _write(path: Path, records: Sequence[Any]) -> Path:
    """Records in the form in which they can be read again, in a file whose suffix is added to `path`.

    Only columnar sources hold dates, bytes or NaN in the fields of prompts; they go back into one, or as text where it takes them not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [_values(record) for record in records]
    try:
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    except (TypeError, ValueError):
        with contextlib.suppress(Exception):  # files of several kinds in one folder; the library's errors share no base class
            return write_parquet(path.with_suffix(".parquet"), rows)
        as_text = [json.loads(json.dumps(row, default=str), parse_constant=lambda _: None) for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in as_text)
    file = path.with_suffix(".jsonl")
    file.write_text(text, encoding="utf-8")
    return file


def _values(record: Any) -> dict[str, Any]:
    if isinstance(record, Demonstration):
        return (
            {"text": record.response} if record.prompt == "" else {"prompt": _plain(record.prompt), "response": record.response}
        )
    if isinstance(record, Comparison):
        return {"prompt": _plain(record.prompt), "responses": record.responses, "ranks": record.ranks, "margin": record.margin}
    return {**record.fields, "prompt": _plain(record.prompt)}


def _plain(prompt: Text) -> Any:
    return prompt if isinstance(prompt, str) else [vars(turn) for turn in prompt]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what a run says on the terminal."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before

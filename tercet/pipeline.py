"""Which stages run: fingerprints, skipping, hand-over, the lock on the run folder. The Python API is at the end."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tercet.config import Config, load_config, parse_yaml, to_yaml
from tercet.types import TercetError

STAGES = ("pretrain", "sft", "reward", "ppo", "evaluate")
FOLDERS = {"pretrain": "pretrain", "sft": "sft", "reward": "reward", "ppo": "ppo", "evaluate": "evaluation"}
# Bumped when a stage's results change for the same configuration and data; tests/test_golden.py holds the results.
VERSIONS = {"pretrain": 1, "sft": 1, "reward": 1, "ppo": 1, "evaluate": 1}

_SAMPLING = ["ppo.temperature", "ppo.max_new_tokens", "ppo.stop", "ppo.truncate_after", "data.prompts", "data.eval_prompts"]
# What each stage's results depend on, beside the stages before it: prefixes of configuration keys.
_DEPENDS = {
    "pretrain": [
        "model",
        "seed",
        "machine.dtype",
        "pretrain",
        "data.pretrain",
        "data.sft",
        "data.max_prompt_length",
        "data.held_out",
    ],
    "sft": ["model", "seed", "machine.dtype", "sft", "data.sft", "data.eval_sft", "data.max_prompt_length", "data.held_out"],
    "reward": ["seed", "machine.dtype", "reward", "data.comparisons", "data.eval_comparisons", "data.held_out", *_SAMPLING],
    "ppo": ["seed", "machine.dtype", "ppo", "reward.use", "data.prompts", "data.eval_prompts", "data.held_out", "evaluation"],
    "evaluate": ["seed", "evaluation", *_SAMPLING],
}
_NO_EFFECT = ("ppo.save_rollouts_every",)


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, and the flat figures of summary.json."""

    folder: Path
    summary: Mapping[str, Any]


class Pipeline:
    """One run folder and the stages that lead to it."""

    def __init__(self, config: Config, reward_callables: Sequence[Callable[..., list[float]]] = ()):
        self.config = _with_earlier_choices(config)
        self.folder = Path(self.config.output)
        self._callables = tuple(reward_callables)
        self._check_rewards()

    def stages(self) -> list[str]:
        """The stages that this configuration has data for, in order."""
        data, config = self.config.data, self.config
        present = {
            "pretrain": config.model.scratch is not None,
            "sft": data.sft is not None,
            "reward": data.comparisons is not None and config.reward.use is None,
            "ppo": data.prompts is not None,
            "evaluate": data.prompts is not None,
        }
        return [stage for stage in STAGES if present[stage]]

    def run(self, wanted: Sequence[str] | None = None, from_stage: str | None = None) -> RunResult:
        """Run the wanted stages (all of them by default) that are not finished; then write summary.json and report.html."""
        from tercet.runtime.progress import console

        stages = self.stages()
        if not stages:
            raise TercetError("there is nothing to do: set data.sft, data.comparisons or data.prompts")
        missing = [stage for stage in wanted or () if stage not in stages]
        if missing:
            raise TercetError(f"{missing[0]}: the configuration has no data for this stage; it has: {', '.join(stages)}")
        chosen = [stage for stage in stages if wanted is None or stage in wanted]
        with _locked(self.folder):
            prints = self._fingerprints(stages)
            if from_stage is not None:
                self._clear(stages, from_stage)
            to_do = [stage for stage in chosen if not self._is_done(stage, prints[stage])]
            self._require_upstream(stages, to_do, chosen)
            if not to_do:
                console.print(f"{self.folder}: {', '.join(chosen)} finished already, nothing to do (redo with --from STAGE)")
                if (self.folder / "report.html").exists() or wanted is not None:
                    return RunResult(self.folder, self.summary())
            if to_do:
                self._execute(to_do, prints)
            self.write_summary()
            if wanted is None or "evaluate" in wanted:
                self.write_report()
        return RunResult(self.folder, self.summary())

    def summary(self) -> dict[str, Any]:
        path = self.folder / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_summary(self) -> None:
        """Collect the figures of all finished stages into summary.json."""
        from tercet.runtime.checkpoint import write_json

        machine = self.config.machine
        figures: dict[str, Any] = {"seed": self.config.seed, "dtype": machine.dtype, "threads": machine.threads, "seconds": 0.0}
        for stage in self.stages():
            done = _read_json(self._done_path(stage))
            if done:
                figures |= done["figures"]
                figures[f"{stage}.seconds"] = done["seconds"]
                figures["seconds"] += done["seconds"]
        write_json(self.folder / "summary.json", figures)

    def write_report(self) -> Path:
        from tercet.report import write_report

        return write_report(self.folder)

    def _execute(self, stages: Sequence[str], prints: dict[str, Any]) -> None:
        from tercet.jobs.evaluation import run_evaluate
        from tercet.jobs.training import run_ppo, run_pretrain, run_reward, run_sft
        from tercet.runtime.checkpoint import write_json
        from tercet.runtime.progress import console
        from tercet.runtime.stage import Interrupt

        jobs = {"pretrain": run_pretrain, "sft": run_sft, "reward": run_reward, "ppo": run_ppo, "evaluate": run_evaluate}
        with Interrupt().listening() as interrupt:
            shop = self.workshop(interrupt)
            for stage in stages:
                if shop.world.is_main:
                    (self.folder / FOLDERS[stage]).mkdir(parents=True, exist_ok=True)
                    write_json(self.folder / FOLDERS[stage] / "started.json", prints[stage])
                began = time.monotonic()
                figures = jobs[stage](shop)
                if shop.world.is_main:
                    done = {"fingerprint": prints[stage], "figures": figures, "seconds": time.monotonic() - began}
                    write_json(self._done_path(stage), done)
                    shutil.rmtree(self.folder / FOLDERS[stage] / "checkpoints", ignore_errors=True)
                shop.world.barrier()
                shown = "  ".join(f"{key} {value:.3g}" for key, value in figures.items() if key in _HEADLINES)
                console.print(f"[green]{stage}[/green] finished in {time.monotonic() - began:.0f} s  {shown}")

    def workshop(self, interrupt: Any) -> Any:
        """The machine, chosen and written to config.yaml, and the base model."""
        from tercet.jobs.training import create_scratch
        from tercet.jobs.workshop import Workshop
        from tercet.models.load import count_parameters
        from tercet.runtime.distributed import World
        from tercet.runtime.machine import resolve
        from tercet.runtime.progress import console

        base = str(self.folder / "pretrain/model") if self.config.model.scratch else str(self.config.model.name)
        if self.config.model.scratch and not Path(base).exists():
            create_scratch(self.config, Path(base))
        settings = self.config.machine
        parameters = count_parameters(base, self.config.model.trust_remote_code)
        machine = resolve(settings.device, settings.dtype, settings.threads, settings.microbatch_tokens, parameters)
        self.config = self.config.model_copy(update={"machine": settings.model_copy(update=machine.settings())})
        machine.apply()
        world = World.start(machine.device)
        if world.is_main:
            (self.folder / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
            chosen = "  ".join(f"{key} {value}" for key, value in machine.settings().items())
            console.print(f"{self.folder}  {parameters / 1e6:.2f} M parameters  {chosen}")
        return Workshop(self.config, self.folder, machine, world, interrupt, base, self._callables)

    def _fingerprints(self, stages: Sequence[str]) -> dict[str, Any]:
        """What each stage's results follow from: its version, its settings, its data's contents, the stages before it."""
        flat = dict(_flatten(self.config.model_dump(mode="json")))
        prints: dict[str, Any] = {}
        for stage in stages:
            keys = [key for key in flat if _under(key, _DEPENDS[stage]) and key not in _NO_EFFECT]
            settings = {key: flat[key] for key in keys if not (key.startswith("data.") and isinstance(flat[key], str))}
            settings.pop("machine.dtype", None) if flat["machine.dtype"] == "auto" else None
            data = {key: _contents(flat[key]) for key in keys if key.startswith("data.") and isinstance(flat[key], str)}
            upstream = {name: _digest(prints[name]) for name in stages[: stages.index(stage)]}
            prints[stage] = {"version": VERSIONS[stage], "settings": settings, "data": data, "upstream": upstream}
            if self._callables and stage in ("ppo", "evaluate"):
                prints[stage]["settings"]["reward function"] = [
                    getattr(call, "__qualname__", repr(call)) for call in self._callables
                ]
        return prints

    def _is_done(self, stage: str, wanted: dict[str, Any]) -> bool:
        """Whether the stage can be skipped; TercetError if what is there came from something else."""
        done = _read_json(self._done_path(stage))
        there = done["fingerprint"] if done else _read_json(self.folder / FOLDERS[stage] / "started.json")
        changes = list(_differences(there, wanted)) if there else []
        if changes:
            state = "finished" if done else "begun"
            raise TercetError(
                f"{self.folder}: stage {stage} was {state} from something else:\n  " + "\n  ".join(changes) + "\n"
                f"`--from {stage}` redoes {', '.join(self.stages()[self.stages().index(stage) :])}; or choose another output folder"
            )
        return done is not None

    def _require_upstream(self, stages: Sequence[str], to_do: Sequence[str], chosen: Sequence[str]) -> None:
        for stage in to_do:
            for earlier in stages[: stages.index(stage)]:
                if earlier not in chosen and not self._done_path(earlier).exists():
                    raise TercetError(
                        f"stage {stage} needs stage {earlier} first: `tercet {earlier} CONFIG`, or `tercet run CONFIG` for all"
                    )

    def _clear(self, stages: Sequence[str], first: str) -> None:
        if first not in stages:
            raise TercetError(f"--from {first}: this run's stages are {', '.join(stages)}")
        for stage in stages[stages.index(first) :]:
            shutil.rmtree(self.folder / FOLDERS[stage], ignore_errors=True)

    def _done_path(self, stage: str) -> Path:
        return self.folder / FOLDERS[stage] / "done.json"

    def _check_rewards(self) -> None:
        uses_stage = any(term.kind == "stage" for term in self.config.ppo.rewards)
        available = self.config.data.comparisons or self.config.reward.use
        if self.config.data.prompts and uses_stage and not available:
            raise TercetError(
                "ppo.rewards uses the reward model of stage 2, but there is neither data.comparisons nor reward.use: give one of them, "
                "or another reward: ppo.rewards=[{kind: function, function: rewards.py:score}]"
            )


_HEADLINES = ("pretrain.eval_loss", "sft.eval_loss", "reward.eval_accuracy", "ppo.train_score", "ppo.train_kl", "win_rate")


def run(config: Any, *, model: Any = None, tokenizer: Any = None, reward: Callable[..., list[float]] | None = None) -> RunResult:
    """All stages. `config`: a YAML file, a mapping or a Config; `model` and `tokenizer`: objects to start from, in place of
    model.name; `reward`: a function(prompts, responses, **fields) -> list[float] in place of ppo.rewards."""
    return _pipeline(config, model, tokenizer, reward).run()


def train_sft(config: Any, *, model: Any = None, tokenizer: Any = None) -> RunResult:
    """Stage 1 alone (after pretraining, where the model is from scratch)."""
    pipeline = _pipeline(config, model, tokenizer, None)
    return pipeline.run([stage for stage in ("pretrain", "sft") if stage in pipeline.stages()])


def train_reward(config: Any, *, model: Any = None, tokenizer: Any = None) -> RunResult:
    """Stage 2 alone."""
    return _pipeline(config, model, tokenizer, None).run(["reward"])


def train_ppo(
    config: Any, *, model: Any = None, tokenizer: Any = None, reward: Callable[..., list[float]] | None = None
) -> RunResult:
    """Stage 3 alone; `reward` as in `run`."""
    return _pipeline(config, model, tokenizer, reward).run(["ppo"])


def evaluate(config: Any, *, model: Any = None, tokenizer: Any = None) -> RunResult:
    """Evaluation and report alone."""
    return _pipeline(config, model, tokenizer, None).run(["evaluate"])


def _pipeline(config: Any, model: Any, tokenizer: Any, reward: Callable[..., list[float]] | None) -> Pipeline:
    values = config.model_dump() if isinstance(config, Config) else config
    if model is not None:
        if tokenizer is None or not isinstance(values, Mapping):
            raise TercetError(
                "model= needs tokenizer= as well, and a configuration given as a mapping (its output says where they go)"
            )
        folder = Path(values.get("output", "run")).resolve() / "base"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        values = {**values, "model": {**values.get("model", {}), "name": str(folder)}}
    if reward is not None:
        loaded = load_config(values)
        rest = [term.model_dump() for term in loaded.ppo.rewards if term.kind != "stage"]
        ppo = loaded.ppo.model_copy(update={"rewards": tuple(rest)})
        return Pipeline(loaded.model_copy(update={"ppo": ppo}), [reward])
    return Pipeline(load_config(values))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the run folder; a second process on it is refused. Ranks beside the first share the first one's lock."""
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise TercetError(f"{folder}: the run folder cannot be written ({error.strerror}): choose another output") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise TercetError(
                f"{folder} is in use by process {file.read().strip() or '?'}: wait for it, or choose another output"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _with_earlier_choices(config: Config) -> Config:
    """Take over what `auto` came to when this run folder was begun, so that a resumed run computes alike."""
    path = Path(config.output) / "config.yaml"
    if not path.exists():
        return config
    earlier = parse_yaml(path.read_text(encoding="utf-8"), str(path)).get("machine", {})
    chosen = {key: earlier[key] for key, value in config.machine.model_dump().items() if value == "auto" and key in earlier}
    return config.model_copy(update={"machine": config.machine.model_copy(update=chosen)})


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _under(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _contents(source: str) -> dict[str, str]:
    from tercet.data.files import fingerprint

    return fingerprint(source)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _differences(there: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    if there["version"] != wanted["version"]:
        yield f"stage version was {there['version']}, is {wanted['version']}"
    for part, noun in (("settings", ""), ("data", "contents of "), ("upstream", "stage ")):
        before, now = there[part], wanted[part]
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                detail = f"was {before.get(key)!r}, is {now.get(key)!r}" if part == "settings" else "changed"
                yield f"{noun}{key} {detail}"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise TercetError(
            f"{path} is not valid JSON: it was damaged from outside; delete it to have its stage looked at anew"
        ) from None

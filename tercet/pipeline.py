"""Which stages of a run folder run, in which order; which are finished and skipped; summary and report."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tercet.config import Config, to_yaml
from tercet.errors import Interrupted, OtherFormat, TercetError
from tercet.fingerprint import STAGES, differences, digest, fingerprints, functions_of
from tercet.folder import FOLDERS, earlier_machine, read_json, require_no_others_files, with_earlier_choices, with_own_base


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, and the flat figures of summary.json."""

    folder: Path
    summary: Mapping[str, Any]


class Pipeline:
    """One run folder and the stages that lead to it."""

    def __init__(self, config: Config, reward_callables: Sequence[Callable[..., list[float]]] = ()):
        self.folder = Path(config.output)
        require_no_others_files(self.folder)
        self.config = with_earlier_choices(with_own_base(config))
        self._callables = tuple(reward_callables)

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
        from tercet.runtime.files import disk_errors_explained
        from tercet.runtime.lock import locked
        from tercet.runtime.progress import console

        stages = self.stages()
        if not stages:
            raise TercetError("there is nothing to do: set data.sft, data.comparisons or data.prompts")
        missing = [stage for stage in wanted or () if stage not in stages]
        if missing:
            raise TercetError(f"{missing[0]}: the configuration has no data for this stage; it has: {', '.join(stages)}")
        chosen = [stage for stage in stages if wanted is None or stage in wanted]
        if from_stage is not None and from_stage not in chosen:
            raise TercetError(f"--from {from_stage}: the stages to run are {', '.join(chosen)}")
        redo = stages[stages.index(from_stage) :] if from_stage is not None else []
        prints = fingerprints(self.config, stages, self._callables)
        if redo and read_json(self._redo_path) == _redo_mark(redo, prints):
            redo = []  # this very command has cleared them already, and goes on now
        with disk_errors_explained(self.folder):
            to_do = self._to_do(chosen, redo, prints)
            self._require_upstream(stages, to_do, chosen, prints)
            # Before the lock: what is wrong is told without a trace in the run folder.
            records, mistakes = self.inspect(to_do, anew="pretrain" in redo)
            if mistakes:
                raise TercetError(mistakes[0])
        with disk_errors_explained(self.folder), locked(self.folder) as is_main:
            to_do = self._to_do(chosen, redo, prints)  # anew: another process may have ended since
            if redo:
                self._clear(redo, is_main)
            if to_do:
                try:
                    self._execute(to_do, redo, records)
                except OtherFormat:
                    raise
                except TercetError:
                    self._explain_breakdown(stages)
                    raise
            else:
                shown = f"{self.folder}: {', '.join(chosen)} finished already, nothing to do (redo with --from STAGE)"
                console.print(shown, markup=False)
            if is_main:
                self._tidy(stages)
                self.write_summary()
                wants_report = wanted is None or "evaluate" in wanted or (self.folder / "report.html").exists()
                if wants_report and self._report_is_old(stages):
                    self.write_report()
                self._redo_path.unlink(missing_ok=True)
        self._wait_for_ranks()
        return RunResult(self.folder, self.summary())

    def _wait_for_ranks(self) -> None:
        """Until the first of them has written the summary, which all of them read."""
        from tercet.runtime.launch import ranks

        if ranks() > 1:
            from tercet.runtime.distributed import World

            World.start(self.config.machine.device).barrier()

    def summary(self) -> dict[str, Any]:
        path = self.folder / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_summary(self) -> None:
        """Collect the figures of all finished stages, and what the verdict's rules make of them, into summary.json."""
        from tercet.report import verdict_of
        from tercet.runtime.files import write_json

        machine = earlier_machine(self.folder) or self.config.machine.model_dump(mode="json")
        figures: dict[str, Any] = {
            "seed": self.config.seed,
            "dtype": machine["dtype"],
            "threads": machine["threads"],
            "seconds": 0.0,
        }
        figures |= {"python": platform.python_version(), "machine": _machine()}
        figures |= {f"versions.{name}": _version(name) for name in ("tercet", "torch", "transformers")}
        for stage in self.stages():
            done = read_json(self._done_path(stage))
            if done:
                figures |= done["figures"]
                figures[f"{stage}.seconds"] = done["seconds"]
                figures["seconds"] += done["seconds"]
        write_json(self.folder / "summary.json", figures)
        write_json(self.folder / "summary.json", figures | {"verdict": verdict_of(self.folder)})

    def _explain_breakdown(self, stages: Sequence[str]) -> None:
        """Let the verdict and the report say what can be known of a stage that broke down. That must not hide why it did."""
        from tercet.runtime.progress import console

        if any((self.folder / FOLDERS[stage] / "metrics.jsonl").exists() for stage in stages):
            with contextlib.suppress(OSError, TercetError):
                self.write_summary()
                console.print(f"what led to it: {self.write_report()}", markup=False)

    def write_report(self) -> Path:
        from tercet.report import write_report

        if not (self.folder / "config.yaml").exists():
            raise TercetError(f"{self.folder}: there is no run here to report on: `tercet run CONFIG` makes one")
        return write_report(self.folder)

    def _execute(self, stages: Sequence[str], redo: Sequence[str], records: dict[str, Any]) -> None:
        from tercet.jobs.evaluation import run_evaluate
        from tercet.jobs.outlook import measure, outlook, sampled_at_once
        from tercet.jobs.preflight import check_models
        from tercet.jobs.training import run_ppo, run_pretrain, run_reward, run_sft
        from tercet.runtime.checkpoint import seed_everything
        from tercet.runtime.files import write_json, write_text
        from tercet.runtime.machine import out_of_memory_explained, release_free_memory
        from tercet.runtime.progress import console
        from tercet.runtime.stage import Interrupt

        jobs = {"pretrain": run_pretrain, "sft": run_sft, "reward": run_reward, "ppo": run_ppo, "evaluate": run_evaluate}
        with Interrupt().listening() as interrupt:
            known = self._known_base
            shop = self.workshop(interrupt)
            if known is None:  # it has just been made: what could not be looked at before
                check_models(self.config, stages, shop.base, records)
            if shop.world.is_main:
                write_text(self.folder / "config.yaml", to_yaml(self.config))
                lengths = measure(records, shop.config, shop.template)
                for check in outlook(shop.config, stages, records, lengths, shop.template, shop.machine, shop.base):
                    if check.level == "warning":
                        console.print(f"warning: {check.text}", style="yellow", markup=False)
            records.clear()  # every stage reads its own, and would hold these beside them
            prints = fingerprints(self.config, self.stages(), self._callables)  # anew, because now the machine is chosen
            if shop.world.is_main and redo:
                write_json(self._redo_path, _redo_mark(redo, prints))
            for stage in stages:
                if shop.world.any(interrupt.requested):
                    raise Interrupted
                folder = self.folder / FOLDERS[stage]
                if shop.world.is_main:
                    write_json(folder / "started.json", prints[stage])
                began = time.monotonic()
                seed_everything(self.config.seed + 100_003 * shop.world.rank)  # dropout differs from rank to rank
                release_free_memory()  # the models of the stage before
                with out_of_memory_explained(stage, shop.machine.microbatch_tokens, sampled_at_once(self.config, stage)):
                    figures = jobs[stage](shop)
                if shop.world.is_main:
                    done = {"fingerprint": prints[stage], "figures": figures, "seconds": time.monotonic() - began}
                    write_json(self._done_path(stage), done)
                    self._tidy([stage])
                shop.world.barrier()
                shown = "  ".join(f"{key} {value:.3g}" for key, value in figures.items() if key in _HEADLINES)
                console.print(f"[green]{stage}[/green] finished in {time.monotonic() - began:.0f} s  {shown}")

    def workshop(self, interrupt: Any) -> Any:
        """The machine, chosen where it says auto, and the base model."""
        from tercet.algo.schedules import usual_rate
        from tercet.jobs.training import create_scratch
        from tercet.jobs.workshop import Workshop
        from tercet.models.load import count_parameters
        from tercet.report.live import Watch
        from tercet.runtime.distributed import World
        from tercet.runtime.machine import TINY_MODEL, own_cores, resolve
        from tercet.runtime.progress import console

        base = self._base
        settings = self.config.machine
        world = World.start(settings.device)
        if self.config.model.scratch and not Path(base).exists() and world.is_main:
            create_scratch(self.config, Path(base))
        world.barrier()
        parameters = count_parameters(base, self.config.model.trust_remote_code)
        adapter = self.config.model.adapter is not None
        wanted = (settings.device, settings.dtype, settings.threads, settings.microbatch_tokens)
        machine = resolve(*wanted, parameters, adapter=adapter)
        machine = replace(machine, threads=world.gather(machine.threads)[0])  # replicas must add up in the same order
        self.config = self.config.model_copy(update={"machine": settings.model_copy(update=machine.settings())})
        machine.apply()
        if world.is_main:
            chosen: dict[str, Any] = machine.settings()
            if self.config.ppo.learning_rate == "auto":
                chosen["ppo.learning_rate"] = f"{usual_rate(parameters, self.config.ppo.minibatch):.2g}"
            shown = "  ".join(f"{key} {value}" for key, value in chosen.items())
            console.print(f"{self.folder}  {parameters / 1e6:.2f} M parameters  {shown}", markup=False)
            if settings.threads == "auto" and 1 < (cores := len(own_cores())) != machine.threads and parameters >= TINY_MODEL:
                console.print(
                    f"{cores - machine.threads} of {cores} cores are busy with other work and left to it; machine.threads: {cores} takes all"
                )
        return Workshop(self.config, self.folder, machine, world, interrupt, base, self._callables, Watch)

    def _to_do(self, chosen: Sequence[str], redo: Sequence[str], prints: Mapping[str, Any]) -> list[str]:
        return [stage for stage in chosen if stage in redo or not self._is_done(stage, prints)]

    def _is_done(self, stage: str, prints: Mapping[str, Any]) -> bool:
        """Whether the stage can be skipped; TercetError if what is there came from something else."""
        changes, done = self._changes(stage, prints)
        if changes:
            state, stages = "finished" if done else "begun", self.stages()
            first = next(earlier for earlier in stages if earlier == stage or self._changes(earlier, prints)[0])
            command = f"`--from {stage}`" if first == stage else f"`tercet run CONFIG --from {first}`"
            raise TercetError(
                f"{self.folder}: stage {stage} was {state} from something else:\n  " + "\n  ".join(changes) + "\n"
                f"{command} redoes {', '.join(stages[stages.index(first) :])}; or choose another output folder"
            )
        return done

    def _changes(self, stage: str, prints: Mapping[str, Any]) -> tuple[list[str], bool]:
        """What differs between the configuration and what the stage's folder came from, in words; and whether the stage is finished."""
        done = read_json(self._done_path(stage))
        there = done["fingerprint"] if done else read_json(self.folder / FOLDERS[stage] / "started.json")
        return (list(differences(there, prints[stage])) if there else []), done is not None

    def _require_upstream(
        self, stages: Sequence[str], to_do: Sequence[str], chosen: Sequence[str], prints: dict[str, Any]
    ) -> None:
        for stage in to_do:
            for earlier in stages[: stages.index(stage)]:
                if earlier not in chosen and not self._is_done(earlier, prints):
                    raise TercetError(
                        f"stage {stage} needs stage {earlier} first: `tercet {earlier} CONFIG`, or `tercet run CONFIG` for all"
                    )

    def inspect(self, stages: Sequence[str], *, anew: bool = False) -> tuple[dict[str, Any], list[str]]:
        """The records that these stages will use, by their key in the data section, and every mistake that can be known beforehand.
        anew: a model from scratch that is there will be made again."""
        from tercet.jobs.preflight import inspect

        if "ppo" in stages or "evaluate" in stages:
            self._check_rewards()
        base = None if anew and self.config.model.scratch else self._known_base
        return inspect(self.config, stages, base, [*functions_of(self.config), *self._callables])

    @property
    def _base(self) -> str:
        """The pretrained model: this run's own where it is from scratch."""
        return str(self.folder / "pretrain/model") if self.config.model.scratch else str(self.config.model.name)

    @property
    def _known_base(self) -> str | None:
        """The same, None while it is not made yet."""
        return self._base if self.config.model.scratch is None or Path(self._base).exists() else None

    def _clear(self, stages: Sequence[str], is_main: bool) -> None:
        """Remove the stages' folders, once all ranks have looked at what is in them."""
        from tercet.runtime.distributed import World
        from tercet.runtime.files import remove_folder

        World.start(self.config.machine.device).barrier()
        if not is_main:
            return
        for stage in reversed(stages):  # if this is cut short, no stage is left that builds on one that is gone
            self._done_path(stage).unlink(missing_ok=True)
            remove_folder(self.folder / FOLDERS[stage])
        if (self.folder / "summary.json").exists():
            self.write_summary()  # its figures of those stages are no more

    def _tidy(self, stages: Sequence[str]) -> None:
        """Remove what a finished stage needs no longer, and what a process that was killed just before doing so left behind."""
        from tercet.runtime.files import remove_tree

        for stage in stages:
            if self._done_path(stage).exists():
                for checkpoints in ("checkpoints", "judge/checkpoints"):
                    shutil.rmtree(self.folder / FOLDERS[stage] / checkpoints, ignore_errors=True)
        for unfinished in self.folder.glob(".report.html.*.tmp"):
            unfinished.unlink(missing_ok=True)
        for removed in self.folder.glob(".*.removed"):
            remove_tree(removed)

    def _report_is_old(self, stages: Sequence[str]) -> bool:
        """Whether a stage has finished since the report was written, be it in a process that died before it could write one."""
        report = self.folder / "report.html"
        done = [self._done_path(stage) for stage in stages]
        newest = max((path.stat().st_mtime_ns for path in done if path.exists()), default=0)
        return not report.exists() or report.stat().st_mtime_ns < newest

    def _done_path(self, stage: str) -> Path:
        return self.folder / FOLDERS[stage] / "done.json"

    @property
    def _redo_path(self) -> Path:
        """What `--from` has cleared in a run that is not over: the same command must go on from there and not begin anew."""
        return self.folder / ".redo.json"

    def _check_rewards(self) -> None:
        if self.config.data.prompts and not (self.config.ppo.rewards or self._callables):
            raise TercetError("ppo.rewards is empty: name a term, or call tercet.run(config, reward=function)")
        uses_stage = any(term.kind == "stage" for term in self.config.terms.values())
        available = self.config.data.comparisons or self.config.reward.use
        if self.config.data.prompts and uses_stage and not available:
            raise TercetError(
                "ppo.rewards or evaluation.judges uses the reward model of stage 2, but there is neither data.comparisons nor reward.use: "
                "give one of them, or another reward: ppo.rewards=[{kind: function, function: rewards.py:score}]"
            )


_HEADLINES = ("pretrain.eval_loss", "sft.eval_loss", "reward.eval_accuracy", "ppo.train_score", "ppo.train_kl", "win_rate")


def _redo_mark(redo: Sequence[str], prints: Mapping[str, Any]) -> dict[str, Any]:
    return {stage: digest(prints[stage]) for stage in redo}


def _machine() -> str:
    """Without `platform.platform`, which starts another program to ask for the processor."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its sources
        return "not installed"

"""One run folder from configuration to report: skipping, refusing, redoing, and exact resume after stops and crashes."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tercet.config import load_config
from tercet.errors import Interrupted
from tercet.fingerprint import STAGES
from tercet.pipeline import Pipeline
from tercet.report.load import load_run
from tercet.types import TercetError

Partial = Callable[..., Path]


@pytest.fixture
def settings(tiny_data: Path, tmp_path: Path, finished_run: Path) -> dict[str, Any]:
    """The finished run's configuration with its output at tmp_path/run (where `run_copy` puts the copy)."""
    import yaml

    values = yaml.safe_load((finished_run / "config.yaml").read_text())
    return {**values, "output": str(tmp_path / "run")}


def run(values: dict[str, Any], wanted: list[str] | None = None, from_stage: str | None = None) -> Any:
    return Pipeline(load_config(values)).run(wanted, from_stage)


def changed(values: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A copy with some keys of some sections replaced."""
    values = copy.deepcopy(values)
    for name, content in sections.items():
        values[name] = {**values[name], **content} if isinstance(content, dict) else content
    return values


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def results(folder: Path, *stages: str) -> dict[str, bytes]:
    """What must be the same bytes in every run of the same configuration."""
    wanted = ("metrics.jsonl", "rollouts.jsonl", "model.safetensors", "held_out.json", "probe.json", "samples.jsonl")
    return {
        f"{stage}/{name}": content
        for stage in stages
        for name, content in files(folder / stage).items()
        if name.endswith(wanted) and "checkpoints" not in name
    }


class TestAFinishedRun:
    def test_the_run_folder(self, finished_run: Path) -> None:
        policy = {
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        scorer = policy - {"generation_config.json"}
        own = {"done.json", "started.json"}
        lines = {"metrics.jsonl", "timings.jsonl"}
        wanted = {".lock", "config.yaml", "summary.json", "report.html"}
        parts = {
            "pretrain": own | {f"model/{name}" for name in policy},
            "sft": own | lines | {f"model/{name}" for name in policy},
            "reward": own | lines | {"held_out.json", "card.json", "probe.json"} | {f"model/{name}" for name in scorer},
            "ppo": own | lines | {"rollouts.jsonl"} | {f"model/{n}" for n in policy} | {f"value/{n}" for n in scorer},
            "evaluation": own | {"policies.json", "wins.json", "path.json", "best_of_n.json", "samples.jsonl"},
        }
        wanted |= {f"{stage}/{name}" for stage, names in parts.items() for name in names}
        assert set(files(finished_run)) == wanted

    def test_config_yaml_has_every_value_and_nothing_left_to_auto(self, finished_run: Path) -> None:
        config = load_config(finished_run / "config.yaml")
        assert config.machine.threads == 1 and config.machine.dtype == "float32"
        assert config.ppo.gae_lambda == 0.95 and "gae_lambda: 0.95" in (finished_run / "config.yaml").read_text()

    def test_metrics_count_every_step(self, finished_run: Path) -> None:
        def counted(stage: str, key: str) -> list[int]:
            return [json.loads(line)[key] for line in (finished_run / stage / "metrics.jsonl").read_text().splitlines()]

        trained = {"sft": 40, "reward": 60}
        for stage, records in trained.items():
            done = json.loads((finished_run / stage / "done.json").read_text())["figures"]
            own = int(done["sft.records" if stage == "sft" else "reward.comparisons"])
            assert records * 0.75 <= own <= records, "about a tenth is held out"
            assert counted(stage, "step") == list(range(1, -(-own // 8) + 1)), "batches of 8, the last one may be smaller"
        assert counted("ppo", "iteration") == [1, 2, 3]

    def test_the_summary_has_the_figures_of_the_design(self, finished_run: Path) -> None:
        summary = json.loads((finished_run / "summary.json").read_text())
        names = ["sft.eval_loss", "reward.eval_accuracy", "ppo.score", "ppo.kl", "ppo.finished", "sft.distinct2", "ppo.distinct2"]
        for name in [*names, "win_rate", "win_rate_low", "win_rate_high", "seconds"]:
            assert isinstance(summary[name], float), name

    def test_again_does_nothing_and_says_so(
        self, run_copy: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = files(run_copy)
        result = run(settings)
        assert "nothing to do" in capsys.readouterr().err
        assert {k: v for k, v in files(run_copy).items() if k != ".lock"} == {k: v for k, v in before.items() if k != ".lock"}
        assert result.summary["win_rate"] == json.loads(before["summary.json"])["win_rate"]

    @pytest.mark.parametrize(("idle", "told"), [(1.2, True), (2.9, False)])
    def test_cores_that_are_left_to_other_work_are_named(
        self,
        idle: float,
        told: bool,
        settings: dict[str, Any],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("tercet.runtime.machine.TINY_MODEL", 0)
        monkeypatch.setattr("tercet.runtime.machine.own_cores", lambda: [0, 1, 2])
        monkeypatch.setattr("tercet.runtime.machine._look", lambda cores, seconds: idle)
        monkeypatch.setattr("torch.set_num_threads", lambda count: None)
        run(changed(settings, machine={"threads": "auto"}), ["pretrain"])
        said = "2 of 3 cores are busy with other work" in " ".join(capsys.readouterr().err.split())
        assert said is told

    def test_it_may_be_moved(self, finished_run: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
        moved = shutil.copytree(finished_run, tmp_path / "elsewhere/else")
        assert run({**settings, "output": str(moved)}).folder == moved

    def test_moved_data_is_the_same_data(self, run_copy: Path, settings: dict[str, Any], tiny_data: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_data, tmp_path / "moved")
        data = {key: str(tmp_path / "moved" / Path(settings["data"][key]).name) for key in ("sft", "comparisons", "prompts")}
        before = files(run_copy / "sft")
        run(changed(settings, data=data))
        assert files(run_copy / "sft") == before


CHANGES: list[tuple[dict[str, Any], str, str]] = [
    ({"seed": 4}, "pretrain", "seed was 3, is 4"),
    ({"sft": {"learning_rate": 0.5}}, "sft", "sft.learning_rate was 0.001, is 0.5"),
    ({"reward": {"batch_size": 4}}, "reward", "reward.batch_size was 8, is 4"),
    ({"ppo": {"gamma": 0.5}}, "ppo", "ppo.gamma was 1.0, is 0.5"),
    ({"ppo": {"kl": {"coef": 0.3, "controller": "fixed"}}}, "ppo", "ppo.kl.coef was 0.1, is 0.3"),
    ({"evaluation": {"prompts": 3}}, "evaluate", "evaluation.prompts was 8, is 3"),
    ({"machine": {"dtype": "float64"}}, "pretrain", "machine.dtype was 'float32', is 'float64'"),
    ({"data": {"max_prompt_length": 20}}, "pretrain", "data.max_prompt_length was 24, is 20"),
]


class TestAChange:
    @pytest.mark.parametrize(("change", "stage", "told"), CHANGES, ids=[told for _, _, told in CHANGES])
    def test_of_a_setting_is_refused_by_the_first_stage_that_depends_on_it(
        self, change: dict[str, Any], stage: str, told: str, run_copy: Path, settings: dict[str, Any]
    ) -> None:
        before = files(run_copy)
        with pytest.raises(TercetError) as caught:
            run(changed(settings, **change))
        message = str(caught.value)
        assert f"stage {stage} was finished from something else" in message and told in message
        assert f"`--from {stage}` redoes {', '.join(STAGES[STAGES.index(stage) :])}" in message
        assert {k: v for k, v in files(run_copy).items() if k != ".lock"} == {k: v for k, v in before.items() if k != ".lock"}

    def test_a_later_stage_alone_is_told_from_where_to_redo(self, run_copy: Path, settings: dict[str, Any]) -> None:
        with pytest.raises(
            TercetError, match=r"(?s)evaluate was .*stage ppo changed\n`tercet run CONFIG --from ppo` redoes ppo, evaluate"
        ):
            run(changed(settings, ppo={"gamma": 0.5}), wanted=["evaluate"])

    def test_of_how_many_responses_evaluation_samples_at_once_is_none(self, run_copy: Path, settings: dict[str, Any]) -> None:
        before = files(run_copy / "evaluation")
        run(changed(settings, evaluation={"batch_size": 3}))
        assert files(run_copy / "evaluation") == before
        run(changed(settings, evaluation={"batch_size": 3}), from_stage="evaluate")
        told = [
            [json.loads(line)["ppo"] for line in part["samples.jsonl"].splitlines()]
            for part in (before, files(run_copy / "evaluation"))
        ]
        assert told[0] == told[1] and len(told[0]) > 3

    @pytest.mark.parametrize(
        ("file", "stage"), [("demonstrations", "pretrain"), ("comparisons", "reward"), ("prompts", "reward")]
    )
    def test_of_a_data_file(
        self, file: str, stage: str, run_copy: Path, settings: dict[str, Any], tiny_data: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(tiny_data, tmp_path / "data")
        data = {key: str(tmp_path / "data" / Path(settings["data"][key]).name) for key in ("sft", "comparisons", "prompts")}
        path = tmp_path / f"data/{file}.jsonl"
        path.write_text(path.read_text().replace("calm", "glad").replace("Describe", "Sketch"))
        key = {"demonstrations": "sft"}.get(file, file)
        with pytest.raises(TercetError, match=rf"(?s)stage {stage} was.*contents of data\.{key} changed.*--from {stage}"):
            run(changed(settings, data=data))

    def test_of_a_reward_functions_code(self, partial_run: Partial, settings: dict[str, Any], tmp_path: Path) -> None:
        code = tmp_path / "score.py"
        code.write_text("def f(prompts, responses, **fields):\n    return [float(len(r)) for r in responses]\n")
        folder = partial_run("pretrain", "sft", "reward")
        values = changed(settings, ppo={"rewards": [{"kind": "function", "function": f"{code}:f"}], "iterations": 1})
        values["output"] = str(folder)
        run(values, ["ppo"])
        code.write_text(code.read_text().replace("len(r)", "-len(r)"))
        with pytest.raises(TercetError, match=r"(?s)stage ppo was finished.*score\.py changed"):
            run(values, ["ppo"])

    def test_upstream_of_a_stage_that_runs_alone(self, partial_run: Partial, settings: dict[str, Any]) -> None:
        """`tercet ppo` after sft.learning_rate was changed must not train on the old SFT model and call it the new one."""
        folder = partial_run("pretrain", "sft", "reward")
        with pytest.raises(TercetError, match=r"stage sft was finished from something else"):
            run(changed({**settings, "output": str(folder)}, sft={"learning_rate": 0.5}), ["ppo"])
        assert not (folder / "ppo").exists()

    def test_of_what_has_no_effect_on_results_is_no_change(self, run_copy: Path, settings: dict[str, Any]) -> None:
        before = files(run_copy / "ppo")
        run(changed(settings, checkpoint={"every": 1, "keep": 5}, ppo={"save_rollouts_every": 7}))
        assert files(run_copy / "ppo") == before

    def test_of_the_stage_version(self, run_copy: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        import tercet.fingerprint

        monkeypatch.setitem(tercet.fingerprint.VERSIONS, "ppo", 77)
        with pytest.raises(TercetError, match=r"(?s)stage ppo was finished.*stage version was \d+, is 77"):
            run(settings)

    def test_after_a_run_with_auto(self, partial_run: Partial, settings: dict[str, Any], tmp_path: Path) -> None:
        """What `auto` came to is no change: the very default must be skipped when it is finished."""
        values = changed({**settings, "output": str(tmp_path / "auto")}, machine={"dtype": "auto", "threads": "auto"})
        run(values, ["pretrain", "sft"])
        before = files(tmp_path / "auto/sft")
        run(values, ["pretrain", "sft"])
        run(changed(values, machine={"dtype": "float32"}), ["pretrain", "sft"])
        assert files(tmp_path / "auto/sft") == before


class TestFrom:
    def test_redoes_that_stage_and_those_after_it_to_the_same_bytes(self, run_copy: Path, settings: dict[str, Any]) -> None:
        before = results(run_copy, *STAGES[:-1], "evaluation")
        stamps = {stage: (run_copy / stage / "done.json").stat().st_mtime_ns for stage in ("sft", "reward", "ppo")}
        run(settings, from_stage="ppo")
        assert results(run_copy, *STAGES[:-1], "evaluation") == before
        after = {stage: (run_copy / stage / "done.json").stat().st_mtime_ns for stage in stamps}
        assert after["sft"] == stamps["sft"] and after["reward"] == stamps["reward"] and after["ppo"] > stamps["ppo"]

    @pytest.mark.parametrize(
        ("wanted", "stage", "change", "told"),
        [
            (None, "polish", {}, "--from polish"),
            (["ppo"], "sft", {}, "--from sft: the stages to run are ppo"),
            (None, "reward", {"sft": {"epochs": 2}}, "stage sft was finished from something else"),
        ],
    )
    def test_refused_before_anything_is_removed(
        self, wanted: Any, stage: str, change: dict[str, Any], told: str, run_copy: Path, settings: dict[str, Any]
    ) -> None:
        before = files(run_copy)
        with pytest.raises(TercetError, match=told):
            run(changed(settings, **change), wanted, stage)
        assert set(files(run_copy)) == set(before)

    def test_a_wrong_record_is_told_before_anything_is_removed(
        self, run_copy: Path, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        wrong = tmp_path / "wrong.jsonl"
        wrong.write_text('{"prompt": "a", "chosen": "b"}\n')
        before = set(files(run_copy))
        with pytest.raises(TercetError, match=r"wrong\.jsonl:1"):
            run(changed(settings, data={"comparisons": str(wrong)}), from_stage="reward")
        assert set(files(run_copy)) == before


class TestOrder:
    def test_stage_by_stage_gives_what_one_run_gives(self, finished_run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
        for stage in STAGES:
            run(settings, [stage])
        stages = (*STAGES[:-1], "evaluation")
        assert results(tmp_path / "run", *stages) == results(finished_run, *stages)
        assert (tmp_path / "run/report.html").exists()

    def test_out_of_order(self, settings: dict[str, Any]) -> None:
        with pytest.raises(TercetError, match=r"stage reward needs stage pretrain first: `tercet pretrain CONFIG`"):
            run(settings, ["reward"])

    def test_a_stage_without_data(self, settings: dict[str, Any]) -> None:
        with pytest.raises(
            TercetError, match=r"reward: the configuration has no data for this stage; it has: pretrain, sft, ppo"
        ):
            run(
                changed(settings, data={"comparisons": None}, ppo={"rewards": [{"kind": "function", "function": "math:fsum"}]}),
                ["reward"],
            )

    def test_nothing_to_do_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(TercetError, match="nothing to do: set data.sft"):
            run({"output": str(tmp_path / "run"), "model": {"name": "x"}})
        assert not (tmp_path / "run").exists()

    def test_ppo_without_any_reward(self, settings: dict[str, Any]) -> None:
        with pytest.raises(TercetError, match=r"neither data\.comparisons nor reward\.use"):
            run(changed(settings, data={"comparisons": None}))
        with pytest.raises(TercetError, match=r"ppo\.rewards is empty"):
            run(changed(settings, ppo={"rewards": []}))


class TestToldBeforeTraining:
    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"data": {"comparisons": "missing.jsonl"}}, r"missing\.jsonl"),
            ({"data": {"prompts": "WRONG"}}, r"wrong\.jsonl:2"),
            ({"ppo": {"rewards": [{"kind": "function", "function": "nowhere.py:f"}]}}, r"there is no file .*nowhere\.py"),
            ({"evaluation": {"gold": "math:no_such_name"}}, "no function named no_such_name"),
        ],
    )
    def test_what_only_a_later_stage_would_meet(
        self, change: dict[str, Any], told: str, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        wrong = tmp_path / "wrong.jsonl"
        wrong.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
        change = json.loads(json.dumps(change).replace("WRONG", str(wrong)))
        with pytest.raises(TercetError, match=told):
            run(changed(settings, **change))
        assert not (tmp_path / "run/pretrain").exists(), "nothing may be trained or written before that"


class TestLock:
    def test_a_second_process_is_refused(self, run_copy: Path, settings: dict[str, Any]) -> None:
        code = "import sys; from pathlib import Path; from tercet.runtime.lock import locked\n"
        code += f"with locked(Path({str(run_copy)!r})): print('held', flush=True); sys.stdin.read()"
        holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ)
        assert holder.stdin is not None and holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(
                TercetError, match=rf"in use by process {holder.pid} on \S+: wait for it, or choose another output"
            ):
                run(settings)
        finally:
            holder.communicate(b"", timeout=20)
        run(settings)  # the lock goes with the process


def test_the_same_seed_twice_is_the_same_bytes(finished_run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """With dropout in stage 1, so that the global random state counts as well."""
    run(settings)
    stages = (*STAGES[:-1], "evaluation")
    again, first = results(tmp_path / "run", *stages), results(finished_run, *stages)
    assert again.keys() == first.keys() and len(first) >= 10
    assert [name for name in first if again[name] != first[name]] == []


def test_another_seed_is_another_run(settings: dict[str, Any], finished_run: Path, tmp_path: Path) -> None:
    run({**settings, "seed": 4}, ["pretrain", "sft"])
    assert results(tmp_path / "run", "sft") != results(finished_run, "sft")


UPSTREAM = {"sft": ["pretrain"], "reward": ["pretrain", "sft"], "ppo": ["pretrain", "sft", "reward"]}


def stop_when_asked_the(monkeypatch: pytest.MonkeyPatch, time: int) -> None:
    """An interrupt that arrives just before a stage asks for it for the n-th time: after a rollout or an optimizer step."""
    import tercet.runtime.stage as module

    class Scripted(module.Interrupt):
        asked = -1  # the pipeline itself asks once, before the stage

        @property
        def requested(self) -> bool:
            self.asked += 1
            return self.asked >= time

        @requested.setter
        def requested(self, value: bool) -> None:
            pass

    monkeypatch.setattr(module, "Interrupt", Scripted)


class TestExactResume:
    # A PPO iteration asks after its rollout and after each of its 4 optimizer steps: 1 and 6 are between iterations.
    @pytest.mark.parametrize(
        ("stage", "time"),
        [("sft", 1), ("sft", 3), ("reward", 2), ("reward", 5), ("ppo", 1), ("ppo", 3), ("ppo", 5), ("ppo", 6), ("ppo", 9)],
    )
    def test_after_an_interrupt(
        self,
        stage: str,
        time: int,
        partial_run: Partial,
        finished_run: Path,
        settings: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder = partial_run(*UPSTREAM[stage])
        values = {**settings, "output": str(folder)}
        with monkeypatch.context() as patch:
            stop_when_asked_the(patch, time)
            with pytest.raises(Interrupted):
                run(values, [stage])
        assert not (folder / stage / "done.json").exists() and list((folder / stage / "checkpoints").iterdir())
        run(values, [stage])
        assert results(folder, stage) == results(finished_run, stage)
        assert figures(folder, stage) == figures(finished_run, stage)
        assert not (folder / stage / "checkpoints").exists()

    def test_after_many_interrupts(
        self, partial_run: Partial, finished_run: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Stopped at every boundary of PPO in turn. Each stop comes at the second question, since the first repeats the stop before."""
        folder = partial_run(*UPSTREAM["ppo"])
        values, stops = {**settings, "output": str(folder)}, 0
        while not (folder / "ppo/done.json").exists():
            with monkeypatch.context() as patch:
                stop_when_asked_the(patch, 2)
                try:
                    run(values, ["ppo"])
                except Interrupted:
                    stops += 1
            assert stops < 40
        assert stops >= 10
        assert results(folder, "ppo") == results(finished_run, "ppo")

    # Optimizer steps: 5 or so in sft, 7 in reward; in PPO 8 an iteration (policy and value model), checkpoints after iteration 2.
    @pytest.mark.parametrize(("stage", "step"), [("sft", 1), ("sft", 4), ("reward", 4), ("ppo", 3), ("ppo", 20)])
    def test_after_a_crash(
        self,
        stage: str,
        step: int,
        partial_run: Partial,
        finished_run: Path,
        settings: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """What a SIGKILL leaves: the last checkpoint, and metrics beyond it."""
        from tercet.runtime.optim import Optimizer

        folder = partial_run(*UPSTREAM[stage])
        values, real, count = {**settings, "output": str(folder)}, Optimizer.step, 0

        def dies(self: Optimizer, learning_rate: float) -> float:
            nonlocal count
            count += 1
            if count == step:
                raise ZeroDivisionError
            return real(self, learning_rate)

        with monkeypatch.context() as patch:
            patch.setattr(Optimizer, "step", dies)
            with pytest.raises(ZeroDivisionError):
                run(values, [stage])
        with (folder / stage / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99, "iteration": 99, "lo')
        run(values, [stage])
        assert results(folder, stage) == results(finished_run, stage)

    @pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
    def test_after_a_crash_at_the_end(
        self, stage: str, partial_run: Partial, finished_run: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Everything is trained and the last checkpoint is there, but neither the model nor done.json."""
        from tercet.jobs.workshop import Workshop

        def dies(*_: Any) -> None:
            raise ZeroDivisionError

        folder = partial_run(*UPSTREAM[stage])
        values = {**settings, "output": str(folder)}
        with monkeypatch.context() as patch:
            patch.setattr(Workshop, "write_model", dies)
            with pytest.raises(ZeroDivisionError):
                run(values, [stage])
        run(values, [stage])
        assert results(folder, stage) == results(finished_run, stage)
        assert figures(folder, stage) == figures(finished_run, stage)

    def test_with_other_settings_is_refused(
        self, partial_run: Partial, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = partial_run("pretrain")
        values = {**settings, "output": str(folder)}
        with monkeypatch.context() as patch:
            stop_when_asked_the(patch, 2)
            with pytest.raises(Interrupted):
                run(values, ["sft"])
        with pytest.raises(TercetError, match=r"(?s)stage sft was begun from something else.*sft\.batch_size was 8, is 4"):
            run(changed(values, sft={"batch_size": 4}), ["sft"])


def figures(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / stage / "done.json").read_text())["figures"]


def test_the_second_reward_model_leaves_no_checkpoints(settings: dict[str, Any], tmp_path: Path, partial_run: Partial) -> None:
    """The judge needs 500 comparisons; its folder is inside the reward model's."""
    folder = partial_run("pretrain", "sft")
    rows = [f'{{"prompt": "What is {i}?", "chosen": "It is fine.", "rejected": "It is"}}\n' for i in range(640)]
    (tmp_path / "many.jsonl").write_text("".join(rows))
    values = changed(
        {**settings, "output": str(folder)}, data={"comparisons": str(tmp_path / "many.jsonl")}, reward={"batch_size": 128}
    )
    run(values, ["reward"])
    assert (folder / "reward/judge/model/model.safetensors").exists()
    assert not list(folder.rglob("checkpoints"))


def test_a_run_that_breaks_down_leaves_a_report_that_tells_what_led_to_it(
    run_copy: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PPO fails in its second iteration: the error is raised, and summary and report are of what there is."""
    from tercet.stages import ppo

    def broken(metrics: dict[str, Any], run: Any) -> None:
        if metrics["iteration"] == 2:
            raise TercetError("broken down")

    monkeypatch.setattr(ppo, "_stop_if_broken", broken)
    with pytest.raises(TercetError, match="^broken down$"):
        Pipeline(load_config(settings)).run(from_stage="ppo")
    summary = json.loads((run_copy / "summary.json").read_text())
    assert "sft.eval_loss" in summary and "ppo.train_score" not in summary and summary["verdict"]
    assert (run_copy / "report.html").stat().st_mtime_ns >= (run_copy / "ppo/metrics.jsonl").stat().st_mtime_ns


def test_a_report_is_never_of_another_policy_than_the_folders(run_copy: Path, settings: dict[str, Any]) -> None:
    """PPO alone, anew: the evaluation is gone, and so is what the report said of it."""
    before = (run_copy / "report.html").read_text()
    run(changed(settings, ppo={"kl": {"coef": 5.0}}), ["ppo"], "ppo")
    after = (run_copy / "report.html").read_text()
    assert not (run_copy / "evaluation").exists() and after != before
    assert "PPO wins" in before and "PPO wins" not in after


def test_another_reward_model_leaves_nothing_of_the_runs_own(
    run_copy: Path, finished_run: Path, settings: dict[str, Any]
) -> None:
    """reward/ still holds the card and the judge of the model that was trained here before."""
    card = run_copy / "reward/card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"accuracy": 0.123}))
    run(changed(settings, reward={"use": str(finished_run / "reward/model")}), None, "ppo")
    assert load_run(run_copy).card == json.loads((run_copy / "evaluation/reward_card.json").read_text())
    assert load_run(run_copy).card["accuracy"] != 0.123
    judges = set(json.loads((run_copy / "evaluation/policies.json").read_text())["ppo"])
    assert not {"judge", "bag_of_words"} & judges


def test_a_run_that_finds_nothing_to_do_says_what_it_was_made_with(settings: dict[str, Any], run_copy: Any) -> None:
    before = json.loads((Path(settings["output"]) / "summary.json").read_text())
    other = changed(settings, machine={"threads": before["threads"] + 1})
    assert run(other).summary["threads"] == before["threads"]


def test_an_output_that_is_a_file_is_said(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(TercetError, match=r"^output: .*taken is a file, a run needs a folder"):
        run({**settings, "output": str(tmp_path / "taken")})


@pytest.mark.parametrize(
    "name", ["evaluation/notes.txt", "reward/train.py", "pretrain/corpus.jsonl", "report.html", "config.yaml"]
)
def test_other_peoples_files_in_the_output_folder_are_not_written_over(settings: dict[str, Any], name: str) -> None:
    own = Path(settings["output"]) / name
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("machine: {room: 3}\n")
    before = files(Path(settings["output"]))
    for from_stage in (None, "sft"):
        with pytest.raises(TercetError, match=f"holds no run, but has '{name.split('/')[0]}' already"):
            run(settings, from_stage=from_stage)
    assert files(Path(settings["output"])) == before


def test_a_run_that_was_stopped_before_its_first_stage_goes_on(settings: dict[str, Any], finished_run: Path) -> None:
    folder = Path(settings["output"])
    folder.mkdir()
    text = (finished_run / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(f"output: {finished_run}", f"output: {folder}"))
    (folder / "notes.txt").write_text("mine")
    run(settings, wanted=["pretrain"])
    assert (folder / "pretrain/done.json").exists() and (folder / "notes.txt").read_text() == "mine"


def test_a_missing_model_stops_a_run_from_scratch_before_anything_is_removed(run_copy: Path, settings: dict[str, Any]) -> None:
    before = files(run_copy)
    for key, name in (("ppo", "value_model"), ("ppo", "policy")):
        with pytest.raises(TercetError, match=rf"^{key}\.{name}: .*no such folder"):
            run(changed(settings, **{key: {name: "/nowhere/at/all"}}), from_stage="pretrain")
    assert files(run_copy) == before


def test_a_whole_configuration_of_somebody_elses_is_not_taken_for_a_runs(settings: dict[str, Any], finished_run: Path) -> None:
    """Every key of it is there, as `tercet init` writes it, but its output is another folder."""
    folder = Path(settings["output"])
    (folder / "sft").mkdir(parents=True)
    (folder / "sft/mine.txt").write_text("mine")
    shutil.copy(finished_run / "config.yaml", folder)
    before = files(folder)
    with pytest.raises(TercetError, match="holds no run, but has 'config.yaml' already"):
        run(settings, from_stage="sft")
    assert files(folder) == before


def test_a_stage_folder_on_another_disk_can_be_redone_again_and_again(
    run_copy: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    shutil.move(run_copy / "evaluation", tmp_path / "elsewhere")
    (run_copy / "evaluation").symlink_to(tmp_path / "elsewhere")
    for _ in range(3):
        run(settings, from_stage="evaluate")
        assert (run_copy / "evaluation/done.json").exists() and not list(run_copy.glob(".*.removed"))


def test_what_a_model_from_python_lies_in_may_be_moved(finished_run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(finished_run / "sft/model", tmp_path / "new/base-5ffce8cb9e05")
    moved = changed(settings, model={"scratch": None, "name": str(tmp_path / "old/base-5ffce8cb9e05")}, data={"pretrain": None})
    pipeline = Pipeline(load_config({**moved, "output": str(tmp_path / "new")}))
    assert pipeline.config.model.name == str(tmp_path / "new/base-5ffce8cb9e05")
    assert Pipeline(load_config({**moved, "output": str(tmp_path / "other")})).config.model.name == moved["model"]["name"]

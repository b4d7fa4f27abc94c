"""The command line: messages instead of tracebacks, signals, and a quick start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import tercet
from tercet import cli
from tercet.config import load_config
from tercet.pipeline import Pipeline

ROOT = Path(tercet.__file__).parents[1]
COMMANDS = [
    "init",
    "run",
    "pretrain",
    "sft",
    "reward",
    "ppo",
    "evaluate",
    "report",
    "compare",
    "doctor",
    "generate",
    "quickstart",
]


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """`tercet arguments` in this process: exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["tercet", *arguments])
    try:
        cli.main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    out = capsys.readouterr()
    return status, out.out, out.err


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return lambda *arguments: call(monkeypatch, capsys, *arguments)


@pytest.fixture
def config_file(finished_run: Path, tmp_path: Path) -> Path:
    """A file with the finished run's settings whose output is tmp_path/run."""
    values = yaml.safe_load((finished_run / "config.yaml").read_text())
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({**values, "output": "run"}))
    return file


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name: str) -> None:
    result = CliRunner().invoke(cli.app, [name, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output
    assert "<class" not in result.output  # a default that only Python understands


def test_the_list_of_commands_is_complete() -> None:
    assert sorted(info.callback.__name__ for info in cli.app.registered_commands if info.callback) == sorted(COMMANDS)


def test_compare_writes_one_page_for_several_runs(run_copy: Path, finished_run: Path, tmp_path: Path, command: Call) -> None:
    page = tmp_path / "pages/two.html"
    status, out, _ = command("compare", str(run_copy), str(finished_run), "--output", str(page))
    assert status == 0 and str(page) in out.replace("\n", "") and "2 runs side by side" in page.read_text(encoding="utf-8")
    status, _, error = command("compare", str(run_copy), "--output", str(page))
    assert status == 2 and "2 to 6 runs, not 1" in error
    status, _, error = command("compare", str(run_copy), str(tmp_path / "nowhere"), "--output", str(page))
    assert status == 2 and "no such run folder" in error


def test_init_writes_a_file_that_loads_and_never_overwrites(tmp_path: Path, command: Call) -> None:
    file = tmp_path / "tercet.yaml"
    status, out, _ = command("init", str(file))
    assert status == 0 and str(file) in out and load_config(file).model.name == "gpt2"
    file.write_text("mine")
    status, _, error = command("init", str(file))
    assert status == 2 and "exists already" in error and file.read_text() == "mine"
    status, _, error = command("init", str(tmp_path / "nowhere/a.yaml"))
    assert status == 2 and "cannot be written" in error


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "missing.yaml"], "missing.yaml: no such file"),
        (["run", "FILE", "--set", "ppo.klcoef=1"], "did you mean ppo.kl.coef?"),
        (["run", "FILE", "--set", "ppo.minibatch_size=3"], "minibatch_size (3) must divide rollout_batch_size (8): try 2"),
        (["run", "FILE", "--set", "data.sft=nowhere.jsonl"], "nowhere.jsonl"),
        (["ppo", "FILE"], "stage ppo needs stage pretrain first"),
        (["run", "FILE", "--from", "later"], "--from later"),
        (["report", "FILE"], "no run here to report on"),
        (["generate", "nowhere", "--prompt", "x"], "no run folder"),
        (["run", "FILE", "--set", "machine.device=cuda:77"], "machine.device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_message_and_status_2(arguments: list[str], told: str, config_file: Path, command: Call) -> None:
    status, out, error = command(*(str(config_file) if word == "FILE" else word for word in arguments))
    assert status == 2 and told in error
    assert error.count("error: ") == 1 and "Traceback" not in error + out


def test_run_twice_report_and_generate(run_copy: Path, config_file: Path, command: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, error = command("run", str(config_file))
    assert status == 0 and "nothing to do" in error
    assert "on held-out prompts" in out and "PPO preferred to SFT" in out and "report.html" in out.replace("\n", "")
    (run_copy / "report.html").unlink()
    summary = (run_copy / "summary.json").read_bytes()
    status, out, _ = command("report", str(config_file))
    assert status == 0 and (run_copy / "report.html").stat().st_size > 10_000
    assert (run_copy / "summary.json").read_bytes() == summary

    before = {path: path.stat().st_mtime_ns for path in run_copy.rglob("*")}
    status, out, error = command("generate", str(run_copy), "--prompt", "What is rain?", "--prompt", "Describe snow simply.")
    assert status == 0, error
    lines = out.splitlines()
    assert lines[0] == "What is rain?" and "Describe snow simply." in lines
    assert [line.split()[0] for line in lines[1:4]] == ["base", "sft", "ppo"]
    assert before == {path: path.stat().st_mtime_ns for path in run_copy.rglob("*")}, "sampling changes nothing in the run folder"
    again = command("generate", str(run_copy), "--prompt", "What is rain?", "--prompt", "Describe snow simply.")[1]
    assert again == out, "the same seed gives the same samples"
    other = command("generate", str(run_copy), "--prompt", "What is rain?", "--stage", "ppo", "--seed", "5")[1]
    assert [line.split()[0] for line in other.splitlines()[1:2]] == ["ppo"] and other.splitlines()[1] != lines[3]
    status, _, error = command("generate", str(run_copy), "--prompt", "x", "--stage", "dpo")
    assert status == 2 and "--stage dpo: this run has base, sft, ppo" in error
    (run_copy / "ppo/best").symlink_to(run_copy / "ppo/model")
    best = command("generate", str(run_copy), "--prompt", "What is rain?", "--stage", "best")[1].splitlines()
    assert best[1].split() == ["best", *lines[3].split()[1:]], "not among those that are shown by default"
    assert command("generate", str(run_copy), "--prompt", "What is rain?")[1].splitlines() == lines[:4]
    (run_copy / "ppo/best").unlink()
    status, _, error = command("generate", str(run_copy), "--prompt", "x", "--prompt", "")
    assert status == 2 and "error: --prompt: an empty text is no token" in error and "Traceback" not in error


def test_paths_with_brackets_are_printed_as_they_are(run_copy: Path, config_file: Path, command: Call) -> None:
    shutil.move(run_copy, run_copy.with_name("[draft]"))
    status, out, error = command("run", str(config_file), "--set", f"output='{run_copy.with_name('[draft]')}'")
    told = "".join(error.split())  # lines break where the folder's name ends
    assert status == 0 and "[draft]/report.html" in "".join(out.split())
    assert "[draft]:pretrain,sft," in told and "nothingtodo" in told
    _, _, error = command("generate", str(run_copy.with_name("[draft]")), "--prompt", "What is rain?")
    assert "[draft]0.05M" in "".join(error.split())


def test_the_table_without_an_evaluation(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tercet.pipeline import RunResult
    from tercet.table import print_summary

    print_summary(RunResult(run_copy, {"seconds": 1.0, "sft.eval_loss": 2.0}))
    assert "report.html" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["init", "NEW"], ["run", "WRONG"]], ids=lambda words: words[0])
def test_a_quick_start_without_the_big_libraries(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("model: {name: gpt2}\nppoo: 3\n")
    words = [{"NEW": str(tmp_path / "new.yaml"), "WRONG": str(tmp_path / "wrong.yaml")}.get(word, word) for word in arguments]
    code = "import sys\nfrom tercet import cli\nsys.argv = ['tercet', *sys.argv[1:]]\ntry:\n    cli.main()\n"
    code += "except SystemExit:\n    pass\nprint(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    loaded = done.stdout.splitlines()[-1]
    assert loaded == "[]", done.stdout + done.stderr


def long_ppo(finished_run: Path, folder: Path) -> dict[str, Any]:
    """A run folder with all but PPO, which has more iterations than anybody waits for here."""
    folder.mkdir()
    for stage in ("pretrain", "sft", "reward"):
        shutil.copytree(finished_run / stage, folder / stage)
    values = yaml.safe_load((finished_run / "config.yaml").read_text())
    values["ppo"] |= {"iterations": 48, "save_rollouts_every": 2}
    values["checkpoint"] = {"every": 3, "keep": 2}
    return {**values, "output": str(folder)}


def start_ppo(values: dict[str, Any], lines: int, file: Path) -> subprocess.Popen[str]:
    """`tercet ppo` in a process of its own, up to its metrics' n-th line."""
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "tercet.cli", "ppo", str(file)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ)
    metrics, end = Path(values["output"]) / "ppo/metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    return process


def written(folder: Path) -> dict[str, bytes]:
    names = ("metrics.jsonl", "rollouts.jsonl", "model/model.safetensors", "value/model.safetensors")
    return {name: (folder / "ppo" / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def undisturbed(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    Pipeline(load_config(long_ppo(finished_run, folder))).run(["ppo"])
    return written(folder)


@pytest.mark.parametrize("lines", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_sigkill_then_the_same_command(lines: int, finished_run: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    values = long_ppo(finished_run, tmp_path / "run")
    process = start_ppo(values, lines, tmp_path / "c.yaml")
    process.kill()
    process.communicate()
    assert not (tmp_path / "run/ppo/done.json").exists()
    Pipeline(load_config(values)).run(["ppo"])
    assert written(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_how_to_go_on(
    number: int, finished_run: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    values = long_ppo(finished_run, tmp_path / "run")
    process = start_ppo(values, 5, tmp_path / "c.yaml")
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "the state is saved, and the same command goes on" in error and "Traceback" not in error
    state = sorted((tmp_path / "run/ppo/checkpoints").glob("step-*"))[-1] / "state.json"
    assert json.loads(state.read_text())["step"] >= 5
    Pipeline(load_config(values)).run(["ppo"])
    assert written(tmp_path / "run") == undisturbed


def test_a_second_signal_stops_at_once_with_a_message(command: Call, monkeypatch: pytest.MonkeyPatch, config_file: Path) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tercet.pipeline.Pipeline.run", stopped)
    status, _, error = command("run", str(config_file))
    assert status == 130 and "goes on from the last checkpoint" in error


def test_the_configuration_of_a_copied_run_folder_is_not_used_on_the_original(
    run_copy: Path, finished_run: Path, tmp_path: Path, command: Call
) -> None:
    for arguments in (("run", "--from", "evaluate"), ("report",)):
        status, _, error = command(arguments[0], str(run_copy / "config.yaml"), *arguments[1:])
        assert status == 2 and f"its output is {finished_run}" in error and f"--set output={run_copy}" in error
    status, out, _ = command("report", str(run_copy / "config.yaml"), "--set", f"output={run_copy}")
    assert status == 0 and str(run_copy / "report.html") in out.replace("\n", "")


def test_generate_makes_no_model(run_copy: Path, command: Call) -> None:
    status, _, error = command("generate", str(run_copy), "--prompt", "caf\udce9")
    assert status == 2 and "bytes that are no UTF-8" in error
    shutil.rmtree(run_copy / "pretrain")
    status, _, error = command("generate", str(run_copy), "--prompt", "What is rain?")
    assert status == 2 and "its model from scratch is not there" in error and not (run_copy / "pretrain").exists()

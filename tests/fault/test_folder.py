"""Run folders that were damaged, moved, shared or written by another version."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fault.conftest import Undisturbed
from fault.harness import Fault, Process, contents, differences, tercet, torn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def killed(config: Path, where: str, at: int, *options: str) -> str:
    """A run that was killed at the n-th change of a file named like this; what it had printed."""
    log = config.parent / "0.log"
    status, output = tercet("run", config, *options, log=log, fault=Fault("kill", at, str(config.parent / "run"), where=where))
    assert status == -9, output[-2000:]
    return output


def finish(config: Path, undisturbed: Undisturbed, *options: str) -> str:
    log = config.parent / "last.log"
    log.unlink(missing_ok=True)
    status, output = tercet("run", config, *options, log=log)
    assert status == 0, output[-2000:]
    assert differences(contents(config.parent / "run"), undisturbed.files) == []
    return output


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "file", "found"),
    [
        (flip, "policy.safetensors", "does not match its checksum"),
        (flip, "state.json", "does not match its checksum"),
        (flip, "manifest.json", ""),
        (cut, "value_model_optimizer.safetensors", "does not match its checksum"),
        (Path.unlink, "policy_optimizer.safetensors", "No such file"),
        (Path.unlink, "manifest.json", "No such file"),
    ],
    ids=["flip-weights", "flip-state", "flip-manifest", "cut", "no-weights", "no-manifest"],
)
def test_a_damaged_checkpoint(
    damage: Callable[[Path], None], file: str, found: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """The one before it is used, and it is said."""
    config = undisturbed.copy(tmp_path / "a")
    killed(config, "/ppo/metrics.jsonl", 7)  # lines 1 and 2, flushed for a checkpoint, 3 and 4, flushed, 5
    checkpoints = tmp_path / "a/run/ppo/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000000002", "step-000000004"]
    damage(checkpoints / "step-000000004" / file)
    output = finish(config, undisturbed)
    assert "step-000000004 is damaged" in output and found in output and "going on after iteration 2" in output


def test_when_every_checkpoint_is_damaged_the_stage_begins_anew(undisturbed: Undisturbed, tmp_path: Path) -> None:
    config = undisturbed.copy(tmp_path / "a")
    killed(config, "/ppo/metrics.jsonl", 7)
    for path in (tmp_path / "a/run/ppo/checkpoints").glob("*/policy.safetensors"):
        flip(path)
    output = finish(config, undisturbed)
    assert output.count("is damaged") == 2 and "going on after" not in output


def test_a_moved_run_goes_on_exactly(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Run folder, data and configuration are somewhere else after the kill, as on another machine."""
    config = undisturbed.copy(tmp_path / "a")
    killed(config, "/ppo/metrics.jsonl", 4)
    moved = undisturbed.copy(tmp_path / "elsewhere")
    shutil.move(tmp_path / "a/run", tmp_path / "elsewhere/run")
    shutil.rmtree(tmp_path / "a")
    assert "going on after iteration 2" in finish(moved, undisturbed)


def test_an_older_format(undisturbed: Undisturbed, tmp_path: Path) -> None:
    config = undisturbed.copy(tmp_path / "a")
    killed(config, "/sft/metrics.jsonl", 4)
    (checkpoint,) = (tmp_path / "a/run/sft/checkpoints").iterdir()
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "format": 1}))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["state.json"] = hashlib.sha256((checkpoint / "state.json").read_bytes()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    before = contents(tmp_path / "a/run")
    status, output = tercet("run", config, log=tmp_path / "1.log")
    assert status == 2 and "has checkpoint format 1, this version of Tercet reads 2" in output and "--from" in output
    assert "Traceback" not in output and contents(tmp_path / "a/run") == before
    finish(config, undisturbed, "--from", "sft")


def test_two_processes_on_one_folder(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The second is refused and told of the first, which ends as if nothing had been."""
    import socket

    config = undisturbed.copy(tmp_path / "a")
    first = Process("run", config, log=tmp_path / "0.log")
    while not (tmp_path / "a/run/sft/started.json").exists():
        assert not first.ended_within(0.01), first.output()
    status, output = tercet("run", config, log=tmp_path / "1.log")
    assert status == 2 and f"is in use by process {first.pid} on {socket.gethostname()}" in output
    status, output = tercet("run", config, "--from", "pretrain", log=tmp_path / "2.log")
    assert status == 2 and "is in use by process" in output
    assert first.wait() == 0, first.output()
    assert differences(contents(tmp_path / "a/run"), undisturbed.files) == []


class TestFrom:
    def test_killed_it_goes_on_with_the_same_command(self, undisturbed: Undisturbed, tmp_path: Path) -> None:
        """Not from the beginning of the stage: a machine that is taken away every hour would never come to the end."""
        config = undisturbed.copy(tmp_path / "a")
        finish(config, undisturbed)
        killed(config, "/ppo/metrics.jsonl", 4, "--from", "ppo")
        output = finish(config, undisturbed, "--from", "ppo")
        assert "going on after iteration 2" in output
        assert "going on" not in finish(config, undisturbed, "--from", "ppo"), "after the end the same command redoes the stage"

    def test_killed_and_changed_it_begins_anew(self, undisturbed: Undisturbed, tmp_path: Path) -> None:
        config = undisturbed.copy(tmp_path / "a")
        killed(config, "/ppo/metrics.jsonl", 4, "--from", "pretrain")
        for options, told in (
            (["--set", "ppo.gamma=0.9"], "ppo.gamma was 1.0, is 0.9"),
            (["--set", "seed=9"], "seed was 3, is 9"),
        ):
            status, output = tercet("run", config, *options, log=tmp_path / "1.log")
            assert status == 2 and told in output
        changed = ("--set", "ppo.gamma=0.9", "--from", "ppo")
        status, output = tercet("run", config, *changed, log=tmp_path / "2.log")
        assert status == 0 and "going on" not in output, output[-2000:]
        finish(config, undisturbed, "--from", "ppo")

    def test_a_report_that_was_not_written_yet_is_written_then(self, undisturbed: Undisturbed, tmp_path: Path) -> None:
        """Killed between the last stage and the report, with the report of the stages before still there."""
        config = undisturbed.copy(tmp_path / "a")
        finish(config, undisturbed)
        report = tmp_path / "a/run/report.html"
        report.write_text(report.read_text().replace("</html>", "the old one</html>"))
        killed(config, "/.summary.json.writing", 1, "--from", "evaluate")
        assert "the old one" in report.read_text() and torn(tmp_path / "a/run") == []
        finish(config, undisturbed)
        assert "the old one" not in report.read_text()

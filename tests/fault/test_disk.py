"""A disk that is full, read-only or forbidden: one message, nothing half-written, and a run that goes on once there is room."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault.conftest import Stages, Undisturbed
from fault.harness import FOLDERS, Fault, contents, differences, tercet, torn

pytestmark = pytest.mark.timeout(4 * 3600)


def refused(status: int, output: str, reason: str) -> None:
    assert status == 2, f"{status} {output[-2000:]}"
    assert output.count("error: ") == 1 and reason in output, output[-2000:]
    assert "Traceback" not in output


def finish(config: Path, undisturbed: Undisturbed) -> None:
    assert torn(config.parent / "run") == []
    status, output = tercet(undisturbed.command, config, log=config.parent / "last.log")
    assert status == 0, output[-2000:]
    assert differences(contents(config.parent / "run"), undisturbed.files) == []


def fill(at: int, undisturbed: Undisturbed, folder: Path) -> None:
    config = undisturbed.copy(folder)
    fault = Fault("fail", at, str(folder / "run"))
    status, output = tercet(undisturbed.command, config, log=folder / "0.log", fault=fault)
    refused(status, output, "No space left on device")
    finish(config, undisturbed)
    shutil.rmtree(folder)


def writes(undisturbed: Undisturbed) -> list[int]:
    return [i + 1 for i, change in enumerate(undisturbed.changes) if change.startswith("write")]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_no_room_at_some_write(seed: int, undisturbed: Undisturbed, tmp_path: Path) -> None:
    fill(random.Random(seed).choice(writes(undisturbed)), undisturbed, tmp_path / "a")


@pytest.mark.full
@pytest.mark.parametrize("stage", FOLDERS)
def test_no_room_at_every_write(stage: str, stages: Stages, tmp_path: Path) -> None:
    part = stages(stage)
    for at in writes(part):
        fill(at, part, tmp_path / str(at))
    print(f"\n{stage}: {len(writes(part))} writes")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in memory, of 100 KB; where nobody may mount one, the test is skipped."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.4, *(pytest.param(n / 20, marks=pytest.mark.full) for n in range(1, 20))])
def test_a_small_disk(share: float, undisturbed: Undisturbed, small_disk: Path) -> None:
    """Also what safetensors and tokenizers write meets this wall, which no patch of Python's can put up for them."""
    resize(small_disk, 2**30)
    config = undisturbed.copy(small_disk / "a")
    used = shutil.disk_usage(small_disk).used
    needed = sum(len(content) for content in undisturbed.files.values() if isinstance(content, bytes))
    resize(small_disk, used + int(share * needed))
    status, output = tercet("run", config, log=small_disk.parent / "0.log")
    refused(status, output, "No space left on device")
    resize(small_disk, 2**30)
    finish(config, undisturbed)


@pytest.mark.slow
def test_a_file_system_that_has_become_read_only(undisturbed: Undisturbed, tmp_path: Path) -> None:
    config = undisturbed.copy(tmp_path / "a")
    fault = Fault("fail", 3, str(tmp_path / "a/run"), number=errno.EROFS, where="/ppo/metrics.jsonl")
    status, output = tercet("run", config, log=tmp_path / "0.log", fault=fault)
    refused(status, output, "Read-only file system")
    assert "choose another output" in output
    finish(config, undisturbed)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="needs another user to become")
def test_a_folder_of_somebody_elses(undisturbed: Undisturbed) -> None:
    with tempfile.TemporaryDirectory() as name:
        config = undisturbed.copy(Path(name) / "a")
        (Path(name) / "a/run").mkdir()
        for folder in (Path(name), Path(name) / "a", Path(name) / "a/run"):
            folder.chmod(0o755)
        status, output = tercet("run", config, log=Path(name) / "0.log", user=65534)
        refused(status, output, "the run folder cannot be written (Permission denied): choose another output")
        assert list((Path(name) / "a/run").iterdir()) == []

"""`tercet` in processes that die on purpose, and what they leave behind compared byte for byte.

A fork server has torch and transformers imported already, so that a process starts in milliseconds and fifty kills take minutes.
Each process is forked from that server, never from the one that runs the tests: it has the threads and the state of a fresh start.
"""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from conftest import questions, tiny_config, write_jsonl, write_tiny_data

ROOT = Path(__file__).parents[2]
FOLDERS = {"pretrain": "pretrain", "sft": "sft", "reward": "reward", "ppo": "ppo", "evaluate": "evaluation"}
STAGES = ("pretrain", "sft", "reward", "judge", "ppo", "evaluate", "report")
IMPORTED = ["tercet.jobs.training", "tercet.jobs.evaluation", "tercet.report", "tercet.table", "transformers.models.gpt2"]
IMPORTED += ["transformers.models.gpt2.modeling_gpt2", "matplotlib.backends.backend_svg"]


def write_configuration(folder: Path) -> Path:
    """FOLDER/tercet.yaml with its data: every stage there is, the second reward model too, in about two seconds; output FOLDER/run."""
    write_tiny_data(folder)
    rng, asked = random.Random(11), questions()
    write_jsonl(folder / "texts.jsonl", ({"text": f"The {i}th day of {rng.choice(asked)}"} for i in range(24)))
    pairs = ({"prompt": f"{rng.choice(asked)} {i}", "chosen": "It is warm.", "rejected": "It"} for i in range(640))
    write_jsonl(folder / "comparisons.jsonl", pairs)
    values = tiny_config(folder, folder / "run")
    values["data"]["pretrain"] = str(folder / "texts.jsonl")
    values["pretrain"] = {key: value for key, value in values["sft"].items() if key != "dropout"}
    values["reward"] |= {"batch_size": 96}
    values["ppo"] |= {"evaluate_every": 2, "iterations": 5}
    values["checkpoint"] = {"every": 2, "keep": 2}
    values["machine"]["microbatch_tokens"] = 1024
    file = folder / "tercet.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@dataclass(frozen=True)
class Fault:
    """What happens to a process when it is about to make its n-th change below a folder, counted from 1; `where`: only those count
    whose line "write /folder/file" holds this text.

    "count": nothing, but a line with the kind and the file of each change is left in `record`. "kill": SIGKILL instead of the
    change. "tear": the file that is opened, or the next one to grow so far, is cut off after `extra` bytes by SIGXFSZ, in the middle
    of a write: also those of safetensors and tokenizers, which Python does not see. "fail": from then on every opening of a file to
    write it raises OSError(number), as on a full disk.
    """

    kind: str
    at: int = 0
    folder: str = ""
    extra: int = 0
    number: int = errno.ENOSPC
    record: str = ""
    where: str = ""

    def install(self) -> None:
        """In the process that is to be struck."""
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            kind, path = _change(event, arguments, self.folder)
            if not kind or self.where not in f"{kind} {path}":
                return
            count += 1
            if self.kind == "count":
                with open(self.record, "a") as file:
                    file.write(f"{kind} {path}\n")
            elif self.kind == "fail" and count >= self.at and kind == "write":
                raise OSError(self.number, os.strerror(self.number), path)
            elif self.kind == "kill" and count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.kind == "tear" and count == self.at:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                size = os.path.getsize(path) if os.path.isfile(path) and path.endswith(".jsonl") else 0
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + self.extra, resource.RLIM_INFINITY))

        sys.addaudithook(hook)


def _change(event: str, arguments: tuple[Any, ...], folder: str) -> tuple[str, str]:
    """What an audit event is about to do below the folder, and to which file: ("write", path), or ("", "")."""
    path = str(arguments[0]) if arguments else ""
    inside = path.startswith(folder)
    if event == "open" and inside and not isinstance(arguments[0], int):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            return "write", path
        if arguments[1] is None:  # opened by number to be read: that is how a finished write is flushed to the disk
            return "sync", path
    elif event == "os.rename" and inside:
        return "rename", path
    elif event == "os.mkdir" and inside and not os.path.isdir(path):
        return "mkdir", path
    elif event in ("os.remove", "os.rmdir") and (inside or arguments[1] != -1):  # rmtree names files relative to their folder
        return "remove", path
    return "", ""


def _tercet(arguments: list[str], log: str, fault: Fault | None, package: str, user: int | None) -> None:
    """The forked process: `tercet ARGUMENTS`, its output in `log`."""
    import tercet
    from tercet import cli

    assert tercet.__file__ == package, "the fork server has imported another copy"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    seconds = os.open(f"{log}.cpu", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # now, because another user may not be allowed to
    if user is not None:
        os.setuid(user)
    if fault is not None:
        fault.install()
    sys.argv = ["tercet", *arguments]
    try:
        cli.main()
    finally:
        os.write(seconds, str(time.process_time()).encode())


class Process:
    """A running `tercet`."""

    def __init__(self, *arguments: str | Path, log: Path, fault: Fault | None = None, user: int | None = None):
        import tercet

        start_server()
        self.log = log
        context = multiprocessing.get_context("forkserver")
        given = ([str(word) for word in arguments], str(log), fault, tercet.__file__, user)
        self._process = context.Process(target=_tercet, args=given, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 600) -> int:
        """The exit status, the negative number of the signal that ended it."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.output()[-2000:]}")
        return self._process.exitcode

    def ended_within(self, seconds: float) -> bool:
        self._process.join(seconds)
        return self._process.exitcode is not None

    def ended_before(self, cpu_seconds: float) -> bool:
        """Whether it ends before it has used so much of a processor: a moment that does not depend on other work on the machine."""
        while not self.ended_within(0.002):
            with contextlib.suppress(FileNotFoundError):
                ticks = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
                if sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK") >= cpu_seconds:
                    return False
        return True

    def output(self) -> str:
        """Everything it has printed, line breaks of the terminal's width taken out."""
        return " ".join(self.log.read_text(errors="replace").split()) if self.log.exists() else ""


def start_server() -> None:
    """Start the fork server, if it is not there yet."""
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before


def tercet(*arguments: str | Path, log: Path, fault: Fault | None = None, user: int | None = None) -> tuple[int, str]:
    """Run to the end: exit status and output."""
    process = Process(*arguments, log=log, fault=fault, user=user)
    return process.wait(), process.output()


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a finished run folder: its bytes, without what a clock or the folder's place has put there."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name == ".lock" or path.name == "timings.jsonl":
            continue
        if path.name in ("done.json", "summary.json"):
            values = json.loads(path.read_text())
            found[name] = {key: value for key, value in values.items() if not key.endswith("seconds")}
        elif name == "report.html":
            found[name] = path.read_text().rstrip().endswith("</html>")
        else:
            found[name] = path.read_bytes().replace(str(folder.parent).encode(), b"PARENT")
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Files that are only on one side, or differ."""
    return [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]


def torn(folder: Path) -> list[str]:
    """Files of a run folder, in whatever state, that have their final name and are not whole. Journals may end in a torn line."""
    from safetensors import SafetensorError, safe_open

    found = []
    for path in folder.rglob("*"):
        inside = [part for part in path.relative_to(folder).parts if part.startswith(".")]
        if inside or path.is_dir() or path.suffix == ".jsonl" or path.name == "README.md":
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".yaml":
                assert isinstance(yaml.safe_load(path.read_text()), dict)
            elif path.suffix == ".html":
                assert path.read_text().rstrip().endswith("</html>")
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
        except (ValueError, AssertionError, SafetensorError) as error:
            found.append(f"{path.relative_to(folder)}: {error}")
    return found


def stage_of(folder: Path) -> str:
    """The stage that a run was in when it died."""
    done = [(folder / name / "done.json").exists() for name in FOLDERS.values()]
    if not (folder / "config.yaml").exists():
        return "start"
    stage = (*STAGES[:3], "ppo", "evaluate", "report")[done.index(False) if False in done else -1]
    return "judge" if stage == "reward" and (folder / "reward/judge").exists() else stage

"""`make mutants` (`python -m mutants.run` in tests/): break a copy of the code in each way of mutants.py; do the tests notice?

Every mutant runs in a process of its own, forked from one that has loaded the libraries but nothing of Tercet. Killed means that
a test failed (pytest's exit code 1); a file that does not compile or a test that is not found ends the script. The figures go
into docs/conformance.md.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from conformance.document import read_section, replace_section
from mutants.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 60
KINDS = (("killed", "timeout"), ("equivalent",), ("survived",))
LIBRARIES = ["torch", "transformers", "pytest", "hypothesis", "datasets", "pydantic"]


def mutated(mutant: Mutant, source: str) -> str:
    """The broken file; ValueError if the text is not there exactly once or the result is not Python."""
    found = source.count(mutant.original)
    if found != 1:
        raise ValueError(f"{mutant.file}: {mutant.name}: the original text is there {found} times, not once: {mutant.original!r}")
    broken = source.replace(mutant.original, mutant.replacement)
    compile(broken, mutant.file, "exec")
    return broken


def in_child(folder: str, tests: tuple[str, ...], output: str) -> None:
    """Run the tests of the copy in `folder`; exit with pytest's code, 99 if they would import another Tercet."""
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    sys.path[:] = [folder, *(entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "tests"))]
    sys.dont_write_bytecode = True  # two mutants of one size within a second would share the bytecode
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import pytest
    import torch
    from hypothesis import Phase, settings

    torch.set_num_threads(1)
    phases = (Phase.explicit, Phase.generate)  # a failure is enough: no shrinking
    settings.register_profile("mutants", database=None, derandomize=True, phases=phases, deadline=None)
    settings.load_profile("mutants")
    code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
    import tercet

    sys.stdout.flush()
    os._exit(code if str(tercet.__file__).startswith(folder) else 99)


class Workshop:
    """A copy of the repository to break, and processes to look at it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(LIBRARIES)
        ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
        for name in ("tercet", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", folder)

    def run(self, tests: tuple[str, ...]) -> tuple[str, str]:
        """("passed", "failed" or "timeout", the output's end); RuntimeError for anything else, such as a missing test."""
        log = self.folder / "output.txt"
        process = self._context.Process(target=in_child, args=(str(self.folder), tests, str(log)))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
            return "timeout", ""
        text = log.read_text(errors="replace")
        if process.exitcode not in (0, 1):
            raise RuntimeError(f"exit code {process.exitcode} from {' '.join(tests)}:\n{text[-2000:]}")
        return ("passed", "failed")[process.exitcode], text[-2000:]

    def judge(self, mutant: Mutant) -> str:
        """Break the copy, run the mutant's tests, mend the copy: "killed", "timeout" (killed as well) or "survived"."""
        file = self.folder / mutant.file
        source = file.read_text(encoding="utf-8")
        file.write_text(mutated(mutant, source), encoding="utf-8")
        try:
            outcome, _ = self.run(mutant.tests)
        finally:
            file.write_text(source, encoding="utf-8")
        return {"passed": "survived", "failed": "killed", "timeout": "timeout"}[outcome]


def run_all(mutants: Iterable[Mutant]) -> dict[str, str]:
    """The verdict on each mutant, by "file: name"; the unbroken copy must pass every named test first."""
    mutants = list(mutants)
    for mutant in mutants:
        mutated(mutant, (ROOT / mutant.file).read_text(encoding="utf-8"))
    verdicts = {}
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder).resolve())
        for tests in sorted({mutant.tests for mutant in mutants}):
            outcome, text = workshop.run(tests)
            if outcome != "passed":
                raise RuntimeError(f"the unbroken code does not pass {' '.join(tests)} ({outcome}):\n{text}")
        for mutant in mutants:
            start = time.monotonic()
            verdict = workshop.judge(mutant)
            if verdict == "survived" and mutant.equivalent:
                verdict = "equivalent"
            verdicts[f"{mutant.file}: {mutant.name}"] = verdict
            print(f"{verdict:10} {time.monotonic() - start:5.1f} s  {mutant.file}: {mutant.name}", flush=True)
    return verdicts


def section(verdicts: dict[str, str]) -> str:
    """The figures as Markdown."""
    outcomes = [verdicts[f"{mutant.file}: {mutant.name}"] for mutant in MUTANTS]  # not those of mutants that are no more
    killed, equivalent, survived = (sum(one in kinds for one in outcomes) for kinds in KINDS)
    lines = [
        f"{len(MUTANTS)} mutants: {killed} killed, {equivalent} equivalent, {survived} survived.",
        "",
        "| file | tests that look | what was broken; killed, unless it says otherwise |",
        "|---|---|---|",
    ]
    for (file, tests), group in itertools.groupby(MUTANTS, key=lambda mutant: (mutant.file, mutant.tests)):
        names = "; ".join(_entry(mutant, verdicts[f"{file}: {mutant.name}"]) for mutant in group)
        files = ", ".join(dict.fromkeys(test.removeprefix("tests/").partition("::")[0] for test in tests))
        lines.append(f"| {file.removeprefix('tercet/')} | {files} | {names} |")
    return "\n".join(lines)


def _entry(mutant: Mutant, verdict: str) -> str:
    if verdict in KINDS[0]:
        return mutant.name
    return f"{mutant.name} [{verdict}{f': {mutant.equivalent}' * (verdict == 'equivalent')}]"


def written() -> dict[str, str]:
    """The verdicts that docs/conformance.md holds, by "file: name"."""
    rows = re.findall(r"^\| (\S+\.py) \| .*? \| (.*) \|$", read_section("mutants"), re.MULTILINE)
    entries = [(file, re.fullmatch(r"(.*?)(?: \[(.*)\])?", entry)) for file, names in rows for entry in names.split("; ")]
    return {f"tercet/{file}: {found[1]}": (found[2] or "killed").partition(":")[0] for file, found in entries if found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "only", nargs="*", help="run only mutants whose 'file: name' contains one of these; the others' verdicts stay as they are"
    )
    arguments = parser.parse_args()
    wanted = arguments.only or [""]
    verdicts = run_all(mutant for mutant in MUTANTS if any(part in f"{mutant.file}: {mutant.name}" for part in wanted))
    survivors = [name for name, verdict in verdicts.items() if verdict == "survived"]
    replace_section("mutants", section({f"{m.file}: {m.name}": "not run" for m in MUTANTS} | written() | verdicts))
    print(f"{len(verdicts)} mutants, {len(survivors)} survived" + "".join(f"\n  {name}" for name in survivors))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

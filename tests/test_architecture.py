"""Who may import whom, no circles, and nothing longer than can be read: design.md sections 2 and 4, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import tercet

PACKAGE = Path(tercet.__file__).parent
TOP = ("pipeline", "folder", "api", "fingerprint", "quickstart", "table", "sampler", "doctor")
LOW = {"types", "config", "data", "models", "generation", "scoring", "algo", "runtime", "stages"}

# Rooms (or single modules of them) of tercet that each room may import, beside itself.
ROOMS: dict[str, set[str]] = {
    "": {"api", "pipeline", "sampler", "config", "errors"},  # tercet/__init__.py: names only
    "types": {"errors"},
    "errors": set(),
    "config": {"types", "errors"},
    "world": {"types", "errors"},
    "algo": {"types"},
    "data": {"types", "errors"},
    "models": {"types", "errors", "algo"},
    "generation": {"types", "errors", "algo", "models"},
    "scoring": {"types", "errors", "algo", "models", "data.template", "data.batches"},
    "runtime": {"types", "errors"},
    "stages": {*LOW, "errors"},
    "jobs": {*LOW, "errors"},
    "report": set(),
    **{room: {*LOW, "errors", "world", "jobs", "report", *TOP} for room in TOP},
    "cli": {*LOW, "errors", "world", "jobs", "report", *TOP},
}
# Libraries that each room may import, beside the standard library.
LIBRARIES: dict[str, set[str]] = {
    "": set(),
    "types": {"torch"},
    "errors": set(),
    "config": {"pydantic", "yaml"},
    "world": set(),
    "algo": {"torch"},
    "data": {"torch", "numpy", "datasets"},
    "models": {"torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy"},
    "generation": {"torch", "transformers", "numpy"},
    "scoring": {"torch", "transformers"},
    "runtime": {"torch", "numpy", "safetensors", "rich"},
    "stages": {"torch", "numpy"},
    "jobs": {"torch", "numpy", "transformers"},
    "report": {"matplotlib", "jinja2", "yaml"},
    "pipeline": set(),
    "folder": set(),
    "api": set(),
    "fingerprint": set(),
    "quickstart": {"rich"},
    "table": {"rich"},
    "sampler": {"torch", "rich"},
    "doctor": {"torch", "rich", "transformers"},
    "cli": {"typer"},
}
STAGES_AMONG_THEMSELVES = {
    "sft": {"supervised"},
    "reward": {"supervised"},
    "ppo": {"rollout", "update", "evaluate"},
    "evaluate": {"rollout"},
}

FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """tercet/data/files.py -> "data.files"; tercet/data/__init__.py -> "data"; tercet/__init__.py -> ""."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def imports_in(source: str) -> Iterator[str]:
    """Full names of everything imported anywhere in the source, lazily inside functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room is meant"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = {module_name(path) for path in FILES}


def own_modules(source: str) -> set[str]:
    """The modules of tercet that the source imports: "data.files" for `from tercet.data.files import fingerprint`."""
    found = set()
    for name in imports_in(source):
        if name == "tercet" or name.startswith("tercet."):
            inner = name.removeprefix("tercet").removeprefix(".")
            found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    return found


def libraries(source: str) -> set[str]:
    tops = {name.partition(".")[0] for name in imports_in(source)}
    return tops - set(sys.stdlib_module_names) - {"tercet"}


def forbidden(module: str, source: str) -> list[str]:
    """What the module imports against the table."""
    room = module.partition(".")[0]
    wrong = [
        f"tercet.{other}"
        for other in own_modules(source)
        if other.partition(".")[0] != room and not {other, other.partition(".")[0]} & ROOMS[room]
    ]
    return wrong + sorted(libraries(source) - LIBRARIES[room])


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    assert forbidden(module_name(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "stages").glob("*.py")), ids=lambda path: path.stem)
def test_stages_do_not_import_each_other(path: Path) -> None:
    others = {name.partition(".")[2] for name in own_modules(path.read_text(encoding="utf-8")) if name.startswith("stages.")}
    assert others <= STAGES_AMONG_THEMSELVES.get(path.stem, set())


@pytest.mark.parametrize(
    ("module", "line", "wrong"),
    [
        ("algo.kl", "from tercet.models.load import load_tokenizer", ["tercet.models.load"]),
        ("algo.kl", "import logging, transformers.utils", ["transformers"]),
        ("scoring.model", "from tercet.data.files import read_rows", ["tercet.data.files"]),
        ("world.gold", "def f():\n    import torch", ["torch"]),
        ("runtime.stage", "from tercet import stages", ["tercet.stages"]),
        ("stages.sft", "from tercet.pipeline import Pipeline", ["tercet.pipeline"]),
        ("jobs.training", "from tercet import cli", ["tercet.cli"]),
    ],
)
def test_the_table_is_enforced(module: str, line: str, wrong: list[str]) -> None:
    assert forbidden(module, line) == wrong


def test_no_circles() -> None:
    graph = {module_name(path): own_modules(path.read_text(encoding="utf-8")) - {module_name(path)} for path in FILES}
    del graph[""]  # tercet/__init__.py names modules as strings and imports none
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {' -> '.join(error.args[1])}") from None


def test_every_folder_is_in_the_table() -> None:
    assert {module.partition(".")[0] for module in MODULES} <= set(ROOMS) == set(LIBRARIES)


def test_only_runtime_knows_torch_distributed() -> None:
    for path in FILES:
        if any(name.startswith("torch.distributed") for name in imports_in(path.read_text(encoding="utf-8"))):
            assert module_name(path) == "runtime.distributed"


def test_nothing_unpickles() -> None:
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        assert not {name.partition(".")[0] for name in imports_in(source)} & {"pickle", "dill", "joblib", "shelve"}, path
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
        assert not calls & {"torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load"}, path


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("tercet", ["torch", "pydantic"]),
        ("tercet.algo", ["transformers", "pydantic", "rich"]),
        ("tercet.world", ["torch", "numpy"]),
        ("tercet.report", ["torch", "transformers"]),
    ],
)
def test_a_room_opens_without_the_others_libraries(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}\nprint([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_is_too_long_to_read(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400, "a file has at most 400 lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= 80, f"{node.name}: a function has at most 80 lines"


def test_the_lowest_releases_that_are_tested_are_those_that_are_promised() -> None:
    root = PACKAGE.parent
    promised = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    lowest = [line.replace("==", ">=") for line in (root / "constraints-lowest.txt").read_text().split()]
    bounds = {Requirement(line).name: Requirement(line).specifier for line in lowest}
    for requirement in map(Requirement, promised):
        (wanted,) = (part.version for part in requirement.specifier if part.operator == ">=")
        (tested,) = (part.version for part in bounds.pop(requirement.name))
        assert Version(tested) == Version(wanted), requirement.name
    assert not bounds

"""The mathematics is importable with torch alone (design.md, table of section 2)."""

import ast
import subprocess
import sys
from pathlib import Path

import tercet.algo

HEAVY = ("transformers", "peft", "datasets", "tokenizers", "pydantic", "yaml", "typer", "rich", "matplotlib")


def test_import_loads_no_other_library() -> None:
    code = f"import sys, tercet.algo; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sources_import_only_stdlib_torch_types_and_each_other() -> None:
    for path in Path(tercet.algo.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                root = name.split(".")[0]
                allowed = root in sys.stdlib_module_names | {"torch"} or name == "tercet.types" or name.startswith("tercet.algo")
                assert allowed and root != "logging", f"{path.name} imports {name}"

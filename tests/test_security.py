"""What a run must never do: unpickle, run foreign code, reach the network, or write down a secret.

Elsewhere: pickled weights and a repository's own code are refused (models/test_load.py), the sources have no call that unpickles
(test_architecture.py), text in the report is shown and not run, in a real browser too (report/test_page.py).
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tercet
from tercet.config import Config, load_config
from tercet.fingerprint import functions_of
from tercet.runtime.checkpoint import Checkpoints

PACKAGE = Path(tercet.__file__).parent
SOURCES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}


def calls(name: str) -> list[tuple[str, ast.Call]]:
    """(file, call) of every call whose function's text ends with the name."""
    return [
        (file, node)
        for file, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(name)
    ]


# A whole run with everything watched that Python can be watched at: audit events, and the kind of each.
WATCHED = (
    "pickle.find_class",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.sendto",
    "subprocess.Popen",
    "os.system",
    "os.exec",
)
WATCHER = f"""
import sys
seen = []
sys.addaudithook(lambda event, arguments: event in {WATCHED!r} and seen.append(f"{{event}} {{arguments!r}}"))
from tercet import cli
sys.argv = ["tercet", "run", sys.argv[1]]
try:
    cli.main()
except SystemExit as end:
    print("status", end.code)
print("watched", seen)
"""
SECRETS = {
    "HF_TOKEN": "hf_SECRETabcdefghijklmnopqrstuvwxyz",
    "WANDB_API_KEY": "SECRETwandb0123456789abcdef0123456789abc",
    "HTTPS_PROXY": "http://me:SECRETpassword@proxy.invalid:8080",
    "AWS_SECRET_ACCESS_KEY": "SECRETaws",
}


@pytest.mark.slow
def test_a_whole_run_unpickles_nothing_calls_nobody_and_writes_no_secret(tiny_data: Path, tmp_path: Path) -> None:
    """With the hub switched on, as a user has it, and with secrets in the environment."""
    from conftest import tiny_config

    config = tmp_path / "tercet.yaml"
    config.write_text(yaml.safe_dump(tiny_config(tiny_data, tmp_path / "run")))
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | SECRETS
    command = [sys.executable, "-c", WATCHER, str(config)]
    done = subprocess.run(command, cwd=PACKAGE.parent, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "watched []" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    written = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert tmp_path / "run/report.html" in written and tmp_path / "run/config.yaml" in written
    assert [path for path, content in written.items() if b"SECRET" in content] == []
    assert "SECRET" not in done.stdout + done.stderr


def test_the_watcher_sees() -> None:
    code = WATCHER.replace("cli.main()", "import pickle, socket, fractions; pickle.loads(pickle.dumps(fractions.Fraction(1)))")
    done = subprocess.run([sys.executable, "-c", code, "x"], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60)
    assert "pickle.find_class" in done.stdout, done.stderr


def test_passwords_in_addresses_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from tercet import cli

    config = tmp_path / "a.yaml"
    config.write_text("model: {name: gpt2}\ndata: {sft: 'https://me:SECRET@host.invalid/data.jsonl'}\n")
    monkeypatch.setattr(sys, "argv", ["tercet", "run", str(config), "--set", f"output={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capsys.readouterr().err
    assert end.value.code == 2 and "***@host.invalid" in told and "SECRET" not in told
    assert not list((tmp_path / "run").rglob("*.yaml"))


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def test_a_pickle_among_a_checkpoints_files_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Checkpoints(tmp_path / "c", keep=1).save(1, {}, {"model": {"w": torch.ones(2)}})
    for name in ("model.bin", "optimizer.pt", "state.pkl", "other.safetensors"):
        (tmp_path / "c/step-000000001" / name).write_bytes(pickle.dumps(Bomb()))
    found, _ = Checkpoints(tmp_path / "c", keep=1).latest()
    assert found is not None and list(found.tensors) == ["model"] and not (tmp_path / "exploded").exists()


def test_a_pickle_in_the_place_of_a_checkpoints_tensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.chdir(tmp_path)
    Checkpoints(tmp_path / "c", keep=1).save(1, {}, {"model": {"w": torch.ones(2)}})
    folder = tmp_path / "c/step-000000001"
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("[!m]*")}
    hashes["model.safetensors"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(hashes))
    found, complaints = Checkpoints(tmp_path / "c", keep=1).latest()
    assert found is None and "is damaged" in complaints[0] and not (tmp_path / "exploded").exists()


def test_arrays_are_loaded_without_pickle() -> None:
    for _, call in calls("np.load"):
        assert {k.arg: ast.unparse(k.value) for k in call.keywords}["allow_pickle"] == "False"


def test_remote_code_is_off_and_only_the_configuration_turns_it_on() -> None:
    assert Config.model_validate({"model": {"name": "gpt2"}}).model.trust_remote_code is False
    assert calls("from_pretrained")
    for name in ("", "from_pretrained", "from_config"):
        for file, call in calls(name):
            given = [ast.unparse(k.value) for k in call.keywords if k.arg == "trust_remote_code"]
            # Handed on from the configuration, never written down as true.
            assert all(value in ("trust_remote_code", "trust") or value.endswith("model.trust_remote_code") for value in given), (
                file
            )


def test_code_is_imported_only_where_a_reward_function_is_loaded() -> None:
    places = {
        file for name in ("import_module", "spec_from_file_location", "exec_module", "__import__") for file, _ in calls(name)
    }
    assert places == {"__init__.py", "scoring/function.py", "runtime/trackers.py"}, "__init__.py loads Tercet's own names"
    trackers = [call.args[0] for file, call in calls("import_module") if file == "runtime/trackers.py"]
    assert {ast.literal_eval(name) for name in trackers} == {"torch.utils.tensorboard", "wandb", "trackio"}


def test_functions_come_from_the_configuration_alone(tmp_path: Path) -> None:
    """Those of ppo.rewards, the judges and the gold; nothing is looked for beside the data, the model or the configuration."""
    values = {
        "model": {"name": "gpt2"},
        "ppo": {"rewards": [{"kind": "function", "function": "a.py:f"}, {"kind": "stage"}]},
        "evaluation": {"judges": {"mine": {"kind": "function", "function": "b:g"}}, "gold": "c.py:h"},
    }
    found = functions_of(load_config(values))
    assert [text.rpartition("/")[2] for text in found] == ["a.py:f", "b:g", "c.py:h"]
    loaded = {file for file, _ in calls("load_function")}
    assert loaded == {"jobs/preflight.py", "jobs/workshop.py", "jobs/evaluation.py"}


def test_telemetry_is_off() -> None:
    code = "import tercet, huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)"
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr

"""Several processes: they stop together after any optimizer step, and go on exactly, also in another number."""

from __future__ import annotations

import json
import multiprocessing
import socket
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from conftest import tiny_config, write_tiny_data
from fault.harness import contents, differences, start_server
from fault.rank import run
from safetensors.torch import load_file

from tercet.runtime.distributed import World

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]


def start(folder: Path, ranks: int, stop_at: int = 0) -> bool:
    """Run in so many processes; whether it was interrupted."""
    start_server()
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"{rank}.log" for rank in range(ranks)]
    given = [(str(folder / "tercet.yaml"), stop_at, rank, ranks, port, str(log)) for rank, log in enumerate(logs)]
    processes = [context.Process(target=run, args=arguments, daemon=True) for arguments in given]
    for process in processes:
        process.start()
    for process, log in zip(processes, logs):
        process.join(600)
        assert process.exitcode == 0, log.read_text()[-6000:]
    return "interrupted at question" in logs[0].read_text()


def prepare(folder: Path) -> Path:
    write_tiny_data(folder)
    values = tiny_config(folder, folder / "run")
    values["data"]["comparisons"] = None
    values["ppo"] |= {"rewards": [{"kind": "function", "function": str(folder / "reward.py:score")}], "iterations": 3}
    values["machine"]["dtype"] = "float64"
    (folder / "reward.py").write_text("def score(prompts, responses, **fields):\n    return [float(len(r)) for r in responses]\n")
    (folder / "tercet.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_two_ranks_stop_in_the_middle_of_an_iteration_and_go_on(tmp_path: Path) -> None:
    """Dropout in stage 1 draws from each rank's own generator; the rollout of an unfinished iteration is in both ranks' hands."""
    whole, broken = prepare(tmp_path / "whole"), prepare(tmp_path / "broken")
    assert not start(whole, 2)
    stops = 0
    for at in (5, 6, 3):  # in stage 1, and after the first and the second optimizer step of PPO
        stops += start(broken, 2, at)
    assert stops == 3
    (checkpoint,) = sorted((broken / "run/ppo/checkpoints").glob("step-*"))[-1:]
    state = json.loads((checkpoint / "state.json").read_text())["values"]
    assert state["progress"]["steps"] == 2 and len(state["samples"]) == 8 and len(state["random"]) == 2
    assert state["random"][0] != state["random"][1], "ranks draw other dropout"
    assert len(load_file(checkpoint / "experience.safetensors")["scores"]) == 8, "the rows of both ranks"
    assert not start(broken, 2)
    assert differences(contents(broken / "run"), contents(whole / "run")) == []


def test_two_ranks_stop_and_one_goes_on(tmp_path: Path) -> None:
    """Sums are then added in another order: equal up to rounding."""
    whole, broken = prepare(tmp_path / "whole"), prepare(tmp_path / "broken")
    assert not start(whole, 2)
    assert start(broken, 2, 5) and start(broken, 2, 6) and not start(broken, 1)
    for stage in ("sft", "ppo"):
        one, two = (load_file(folder / f"run/{stage}/model/model.safetensors") for folder in (whole, broken))
        assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-6, stage


def test_rows_of_all_ranks_in_the_order_of_the_batch() -> None:
    """Five rows over two ranks, of unequal widths."""
    experience = tiny.rollout_of(tiny.actors_of(), tiny.ppo_config(rollout_batch_size=5)).experience
    parts = [experience.select(range(rank, 5, 2)) for rank in range(2)]
    tensors = [{"ids": part.sequences.input_ids, "values": part.values, "scores": part.scores} for part in parts]
    world = World()
    world.gather = lambda value: tensors  # type: ignore[method-assign]
    whole = world.gather_padded(tensors[0])
    assert torch.equal(whole["ids"], experience.sequences.input_ids[:, : whole["ids"].shape[1]])
    assert torch.equal(whole["values"], experience.values[:, : whole["values"].shape[1]])
    assert torch.equal(whole["scores"], experience.scores)

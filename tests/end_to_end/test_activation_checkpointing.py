"""machine.activation_checkpointing changes what is kept in memory, and no number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_config, write_tiny_data
from safetensors.torch import load_file

from tercet.config import load_config
from tercet.pipeline import Pipeline


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, {"rank": 2, "alpha": 4}])
def test_a_whole_run_ends_with_the_same_weights(adapter: dict[str, int] | None, tmp_path: Path) -> None:
    found = []
    for recompute in (False, True):
        folder = tmp_path / str(recompute)
        folder.mkdir()
        write_tiny_data(folder)
        values = tiny_config(folder, folder / "run")
        values["machine"]["activation_checkpointing"] = recompute
        if adapter is not None:
            values["model"]["adapter"] = adapter
            values["sft"]["dropout"] = 0.0
        Pipeline(load_config(values)).run()
        stages = ("sft", "reward", "ppo")
        found.append({stage: load_file(folder / f"run/{stage}/model/model.safetensors") for stage in stages})
    for stage, weights in found[0].items():
        assert all(torch.equal(weight, found[1][stage][name]) for name, weight in weights.items()), stage

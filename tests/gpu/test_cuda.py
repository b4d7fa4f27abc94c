"""`python -m pytest -m gpu`: what only a CUDA card can show. Nothing else in the suite needs one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import merged, tiny_config

from tercet.config import load_config
from tercet.errors import Interrupted
from tercet.pipeline import Pipeline
from tercet.runtime.stage import StageRun

pytestmark = pytest.mark.gpu


@pytest.fixture
def settings(tiny_data: Path, tmp_path: Path) -> dict[str, Any]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return merged(tiny_config(tiny_data, tmp_path / "run"), {"machine": {"device": "cuda", "dtype": "bfloat16"}})


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("model.safetensors"))}


def test_all_stages_run_on_the_card(settings: dict[str, Any]) -> None:
    result = Pipeline(load_config(settings)).run()
    summary = json.loads((result.folder / "summary.json").read_text())
    assert abs(json.loads((result.folder / "ppo/metrics.jsonl").read_text().splitlines()[0])["kl"]) < 1e-6
    assert 0 <= summary["win_rate"] <= 1
    timings = json.loads((result.folder / "ppo/timings.jsonl").read_text().splitlines()[-1])
    assert 0 < timings["update_utilisation"] < 1


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stage_goes_on_exactly(stage: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after its first checkpoint; the optimizer's moments and counts come back to the card."""
    settings = merged(settings, {"checkpoint": {"every": 1}})
    whole = Pipeline(load_config(settings)).run(None).folder
    wanted = weights(whole / stage)
    shutil.rmtree(whole / stage)
    save, saved = StageRun.save, []

    def once(self: StageRun, *args: Any, **options: Any) -> None:
        save(self, *args, **options)
        saved.append(self.name)
        if saved == [stage]:
            raise Interrupted

    monkeypatch.setattr(StageRun, "save", once)
    with pytest.raises(Interrupted):
        Pipeline(load_config(settings)).run([stage])
    Pipeline(load_config(settings)).run([stage])
    assert weights(whole / stage) == wanted

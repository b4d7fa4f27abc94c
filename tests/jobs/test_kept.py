"""Rows that an interrupted evaluation leaves: exact, whole batches, and only for the same question."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tercet.errors import Interrupted
from tercet.jobs.kept import Kept
from tercet.runtime.distributed import World


@pytest.fixture
def shop(tmp_path: Path) -> Any:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/started.json").write_text('{"version": 1}')
    return SimpleNamespace(folder=tmp_path, world=World(), interrupt=SimpleNamespace(requested=False))


BATCHES = [
    [{"score": 0.1 + 0.2, "response": "a\u2028b"}, {"score": -math.pi, "response": ""}],
    [{"score": 1e-300, "ids": [1, 2]}],
]


def filled(shop: Any) -> Path:
    kept = Kept(shop, "ppo", "model")
    assert kept.rows() == []
    for batch in BATCHES:
        kept.keep(batch)
    return shop.folder / "evaluation/checkpoints/ppo.jsonl"


def test_rows_come_back_to_the_last_bit_and_can_be_added_to(shop: Any) -> None:
    filled(shop)
    again = Kept(shop, "ppo", "model")
    assert again.rows() == BATCHES[0] + BATCHES[1]
    again.keep([{"score": 2.0}])
    assert Kept(shop, "ppo", "model").rows() == [*BATCHES[0], *BATCHES[1], {"score": 2.0}]
    assert Kept(shop, "sft", "model").rows() == []


def test_a_batch_that_a_kill_cut_short_is_dropped(shop: Any) -> None:
    path = filled(shop)
    path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    again = Kept(shop, "ppo", "model")
    assert again.rows() == BATCHES[0]
    again.keep(BATCHES[1])
    assert Kept(shop, "ppo", "model").rows() == BATCHES[0] + BATCHES[1]


def test_rows_of_another_checkpoint_or_stage_are_thrown_away(shop: Any) -> None:
    filled(shop)
    assert Kept(shop, "ppo", "another model").rows() == []
    filled(shop)
    (shop.folder / "evaluation/started.json").write_text('{"version": 2}')
    assert Kept(shop, "ppo", "model").rows() == []
    assert json.loads('{"version": 2}') == json.loads((shop.folder / "evaluation/started.json").read_text())


def test_a_signal_stops_after_the_batch_is_written(shop: Any) -> None:
    shop.interrupt.requested = True
    with pytest.raises(Interrupted):
        Kept(shop, "ppo", "model").keep(BATCHES[0])
    assert Kept(shop, "ppo", "model").rows() == BATCHES[0]

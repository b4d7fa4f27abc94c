"""Healthy runs of the embedded world have no fault: seed 0 in CI, which the broken runs need anyway, two more seeds with `make full`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "seed",
    [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)],
)
def test_healthy_runs_have_no_fault(seed: int, clinic: Any, faults: Callable[[Path], dict[str, str]]) -> None:
    assert faults(clinic.healthy(seed)) == {}

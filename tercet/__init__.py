"""Tercet: learning from human preferences in three stages: SFT, a reward model from comparisons, PPO.

The names here are loaded when they are first used, so that `import tercet.algo` needs nothing but torch.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

# Threads that spin while they wait make a loaded machine many times slower (3.8 s against 0.45 s a step, two threads beside two
# other jobs), and threads that sleep at once a quiet one by a fifth: they spin for some ten microseconds. Read when torch loads.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# What is trained on which data is nobody else's business; read when huggingface_hub is imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

_HOMES = {
    "run": "tercet.api",
    "train_sft": "tercet.api",
    "train_reward": "tercet.api",
    "train_ppo": "tercet.api",
    "evaluate": "tercet.api",
    "generate": "tercet.sampler",
    "RunResult": "tercet.pipeline",
    "Config": "tercet.config",
    "load_config": "tercet.config",
    "TercetError": "tercet.errors",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tercet' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

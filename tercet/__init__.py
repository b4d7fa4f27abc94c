"""Tercet: learning from human preferences in three stages: SFT, a reward model from comparisons, PPO.

The names here are loaded when they are first used, so that `import tercet.algo` needs nothing but torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "run": "tercet.pipeline",
    "train_sft": "tercet.pipeline",
    "train_reward": "tercet.pipeline",
    "train_ppo": "tercet.pipeline",
    "evaluate": "tercet.pipeline",
    "RunResult": "tercet.pipeline",
    "Config": "tercet.config",
    "load_config": "tercet.config",
    "TercetError": "tercet.types",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tercet' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""Optimizer steps: AdamW, the global gradient norm, and a learning rate that is set from outside."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tercet.runtime.distributed import World


class Optimizer:
    """AdamW (betas 0.9, 0.999, eps 1e-5) over a module's trainable parameters, with state that is saved by parameter name."""

    def __init__(self, module: nn.Module, *, weight_decay: float, max_grad_norm: float, world: World):
        self._named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._max_grad_norm = max_grad_norm
        self._world = world
        self._adam = torch.optim.AdamW(
            self._named.values(),
            lr=0.0,
            betas=(0.9, 0.999),
            eps=1e-5,
            weight_decay=weight_decay,
            fused=_fused(self._named.values()),
        )

    def step(self, learning_rate: float) -> float:
        """Add gradients over ranks, clip, step, and clear them. Returns the norm before clipping; if it is not finite, no step is
        taken and nothing changes."""
        self._world.sum_gradients(self._named.values())
        norm = nn.utils.clip_grad_norm_(self._named.values(), self._max_grad_norm).item()
        if norm == norm and norm not in (float("inf"), float("-inf")):
            for group in self._adam.param_groups:
                group["lr"] = learning_rate
            self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Tensor]:
        """The moments, named "parameter/exp_avg" and so on."""
        return {
            f"{name}/{key}": value
            for name, parameter in self._named.items()
            for key, value in self._adam.state.get(parameter, {}).items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` gave."""
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition("/")
            parameter = self._named[name]
            self._adam.state[parameter][key] = value if key == "step" else value.to(parameter.device)


def _fused(parameters: Iterable[nn.Parameter]) -> bool:
    return all(p.device.type in ("cpu", "cuda") for p in parameters)

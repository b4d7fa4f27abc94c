"""Policies on the straight line between two others: part of the way costs less KL than stopping early at the same reward (Ramé 2024)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tercet.models.roles import Policy


@contextlib.contextmanager
def interpolated(policy: Policy, start: Callable[[], Callable[[str], Tensor]], weight: float) -> Iterator[None]:
    """Let each weight of a policy that learns be start + weight * (own - start), and its own again afterwards, to the bit.

    start() gives what gives a parameter's value at the start by its name; an adapter's start is its backbone, and is not asked for.
    Meanwhile all that is trained is in memory twice.
    """
    if weight == 1.0:
        yield
        return
    trained = {name: parameter.data for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    own = {name: tensor.clone() for name, tensor in trained.items()}
    value_at_start = start() if policy.merge is None else None
    for name, tensor in trained.items():
        if value_at_start is not None:
            tensor.copy_(torch.lerp(value_at_start(name).to(tensor), tensor, weight))
        elif ".lora_B." in name:  # a product of two matrices, of which the second began as zeros
            tensor.mul_(weight)
    del value_at_start  # it may hold a whole model
    try:
        yield
    finally:
        for name, tensor in trained.items():
            tensor.copy_(own[name])

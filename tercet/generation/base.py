"""What a generator is, so that another engine can stand in for the native one."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from tercet.types import Sequences


class Generator(Protocol):
    """Samples responses from a copy of the policy that `sync` brought up to date."""

    def sync(self, version: int) -> None:
        """Take over the policy's present weights as number `version`."""

    def sample(self, prompts: list[list[int]], uniforms: Tensor | None) -> Sequences:
        """One response for each prompt. uniforms (B, T) float64 in [0, 1); None takes the likeliest token.

        The result carries sampler_logprobs and the policy_version that sampled it.
        """

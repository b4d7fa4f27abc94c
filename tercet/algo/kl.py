"""KL between policy and reference: estimators on sampled tokens, the coefficient's controllers, and the known optimum."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tercet.algo.masks import at_least_float32

ERROR_LIMIT = 0.2
"""The proportional error of the adaptive controller is clipped to +- this (Ziegler 2019, section 2.2)."""


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d = log pi - log pi_ref per sampled token: unbiased, may be negative. The KL that belongs in a reward.

    Any equal shapes. Source for k1, k2, k3: Schulman, "Approximating KL divergence".
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d^2 / 2: biased, never negative; its gradient as a loss is that of the reverse KL."""
    return (logprobs - ref_logprobs) ** 2 / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d: unbiased and never negative. For logging; as a loss its gradient is that of the forward KL."""
    difference = logprobs - ref_logprobs
    return torch.expm1(-difference) + difference


def sequence_kl(kl: Tensor, mask: Tensor) -> Tensor:
    """Sum over the response tokens, in nats per response: (B, T), (B, T) bool -> (B,)."""
    return torch.where(mask, at_least_float32(kl), 0.0).sum(1)


class FixedKL:
    """A constant KL coefficient. ValueError: coef is negative or not finite."""

    def __init__(self, coef: float) -> None:
        if not 0 <= coef < math.inf:
            raise ValueError(f"the KL coefficient must be >= 0, got {coef}")
        self.coef = float(coef)

    def update(self, mean_sequence_kl: float, n_episodes: int) -> None:
        """Nothing to adapt."""

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over the coefficient of a saved run."""
        self.coef = float(state["coef"])


class AdaptiveKL(FixedKL):
    """coef *= 1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon: holds the KL per response near `target` nats.

    horizon counts episodes (responses). ValueError: coef, target or horizon is not > 0.
    Source: Ziegler 2019, section 2.2; lm-human-preferences train_policy.py:115-124.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        super().__init__(coef)
        for name, value in (("coefficient", coef), ("target", target), ("horizon", horizon)):
            if not 0 < value < math.inf:
                raise ValueError(f"the adaptive KL {name} must be > 0, got {value}")
        self.target = float(target)
        self.horizon = float(horizon)

    def update(self, mean_sequence_kl: float, n_episodes: int) -> None:
        """After an iteration's update: mean_sequence_kl in nats per response, over the n_episodes responses sampled.

        ValueError: the KL is not finite, or n_episodes is so large against the horizon that one step could turn the
        coefficient negative.
        """
        if not math.isfinite(mean_sequence_kl):
            raise ValueError(f"the KL must be finite to adapt its coefficient, got {mean_sequence_kl}")
        if ERROR_LIMIT * n_episodes >= self.horizon:
            raise ValueError(f"the adaptive KL horizon ({self.horizon:g}) must exceed {ERROR_LIMIT} x {n_episodes} episodes")
        error = max(-ERROR_LIMIT, min(ERROR_LIMIT, mean_sequence_kl / self.target - 1))
        self.coef *= 1 + error * n_episodes / self.horizon


def kl_optimum(ref_probs: Tensor, rewards: Tensor, kl_coef: float) -> tuple[Tensor, Tensor]:
    """The policy that maximises E[reward] - kl_coef * KL(policy, reference) on a world that can be enumerated.

    ref_probs (..., Y): the reference's probability of each of Y outcomes, summing to 1; rewards (..., Y). Returns the optimum
    pi* ~ ref exp(reward / kl_coef), (..., Y), and its objective kl_coef * log Z, (...). ValueError: kl_coef is not > 0.
    Source: Ziegler 2019, section 3.1.1; Rafailov 2023 (DPO), equation 4.
    """
    if not kl_coef > 0:
        raise ValueError(f"kl_coef must be > 0, got {kl_coef}")
    tilted = ref_probs.log() + rewards / kl_coef
    return tilted.softmax(-1), kl_coef * tilted.logsumexp(-1)

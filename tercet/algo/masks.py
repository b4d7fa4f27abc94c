"""What counts in a padded batch: where responses end, and sums, means and variances over the True entries of a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

AllSum = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks and returns the sum; the identity in one process."""


def identity(tensor: Tensor) -> Tensor:
    """The `all_sum` of a single process."""
    return tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision, integers and bools become float32; float32 and float64 stay."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def truncate_at_stop(ids: Tensor, stop_ids: Tensor | Sequence[int], truncate_after: int = 0) -> tuple[Tensor, Tensor]:
    """Where each response ends: with the first stop token at an index >= truncate_after, which is kept.

    ids (B, T) int64: fully sampled responses. stop_ids: 1-D int64, may be empty. Returns lens (B,) int64, T where there is no
    such stop token, and finished (B,) bool. Source: lm-human-preferences lm_tasks.py:39-66.
    """
    stops = torch.as_tensor(stop_ids, dtype=torch.long, device=ids.device)
    late_enough = torch.arange(ids.shape[1], device=ids.device) >= truncate_after
    ends = torch.isin(ids, stops) & late_enough
    # Exclusive cumsum: 0 up to and including the first stop token.
    kept = ends.long().cumsum(1) - ends.long() == 0
    return kept.sum(1), ends.any(1)


def last_index(mask: Tensor) -> Tensor:
    """Index of the last True of each row of mask (B, T) bool, as (B,) int64; -1 where a row has none."""
    steps = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (steps * mask).amax(1) - 1


def position_ids(mask: Tensor) -> Tensor:
    """Exclusive cumsum of mask (B, L) bool, as int64: the first real token of a row is at position 0 however it is padded.

    Source: lm-human-preferences model.py:265-269.
    """
    counts = mask.long()
    before: Tensor = counts.cumsum(1) - counts
    return before


def masked_sum(x: Tensor, mask: Tensor, all_sum: AllSum = identity) -> Tensor:
    """Sum of x over the True entries of mask (same shape, bool) and all ranks; a scalar of at least float32.

    Selects instead of multiplying, so NaN or infinity where the mask is False does not matter.
    """
    return all_sum(torch.where(mask, at_least_float32(x), 0.0).sum())


def masked_mean(x: Tensor, mask: Tensor, all_sum: AllSum = identity) -> Tensor:
    """Mean of x over the True entries of mask and all ranks; a scalar, 0 where no entry counts."""
    total = torch.where(mask, at_least_float32(x), 0.0).sum()
    sums = all_sum(torch.stack([total, mask.sum().to(total.dtype)]))
    return sums[0] / sums[1].clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, all_sum: AllSum = identity) -> Tensor:
    """Population variance (divided by n, not n - 1) of x over the True entries of mask and all ranks; a scalar."""
    x = at_least_float32(x)
    return masked_mean((x - masked_mean(x, mask, all_sum)) ** 2, mask, all_sum)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8, all_sum: AllSum = identity) -> Tensor:
    """x scaled to unit variance over the True entries of mask and all ranks; 0 elsewhere.

    x, mask (B, T). shift_mean=True also removes the mean (advantages), False keeps it (rewards, which PPO here leaves as they are).
    Population variance, eps inside the root. Source: lm-human-preferences core.py:336-341.
    """
    x = at_least_float32(x)
    mean = masked_mean(x, mask, all_sum)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, mask, all_sum) + eps)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)

"""Matrix products: their precision, and the shapes that oneDNN is fast at."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def product_dtype(weight: Tensor) -> torch.dtype:
    """What matrix products with the weight are computed in: autocast's precision where it is on, else the weight's own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def by_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (n, i) @ weight (o, i)^T + bias (o,), some rows at a time where oneDNN gives both halves of the work to one thread: 768 to 1,280
    rows to some 768 columns (1,088 x 3,072 x 768 took 4.6 ms on two threads, in parts 3.1; elsewhere parts took up to three times as
    long)."""
    lopsided = 640 < len(x) <= 1280 and len(weight) <= 1024 and weight.numel() >= 2**19 and x.dtype is torch.bfloat16
    if not lopsided or torch.get_num_threads() == 1 or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    return torch.cat([F.linear(part, weight, bias) for part in torch.split(x, 512)])

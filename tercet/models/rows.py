"""Vectors as rows of the memory in which they already lie, so that kernels which take a list of rows need no copy."""

from __future__ import annotations

from torch import Tensor


def as_rows(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Vectors (..., d) as a view (n, d) of the memory from the first to the last of them, and how many rows it is along each dimension
    from one to the next: the vector at (i, j) is row i * steps[0] + j * steps[1]. Copied first where memory is not so divided."""
    size = x.shape[-1]
    if x.stride(-1) != 1 or any(stride % size for stride in x.stride()[:-1]):
        x = x.contiguous()
    steps = tuple(stride // size for stride in x.stride()[:-1])
    last = sum((count - 1) * step for count, step in zip(x.shape, steps))
    return x.as_strided((last + 1, size), (size, 1)), steps

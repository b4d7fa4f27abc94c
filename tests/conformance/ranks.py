"""Several ranks as threads of one process: quick, and enough for whatever goes through World."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from tercet.runtime.distributed import World

T = TypeVar("T")


class _Rank(World):
    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier):
        super().__init__(rank, size)
        self._board, self._barrier = board, barrier

    def gather(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait()
        values = list(self._board)
        self._barrier.wait()
        return values

    def all_sum(self, value: Tensor) -> Tensor:
        values = self.gather(value.clone())
        return sum(values[1:], start=values[0])


def together(size: int, work: Callable[[World], T]) -> list[T]:
    """What `work(world)` returns on each of `size` ranks that run at once; the first error of any rank is raised."""
    board: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=60)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(_Rank(rank, size, board, barrier))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not errors
    return results

"""The only room that knows of torch.distributed. One process is world size 1 on the same code.

Started by torchrun, every rank holds the whole model and a share of the rows (row i belongs to rank i mod size); gradients are
sums over rows, so they are added over ranks and the result does not depend on how many there are.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tercet.errors import TercetError
from tercet.runtime.launch import local_rank, local_ranks, ranks


class World:
    """This process among its equals: `rank` of `size`."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank = rank
        self.size = size

    @staticmethod
    def start(device: str) -> World:
        """Join the processes that torchrun started, if it did; `device` as in the configuration, "auto" or a name."""
        if ranks() == 1:
            return World()
        if not dist.is_initialized():
            on_cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
            if on_cuda:
                _take_gpu(local_rank())
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")  # counts and lists are on the CPU
            atexit.register(_leave)
        return World(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def all_sum(self, value: Tensor) -> Tensor:
        """The sum over ranks; every rank gets it, computed in the same order."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add the gradients of all ranks, in one exchange per dtype; a rank that had no rows contributes zeros."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter)
        for group in by_dtype.values():
            flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in group])
            dist.all_reduce(flat)
            for parameter, part in zip(group, flat.split([parameter.numel() for parameter in group])):
                _gradient(parameter).copy_(part.view_as(parameter))

    def gather(self, value: Any) -> list[Any]:
        """Each rank's value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: what all ranks must decide alike."""
        return bool(self.all_sum(torch.tensor(float(flag))).item())

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def own_rows(self, count: int) -> range:
        """The rows of a batch of `count` that this rank works on."""
        return range(self.rank, count, self.size)

    def gather_rows(self, own: list[Any]) -> list[Any]:
        """Something for each row of a batch, in the batch's order, from what each rank has for its `own_rows`; on every rank."""
        parts = self.gather(own)
        return [parts[row % self.size][row // self.size] for row in range(sum(map(len, parts)))]

    def gather_padded(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named tensors whose rows are those of a batch, (rows, ...), in the batch's order, from what each rank has for its `own_rows`,
        padded with zeros to one width; on every rank."""
        parts = self.gather(own)
        if len(parts) == 1:
            return own
        whole = {}
        for name in own:
            tensors = [part[name] for part in parts]
            widths = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors))]
            rows = tensors[0].new_zeros(sum(len(tensor) for tensor in tensors), *widths)
            for rank, tensor in enumerate(tensors):
                rows[rank :: len(parts)][(slice(None), *(slice(size) for size in tensor.shape[1:]))] = tensor
            whole[name] = rows
        return whole


def _take_gpu(number: int) -> None:
    """Let "cuda" mean this GPU in this process."""
    try:
        torch.cuda.set_device(number)
    except RuntimeError as error:
        raise TercetError(
            f"torchrun started {local_ranks()} processes on this machine, but there is no GPU number {number} "
            f"({str(error).splitlines()[0]}): start as many as there are GPUs (--nproc-per-node), or set machine.device: cpu"
        ) from None


def _leave() -> None:
    """Its threads must have ended before the interpreter does, or the process may abort instead of exiting with its status."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad

"""One rank of a `tercet run` in several processes, which is told when to stop."""

from __future__ import annotations

import os


def run(config: str, stop_at: int, rank: int, size: int, port: int, log: str) -> None:
    """In a process of its own, as torchrun would start it. Rank 0 alone is asked to stop, at its `stop_at`-th boundary (0: never), of
    which it leaves word in `log`, where everything that is printed goes."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}

    import torch.distributed as dist

    import tercet.runtime.stage as module
    from tercet.config import load_config
    from tercet.errors import Interrupted
    from tercet.pipeline import Pipeline

    class Scripted(module.Interrupt):
        """A signal that arrives just before a boundary asks for it."""

        asked = 0

        @property
        def requested(self) -> bool:
            Scripted.asked += 1
            return rank == 0 and 0 < stop_at <= Scripted.asked

        @requested.setter
        def requested(self, value: bool) -> None:
            pass

    module.Interrupt = Scripted  # type: ignore[misc]
    try:
        Pipeline(load_config(config)).run()
    except Interrupted:
        print(f"interrupted at question {Scripted.asked}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()  # a forked process leaves without atexit

"""What torchrun tells the processes that it starts, each alike; a process that was started without it is the only one."""

from __future__ import annotations

import os


def ranks() -> int:
    """How many processes there are, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among all; a lone one's is 0, whatever a job before has left in its environment."""
    return int(os.environ.get("RANK", "0")) if ranks() > 1 else 0


def local_rank() -> int:
    """This process's number among those of its machine: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_ranks() -> int:
    """How many processes there are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

"""The lock on a run folder: two processes that write one folder would ruin it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tercet.errors import TercetError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder, made if missing; a second process on it is refused. Other ranks share the first one's lock."""
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise TercetError(f"{folder}: the run folder cannot be written ({error.strerror}): choose another output") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise TercetError(
                f"{folder} is in use by process {file.read().strip() or '?'}: wait for it, or choose another output"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield

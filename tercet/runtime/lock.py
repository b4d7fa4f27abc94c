"""The lock on a run folder: two processes that write one folder would ruin it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tercet.errors import TercetError
from tercet.runtime import launch


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the run folder, made if missing; a second process on it is refused. Other ranks share the first one's lock.

    Gives whether this process is the one that holds it. The lock goes with the process, however it ends; a folder in which nothing
    came to be goes too.
    """
    if launch.rank() > 0:
        yield False
        return
    with _held(folder) as file:
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield True
        finally:
            with contextlib.suppress(OSError):
                if os.listdir(folder) == [".lock"]:
                    (folder / ".lock").unlink()
                    folder.rmdir()


def _held(folder: Path) -> TextIO:
    """The lock file, opened and held; TercetError if another process holds it or the folder cannot be written."""
    path = folder / ".lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise TercetError(f"{folder}: the run folder cannot be written ({error.strerror}): choose another output") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                file.close()
                raise TercetError(
                    f"{folder}: files cannot be locked on this file system ({error.strerror}), so that two runs there could ruin each other: "
                    "choose an output on another one"
                ) from None
            file.seek(0)
            holder = file.read().strip() or "?"
            file.close()
            raise TercetError(f"{folder} is in use by process {holder}: wait for it, or choose another output") from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # its holder has just removed it, and a lock on a file without a name keeps nobody out

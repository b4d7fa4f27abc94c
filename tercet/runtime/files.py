"""Files and folders that are there whole or not at all, and what is said when the disk is full, read-only or broken."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tercet.errors import TercetError


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


def folder_beside(final: Path) -> Path:
    """An empty folder beside `final` to write it in, for `replace_folder`; what a killed process left there goes."""
    temporary = final.with_name(f".{final.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in its place; the old one is gone only when the new one is complete on disk."""
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    removed = _moved_aside(final)
    os.replace(temporary, final)
    sync(final.parent)
    remove_tree(removed)


def remove_folder(folder: Path) -> None:
    """Remove a folder, or what is left of one whose removal a kill cut short; nothing if there is none."""
    remove_tree(_moved_aside(folder))


def _moved_aside(folder: Path) -> Path:
    """Take a folder's name away from it, so that a kill during the removal does not leave half a folder under that name."""
    removed = folder.with_name(f".{folder.name}.removed")
    remove_tree(removed)
    if folder.exists():
        os.replace(folder, removed)
    return removed


def remove_tree(path: Path) -> None:
    """Remove a folder that nobody needs any longer, as far as that is possible."""
    if path.is_symlink():  # to a folder on another disk, whose contents are left there
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some file systems have that for files alone
            raise
    finally:
        os.close(descriptor)


_WAYS_OUT = {
    errno.ENOSPC: "make room there, or lower checkpoint.keep",
    errno.EDQUOT: "make room within the quota, or lower checkpoint.keep",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make it writable, or choose another output",
    errno.EACCES: "make it writable, or choose another output",
    errno.EPERM: "make it writable, or choose another output",
    errno.EIO: "the disk itself may be failing: move the run folder to another one",
}


@contextmanager
def disk_errors_explained(folder: Path) -> Iterator[None]:
    """Turn what a failing disk makes the standard library, safetensors or tokenizers raise into a TercetError.

    Every file of the run folder is replaced whole or not at all, so whatever was there before the failed write still is.
    """
    try:
        yield
    except TercetError:
        raise
    except Exception as error:  # the Rust libraries raise classes of their own, with the number in the text alone
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number is None or number not in _WAYS_OUT:
            raise
        file = error.filename if isinstance(error, OSError) and error.filename else folder
        raise TercetError(
            f"{file}: {os.strerror(number)}. What was finished and the last checkpoint are kept: {_WAYS_OUT[number]}, then the same "
            "command goes on from there"
        ) from error

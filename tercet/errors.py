"""The exceptions that end a run; apart from types.py so that the command line starts without torch."""

from collections.abc import Iterator
from contextlib import contextmanager


class TercetError(Exception):
    """A mistake in what the user gave (data, configuration, model, run folder). Its message says what was found, where, what was
    expected and the way out; the command line prints it without a traceback and exits with status 2."""


class OtherFormat(TercetError):
    """A checkpoint that another version of Tercet wrote: refused before anything in the run folder is touched."""


class Interrupted(Exception):
    """SIGINT or SIGTERM came; the state was saved at the last boundary."""


@contextmanager
def named_by(key: str) -> Iterator[None]:
    """Let a sentence about a file or a model begin with the key of the configuration that named it."""
    try:
        yield
    except TercetError as error:
        raise TercetError(f"{key}: {error}") from None

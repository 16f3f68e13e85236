"""How a command ends from outside: SIGTERM and SIGHUP unwind like Ctrl-C, so that no temporary file stays; a lost
stdout is an error.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from repquant_fx.errors import OutputError
from repquant_fx.security import channel


class Terminated(BaseException):
    """A signal asks the process to end. Not an Exception: nothing on the way may take it for a failure of its own."""

    def __init__(self, number: int) -> None:
        self.name, self.exit_code = signal.Signals(number).name, 128 + number


@contextmanager
def terminated() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `Terminated`, where this is the main thread and nobody handles or ignores them
    already.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    mine = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL] \
        if threading.current_thread() is threading.main_thread() else []

    def stop(number: int, _: object) -> NoReturn:
        raise Terminated(number)

    for number in mine:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def flushed() -> Iterator[None]:
    """What was printed on stdout has arrived.

    Raises:
        BrokenPipeError: the reader is gone.
        OutputError: it cannot be written; the disk is full, of stdout or of any other file.
    """
    try:
        yield
    except BrokenPipeError:
        _discard()
        raise
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _discard()
        raise OutputError(f"the disk is full: {error}; {channel.outcome()}") from error
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        _discard()
        if isinstance(error, BrokenPipeError):
            raise
        raise OutputError(
            f"cannot write the result to stdout: {error.strerror or error}; {channel.outcome()}"
        ) from error


def _discard() -> None:
    """Python flushes stdout once more when it ends; let that go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

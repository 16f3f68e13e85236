"""How a command ends from outside: SIGTERM and SIGHUP unwind like Ctrl-C, so that no temporary file stays; a lost
stdout is an error.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO, cast

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
def encodable() -> Iterator[None]:
    """What stdout's encoding does not have is written as Python would escape it, as on stderr."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    before = stream.errors
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stream.reconfigure(errors=before)


@contextmanager
def flushed() -> Iterator[None]:
    """What was printed on stdout has arrived.

    Raises:
        BrokenPipeError: the reader is gone.
        OutputError: it cannot be written; the disk is full, of stdout or of any other file.
    """
    stream = sys.stdout
    if stream is not None:
        sys.stdout = cast(TextIO, _Result(stream))
    try:
        yield
        if stream is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard()
        raise
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OutputError(f"the disk is full: {error}; {channel.outcome()}") from error
    finally:
        sys.stdout = stream


class _Result:
    """stdout, whose failures are told from those of other files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._named():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._named():
            self._stream.flush()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            _discard()
            raise OutputError(
                f"cannot write the result to standard output: {error.strerror or error}; {channel.outcome()}"
            ) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _discard() -> None:
    """Python flushes stdout once more when it ends; let that go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

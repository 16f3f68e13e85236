"""What the working process tells its supervisor, and asks it; where there is no supervisor, nothing is sent.

Messages are JSON objects, one per line. `ask` waits for a byte: the supervisor does not answer once it has been told to
stop, and ends this process instead. So what needs leave (renaming outputs, ending) either happens as a whole or not at
all, and nothing is written when nobody supervises any more.

| message | fields | asked |
|---|---|---|
| `stage` | `name` | |
| `guarded`, `free` | of the first `what`, `seconds`: begin and end of what a file that nobody vouches for may take | |
| `temporary` | `path`: about to be made, to be removed if this process is killed | |
| `commit` | `paths`: about to be renamed into place | yes |
| `committed` | `paths` | |
| `ending` | `code`: the work is done, or a message about its failure follows | yes |
| `signal` | `number`: this process got one that is meant for both | |
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOAD_SECONDS = 1800.0  # that loading, or capturing, a file may take which nobody vouches for
LOST = 137  # exit code where the supervisor is gone: that of SIGKILL


@dataclass
class _Line:
    """The two pipes of a working process."""

    out: int
    back: int
    folder: str | None
    process: int = field(default_factory=os.getpid)
    lock: Any = field(default_factory=threading.RLock)  # a handler tells what came while its thread asks

    def send(self, message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[os.write(self.out, data):]


_line: _Line | None = None
_outputs: list[str] = []
load_seconds = LOAD_SECONDS  # the command line's --load-timeout


def connect(out: int, back: int, folder: str | None = None) -> None:
    """From now on there is a supervisor, which reads `out`, answers on `back` and removes `folder` in the end."""
    global _line
    _line = _Line(out, back, None if folder is None else os.path.realpath(folder))


def supervised() -> bool:
    """Whether this process has a supervisor; one that it forked does not."""
    return _line is not None and _line.process == os.getpid()


def tell(event: str, **fields: Any) -> None:
    """Send a message."""
    if _line is not None and supervised():
        with _line.lock:
            try:
                _line.send({"event": event, **fields})
            except OSError:  # nobody listens
                os._exit(LOST)


def ask(event: str, **fields: Any) -> None:
    """Send a message and wait for leave. Does not return where there is no supervisor any more."""
    if _line is None or not supervised():
        return
    with _line.lock:
        try:
            _line.send({"event": event, **fields})
            answered = os.read(_line.back, 1)
        except OSError:
            answered = b""
    if not answered:
        os._exit(LOST)


@contextmanager
def committing(paths: Sequence[Path]) -> Iterator[None]:
    """Rename files into place within the block: a signal ends the process before it or after it, not in between."""
    passing = _line.folder if _line is not None else None
    names = [str(path) for path in paths if passing is None or not os.path.realpath(path).startswith(passing + os.sep)]
    ask("commit", paths=names)
    done: list[str] = []
    try:
        with _signals_later():
            yield
            done = names
            _outputs.extend(names)
    finally:
        tell("committed", paths=done)


@contextmanager
def _signals_later() -> Iterator[None]:
    """Signals that end a process come after the block. Handlers belong to the main thread, others are not interrupted
    by one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.getsignal(number)
        for name in ("SIGINT", "SIGTERM", "SIGHUP")
        if (number := getattr(signal, name, None)) is not None
    }
    mine = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in mine:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in mine.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def begin() -> None:
    """A command begins: nothing is written yet."""
    _outputs.clear()


def outcome() -> str:
    """What a command that ends early has to say of its outputs."""
    return said(_outputs)


def said(outputs: Sequence[str]) -> str:
    """Outputs in words.

    >>> said([])
    'nothing was written'
    >>> said(["m.onnx", "r.json"])
    'already written: m.onnx, r.json'
    """
    return f"already written: {', '.join(outputs)}" if outputs else "nothing was written"

"""The command line's two processes: a small one that watches, and its child that does the work.

The child is forked before any library is loaded and before any thread runs. The supervisor runs no library, so no
signal is lost in one. It is told (see `channel`) which stage runs, which temporary files exist, and is asked before
outputs are renamed into place:

| what happens | what follows |
|---|---|
| SIGINT, SIGTERM, SIGHUP, to either process | it is killed at once, what it left is removed, one line; 130, 143, 129 |
| ... while outputs are renamed | the same afterwards; the line says what was written |
| ... while the command is ending | its own exit code |
| the child crashes | one line with stage and signal; 2 where a file that nobody vouches for was involved, else 1 |
| the child is killed (out of memory) | one line; 2 |
| a file that nobody vouches for takes longer than its deadline | one line; 2 |
| the supervisor is killed | the kernel kills the child (Linux), and it has no leave to write outputs (everywhere) |

The child is killed rather than asked to stop: an exception raised from outside, in whatever a C library is doing, is
swallowed by one callback and turned into an abort by the next. Nothing is lost, since every output appears by renaming.

Not for Windows, nor for a process that has threads already; there the work runs in the process itself.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from repquant_fx.security import channel

STOPS = {"SIGINT": "interrupted", "SIGTERM": "terminated by SIGTERM", "SIGHUP": "terminated by SIGHUP"}
GRACE = 10.0  # seconds for renaming outputs, or for ending, after a signal
TICK = 1.0  # seconds; a pause of both processes (Ctrl-Z) counts as one of them
_TEMPORARY = re.compile(r"\.(.*\.)?[a-z0-9_]{8}", re.DOTALL)  # the only names that are removed
_PR_SET_PDEATHSIG = 1

Say = Callable[[str, str, int], None]  # message, kind, exit code


def supervise(work: Callable[[], int], say: Say) -> int:
    """Run `work` in a child and return its exit code, or what its end means; in the child itself, what `work` returns.

    Args:
        say: prints the one line of an end that the child could not report.
    """
    if not hasattr(os, "fork") or threading.active_count() > 1 or "torch" in sys.modules or sys.gettrace() is not None:
        return work()
    numbers = [
        number
        for name in STOPS
        if signal.getsignal(number := getattr(signal, name)) in (signal.SIG_DFL, signal.default_int_handler)
    ]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    heard, out = os.pipe()
    back, answers = os.pipe()
    folder = _own_folder()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, nobody learns how a child ended
    supervisor, child = os.getpid(), os.fork()
    if child == 0:
        os.close(heard)
        os.close(answers)
        channel.connect(out, back, folder)
        _become_child(supervisor, numbers, folder)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return work()
    os.close(out)
    os.close(back)
    try:
        return _Watch(child, heard, answers, say).run(numbers, before)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _own_folder() -> str | None:
    """A temporary folder for this command alone, so that all that a killed child leaves can be removed."""
    try:
        return tempfile.mkdtemp(prefix="repquant-fx-")
    except OSError:  # whoever needs one says so
        return None


def _become_child(supervisor: int, numbers: list[int], folder: str | None) -> None:
    for number in numbers:  # the supervisor decides; a handler, unlike SIG_IGN, is not inherited by programs
        signal.signal(number, lambda number, _: channel.tell("signal", number=number))
    if folder is not None:
        os.environ["TMPDIR"], tempfile.tempdir = folder, None
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if sys.platform == "linux":
        with suppress(ImportError, OSError, AttributeError):
            import ctypes

            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != supervisor:
        os._exit(channel.LOST)
    if "--debug" not in sys.argv:
        _own_stderr()


def _own_stderr() -> None:
    """What Python writes to stderr goes there; what C libraries write by themselves, the trace of an abort above all,
    goes nowhere.
    """
    if sys.stderr is None:
        return
    with suppress(OSError, ValueError):
        copy = os.dup(sys.stderr.fileno())
        stream = open(copy, "w", encoding=sys.stderr.encoding, errors="backslashreplace", buffering=1)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        sys.stderr = sys.__stderr__ = stream  # type: ignore[misc]


class _Watch:
    """The supervisor's side of one child."""

    def __init__(self, child: int, heard: int, answers: int, say: Say) -> None:
        self.child, self.heard, self.answers, self.say = child, heard, answers, say
        self.buffer = b""
        self.stage = "start"
        self.untrusted: str | None = None  # what was loaded or run at last of a file that nobody vouches for
        self.left: tuple[float, float] | None = None  # seconds left, and of how many
        self.temporary: set[str] = set()
        self.renaming = False
        self.committing: list[str] = []
        self.written: list[str] = []
        self.code: int | None = None  # the work is done, and this is to be the exit code
        self.stop: int | None = None  # the signal that ends the command
        self.reason: str | None = None  # why the child was killed, None where it was not by us
        self.patience: float | None = None

    def run(self, numbers: list[int], mask: set[Any]) -> int:
        """Until the child has ended; returns the exit code."""
        wake, waker = os.pipe()
        for end in (wake, waker, self.heard):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in numbers:
            signal.signal(number, self._stop)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while True:
            began, due = time.monotonic(), self.left
            sources = [wake] if self.heard < 0 else [wake, self.heard]
            timed = self.left is not None or self.patience is not None
            ended, status = os.waitpid(self.child, os.WNOHANG)
            if ended:
                break
            select.select(sources, [], [], TICK if timed else None)
            with suppress(BlockingIOError):
                os.read(wake, 4096)
            self._listen()
            # a deadline counts from where it was set
            self._pass(min(time.monotonic() - began, TICK) if self.left is due else 0.0)
        self._listen()
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # it is over: one line at most
        for path in self.temporary:
            _remove(Path(path))
        return self._result(status)

    def _stop(self, number: int, _: object = None) -> None:
        self.stop = self.stop or number

    def _pass(self, seconds: float) -> None:
        """Time has passed: end the child where it is due."""
        if self.stop is not None and self.reason is None:
            wait = self.renaming or self.code is not None
            self.patience = (GRACE if self.patience is None else self.patience) - seconds
            if not wait or self.patience <= 0:
                self._kill("signal")
        if self.left is not None and self.reason is None:
            self.left = self.left[0] - seconds, self.left[1]
            if self.left[0] <= 0:
                self._kill("deadline")

    def _kill(self, reason: str) -> None:
        self.reason = reason
        with suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGKILL)

    def _listen(self) -> None:
        while self.heard >= 0:
            try:
                data = os.read(self.heard, 65536)
            except BlockingIOError:
                break
            if not data:  # the child has closed it: it ends
                os.close(self.heard)
                self.heard = -1
            self.buffer += data
        *lines, self.buffer = self.buffer.split(b"\n")
        for line in lines:
            self._hear(json.loads(line))

    def _hear(self, message: dict[str, Any]) -> None:
        event = message["event"]
        if event == "stage":
            self.stage = message["name"]
        elif event == "guarded":
            self.untrusted, self.left = message["what"], (message["seconds"], message["seconds"])
        elif event == "free":
            self.left = None
        elif event == "temporary":
            self.temporary.add(message["path"])
        elif event == "signal":
            self._stop(message["number"])
        elif event == "committed":
            self.written += message["paths"]
            self.renaming, self.committing = False, []
        elif self.stop is None and self.reason is None:  # asks for leave
            if event == "commit":
                self.renaming, self.committing = True, message["paths"]
            elif event == "ending":
                self.code, self.left = message["code"], None
            with suppress(BrokenPipeError):
                os.write(self.answers, b".")

    def _result(self, status: int) -> int:
        """The exit code, after the line that explains it where the child did not."""
        state = channel.said(self.written)
        if self.committing:
            state += f"; was just writing {', '.join(self.committing)}"
        if self.reason == "signal" and self.stop is not None:
            name = signal.Signals(self.stop).name
            return self._say(
                f"{STOPS[name]}; {state}", "KeyboardInterrupt" if name == "SIGINT" else "Terminated", 128 + self.stop
            )
        if self.reason == "deadline" and self.left is not None:
            return self._say(
                f"error: {self.untrusted}: it did not end within {self.left[1]:g} s, in the stage {self.stage}; "
                f"{state}; "
                "give it more with --load-timeout",
                "ModelFileError",
                2,
            )
        if not os.WIFSIGNALED(status):
            if self.code is None and self.untrusted is not None:  # it ended without leave
                return self._say(
                    f"error: {self.untrusted}: the process ended by itself (exit code {os.WEXITSTATUS(status)}) in the "
                    "stage "
                    f"{self.stage}; {state}",
                    "ModelFileError",
                    2,
                )
            return os.WEXITSTATUS(status)
        if self.code is not None and self.reason is None:  # a library that crashes when all is done changes nothing
            return self.code
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        if number == signal.SIGKILL:
            return self._say(
                f"error: the process was killed ({name}) in the stage {self.stage}, most likely because the memory ran "
                f"out; {state}",
                "MemoryError",
                2,
            )
        if self.untrusted is not None:
            return self._say(
                f"error: {self.untrusted}: the process crashed ({name}) in the stage {self.stage}; {state}",
                "ModelFileError",
                2,
            )
        return self._say(f"internal error: the process crashed ({name}) in the stage {self.stage}; {state}; "
                         "please report it with the output of the same command and --debug", "Crash", 1)

    def _say(self, message: str, kind: str, code: int) -> int:
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write("\r\033[K\033[?25h")  # a progress bar that nobody took away, and the cursor that it hid
        self.say(message, kind, code)
        return code


def _remove(path: Path) -> None:
    """What a killed child announced and left; nothing else, whatever it announced."""
    if _TEMPORARY.fullmatch(path.name) and not path.is_symlink():
        with suppress(OSError):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

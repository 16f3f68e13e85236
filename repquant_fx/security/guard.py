"""A guard while a file that nobody vouches for is loaded and run: what a model has no business to do is refused, and
named.

Python tells an audit hook before it starts a process, opens a socket or a file to write, or calls into C by ctypes. A
hook cannot be removed, so there is one for the process, and `guarded` switches it on. It holds for the thread that
entered the block and for every thread that this one starts, as long as they run; other threads go on as they like. What
is left behind to be called later is called under it, too (see `postponed`). In the process of the command line,
programs and the network stay refused when the block is over, whoever asks.

The guard stops chains of calls through installed libraries, which is what a model of known classes can be bent to. It
is no boundary against Python code that an attacker writes freely, and sees nothing of what a C library does by itself:
such code is not loaded in the first place, and `confinement` is the kernel's part.

| refused | audit events |
|---|---|
| processes | `os.system`, `os.exec`, `os.fork`, `os.spawn`, `subprocess.Popen`, `pty.spawn`, ..., `os.kill` |
| network | `socket.*`, `http.client.*`, `urllib.Request`, ... |
| C | `ctypes.*` |
| code from elsewhere | modules, libraries and compiled code outside the standard library and the installed packages |
| writing | opening to write, renaming, removing, linking, ... outside `writable` and the temporary folder |
| the process itself | current folder, limits, other audit hooks, stdin, the debugger |
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import sysconfig
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from repquant_fx.errors import ModelFileError
from repquant_fx.security import channel, confinement, postponed

_ACTIONS = {  # events, or their first part where it ends in a dot, to what was tried
    "start a process": (
        "os.system",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "os.startfile",
        "os.startfile/2",
        "subprocess.Popen",
        "pty.spawn",
        "_winapi.CreateProcess",
        "sys.remote_exec",
        "_posixsubprocess.fork_exec",
    ),
    "send a signal": ("os.kill", "os.killpg", "signal.pthread_kill"),
    "use the network": (
        "socket.",
        "http.",
        "urllib.",
        "ftplib.",
        "smtplib.",
        "imaplib.",
        "poplib.",
        "nntplib.",
        "telnetlib.",
        "webbrowser.",
    ),
    "call into C": ("ctypes.",),
    "read compiled code": ("marshal.load",),
    "open a database": ("sqlite3.",),
    "write to the system's log": ("syslog.",),
    "change the registry": (
        "winreg.CreateKey",
        "winreg.DeleteKey",
        "winreg.DeleteValue",
        "winreg.SetValue",
        "winreg.LoadKey",
        "winreg.SaveKey",
    ),
    "change this process": (
        "os.chdir",
        "os.fchdir",
        "resource.setrlimit",
        "resource.prlimit",
        "sys.addaudithook",
        "setopencodehook",
        "builtins.breakpoint",
        "builtins.input",
        "code.interact",
    ),
}
_EXACT = {event: action for action, events in _ACTIONS.items() for event in events if not event.endswith(".")}
_FAMILIES = {event[:-1]: action for action, events in _ACTIONS.items() for event in events if event.endswith(".")}
# the last follows a connection
_HARMLESS = {"socket.gethostname", "ctypes.get_errno", "ctypes.set_errno", "http.client.send"}
_PATHS = {  # events that change the file system: (index of the path, index of the descriptor it is relative to)
    "os.chflags": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.link": ((0, 2), (1, 3)),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.removexattr": ((0, None),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.mkfifo": ((0, None),),
    "os.mknod": ((0, None),),
    "os.setxattr": ((0, None),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
}
_SILENT = (  # functions that Python does not announce, and the events that they become
    ("_posixsubprocess", "fork_exec", "_posixsubprocess.fork_exec"),
    ("subprocess", "_fork_exec", "_posixsubprocess.fork_exec"),
    ("os", "mkfifo", "os.mkfifo"),
    ("os", "mknod", "os.mknod"),
    ("posix", "mkfifo", "os.mkfifo"),
    ("posix", "mknod", "os.mknod"),
    ("_thread", "start_new_thread", "_thread.start_new_thread"),  # before Python 3.13
    ("_thread", "start_new", "_thread.start_new_thread"),
    ("threading", "_start_new_thread", "_thread.start_new_thread"),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NOISY = tuple(
    os.path.join(sysconfig.get_paths()["stdlib"], name)
    for name in ("antigravity.py", "idlelib", "lib2to3", "test", "turtledemo")
)
_THREADS = ("_thread.start_new_thread", "_thread.start_joinable_thread")
_LASTING = ("start a process", "use the network")
_SHOWN = 120  # characters of an argument


class _Guard:
    """One block at work."""

    def __init__(self, what: str, writable: Iterable[Path]) -> None:
        self.what = what
        self.violation: ModelFileError | None = None
        self.writable = tuple(os.path.realpath(path) for path in (Path(tempfile.gettempdir()), *writable))
        self.ident = threading.get_ident()
        self.before = frozenset(sys._current_frames())

    def holds(self, ident: int) -> bool:
        """Whether a thread is under it: the one that entered the block, and those that C started since."""
        return ident == self.ident or (ident not in self.before and _thread(ident) is None)

    def refuse(self, action: str, event: str, subject: object) -> None:
        """Raise, and remember the first one: whoever catches it does not make it undone."""
        if _importing():
            return
        text = os.fsdecode(subject) if isinstance(subject, (str, bytes)) else repr(subject)
        error = ModelFileError(f"{self.what}: it tried to {action} ({event} {text[:_SHOWN]!a}), which is refused; "
                               "pass --allow-pickle if you trust the file")
        self.violation = self.violation or error
        raise error


_active: list[_Guard] = []
_started: weakref.WeakKeyDictionary[threading.Thread, _Guard] = weakref.WeakKeyDictionary()  # under a guard, for good
_lasting: _Guard | None = None  # of the process of the command line
_busy = threading.local()  # what the hook itself does is not judged
_installed = False


@contextmanager
def guarded(what: str, writable: Iterable[Path] = ()) -> Iterator[None]:
    """Refuse what a model has no business to do while the block runs.

    Args:
        what: is being done, such as `loading m.pt`; opens the message.
        writable: folders (and files) that may be written beside the temporary folder.

    Raises:
        ModelFileError: the block tried something; also where the block caught the refusal itself.
    """
    global _installed, _lasting
    if not _installed:
        sys.addaudithook(_hook)
        _announce()
        _installed = True
    guard, bytecode = _Guard(what, writable), sys.dont_write_bytecode
    confinement.bound_memory()
    sys.dont_write_bytecode = True  # a module that a library imports late would be compiled into its own folder
    outermost = not _active  # a deadline holds for the whole of a block, whatever is guarded within
    _active.append(guard)
    if outermost:
        channel.tell("guarded", what=what, seconds=channel.load_seconds)
    later = functools.partial(_afterwards, f"after {what}", guard.writable)
    try:
        with postponed.watched(later, lambda action: guard.refuse(action, "signal.signal", "")):
            yield
    except (Exception, SystemExit) as error:
        if guard.violation is not None and error is not guard.violation:
            raise guard.violation from None
        if isinstance(error, SystemExit):
            raise ModelFileError(f"{what}: it tried to end the process") from None
        raise
    finally:
        if confinement.lasting:
            _lasting = _Guard(f"after {what}", ())
        _active.remove(guard)
        if outermost:
            channel.tell("free")
        sys.dont_write_bytecode = bytecode
    if guard.violation is not None:
        raise guard.violation


@contextmanager
def _afterwards(what: str, writable: Iterable[str]) -> Iterator[None]:
    """What a block left behind is called now, in any thread."""
    guard = _Guard(what, map(Path, writable))
    _active.append(guard)
    try:
        yield
    finally:
        _active.remove(guard)


def _thread(ident: int) -> threading.Thread | None:
    """What Python knows of a thread; nothing of one that C started. (`threading.current_thread` would make it up.)"""
    known: dict[int, threading.Thread] = getattr(threading, "_active", {})
    return known.get(ident)


def _announce() -> None:
    """Let the functions that Python forgets tell the hook, too."""
    for place, name, event in _SILENT:
        try:
            module = importlib.import_module(place)
            setattr(module, name, _announced(getattr(module, name), event))
        except (ImportError, AttributeError):  # another system, or another Python
            continue


def _announced(function: Callable[..., Any], event: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        sys.audit(event, *(args or tuple(named.values())))
        return function(*args, **named)

    return call


def guarded_unless(trusted: bool, what: str, writable: Iterable[Path] = ()) -> AbstractContextManager[None]:
    """`guarded`, or nothing where the user vouches for what runs."""
    return nullcontext() if trusted else guarded(what, writable)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not (_active or _started or _lasting) or getattr(_busy, "now", False):
        return
    _busy.now = True
    try:
        guard = _guard_of(threading.get_ident())
        if guard is not None:
            _judge(guard, event, args)
        elif _lasting is not None and _action(event) in _LASTING:
            _judge(_lasting, event, args)
    finally:
        _busy.now = False


def _guard_of(ident: int) -> _Guard | None:
    for guard in reversed(_active):
        if guard.holds(ident):
            return guard
    thread = _thread(ident)
    return None if thread is None else _started.get(thread)


def _action(event: str) -> str | None:
    return None if event in _HARMLESS else _EXACT.get(event) or _FAMILIES.get(event.partition(".")[0])


def _judge(guard: _Guard, event: str, args: tuple[Any, ...]) -> None:
    if event == "open":
        path, mode, flags = args
        if (
            not isinstance(path, int)
            and (flags & _WRITING or any(letter in (mode or "") for letter in "wax+"))
            and not _may_write(guard, path)
        ):
            guard.refuse("write a file", event, os.fspath(path))
    elif event == "import":  # by name it is only looked for; what is found is executed, or is a library
        if args[1] is not None and not _installed_file(os.fsdecode(args[1])):
            guard.refuse("load a library", event, args[1])
    elif event == "marshal.loads":
        if not _known_bytecode(sys._getframe(2)):
            guard.refuse("read compiled code", event, args[0])
    elif event == "exec":
        name = getattr(args[0], "co_filename", "<unknown>")
        noisy = any(_below(name, each) for each in _NOISY)
        if noisy or (not name.startswith("<") and not _installed_file(name) and os.path.exists(name)):
            guard.refuse("run a file", event, name)
    elif event in _PATHS:
        for index, anchor in _PATHS[event]:
            if not _may_write(guard, args[index], args[anchor] if anchor is not None else -1):
                guard.refuse("change a file", event, args[index])
    elif event in _THREADS:
        thread = getattr(args[0], "__self__", None)
        if isinstance(thread, threading.Thread):
            _started[thread] = guard
        else:
            guard.refuse("start a thread without a name", event, args[0])
    elif (action := _action(event)) is not None:
        guard.refuse(action, event, args[0] if len(args) == 1 else args)


def _may_write(guard: _Guard, path: Any, folder: int = -1) -> bool:
    """Whether a path lies in a folder that may be written.

    Args:
        path: of the event; a descriptor was judged when it was opened.
        folder: the descriptor of the folder that a relative path starts from; -1 for the current one.
    """
    if isinstance(path, int):
        return True
    try:
        text = os.fsdecode(path)
        if folder != -1 and not os.path.isabs(text):
            text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
        # the entry itself is changed, not what it links to; where it is opened, what it links to
        places = {
            os.path.realpath(text),
            os.path.join(os.path.realpath(os.path.dirname(text) or "."), os.path.basename(text)),
        }
    except (OSError, ValueError, TypeError):
        return False
    return all(place == os.devnull or any(_below(place, root) for root in guard.writable) for place in places)


def _importing() -> bool:
    """Whether the body of an installed module runs, because it is being imported."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code, caller = frame.f_code, frame.f_back
        if (
            code.co_name == "<module>"
            and caller is not None
            and caller.f_code.co_filename == "<frozen importlib._bootstrap>"
            and _installed_file(code.co_filename)
        ):
            return True
        frame = caller
    return False


def _known_bytecode(reader: Any) -> bool:
    """Whether compiled code is read by the import system, for a module that is installed; the names within the code can
    lie.
    """
    if reader.f_code.co_filename not in ("<frozen importlib._bootstrap_external>", "<frozen zipimport>"):
        return False
    paths = [reader.f_locals.get(name) for name in ("bytecode_path", "source_path", "pathname")]
    return any(paths) and all(_installed_file(path) for path in paths if path)


def _installed_file(path: str) -> bool:
    """Whether a file lies where Python's packages are installed, or in this package."""
    absolute, real = os.path.abspath(path), os.path.realpath(path)
    return any(_below(each, root) for root in _roots() for each in (absolute, real))


def _roots() -> set[str]:
    if not _known_roots:
        folders = {
            path for key, path in sysconfig.get_paths().items() if key in ("stdlib", "platstdlib", "purelib", "platlib")
        }
        folders |= {path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")}
        folders |= {
            os.path.abspath(path)
            for name in ("repquant_fx", "repquant_fx.passes", "repquant_fx.exporters")
            if name in sys.modules
            for path in sys.modules[name].__path__
        }
        _known_roots.update(folders | {os.path.realpath(folder) for folder in folders})
    return _known_roots


_known_roots: set[str] = set()


def _below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)

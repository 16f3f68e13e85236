"""What a model may not do while it is loaded and run."""

from __future__ import annotations

import _thread
import ctypes
import importlib
import importlib.util
import marshal
import os
import runpy
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import urllib.request
import weakref
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import ExtensionFileLoader, SourcelessFileLoader
from multiprocessing.util import spawnv_passfds
from pathlib import Path
from typing import Any

import pytest

from repquant_fx.errors import ModelFileError
from repquant_fx.security import guard
from repquant_fx.security.guard import guarded, guarded_unless

ATTEMPTS: dict[str, tuple[Callable[[], Any], str]] = {
    "os.system": (lambda: os.system("touch ran"), "start a process (os.system 'touch ran')"),
    "subprocess": (lambda: subprocess.run(["touch", "ran"], check=True), "start a process (subprocess.Popen"),
    "os.popen": (lambda: os.popen("touch ran").read(), "start a process (subprocess.Popen"),
    "exec": (lambda: os.execv("/usr/bin/touch", ["touch", "ran"]), "start a process (os.exec"),
    "spawn": (lambda: os.posix_spawn("/usr/bin/touch", ["touch", "ran"], {}), "start a process (os.posix_spawn"),
    "spawn of multiprocessing": (
        lambda: spawnv_passfds(b"/usr/bin/touch", [b"touch", b"ran"], ()),
        "start a process (_posixsubprocess.fork_exec",
    ),
    "fork": (os.fork, "start a process (os.fork"),
    "kill": (lambda: os.kill(os.getppid(), 0), "send a signal (os.kill"),
    "socket": (lambda: socket.create_connection(("127.0.0.1", 9)), "use the network (socket."),
    "url": (lambda: urllib.request.urlopen("http://127.0.0.1:9/"), "use the network (urllib.Request"),
    "ctypes": (lambda: ctypes.CDLL(None), "call into C (ctypes.dlopen"),
    "address": (lambda: ctypes.string_at(id(0), 8), "call into C (ctypes.string_at"),
    "write": (lambda: Path("ran").write_text("x"), "write a file (open 'ran')"),
    "append": (lambda: open("other.txt", "a"), "write a file (open"),
    "descriptor": (lambda: os.open("ran", os.O_CREAT | os.O_WRONLY), "write a file (open"),
    "update": (lambda: open("other.txt", "r+"), "write a file (open"),
    "rename": (lambda: os.rename("other.txt", "ran"), "change a file (os.rename"),
    "remove": (lambda: os.unlink("other.txt"), "change a file (os.remove"),
    "folder": (lambda: os.mkdir("ran"), "change a file (os.mkdir"),
    "link": (lambda: os.symlink("other.txt", "ran"), "change a file (os.symlink"),
    "pipe": (lambda: os.mkfifo("ran"), "change a file (os.mkfifo"),
    "node": (lambda: os.mknod("ran"), "change a file (os.mknod"),
    "mode": (lambda: os.chmod("other.txt", 0o777), "change a file (os.chmod"),
    "truncate": (lambda: os.truncate("other.txt", 0), "change a file (os.truncate"),
    "database": (lambda: sqlite3.connect("ran"), "open a database (sqlite3.connect"),
    "module": (lambda: importlib.import_module("wicked"), "run a file (exec"),
    "noisy module": (lambda: importlib.import_module("antigravity"), "run a file (exec"),
    "file": (lambda: runpy.run_path("evil.py"), "run a file (exec"),
    "library": (lambda: ExtensionFileLoader("evil", "evil.so").load_module("evil"), "load a library (import"),
    "compiled": (
        lambda: SourcelessFileLoader("evil", "evil.pyc").load_module("evil"),
        "read compiled code (marshal.loads",
    ),
    "compiled script": (lambda: runpy.run_path("evil.pyc"), "read compiled code (marshal.load"),
    "hook": (lambda: sys.addaudithook(lambda *_: None), "change this process (sys.addaudithook"),
    "chdir": (lambda: os.chdir("/"), "change this process (os.chdir"),
    "thread": (lambda: _thread.start_new_thread(os.mkdir, ("ran",)), "start a thread without a name (_thread."),
    "exit": (lambda: sys.exit(0), "end the process"),
}


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A current folder that is not the temporary one, with a module and a file."""
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "temporary").mkdir()
    (here / "evil.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    (here / "wicked.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    (here / "evil.so").write_bytes(b"no library")
    code = compile("import pathlib; pathlib.Path('ran').touch()", "<string>", "exec")  # its own name is anything
    (here / "evil.pyc").write_bytes(importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code))
    (here / "other.txt").write_text("theirs")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(here)
    return here


@pytest.mark.parametrize("name", ATTEMPTS)
def test_what_is_refused(name: str, place: Path) -> None:
    attempt, words = ATTEMPTS[name]
    with pytest.raises(ModelFileError) as caught, guarded("loading m.pt"):
        attempt()
    assert str(caught.value).startswith("loading m.pt: it tried to ") and words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(p.name for p in place.iterdir() if p.name != "__pycache__") == [
        "evil.py",
        "evil.pyc",
        "evil.so",
        "other.txt",
        "wicked.py",
    ]
    assert (place / "other.txt").read_text() == "theirs"


def test_a_refusal_cannot_be_swallowed(place: Path) -> None:
    with pytest.raises(ModelFileError, match=r"os\.system 'touch ran'"), guarded("loading m.pt"):
        try:
            os.system("touch ran")
        except Exception:
            pass
        try:
            os.mkdir("second")
        except Exception as error:
            raise ValueError("something else") from error
    assert not (place / "ran").exists()


def test_a_thread_does_not_help(place: Path) -> None:
    def attempt() -> None:
        with suppress(ModelFileError):
            os.mkdir("ran")

    with pytest.raises(ModelFileError, match=r"os\.mkdir"), guarded("loading m.pt"):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert not (place / "ran").exists()


def test_threads_that_ran_before_go_on(place: Path) -> None:
    """A server that compiles in one thread may open sockets in the others."""
    go, done = threading.Event(), threading.Event()

    def work() -> None:
        go.wait(30)
        os.mkdir("theirs")
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    with guarded("loading m.pt"):
        go.set()
        assert done.wait(30)
    thread.join()
    assert (place / "theirs").is_dir()


def test_what_stays_possible(place: Path) -> None:
    """Reading anything, writing where it was said, importing what is installed; and all of it afterwards."""
    (place / "out").mkdir()
    sys.modules.pop("wave", None)
    with guarded("loading m.pt", [place / "out"]):
        assert Path("other.txt").read_text() == "theirs"
        (place / "out" / "a").write_text("x")
        os.replace("out/a", "out/b")
        with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x")
        with open(os.devnull, "w"):
            pass
        importlib.import_module("wave")
        with pytest.raises(ImportError):
            importlib.import_module("no_such_module_anywhere")
        exec("x = 1", {})
    with guarded_unless(True, "loading m.pt"):
        os.mkdir("mine")
    os.symlink("..", "out/up")
    with pytest.raises(ModelFileError, match="write a file"), guarded("loading m.pt", [place / "out"]):
        Path("out/up/ran").write_text("x")
    assert subprocess.run([sys.executable, "-c", ""], check=True).returncode == 0


def test_bytecode_is_not_written(place: Path) -> None:
    before = sys.dont_write_bytecode
    with guarded("loading m.pt"):
        assert sys.dont_write_bytecode
    assert sys.dont_write_bytecode == before


def test_an_installed_module_may_do_what_it_likes_while_it_is_imported(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision loads its library of C then, and huggingface_hub asks `ldconfig`."""
    (place / "installed.py").write_text("import os\nos.mkdir('made')\ndef later():\n    os.mkdir('later')\n")
    monkeypatch.setattr(guard, "_known_roots", {*guard._roots(), str(place)})
    with guarded("loading m.pt"):
        module = importlib.import_module("installed")
    assert (place / "made").is_dir()
    with pytest.raises(ModelFileError, match=r"os\.mkdir 'later'"), guarded("loading m.pt"):
        module.later()


def test_a_deadline_holds_for_the_outermost_block(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, object]] = []
    monkeypatch.setattr(guard.channel, "tell", lambda event, **fields: told.append((event, fields.get("what"))))
    with guarded("loading m.pt"):
        with guarded("loading its tokenizer"):
            pass
        assert told == [("guarded", "loading m.pt")]
    assert told == [("guarded", "loading m.pt"), ("free", None)]


def test_a_thread_stays_guarded_when_the_block_is_over(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """So do those that it starts; others, which may have its ident later, do not."""
    go, refused = threading.Event(), list[str]()

    def attempt() -> None:
        try:
            os.mkdir("ran")
        except ModelFileError as error:
            refused.append(str(error))

    def work() -> None:
        go.wait(30)
        attempt()
        inner = threading.Timer(0, attempt)
        inner.start()
        inner.join(30)

    with guarded("loading m.pt"):
        thread = threading.Thread(target=work)
        thread.start()
    go.set()
    thread.join(30)
    assert not (place / "ran").exists() and len(refused) == 2 and "change a file (os.mkdir" in refused[1]
    other = threading.Thread(target=os.mkdir, args=("theirs",))
    other.start()
    other.join(30)
    assert (place / "theirs").exists()


def test_threads_of_others_are_free_while_a_block_runs(place: Path) -> None:
    """A server starts threads for other requests meanwhile."""
    go, done = threading.Event(), threading.Event()

    def serve() -> None:
        go.wait(30)
        thread = threading.Thread(target=os.mkdir, args=("theirs",))
        thread.start()
        thread.join(30)
        done.set()

    server = threading.Thread(target=serve)
    server.start()
    with guarded("loading m.pt"):
        go.set()
        assert done.wait(30)
    server.join(30)
    assert (place / "theirs").is_dir()


def test_a_finalizer_is_called_under_the_guard(place: Path) -> None:
    class Thing:
        pass

    before, thing = Thing(), Thing()
    mine = weakref.finalize(before, os.mkdir, "mine")
    with guarded("loading m.pt"):
        theirs = weakref.finalize(thing, os.mkdir, "ran")
        harmless = weakref.finalize(thing, str.upper, "x")
    mine()
    with pytest.raises(ModelFileError, match=r"after loading m.pt: it tried to change a file \(os.mkdir 'ran'\)"):
        theirs()
    assert harmless() == "X" and (place / "mine").exists() and not (place / "ran").exists()


def test_handlers_and_hooks_are_put_back(place: Path) -> None:
    hook, handler = sys.excepthook, signal.getsignal(signal.SIGUSR1)
    with pytest.raises(ModelFileError, match="handle the signal SIGUSR1"), guarded("loading m.pt"):
        signal.signal(signal.SIGUSR1, lambda *_: None)
    assert signal.getsignal(signal.SIGUSR1) is handler
    with guarded("loading m.pt"):
        sys.excepthook = lambda *_: os.system("touch ran")
    assert sys.excepthook is hook


def test_the_end_of_the_process(tmp_path: Path) -> None:
    """Functions that a block registers for it are called under a guard; those of the program around it are not."""
    script = """
        import atexit, os, tempfile, threading
        from repquant_fx.security.guard import guarded
        tempfile.tempdir = os.path.abspath("temporary")
        atexit.register(os.mkdir, "before")
        with guarded("loading m.pt"):
            atexit.register(os.mkdir, "ran")
            threading._register_atexit(os.mkdir, "ran2")
            atexit.register(print, "harmless")
        with guarded("loading n.pt"):
            pass
        atexit.register(os.mkdir, "after")
        """
    (tmp_path / "temporary").mkdir()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "harmless\n" and done.stderr.count("after loading m.pt: it tried to change a file") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["after", "before", "temporary"]

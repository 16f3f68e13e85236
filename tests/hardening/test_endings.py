"""Disks that are full and processes that are ended: complete files or none, and the right exit code."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
import warnings
from pathlib import Path

import pytest

from repquant_fx import files
from repquant_fx.cli import COMMANDS, main
from repquant_fx.cli.common import add_output
from repquant_fx.cli.signals import Terminated, flushed, terminated
from repquant_fx.errors import OutputError
from repquant_fx.files import check_writable, write_together

ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- disks -----------------------------------------------------------------------------------------------------------


def test_two_files_are_both_there_or_neither(tmp_path: Path) -> None:
    """The second does not fit: a limit on the size of files stands for a full disk."""
    write_together({tmp_path / "old": b"old"})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*old: File too large"):
            write_together({tmp_path / "new": b"x" * 500, tmp_path / "old": b"x" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["old"] and (tmp_path / "old").read_bytes() == b"old"


def test_a_device_is_no_output(tmp_path: Path) -> None:
    """Renaming onto it would take its place."""
    os.symlink("/dev/full", tmp_path / "link")
    for path in ("/dev/full", tmp_path / "link"):
        with pytest.raises(OutputError, match="a device"):
            check_writable(path, True)
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000])
def test_names_that_no_file_has(name: str) -> None:
    with pytest.raises(OutputError, match="cannot write") as caught:
        check_writable(name, False)
    assert len(str(caught.value)) < 400


def test_writers_of_one_name_do_not_mix(tmp_path: Path) -> None:
    """Two compiles at once: the file is that of one of them, whole."""
    contents = [bytes([number]) * 50_000 for number in range(4)]
    threads = [
        threading.Thread(
            target=lambda data=data: [write_together({tmp_path / "m": data, tmp_path / "r": data}) for _ in range(10)]
        )
        for data in contents
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not (tmp_path / "m").exists() or (tmp_path / "m").read_bytes() in contents
    assert names(tmp_path) == ["m", "r"] and (tmp_path / "r").read_bytes() in contents


def test_long_names_are_written(tmp_path: Path) -> None:
    name = "n" * 250
    write_together({check_writable(tmp_path / name, False): b"x"})
    assert names(tmp_path) == [name]


def test_a_result_that_cannot_be_printed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OutputError, match="standard output: No space left"), flushed():
            print("result")


def run(script: str, folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=folder, text=True,
                          **{"stderr": subprocess.PIPE, "env": ENVIRONMENT, **options})  # type: ignore[call-overload]


COMMAND = """
    import sys, types
    from repquant_fx import cli
    from repquant_fx.cli import main
    command = types.ModuleType("command", "`repquant-fx say`: print something.")
    command.add = lambda parser: parser.set_defaults(run=lambda options: print("x" * 100_000) or 0)
    cli.COMMANDS["say"] = command
    sys.exit(main(["say"]))
"""


def test_a_full_stdout_ends_with_two(tmp_path: Path) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = run(COMMAND, tmp_path, stdout=full)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "cannot write the result to standard output: No space left" in done.stderr, done.stderr


ODD = COMMAND.replace('"x" * 100_000', '"\\u00e9\\udcff \\u2500 x"')


def test_a_stdout_that_is_not_utf_8(tmp_path: Path) -> None:
    """What it cannot say is escaped."""
    done = run(ODD, tmp_path, stdout=subprocess.PIPE, env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\xe9\\udcff \\u2500 x\n", "")


def test_tracebacks_are_escaped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: object) -> int:
        warnings.warn("odd\x1b[2J", stacklevel=1)
        raise ValueError("\x1b]0;title\x07 \x9b1m\u2028")

    command = types.ModuleType("command", "`repquant-fx say`: print something.")
    vars(command)["add"] = lambda parser: (add_output(parser), parser.set_defaults(run=fail))
    monkeypatch.setitem(COMMANDS, "say", command)
    assert main(["say", "--debug"]) == 1
    said = capsys.readouterr().err
    assert "Traceback (most recent call last):\n" in said
    assert said.count("ValueError: \\x1b]0;title\\x07 \\x9b1m\\u2028\n") == 2
    assert "UserWarning: odd\\x1b[2J\n" in said and not set(said) & set("\x1b\x07\x9b\u2028")


def test_a_reader_that_is_gone_ends_quietly(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = run(COMMAND, tmp_path, stdout=write)
    os.close(write)
    assert done.returncode == 141 and done.stderr == ""


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_writing_leaves_nothing(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.os, "fsync", lambda _: os.kill(os.getpid(), number))
    with pytest.raises(Terminated) as caught, terminated():
        write_together({tmp_path / "a": b"data", tmp_path / "b": b"data"})
    assert caught.value.exit_code == 128 + number and not names(tmp_path)
    assert signal.getsignal(number) == signal.SIG_DFL, "as it was"


def test_handlers_of_others_stay() -> None:
    """A training script that compiles has its own; `nohup` ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminated():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_killed_while_writing(tmp_path: Path) -> None:
    """Outright: nothing can be cleaned up, and still no name holds a part."""
    (tmp_path / "old.onnx").write_bytes(b"old")
    done = run("""
        import os, signal
        from repquant_fx.files import write_together
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        write_together({"old.onnx": b"new", "report.json": b"new"})
    """, tmp_path, stdout=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL and (tmp_path / "old.onnx").read_bytes() == b"old"
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["old.onnx"]


ARCH = "timm:vit_tiny_patch16_224,img_size=16,patch_size=8,embed_dim=12,num_heads=3,depth=1,num_classes=2"


@pytest.mark.parametrize(
    "number, code, word", [(signal.SIGTERM, 143, "terminated by SIGTERM"), (signal.SIGKILL, -9, "")]
)
def test_ended_while_compiling(number: signal.Signals, code: int, word: str, tmp_path: Path) -> None:
    (tmp_path / "slow_data.py").write_text(textwrap.dedent("""
        import pathlib, time
        def batches():
            pathlib.Path("started").touch()
            time.sleep(120)
    """))
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "repquant_fx",
            "compile",
            ARCH,
            "--calib",
            "slow_data:batches",
            "--out",
            "m.onnx",
            "--report",
            "r.json",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        while not (tmp_path / "started").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        out, error = process.communicate()
    finally:
        process.kill()
    assert process.returncode == code and out == "" and word in error and "Traceback" not in error, error
    assert names(tmp_path) == ["slow_data.py", "started"]


def test_out_of_memory_is_no_internal_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import repquant_fx.compiler

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(repquant_fx.compiler, "compile_model", fail)
    assert main(["compile", "m.pt2", "--out", str(tmp_path / "m.onnx")]) == 2
    assert "not enough memory" in capsys.readouterr().err and not names(tmp_path)


@pytest.mark.parametrize(
    "argv", [["--seed", "9" * 30], ["--seed", "-1"], ["--input-shape", "9" * 6000], ["--calib-samples", "x"]]
)
def test_numbers_that_are_none(argv: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["compile", ARCH, "--out", str(tmp_path / "m.onnx"), *argv]) == 2
    assert "internal" not in capsys.readouterr().err

"""How a command ends: by signals at every moment, by crashes, by a deadline, without its supervisor."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork, no supervisor")

PRELUDE = """
    import os, signal, sys, time, types
    from pathlib import Path
    from repquant_fx import cli, files, log
    from repquant_fx.cli import common
    from repquant_fx.security import channel, guard

    def run(options):
        log.stage("work")
        return work() or 0

    command = types.ModuleType("command", "`repquant-fx do`: do something.")
    def add(parser):
        common.add_source(parser)
        common.add_calibration(parser)
        parser.add_argument("--report", type=Path)
        parser.set_defaults(run=run)
    command.add = add
    cli.COMMANDS = {"do": command}
    sys.argv = ["repquant-fx", "do", "m.pt", "--log-json", *sys.argv[1:]]
"""


@contextmanager
def command(
    folder: Path, work: str, *argv: str, confined: bool = False, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A command line whose one command runs `work`. The temporary folder is `folder / "temporary"`. Confined where the
    packages are there.
    """
    without = "" if confined else "import sys; sys.modules['landlock'] = sys.modules['pyseccomp'] = None\n"
    body = textwrap.indent(textwrap.dedent(work), "    ")
    script = f"{without}{textwrap.dedent(PRELUDE)}\ndef work():\n{body}\n\nsys.exit(cli.main())\n"
    (folder / "temporary").mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "TMPDIR": str(options.pop("temporary", folder / "temporary")),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    process = subprocess.Popen([sys.executable, "-c", script, *argv], cwd=folder, text=True, env=environment,
                               **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def event(stream: IO[str] | None, name: str) -> dict[str, Any]:
    """Read log lines until the event."""
    assert stream is not None
    for line in stream:
        if (found := json.loads(line))["event"] == name:
            return found
    raise AssertionError(f"no {name}")


def end(process: subprocess.Popen[str]) -> tuple[int, str, list[dict[str, Any]]]:
    """(exit code, stdout, what was said after the stage began)."""
    out, error = process.communicate()
    return (
        process.returncode,
        out,
        [e for e in map(json.loads, error.splitlines()) if not e["event"].startswith("stage")],
    )


def names(folder: Path) -> list[str]:
    """All that is in a folder and its temporary folder."""
    return sorted(p.name for p in (*folder.iterdir(), *(folder / "temporary").iterdir()) if p.name != "temporary")


SIGNALS = [
    (signal.SIGINT, 130, "interrupted"),
    (signal.SIGTERM, 143, "terminated by SIGTERM"),
    (signal.SIGHUP, 129, "terminated by SIGHUP"),
]
# what a library may be doing: swallowing everything, not letting Python run, importing, cleaning up
BUSY = {
    "sleeping": "time.sleep(60)",
    "swallowing": """
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
        """,
    "in C": "import re; re.match('(a*)*b', 'a' * 60)",
    "with files": """
        import tempfile
        folder = tempfile.mkdtemp()
        Path(folder, "large").write_text("x")
        os.fsync = lambda _: (log.stage("fsync"), time.sleep(60))
        files.write_together({"m.onnx": b"x", "r.json": b"x"})
        """,
    "with a directory": """
        os.fsync = lambda _: (log.stage("fsync"), time.sleep(60))
        files.write_directory("out", {"model.onnx": b"x"})
        """,
}


@pytest.mark.parametrize(
    "busy, number, code, words", [*(("swallowing", *each) for each in SIGNALS), *((busy, *SIGNALS[1]) for busy in BUSY)]
)
def test_a_signal_ends_at_once_and_leaves_nothing(
    busy: str, number: signal.Signals, code: int, words: str, tmp_path: Path
) -> None:
    with command(tmp_path, BUSY[busy]) as process:
        while event(process.stderr, "stage_started")["stage"] != ("fsync" if "with" in busy else "work"):
            pass
        process.send_signal(number)
        found = end(process)
    assert found[:2] == (code, "") and [e["message"] for e in found[2]] == [f"{words}; nothing was written"], found
    assert found[2][0]["exit_code"] == code and names(tmp_path) == []


def test_a_signal_to_both_is_one_signal(tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches all processes of the job."""
    with command(tmp_path, "time.sleep(60)", start_new_session=True) as process:
        event(process.stderr, "stage_started")
        os.killpg(process.pid, signal.SIGINT)
        found = end(process)
    assert found[0] == 130 and len(found[2]) == 1


def test_a_signal_to_the_child_alone(tmp_path: Path) -> None:
    with command(tmp_path, "log.info(str(os.getpid())); time.sleep(60)") as process:
        os.kill(int(event(process.stderr, "info")["message"]), signal.SIGTERM)
        found = end(process)
    assert found[0] == 143 and [e["message"] for e in found[2]] == ["terminated by SIGTERM; nothing was written"]


@pytest.mark.parametrize(
    "write, outputs",
    [
        ("files.write_together({'m.onnx': b'new', 'r.json': b'new'})", ["m.onnx", "r.json"]),
        ("files.write_together({'m.data': [b'n', b'ew'], 'm.onnx': b'new'}, [Path('old')])", ["m.data", "m.onnx"]),
        (
            "files.write_directory('out', {'config.json': b'new', 'model.onnx': b'new'})",
            ["out/config.json", "out/model.onnx"],
        ),
    ],
)
def test_a_signal_between_two_renames_comes_after_both(write: str, outputs: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "old").touch()
    work = f"""
        rename = os.replace
        def replace(*names):
            rename(*names)
            if not replace.count:
                os.kill(os.getppid(), signal.SIGTERM)  # the supervisor learns of it now
                log.info("half")
            replace.count += 1
        replace.count = 0
        os.replace = replace
        {write}
        log.info("both")
        time.sleep(60)
        """
    with command(tmp_path, work) as process:
        code, _, said = end(process)
    assert code == 143 and said[-1]["message"] == f"terminated by SIGTERM; already written: {', '.join(outputs)}", said
    assert all((tmp_path / name).read_bytes() == b"new" for name in outputs)
    assert (tmp_path / "old").exists() == ("old" not in write)
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_signal_when_all_is_done(tmp_path: Path) -> None:
    """The command is ending: it ends as it would have."""
    work = """
        leave = channel.ask
        channel.ask = lambda *a, **k: (leave(*a, **k), os.kill(os.getppid(), signal.SIGTERM))
        print("result")
        return 3
        """
    with command(tmp_path, work) as process:
        assert end(process) == (3, "result\n", [])


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """`nohup`."""
    with command(tmp_path, "os.kill(os.getppid(), signal.SIGHUP); os.kill(os.getpid(), signal.SIGHUP); print('done')",
                 preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        assert end(process) == (0, "done\n", [])


# ---- crashes ---------------------------------------------------------------------------------------------------------

CRASH = """
    import ctypes
    with guard.guarded("loading m.pt") if {untrusted} else channel._signals_later():
        log.stage("load")
        os.write(2, b"a library says a lot\\n")
        {crash}
    """


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE"])
@pytest.mark.parametrize("untrusted", [True, False])
def test_a_crash_is_one_line(name: str, untrusted: bool, tmp_path: Path) -> None:
    crash = "os.abort()" if name == "SIGABRT" else f"signal.raise_signal(signal.{name})"
    with command(tmp_path, CRASH.format(untrusted=untrusted, crash=crash)) as process:
        code, out, said = end(process)
    assert (code, out, len(said)) == (2 if untrusted else 1, "", 1)
    assert f"crashed ({name}) in the stage load; nothing was written" in said[0]["message"]
    assert said[0]["message"].startswith("error: loading m.pt: " if untrusted else "internal error: ")
    assert names(tmp_path) == []


def test_killed_for_memory(tmp_path: Path) -> None:
    with command(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)") as process:
        code, _, said = end(process)
    assert (
        code == 2
        and "the process was killed (SIGKILL) in the stage work, most likely because the memory ran out"
        in said[0]["message"]
    )


def test_a_crash_when_all_is_done(tmp_path: Path) -> None:
    """Libraries are torn down at exit; the result stands."""
    with command(tmp_path, "import atexit; atexit.register(os.abort); print('result')") as process:
        assert end(process) == (0, "result\n", [])


def test_a_deadline(tmp_path: Path) -> None:
    work = """
        with guard.guarded("loading m.pt"):
            log.stage("load")
            while True:
                try:
                    time.sleep(60)
                except BaseException:
                    pass
        """
    with command(tmp_path, work, "--load-timeout", "0.2") as process:
        code, _, said = end(process)
    assert code == 2 and said[0]["message"].startswith(
        "error: loading m.pt: it did not end within 0.2 s, in the stage load; nothing was written"
    )
    with command(
        tmp_path, "with guard.guarded('loading m.pt'): pass\ntime.sleep(3.5); print('slow')", "--load-timeout", "2"
    ) as process:
        assert end(process)[:2] == (0, "slow\n"), "what follows may take its time"


def test_a_file_that_ends_the_process_is_at_fault(tmp_path: Path) -> None:
    """`os._exit` is announced to nobody; an exit code of 0 would mean that the outputs are there."""
    with command(tmp_path, "with guard.guarded('loading m.pt'): os._exit(0)") as process:
        code, _, said = end(process)
    assert (
        code == 2 and "loading m.pt: the process ended by itself (exit code 0) in the stage work" in said[-1]["message"]
    )


def test_exit_codes_and_streams_pass(tmp_path: Path) -> None:
    for code in (0, 3, 141):
        with command(
            tmp_path, f"print(sys.stdin.read()); print('error', file=sys.stderr); return {code}", stdin=subprocess.PIPE
        ) as process:
            out, error = process.communicate("input")
        assert (process.returncode, out) == (code, "input\n") and "error\n" in error
    with command(tmp_path, "raise OSError('odd')") as process:
        code, _, said = end(process)
    assert code == 1 and said[0]["message"].startswith("internal error: OSError: odd")
    with command(tmp_path, "sys.exit(7)") as process:
        assert end(process)[0] == 7


# ---- the supervisor --------------------------------------------------------------------------------------------------


def test_without_its_supervisor_nothing_is_written(tmp_path: Path) -> None:
    """Outright: the kernel takes the child along; where it does not, nobody gives leave."""
    work = """
        if "--debug" in sys.argv:
            import ctypes
            ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # not on this kernel
        supervisor = os.getppid()
        os.kill(supervisor, signal.SIGKILL)
        while os.getppid() == supervisor:
            time.sleep(0.01)
        files.write_together({"m.onnx": b"x"})
        """
    for options in ([], ["--debug"]):
        with command(tmp_path, work, *options) as process:
            assert process.stdout is not None
            process.wait()
            assert select.select([process.stdout], [], [])[0] and not process.stdout.read(), (
                "both processes have ended"
            )
        assert process.returncode == -signal.SIGKILL and not (tmp_path / "m.onnx").exists()


def test_job_control(tmp_path: Path) -> None:
    """Stopped and continued as one job."""
    with command(
        tmp_path, "log.info('on'); sys.stdin.readline(); print('done')", stdin=subprocess.PIPE, start_new_session=True
    ) as process:
        event(process.stderr, "info")
        os.killpg(process.pid, signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        os.killpg(process.pid, signal.SIGCONT)
        assert process.communicate("\n")[0] == "done\n" and process.returncode == 0


def test_only_temporary_names_are_removed(tmp_path: Path) -> None:
    """A child that is not itself any more may announce what it likes."""
    from repquant_fx.security.supervisor import _remove

    for name in ("mine", ".ssh", ".m.onnx.0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        _remove(tmp_path / name)
    os.symlink("mine", tmp_path / ".link.0123abcd")
    _remove(tmp_path / ".link.0123abcd")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".link.0123abcd", ".ssh", "mine"]


# ---- results that cannot be given ------------------------------------------------------------------------------------


def test_a_result_that_cannot_be_printed_says_what_was_written(tmp_path: Path) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full, \
            command(tmp_path, "files.write_atomically('m.onnx', b'x'); print('{}')", stdout=full) as process:
        code, _, said = end(process)
    assert code == 2 and "No space left on device; already written: m.onnx" in said[0]["message"]
    assert (tmp_path / "m.onnx").exists()


def test_a_temporary_folder_that_is_gone(tmp_path: Path) -> None:
    """The command needs none, so it runs."""
    with command(tmp_path, "print('done')", temporary="/nowhere") as process:
        assert end(process)[0] == 0


LATER = """
    import socket, subprocess
    class Late:
        def __del__(self):
            for attempt in (lambda: subprocess.run(["touch", "ran"]), socket.socket):
                try:
                    attempt()
                    log.info("done")
                except Exception as error:
                    log.info(str(error))
    with guard.guarded("loading m.pt"):
        late = Late()
    del late
    Path("out").mkdir()
    """


@pytest.mark.parametrize(
    "argv, words", [([], ["subprocess.Popen", "use the network"]), (["--allow-pickle"], ["done", "done"])]
)
def test_programs_and_the_network_stay_refused(argv: list[str], words: list[str], tmp_path: Path) -> None:
    """Even to what no guard sees coming, unless the user's own code runs."""
    with command(tmp_path, LATER, *argv) as process:
        code, _, said = end(process)
    assert code == 0 and len(said) == 2 and all(word in e["message"] for word, e in zip(words, said)), said
    assert ("ran" in names(tmp_path)) == bool(argv) and "out" in names(tmp_path)

"""What the kernel refuses to a command's process, whatever Python or C tries."""

from __future__ import annotations

import argparse
import re
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
from test_supervisor import command, end

from repquant_fx.security import channel, confinement

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")

TRY = """
    import ctypes, socket, subprocess
    libc = ctypes.CDLL(None, use_errno=True)
    def fails(attempt):
        try:
            return attempt() and 0
        except OSError as error:
            return type(error).__name__
    out = dict(
        inside=fails(lambda: Path("out/a").write_text("x")),
        outside=fails(lambda: Path("outside").write_text("x")),
        change=fails(lambda: Path("m.pt").write_text("x")),
        remove=fails(lambda: Path("m.pt").unlink()),
        temporary=fails(lambda: __import__("tempfile").TemporaryFile().close()),
        null=fails(lambda: open(os.devnull, "w").close()),
        read=fails(lambda: Path("m.pt").read_text()),
        process=fails(lambda: subprocess.run(["touch", "out/ran"])),
        in_c=libc.system(b"touch out/ran2") == 0,
        socket=fails(lambda: socket.socket().close()),
        kill=fails(lambda: os.kill(os.getppid(), 0)),
        own=fails(lambda: os.kill(os.getpid(), 0)),
    )
    print(out)
    """


def tried(folder: Path, *argv: str, report: str = "out/report") -> dict[str, Any]:
    (folder / "out").mkdir(exist_ok=True)
    (folder / "m.pt").write_text("model")
    with command(folder, TRY, "--report", report, *argv, confined=True) as process:
        code, out, said = end(process)
    assert code == 0, said
    return dict(eval(out))  # what this test printed itself


def test_landlock(tmp_path: Path) -> None:
    pytest.importorskip("landlock")
    found = tried(tmp_path)
    if not found["outside"]:
        pytest.skip("this kernel has no Landlock")
    assert {name: found[name] for name in ("outside", "change", "remove", "process")} == dict.fromkeys(
        ("outside", "change", "remove", "process"), "PermissionError")
    assert not any(found[name] for name in ("inside", "temporary", "null", "read", "own", "in_c"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a"]


def test_seccomp(tmp_path: Path) -> None:
    pytest.importorskip("pyseccomp")
    found = tried(tmp_path)
    assert all(found[name] == "PermissionError" for name in ("socket", "kill", "process")) and not found["own"]


@pytest.mark.parametrize(
    "argv",
    [["--allow-pickle"], ["--calib", "mine:batches"], ["--arch", "timm:vit,pretrained"], ["--tokenizer", "hf:a/b"]],
)
def test_what_is_not_confined(argv: list[str], tmp_path: Path) -> None:
    """The user's own code, and the hub."""
    found = tried(tmp_path, *argv)
    assert not any(found[name] for name in ("outside", "process", "socket", "kill"))


def options(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"model": "m.pt", "allow_pickle": False, **given})


def test_folders_that_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").mkdir()
    found = confinement._writable(
        options(out=Path("m.onnx"), report=Path("reports/r.json"), html=None, work_dir=tmp_path / "a" / "b" / "c")
    )
    assert set(found[1:]) == {tmp_path, tmp_path / "reports"}
    assert len(confinement._writable(options(out=Path("a\0b")))) >= 1


def test_not_as_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody who imports this package is confined by it."""
    assert not channel.supervised() and confinement.confine(options()) == []


OVER = """
    import torch
    from repquant_fx import limits
    from repquant_fx.errors import ModelFileError
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits.memory, confinement.SLACK = lambda: 1 << 30, used
    with guard.guarded("loading m.pt"):
        try:
            torch.zeros(1 << 31)
        except RuntimeError as error:
            if "--report" in sys.argv:
                raise ModelFileError("m.pt holds a module that is not whole") from error
            raise
    """.replace("import torch", "import torch; from repquant_fx.security import confinement", 1)


@pytest.mark.parametrize("argv", [[], ["--report", "r.json"]], ids=["of torch", "as a reader of files explains it"])
def test_running_out_of_address_space_names_the_limit(argv: list[str], tmp_path: Path) -> None:
    with command(tmp_path, OVER, *argv) as process:
        code, out, said = end(process)
    assert (code, out, len(said)) == (2, "", 1), said
    assert "error: not enough memory" in said[0]["message"]
    assert re.search(r"the address space of the process is limited to \d+\.\d GB", said[0]["message"])


@pytest.mark.parametrize("device, bounded", [("cpu", True), ("cpu:0", True), ("cuda", False), ("cuda:1", False)])
def test_a_gpu_gets_all_addresses(device: str, bounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA reserves addresses for the memory of all devices and of the machine when it starts."""
    set_limits: list[Any] = []
    monkeypatch.setattr(channel, "supervised", lambda: True)
    monkeypatch.setattr(confinement, "_seccomp", lambda: None)
    monkeypatch.setattr(confinement, "_landlock", lambda folders: None)
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: set_limits.append(limit))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    monkeypatch.setattr(confinement, "lasting", False)
    monkeypatch.setattr(confinement, "_boundable", False)
    assert confinement.confine(options(device=device)) == []
    confinement.bound_memory()
    assert bool(set_limits) == bounded == confinement.lasting

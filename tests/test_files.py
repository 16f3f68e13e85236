"""Files are complete or not there."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from repquant_fx import files
from repquant_fx.errors import InputError, OutputError
from repquant_fx.files import check_writable, write_atomically


def test_write_then_read(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_atomically(path, b"one")
    assert path.read_bytes() == b"one"
    write_atomically(str(path), b"")
    assert path.read_bytes() == b""
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    """A file that others cannot read would surprise."""
    path = tmp_path / "a"
    before = os.umask(0o027)
    try:
        write_atomically(path, b"x")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert os.umask(0o027) == 0o027, "the umask is as it was"
    finally:
        os.umask(before)


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failure_leaves_the_old_file_and_no_other(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(OutputError, match=r"cannot write .*a: No space left on device"):
        write_atomically(path, b"new and longer")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", b"data")
    assert not list(tmp_path.iterdir())


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "a", []
    path.write_bytes(b"old")
    fsync = os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda handle: (seen.append(path.read_bytes()), fsync(handle)))
    write_atomically(path, b"new")
    assert seen == [b"old"] and path.read_bytes() == b"new"


def missing_folder(root: Path) -> Path:
    return root / "no" / "m.onnx"


def a_folder(root: Path) -> Path:
    return root


def below_a_file(root: Path) -> Path:
    (root / "file").write_text("x")
    return root / "file" / "m.onnx"


@pytest.mark.parametrize(
    "make, words", [(missing_folder, "does not exist"), (a_folder, "it is a folder"), (below_a_file, "cannot write")]
)
@pytest.mark.parametrize("force", [False, True])
def test_unwritable(make, words: str, force: bool, tmp_path: Path) -> None:
    path = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match=words) as caught:
        check_writable(path, force)
    assert str(path) in str(caught.value) and isinstance(caught.value, InputError) and caught.value.exit_code == 2
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(OutputError, match="cannot write"):
        write_atomically(path, b"x")
    assert sorted(tmp_path.iterdir()) == before


def test_existing_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    assert check_writable(str(path), False) == path
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="--force"):
        check_writable(path, False)
    assert check_writable(path, True) == path and path.read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_relative_name_is_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_atomically(check_writable("m.onnx", False), b"x")
    assert (tmp_path / "m.onnx").read_bytes() == b"x"


def test_a_folder_that_refuses_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read-only mounts and full disks, which permissions do not show."""
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match="Read-only file system"):
        check_writable(tmp_path / "m.onnx", True)
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="no permission"):
        check_writable(tmp_path / "m.onnx", True)


def test_a_full_disk_of_temporary_files_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that could not write its file complains of what it reads afterwards. A limit on sizes stands for a full
    disk.
    """
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OutputError, match="the disk of temporary files is full") as caught, files.scratch():
            raise ValueError("Error parsing message with type 'onnx.ModelProto'")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(ValueError, match="another"), files.scratch() as folder:
        raise ValueError("another")
    assert not folder.exists() and not list(tmp_path.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(OutputError, match=r"cannot make a temporary folder.*TMPDIR"), files.scratch():
        pass

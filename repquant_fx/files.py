"""Files that are either complete or not there; and files that end."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from repquant_fx.errors import OutputError
from repquant_fx.security import channel

Content = bytes | Iterable[bytes | bytearray | memoryview]  # of a file; parts are written one after the other
MODEL = "model.onnx"  # within a directory; the name that optimum looks for
ENCODER, DECODER = "encoder_model.onnx", "decoder_model.onnx"  # of an encoder-decoder; as optimum calls them
_PROBE = 1 << 20  # bytes; a disk that has no room for so many is full
_LONGEST_PREFIX = 200  # bytes, of the name of a temporary file


def irregular(path: Path) -> str | None:
    """What a path is, where reading it may not end (a device, a pipe); None for a file, a directory, or nothing."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # whoever opens it says why
        return None
    return (
        None
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode)
        else "a pipe"
        if stat.S_ISFIFO(mode)
        else "a device or a socket"
    )


def check_writable(path: str | Path, force: bool) -> Path:
    """Refuse early what would fail late.

    Raises:
        OutputError: the folder is missing or cannot be written, the path is a folder, or the file exists and `force` is
            not set.
    """
    path = _possible(path)
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; give a file name")
    if irregular(path):
        raise OutputError(f"cannot write {path}: it is {irregular(path)}; give a file name")
    if path.exists() and not force:
        raise OutputError(f"{path} exists; pass --force to replace it")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}: no permission to write in {path.parent}")
    try:  # permissions alone do not tell: read-only mounts, full disks, odd file systems
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def check_folder(path: str | Path) -> Path:
    """Refuse early a folder that cannot be written, or made.

    Raises:
        OutputError: the path is a file, or the folder (its first existing parent, where it is yet to be made) cannot be
            written.
    """
    path = _possible(path)
    existing = next((p for p in [path, *path.absolute().parents] if p.exists()), path)
    if not existing.is_dir():
        raise OutputError(f"cannot use {path}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"cannot use {path}: no permission to write in {existing}")
    return path


def _possible(path: str | Path) -> Path:
    """A path that a file can have: no loop of links, not too long, without null bytes."""
    path = Path(path)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {str(path)[:200]!r}: {getattr(error, 'strerror', None) or error}") from error
    return path


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write one file, see `write_together`."""
    write_together({path: data})


def write_together(
    files: Mapping[str | Path, Content] | Mapping[Path, Content], superseded: Iterable[Path] = ()
) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, never a part. None is renamed before all
    are written; they are renamed in order.

    Args:
        superseded: files to remove once all are in place.

    A signal comes before the first is renamed or after the last. A process that is killed outright may leave the hidden
    file `.NAME.xxxxxxxx` behind, never a part under the name itself.

    Raises:
        OutputError: the disk is full, or a path cannot be written.
    """
    _replace({Path(path): data for path, data in files.items()}, channel.committing, superseded)


def write_part(path: Path, data: Content) -> None:
    """Write one file that is no output but a part of the work, complete or not at all.

    Raises:
        OutputError: the disk is full, or the path cannot be written.
    """
    _replace({path: data}, lambda _: nullcontext())


def _replace(files: Mapping[Path, Content], committing: Callable[[Sequence[Path]], AbstractContextManager[None]],
             superseded: Iterable[Path] = ()) -> None:
    path = Path()
    written: list[tuple[Path, Path]] = []
    try:
        for path, data in files.items():
            temporary = _beside(path)
            written.append((temporary, path))
            _write(temporary, data)
        with committing(list(files)):
            for temporary, path in written:
                os.replace(temporary, path)
            _discard(superseded)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        _discard(temporary for temporary, _ in written)


def _write(path: Path, data: Content) -> None:
    with open(path, "xb") as file:
        for part in (data,) if isinstance(data, bytes) else data:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _beside(path: Path) -> Path:
    """A name for what becomes `path`; the supervisor removes it if this process is killed."""
    temporary = path.parent / f".{os.fsdecode(os.fsencode(path.name)[:_LONGEST_PREFIX])}.{secrets.token_hex(4)}"
    channel.tell("temporary", path=str(temporary.absolute()))
    return temporary


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder for the block.

    Raises:
        OutputError: it cannot be made; or the block failed, whatever it says of it, and the disk of temporary files is
            full.
    """
    try:
        folder = tempfile.mkdtemp()
    except OSError as error:
        raise OutputError(
            f"cannot make a temporary folder: {error.strerror or error}; set TMPDIR to a folder that can be written"
        ) from error
    try:
        yield Path(folder)
    except Exception as error:
        if _is_full(Path(folder)):
            raise OutputError(
                f"the disk of temporary files is full ({tempfile.gettempdir()}); free space there or set TMPDIR"
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_full(folder: Path) -> bool:
    try:
        _write(folder / "probe", bytes(_PROBE))
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return False


def is_directory(path: str | Path) -> bool:
    """Whether an output path names a directory: everything does that does not end in `.onnx`."""
    return Path(path).suffix.lower() != ".onnx"


def check_directory(path: str | Path, names: Iterable[str], force: bool) -> Path:
    """Refuse early a directory that cannot be written, or that holds one of `names` while `force` is not set. Others in
    it do no harm.

    Raises:
        OutputError: the path is a file, its folder is missing or cannot be written, or a file exists.
    """
    path = _possible(path)
    if not path.is_dir():
        if path.exists():
            raise OutputError(
                f"cannot write {path}: it is a file; a name that does not end in .onnx stands for a directory"
            )
        return check_writable(path, force)
    for name in names:
        check_writable(path / name, force)
    return path


def write_directory(
    path: str | Path, files: Mapping[str, Content], beside: Mapping[Path, Content] | None = None,
    superseded: Iterable[Path] = (),
) -> None:
    """Write files into a directory, and others beside it: all of them or none. A directory that exists keeps its other
    files, but those that are `superseded`.

    Everything is written under other names first, so a full disk changes nothing. A new directory then appears as a
    whole; in an old one the files are replaced one after the other, the last of `files` last.

    Raises:
        OutputError: the disk is full, or a path cannot be written.
    """
    path, others = Path(path), beside or {}
    staging = _beside(path)
    written = [(_beside(other), other) for other in others]
    problem = path
    try:
        staging.mkdir()
        for name, data in files.items():
            _write(staging / name, data)
        for temporary, problem in written:
            _write(temporary, others[problem])
        with channel.committing([*(path / name for name in files), *others]):
            for temporary, problem in written:
                os.replace(temporary, problem)
            problem = path
            if not path.exists():
                os.rename(staging, path)
                return
            for name in files:
                os.replace(staging / name, path / name)
            _discard(superseded)
    except OSError as error:
        raise OutputError(f"cannot write {problem}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _discard(temporary for temporary, _ in written)


def _discard(temporaries: Iterable[Path]) -> None:
    for temporary in temporaries:
        with suppress(OSError):
            temporary.unlink()

"""What the kernel enforces on the working process of the command line: the net below the guard, for what runs in C.

| what | by | where |
|---|---|---|
| no dump of memory after a crash | RLIMIT_CORE | everywhere, see `supervisor` |
| no more address space than memory and 16 GiB | RLIMIT_AS | without `--allow-pickle`, `--offload-dir`, a GPU |
| writing to the folders of the outputs and a temporary one only, no program | Landlock | `landlock` is installed |
| no program, no socket, no tracing, no signal to others | seccomp | `pyseccomp` is installed |

The packages come with `pip install "repquant-fx[sandbox]"`, for Linux; pyseccomp needs the system's libseccomp. Not
confined are commands in which the user's own code runs (`--allow-pickle`, `--calib module:callable`, `lm-eval`), that
need the network (the hub, torchrun) or a GPU, whose driver writes and connects where it likes, and reserves addresses
for all the memory that it may ever map. Reading is never restricted.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from repquant_fx import log
from repquant_fx.security import channel

SLACK = 16 << 30  # bytes of address space beside what is used: libraries, stacks, arenas of the allocator
_DENIED = (
    "execve",
    "execveat",
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "socket",
    "io_uring_setup",
    "pidfd_open",
    "pidfd_getfd",
    "mount",
    "umount2",
    "pivot_root",
    "chroot",
    "unshare",
    "setns",
    "bpf",
    "perf_event_open",
    "userfaultfd",
    "keyctl",
    "add_key",
    "request_key",
    "init_module",
    "finit_module",
    "delete_module",
    "kexec_load",
    "reboot",
    "swapon",
    "swapoff",
    "settimeofday",
    "clock_settime",
    "sethostname",
    "setdomainname",
    "open_by_handle_at",
)
_HUB, _PRETRAINED = "hf:", ",pretrained"

_boundable = False
lasting = False  # whether the guard goes on refusing programs and the network when a file is loaded


def confine(options: argparse.Namespace) -> list[str]:
    """Confine this process as far as the command allows. Before any thread runs: what is set holds for this thread and
    later ones.

    Returns:
        what is in force, in words; empty where nothing is.
    """
    global _boundable, lasting
    if not channel.supervised() or not hasattr(options, "model"):
        return []
    gpu = getattr(options, "device", "cpu").partition(":")[0] != "cpu"
    mapped = getattr(options, "offload_dir", None) is not None
    lasting = not (gpu or _free(options))
    if sys.platform != "linux":
        return []
    _boundable = not (options.allow_pickle or gpu or mapped)
    if not lasting:
        return []
    # seccomp first: its package finds the system's library by asking a program, which Landlock refuses
    return [text for text in (_seccomp(), _landlock(_writable(options))) if text]


def _free(options: argparse.Namespace) -> bool:
    """Whether the user's own code runs, or the network is needed."""
    values = [value for name, value in vars(options).items() if isinstance(value, str) and name != "prompt"]
    hub = any(value.startswith(_HUB) and not os.path.isdir(value.removeprefix(_HUB)) for value in values)
    calibration = getattr(options, "calib", None) or ""
    callable_given = ":" in calibration and not os.path.exists(calibration)
    tasks = getattr(options, "tasks", None) is not None  # of lm_eval: libraries that keep caches, code of the user
    return bool(options.allow_pickle or tasks or callable_given or hub or any(_PRETRAINED in value for value in values)
                or "WORLD_SIZE" in os.environ)


def _writable(options: argparse.Namespace) -> list[Path]:
    """Folders that the command writes to: those of its outputs; of a folder that is yet to be made the first one that
    exists.
    """
    wanted = [Path(tempfile.gettempdir())]
    for name in ("out", "report", "html", "work_dir", "offload_dir"):
        path = getattr(options, name, None)
        if path is not None:
            wanted += (
                [path.absolute(), path.absolute().parent] if name in ("out", "report", "html") else [path.absolute()]
            )
    found = []
    for path in wanted:
        try:
            found.append(next(p for p in (path, *path.parents) if p.is_dir()))
        except (OSError, ValueError):  # a path that no file has; the command says so
            continue
    return found


def _landlock(folders: Iterable[Path]) -> str | None:
    try:
        from landlock import FSAccess, Ruleset, landlock_abi_version
    except ImportError:
        return None
    try:
        version = landlock_abi_version()
        reading = FSAccess.READ_FILE | FSAccess.READ_DIR | (FSAccess.IOCTL_DEV if version >= 5 else FSAccess(0))
        writing = FSAccess.all() & ~reading  # with EXECUTE, which nothing allows
        rules = Ruleset(writing)
        for folder in dict.fromkeys(folders):
            rules.allow(folder, rules=writing & ~FSAccess.EXECUTE)
        rules.allow(os.devnull, rules=writing & FSAccess.all_file() & ~FSAccess.EXECUTE)
        rules.apply()
    except Exception:  # a kernel without it
        return None
    return f"Landlock ABI {version}"


def _seccomp() -> str | None:
    try:
        import pyseccomp
    except (ImportError, OSError, RuntimeError):  # the last ones: the system has no libseccomp
        return None
    try:
        rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
        refuse = pyseccomp.ERRNO(errno.EPERM)
        for name in _DENIED:
            try:
                rules.add_rule(refuse, name)
            except (OSError, ValueError):  # this processor has no such call
                continue
        for name in ("kill", "tgkill"):
            rules.add_rule(refuse, name, pyseccomp.Arg(0, pyseccomp.NE, os.getpid()))
        rules.add_rule(refuse, "tkill")
        rules.load()
    except Exception:  # a kernel without it
        return None
    return "seccomp"


def address_space() -> int | None:
    """Bytes of address space that this process may have; None where nothing limits it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def bound_memory() -> None:
    """Limit the address space of a process that `confine` has judged, once, unless it is limited already."""
    global _boundable
    if not _boundable:
        return
    _boundable = False
    import resource

    from repquant_fx import limits

    most = limits.memory() + SLACK
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY and (hard == resource.RLIM_INFINITY or hard >= most):
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        log.detail(f"at most {limits.readable(most)} of address space")

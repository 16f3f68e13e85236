"""What this machine's processor does with products of uint8 and int8.

x86 processors with AVX2 but without VNNI multiply them by `vpmaddubsw`, which adds two products in 16 bits that
saturate (see `quantizers.saturation`); VNNI and AMX add them in 32 bits. Others have other instructions.
"""

from __future__ import annotations

import functools
import importlib
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_X86 = ("x86_64", "amd64", "i386", "i686")
_EXACT = {"avx512_vnni", "avx_vnni", "amx_int8", "avx512vnni"}  # the last one is numpy's word


@functools.cache
def flags() -> frozenset[str]:
    """Names of the instruction sets, in lower case: those that Linux lists; elsewhere those that numpy found, which
    knows no AVX-VNNI. Empty where neither tells."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    if not found:
        try:
            features = importlib.import_module("numpy._core._multiarray_umath").__cpu_features__
        except (ImportError, AttributeError):
            features = {}
        found = [name for name, present in features.items() if present]
    return frozenset(name.lower() for name in found)


def saturates() -> bool:
    """Whether sums of products of uint8 and int8 saturate here."""
    return platform.machine().lower() in _X86 and "avx2" in flags() and not flags() & _EXACT

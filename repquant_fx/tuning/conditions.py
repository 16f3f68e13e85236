"""What a tuning is for: runtime, threads and batch, and what quality may be lost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from repquant_fx.errors import InputError
from repquant_fx.runtimes import PACKAGES, version
from repquant_fx.targets import DEFAULT, RUNTIMES, TIMED, find

MAX_DROP, SECONDS, TRIALS = 1.0, 2.0, 3


@dataclass(frozen=True)
class Conditions:
    """How a recipe is to run, and what it may cost; the arguments of `tune` of these names.

    Raises:
        InputError: a number out of range, a target that cannot be timed here, or its runtime is not installed.
    """

    target: str = DEFAULT
    threads: int | None = None
    batch: int | None = None
    max_drop: float = MAX_DROP
    seconds: float = SECONDS
    trials: int = TRIALS

    def __post_init__(self) -> None:
        runtime = find(self.target).runtime
        if self.target not in TIMED:
            raise InputError(f"files for the target {self.target} run elsewhere, so timing them here says nothing; one "
                             f"of {', '.join(TIMED)}")
        if version(runtime) is None:
            raise InputError(f"{RUNTIMES[runtime]} is not installed: pip install {PACKAGES[runtime]}")
        for name in ("threads", "batch", "trials"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name} is a whole number of at least 1; found {value!r}")
        if not (0 <= self.max_drop < math.inf and 0 < self.seconds < math.inf):
            raise InputError(f"max_drop is at least 0 dB and seconds are above 0; found {self.max_drop!r} and "
                             f"{self.seconds!r}")

    def __str__(self) -> str:
        """For people, as far as it decides what is fast."""
        threads = "" if self.threads is None else f", threads {self.threads}"
        return f"target {self.target}{threads}, batch {self.batch or 1}"

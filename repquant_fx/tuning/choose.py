"""Which forms to take, from what was measured of each: no clock and no model here.

A form is timed in turns with the recipe that the tuning starts from. Its speed is the median, over the turns, of the
start's time divided by its own, so that what slows a machine down for a while slows both. A gain smaller than the
distance between the quartiles of these ratios, or than 1 %, is taken for noise.

Errors of single forms are predicted to add up in power. What was chosen by that is then measured as a whole (`settle`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from repquant_fx.tuning.candidates import Form

KEPT = "kept"
LEAST_GAIN = 0.01  # less comes and goes with where memory happens to lie


@dataclass(frozen=True)
class Speed:
    """Times faster than the start: the median over turns, and the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, start: Sequence[float], form: Sequence[float]) -> Speed:
        """Of the seconds of both, turn by turn; two turns at least."""
        ratios = [a / b for a, b in zip(start, form, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(median, low, high)

    @property
    def gains(self) -> bool:
        """Whether it is faster by more than noise."""
        return self.median - 1 > max(self.high - self.low, LEAST_GAIN)

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}-{self.high:.2f}]"


@dataclass(frozen=True)
class Trial:
    """A form that was compiled alone, quickly, and measured; `problem` says why it could not be, and then its figures
    mean nothing.

    Attributes:
        sqnr_db: of the output on held-back samples; infinite where there is no error.
        file_bytes: of the file.
    """

    form: Form
    speed: Speed
    sqnr_db: float
    file_bytes: int
    problem: str = ""

    @classmethod
    def failed(cls, form: Form, problem: str) -> Trial:
        """One without figures."""
        return cls(form, Speed(1.0, 1.0, 1.0), -math.inf, 0, problem)

    @property
    def summary(self) -> str:
        """For people."""
        if self.problem:
            return f"{self.form.name}: {self.problem}"
        return f"{self.form.name}: {self.speed} times faster, {self.sqnr_db:.1f} dB"

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        measured = None if self.problem else {**vars(self.speed), "sqnr_db": finite(self.sqnr_db),
                                              "file_bytes": self.file_bytes}
        return {"form": self.form.name, "measured": measured, "problem": self.problem}


@dataclass(frozen=True)
class Verdict:
    """What became of a form, and why; `kept` ones are measured together."""

    trial: Trial
    kept: bool
    why: str

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {**self.trial.to_dict(), "kept": self.kept, "why": self.why}


@dataclass(frozen=True)
class Attempt:
    """A combination of forms that was compiled with the real settings and measured beside the start; without figures
    (no bytes) where it could not be.
    """

    forms: tuple[Form, ...]
    speed: Speed
    sqnr_db: float
    file_bytes: int
    accepted: bool
    why: str

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {"forms": [form.name for form in self.forms], **vars(self.speed), "sqnr_db": finite(self.sqnr_db),
                "file_bytes": self.file_bytes, "accepted": self.accepted, "why": self.why}


def finite(value: float) -> float | None:
    """A number as JSON has it: None of an SQNR without bound."""
    return value if math.isfinite(value) else None


def lost(start: float, other: float) -> float:
    """dB of SQNR that something has less than the start, negative where it has more."""
    return 0.0 if start == other else start - other


def together(start: float, alone: Sequence[float]) -> float:
    """The SQNR predicted of several forms at once, dB: the noise that each adds to the start's adds up.

    Args:
        start: of the start.
        alone: of each form by itself.
    """
    noises = [10 ** (-each / 10) for each in (start, *alone)]
    total = noises[0] + sum(noise - noises[0] for noise in noises[1:])
    total = max(total, min(noises))  # forms that each take noise away may take away the same
    return -10 * math.log10(total) if total > 0 else math.inf


def choose(start: float, trials: Sequence[Trial], max_drop: float) -> list[Verdict]:
    """Take forms in the order of their gain, as long as the SQNR predicted of all stays within the floor.

    Args:
        start: SQNR of the start, compiled as the trials were.
        max_drop: dB that may be lost.

    Returns:
        a verdict for each trial, in their order.
    """
    taken: list[Trial] = []
    why: dict[Form, str] = {}
    for trial in sorted(trials, key=lambda each: (-each.speed.median, each.form.name)):
        why[trial.form] = reason = _against(start, trial, taken, max_drop)
        if reason == KEPT:
            taken.append(trial)
    return [Verdict(trial, trial in taken, why[trial.form]) for trial in trials]


def _against(start: float, trial: Trial, taken: Sequence[Trial], max_drop: float) -> str:
    """Why a form is not taken beside others; `KEPT` where it is."""
    if trial.problem:
        return trial.problem
    if not trial.speed.gains:
        return "slower" if trial.speed.high < 1 else "no gain beyond noise"
    if (other := next((each for each in taken if each.form.about & trial.form.about), None)) is not None:
        return f"{other.form.name} gains more"
    alone = lost(start, trial.sqnr_db)
    if alone > max_drop:
        return f"loses {alone:.2f} dB"
    whole = lost(start, together(start, [*(each.sqnr_db for each in taken), trial.sqnr_db]))
    return KEPT if whole <= max_drop else f"with what is kept it would lose {whole:.2f} dB"


Measure = Callable[[Sequence[Form]], tuple[Speed, float, int] | str]


def settle(
    start: float, verdicts: Sequence[Verdict], measure: Measure, max_drop: float, most: int
) -> list[Attempt]:
    """Measure what was chosen as a whole; while it loses too much, without the form that costs most.

    Args:
        start: SQNR of the start with the real settings.
        measure: speed, SQNR and bytes of a combination with the real settings, or why it cannot be compiled or run.
        most: combinations that are measured.

    Returns:
        those that were measured. The last one alone may be accepted; where it is not, the start it is.
    """
    kept, done = [verdict.trial for verdict in verdicts if verdict.kept], list[Attempt]()
    while kept and len(done) < most:
        forms = tuple(trial.form for trial in kept)
        measured = measure(forms)
        problem = measured if isinstance(measured, str) else ""
        speed, sqnr, size = (Speed(1.0, 1.0, 1.0), -math.inf, 0) if isinstance(measured, str) else measured
        drop = lost(start, sqnr)
        why = problem or (f"loses {drop:.2f} dB" if drop > max_drop else "" if speed.gains else "no gain beyond noise")
        done.append(Attempt(forms, speed, sqnr, size, not why, why or KEPT))
        if drop <= max_drop:
            break
        kept.remove(min(kept, key=lambda trial: (trial.sqnr_db, trial.speed.median, trial.form.name)))
    return done

"""What a tuning gives: the recipe, and everything that was measured on the way to it, as a table and as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from repquant_fx.recipe import Recipe
from repquant_fx.recipe_text import write
from repquant_fx.tuning.choose import Attempt, Verdict, finite
from repquant_fx.tuning.conditions import Conditions

_HEADER = ("form", "times faster", "SQNR dB", "MB", "")


@dataclass(frozen=True)
class Measured:
    """The start as it was compiled: SQNR of the output on held-back samples, dB, and bytes of the file."""

    sqnr_db: float
    file_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {"sqnr_db": finite(self.sqnr_db), "file_bytes": self.file_bytes}


@dataclass(frozen=True)
class TuneResult:
    """The result of `tune`.

    Attributes:
        recipe: what `compile` takes: the fastest within the floor, or the start.
        start: the recipe that the tuning began with.
        conditions: under which the models ran.
        quick: the start compiled as quickly as the forms were.
        verdicts: every form, measured alone.
        whole: the start with its own settings; None where no form was kept.
        attempts: what was kept, measured as a whole beside it.
    """

    recipe: Recipe
    start: Recipe
    conditions: Conditions
    quick: Measured
    verdicts: Sequence[Verdict]
    whole: Measured | None = None
    attempts: Sequence[Attempt] = ()

    @property
    def accepted(self) -> Attempt | None:
        """The combination that is the result; None where it is the start."""
        return next((attempt for attempt in self.attempts if attempt.accepted), None)

    @property
    def fallback(self) -> bool:
        """Whether forms were kept and did not hold up together."""
        return bool(self.attempts) and self.accepted is None

    @property
    def verdict(self) -> str:
        """A sentence on the result."""
        best = self.accepted
        if best is not None and self.whole is not None:
            return (f"{', '.join(form.name for form in best.forms)}: {best.speed} times faster than the start, "
                    f"{best.sqnr_db:.1f} dB instead of {self.whole.sqnr_db:.1f}, {best.file_bytes / 1e6:.2f} MB "
                    f"instead of {self.whole.file_bytes / 1e6:.2f}")
        if self.fallback:
            last = self.attempts[-1]
            speed = f" ({last.speed} times faster)" if last.file_bytes else ""
            return (f"fell back to the start: {', '.join(form.name for form in last.forms)} measured as a whole: "
                    f"{last.why}{speed}")
        return "the start stays: no form is faster within the floor"

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "recipe": self.recipe.to_dict(),
            **vars(self.conditions),
            "verdict": self.verdict,
            "fallback": self.fallback,
            "quick": self.quick.to_dict(),
            "forms": [verdict.to_dict() for verdict in self.verdicts],
            "start": None if self.whole is None else self.whole.to_dict(),
            "attempts": [attempt.to_dict() for attempt in self.attempts],
        }

    def table(self) -> str:
        """The start and every form, the fastest first, each compiled alone and quickly: without GPTQ, correction and
        searches of ranges, which change the SQNR and not the speed.
        """
        rows = [_HEADER, ("start", "1.00", f"{self.quick.sqnr_db:.1f}", f"{self.quick.file_bytes / 1e6:.2f}", "")]
        for verdict in sorted(self.verdicts, key=lambda each: (-each.trial.speed.median, each.trial.form.name)):
            trial = verdict.trial
            figures = ("", "", "") if trial.problem else (
                str(trial.speed), f"{trial.sqnr_db:.1f}", f"{trial.file_bytes / 1e6:.2f}")
            rows.append((trial.form.name, *figures, verdict.why if verdict.kept else f"dropped: {verdict.why}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
        return "\n".join("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(
            row[1:4], widths[1:4])), row[4]]).rstrip() for row in rows)

    def __str__(self) -> str:
        return f"{self.table()}\n{self.verdict}"

    def to_text(self, form: str = "yaml") -> str:
        """The recipe as a file, `yaml` or `toml`, with comments on where it comes from."""
        lines = [f"Chosen by `repquant-fx tune` for {self.conditions}.", *str(self).splitlines()]
        return "".join(f"# {line}".rstrip() + "\n" for line in lines) + write(self.recipe, form)

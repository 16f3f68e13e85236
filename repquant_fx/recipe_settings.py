"""What one setting of a recipe may be: said once, at its field, for the check, the schema, the comments and the command
line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from repquant_fx.errors import RecipeError

_KEY = "setting"
_NAMES = {int: "integer", float: "number", bool: "boolean"}


@dataclass(frozen=True)
class Setting:
    """The values that a setting takes.

    Attributes:
        kind: int, float, bool, str for one of `choices`, or tuple for any of them.
        choices: words, the default first where one is taken.
        low: the least number; None where it has no limit.
        high: the greatest number; None where it has no limit.
        alone: what the switch of the command line stands for without a value; None where it needs one.
        words: that stand for a number out of these limits; a number is written as the first of its words.
        numbers: all that it may be, where it is no range.
    """

    kind: type
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    alone: int | None = None
    words: tuple[tuple[str, int], ...] = ()
    numbers: tuple[int, ...] = ()

    def read(self, value: Any) -> Any:
        """The number that a word stands for; any other value as it is."""
        return dict(self.words).get(value, value) if isinstance(value, str) else value

    def written(self, value: Any) -> Any:
        """The word for a number that has one; any other value as it is."""
        return next((word for word, number in self.words if number == value), value)

    def check(self, name: str, value: Any) -> None:
        """Raises:
        RecipeError: the setting `name` does not take this value.
        """
        hint = ""
        if self.kind is str:
            fits, wanted = value in self.choices, f"one of {', '.join(self.choices)}"
            hint = nearest(value, self.choices)
        elif self.kind is tuple:
            fits = isinstance(value, (list, tuple)) and all(item in self.choices for item in value)
            wanted = f"a list of {', '.join(self.choices)}, or empty"
        elif self.kind is bool:
            fits, wanted = isinstance(value, bool), "true or false"
        else:
            numbers = int if self.kind is int else (int, float)
            fits = not isinstance(value, bool) and isinstance(value, numbers) and self._holds(value)
            what = "one" if self.numbers else "an integer" if self.kind is int else "a number"
            wanted = f"{what} {self._range()}{self._or_words()}"
        if not fits:
            raise RecipeError(f"{name} must be {wanted}; found {value!r}{hint}")

    def _holds(self, value: float) -> bool:
        if value in dict(self.words).values():
            return True
        if self.numbers:
            return value in self.numbers
        return (self.low is None or self.low <= value) and (self.high is None or value <= self.high)

    def _range(self) -> str:
        if self.numbers:
            return f"of {', '.join(map(str, self.numbers))}"
        return f"of at least {self.low:g}" if self.high is None else f"from {self.low:g} to {self.high:g}"

    def _or_words(self) -> str:
        return f", or {self.words[0][0]}" if self.words else ""

    def allowed(self) -> str:
        """A sentence for people; empty where true and false are all there is."""
        if self.choices:
            return f"{'One' if self.kind is str else 'Any'} of: {', '.join(self.choices)}."
        if self.numbers:
            return f"One {self._range()}."
        text = "" if self.kind is bool else self._range().removeprefix("of ") + self._or_words()
        return f"{text[0].upper()}{text[1:]}." if text else ""

    def schema(self) -> dict[str, Any]:
        """The same in the words of JSON schema."""
        if self.kind is str:
            return {"enum": list(self.choices)}
        if self.kind is tuple:
            return {"type": "array", "items": {"enum": list(self.choices)}}
        bounds = {"minimum": self.low, "maximum": self.high}
        if self.numbers:
            return {"enum": list(self.numbers)}
        number = {"type": _NAMES[self.kind], **{key: value for key, value in bounds.items() if value is not None}}
        return {"anyOf": [number, {"enum": [each for pair in self.words for each in pair]}]} if self.words else number


def setting(default: Any, kind: type | None = None, **limits: Any) -> Any:
    """A field of a recipe; `limits` are those of `Setting`, its kind is that of the default unless given."""
    return field(default=default, metadata={_KEY: Setting(kind or type(default), **limits)})


FLOAT = 32  # bits of what stays in float32


def bits(default: int | None = None, words: tuple[tuple[str, int], ...] = ()) -> Any:
    """A field for a number of bits."""
    return setting(default, int, low=2, high=8, words=words)


def bits_or_none(default: int | None = None) -> Any:
    """A field for a number of bits, or `none` for what stays in float."""
    return bits(default, words=(("none", FLOAT), ("float", FLOAT)))


def settings_of(cls: Any) -> dict[str, Setting]:
    """The settings of a dataclass by name; what is no `setting`, such as the rules themselves, is left out."""
    return {f.name: f.metadata[_KEY] for f in fields(cls) if _KEY in f.metadata}


def nearest(value: Any, names: Iterable[Any]) -> str:
    """`; did you mean 'x'?`, where one of the known words is near; else nothing."""
    by_case = {str(name).lower(): name for name in names}
    close = difflib.get_close_matches(str(value).lower(), list(by_case), n=1, cutoff=0.5)
    return f"; did you mean {by_case[close[0]]!r}?" if close else ""

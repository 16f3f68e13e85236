"""JSON from a file, read into typed data: whatever does not fit is a `Misfit` that names its field.

    >>> @dataclass(frozen=True)
    ... class Site:
    ...     name: str
    ...     bits: Annotated[int, Within(2, 8)]
    >>> read(tuple[Site, ...], parse('[{"name": "fc/input", "bits": 4}]'), "sites")
    (Site(name='fc/input', bits=4),)
"""

from __future__ import annotations

import json
import math
import types
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
DEEPEST = 32  # levels of a document; ours have seven
LONGEST = 1 << 28  # characters of a document; ours take 400 a layer, with statistics some 10 kB
_WORDS = {str: "text", int: "an integer", float: "a finite number", bool: "true or false", type(None): "null"}


class Misfit(ValueError):
    """A document is no JSON, or a field has another type or range than it should; the message names the field."""


@dataclass(frozen=True)
class Within:
    """The range of an annotated number, both ends included."""

    low: float
    high: float


def parse(text: str) -> Any:
    """Plain data out of JSON text.

    Raises:
        Misfit: not JSON, too long, nested deeper than `DEEPEST`, or with a number that is not finite.
    """
    if len(text) > LONGEST:
        raise Misfit(f"it is longer than {LONGEST} characters")
    try:
        data = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except Misfit:
        raise
    except RecursionError as error:
        raise Misfit(f"it is nested deeper than {DEEPEST} levels") from error
    except ValueError as error:
        raise Misfit(f"it is not JSON: {error}") from error
    level = [data]
    for _ in range(DEEPEST):
        level = [inner for value in level if isinstance(value, (dict, list))
                 for inner in (value.values() if isinstance(value, dict) else value)]
        if not level:
            return data
    raise Misfit(f"it is nested deeper than {DEEPEST} levels")


def read(kind: type[T], value: Any, where: str = "") -> T:
    """`value` as `kind`: a type of JSON, `Any`, a union, `Annotated` with `Within`, `list[X]`, `tuple[X, ...]`,
    `dict[str, X]`, or a dataclass of these, whose fields are the keys of an object; other keys are ignored.

    Args:
        where: the name of the field, for the message.

    Raises:
        Misfit: it is none.
    """
    return cast(T, _read(kind, value, where))


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        kind = next((each for each in arguments if _takes(each, value)), None)
        if kind is None:
            raise _misfit(where, " or ".join(map(_describe, arguments)), value)
        return _read(kind, value, where)
    if not _takes(kind, value):
        raise _misfit(where, _describe(kind), value)
    if origin is Annotated:
        limits = arguments[1]
        if not limits.low <= value <= limits.high:
            raise _misfit(where, f"{_describe(kind)} from {limits.low} to {limits.high}", value)
    if origin in (list, tuple):
        return origin(_read(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        return {key: _read(arguments[1], item, _inner(where, key)) for key, item in value.items()}
    return _record(kind, value, where) if is_dataclass(kind) else value


def _takes(kind: Any, value: Any) -> bool:
    """Whether a value is of this kind, whatever is in it."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _takes(get_args(kind)[0], value)
    if kind is Any:
        return True
    if origin in (list, tuple):
        return isinstance(value, list)
    if origin is dict or is_dataclass(kind):
        return isinstance(value, dict)
    if kind is float:  # an integer may be larger than any float
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e308
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _record(kind: Any, value: dict[str, Any], where: str) -> Any:
    found = {}
    for name, annotation, required in _members(kind):
        if name in value:
            found[name] = _read(annotation, value[name], _inner(where, name))
        elif required:
            raise Misfit(f"{_inner(where, name)} is missing")
    return kind(**found)


@cache
def _members(kind: Any) -> list[tuple[str, Any, bool]]:
    """Name, annotation and whether it is required, of each field."""
    hints = get_type_hints(kind, include_extras=True)
    return [(f.name, hints[f.name], f.default is MISSING and f.default_factory is MISSING) for f in fields(kind)]


def _inner(where: str, name: str) -> str:
    return f"{where}.{name[:80]}" if where else name[:80]


def _describe(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Annotated:
        return _describe(get_args(kind)[0])
    return _WORDS.get(kind) or ("a list" if origin in (list, tuple) else "a JSON object")


def _misfit(where: str, wanted: str, value: Any) -> Misfit:
    found = {dict: "a JSON object", list: "a list", type(None): "null"}.get(type(value))
    if found is None:
        found = "a huge number" if isinstance(value, int) and value.bit_length() > 64 else repr(value)[:60]
    return Misfit(f"{where or 'it'} must be {wanted}; found {found}")


def _refuse_constant(name: str) -> None:
    raise Misfit(f"it holds the number {name}, which is not JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise Misfit(f"it holds the number {digits[:20]}, which is too large")
    return number



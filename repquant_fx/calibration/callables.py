"""Calibration data from the user's code: `module:callable` is imported and called, and what it raises is named."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from repquant_fx.errors import CalibrationError


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """The current directory first on sys.path, while user code is imported and runs."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(here)



def import_callable(text: str) -> Callable[[], Any]:
    """The callable `module:attribute` names; the attribute may be dotted."""
    module_name, _, attribute = text.partition(":")
    try:
        member: Any = importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (module_name == missing or module_name.startswith(missing + ".")):
            raise CalibrationError(
                f"calibration callable {text}: there is no module {missing} on the path or in {os.getcwd()}"
            ) from error
        raise CalibrationError(
            f"calibration callable {text}: importing {module_name} raised {_described(error)}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(member, part):
            raise CalibrationError(f"calibration callable {text}: the module {module_name} has no {attribute}")
        member = getattr(member, part)
    if not callable(member):
        raise CalibrationError(f"calibration callable {text}: {attribute} is a {type(member).__name__}, not callable")
    return member



def call(function: Callable[[], Any], name: str) -> Any:
    try:
        return function()
    except Exception as error:
        raise CalibrationError(f"calibration callable {name} raised {_described(error)}") from error



def naming_errors(batches: Iterable[Any], origin: str) -> Iterator[Any]:
    """The batches; what the user's code raises on the way is named."""
    try:
        yield from batches
    except Exception as error:
        raise CalibrationError(f"{origin} raised {_described(error)}") from error



def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"

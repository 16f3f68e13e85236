"""What a long run says while it works: stages, warnings and the result, for people or as one JSON object per line, on
stderr.

A message is one line, whatever names from a file it quotes: for people it is escaped (`security.escape`), in JSON it is
a string of ASCII.

The compiler calls `stage(name)` where a new stage begins; nothing is said unless `using` chose a form. stdout belongs
to results.

| event | fields beside `event` and `time` (UTC, ISO 8601) | level |
|---|---|---|
| `stage_started`, `stage_finished` | `stage`; of a finished one `seconds` | DEBUG, INFO |
| `info` | `message` | INFO |
| `warning` | `message` | WARNING |
| `result` | what the command prints with `--json`, without its long lists | INFO |
| `error` | `message`, `kind` (class of the error), `exit_code` | ERROR |

Whatever the form, and where a library says nothing, each event is a record of the standard library's logger
`repquant_fx`, whose attributes `event` and `fields` hold the same; a program that configures `logging` sees them. What
`--verbose` adds is logged as DEBUG.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from repquant_fx import progress
from repquant_fx.security import channel
from repquant_fx.security.escape import printable

QUIET, NORMAL, VERBOSE, JSON = "quiet", "normal", "verbose", "json"
FORMS = (QUIET, NORMAL, VERBOSE, JSON)
_LONGEST = 10_000  # characters of a message for people
_LOGGER = logging.getLogger("repquant_fx")
_LOGGER.addHandler(logging.NullHandler())  # silent where the program that uses this package has not configured logging


class _Log:
    form: str | None = None  # None: used as a library, silent
    stage: tuple[str, float] | None = None
    seconds: dict[str, float] = {}
    peaks: dict[str, float | None] = {}


@contextmanager
def using(form: str) -> Iterator[None]:
    """Speak in one of FORMS within the block; progress bars only in the forms for people, and only on a terminal."""
    before = _Log.form, _Log.stage, progress.enabled
    _Log.form, _Log.stage, progress.enabled = form, None, form in (NORMAL, VERBOSE)
    try:
        yield
    finally:
        _Log.form, _Log.stage, progress.enabled = before


def stage(name: str) -> None:
    """A stage begins; the one before has finished."""
    finish()
    _Log.stage = (name, time.perf_counter())
    channel.tell("stage", name=name)
    _event(logging.DEBUG, "stage_started", f"{name} begins", stage=name)


def start() -> None:
    """A compile begins: what stages take is counted from here."""
    finish()
    _Log.seconds, _Log.peaks = {}, {}


@contextmanager
def part(name: str) -> Iterator[None]:
    """Count the seconds of a part of the current stage, as `stage/name`, over all times that it is entered."""
    key = f"{_Log.stage[0]}/{name}" if _Log.stage is not None else name
    began = time.perf_counter()
    try:
        yield
    finally:
        _Log.seconds[key] = _Log.seconds.get(key, 0.0) + time.perf_counter() - began


def spent() -> dict[str, float]:
    """Seconds of every stage and part since `start`; parts follow their stage."""
    stages = [name for name in _Log.seconds if name in _Log.peaks]
    return {
        key: round(_Log.seconds[key], 3)
        for stage in stages
        for key in _Log.seconds
        if key == stage or key.startswith(f"{stage}/")
    }


def peaks() -> dict[str, float | None]:
    """Peak memory (MB) of this process by the end of each stage since `start`; None where the system does not tell."""
    return dict(_Log.peaks)


def peak_memory() -> float | None:
    """The largest resident set of this process so far, MB."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def finish() -> None:
    """The last stage has finished."""
    if _Log.stage is None:
        return
    name, started = _Log.stage
    _Log.stage = None
    elapsed = time.perf_counter() - started
    _Log.seconds[name] = _Log.seconds.get(name, 0.0) + elapsed
    _Log.peaks[name] = peak_memory()
    seconds = round(elapsed, 3)
    _event(logging.INFO, "stage_finished", f"{name}: {seconds:.2f} s", stage=name, seconds=seconds)
    if _Log.form == VERBOSE:
        _tell(f"{name}: {seconds:.2f} s")


def info(message: str) -> None:
    """Something a person may want to read; not with --quiet."""
    _event(logging.INFO, "info", message, message=message)
    if _Log.form in (NORMAL, VERBOSE):
        _tell(message)


def detail(message: str) -> None:
    """Something for --verbose; no event."""
    _record(logging.DEBUG, "detail", message, {"message": message})
    if _Log.form == VERBOSE:
        _tell(message)


def warning(message: str) -> None:
    """Something the user should know, --quiet or not."""
    _event(logging.WARNING, "warning", message, message=message)
    if _Log.form not in (None, JSON):
        _tell(f"repquant-fx: warning: {message}")


def result(fields: Mapping[str, Any]) -> None:
    """The outcome, for those who read events; people and pipes get it on stdout."""
    _event(logging.INFO, "result", "finished", **fields)


def error(message: str, kind: str, exit_code: int, advice: str = "") -> None:
    """Why a command ended, and on a line of its own what to do about it; always said."""
    said = f"{message}\n{advice}" if advice else message
    _event(logging.ERROR, "error", said, message=said, kind=kind, exit_code=exit_code)
    if _Log.form != JSON:
        _tell(f"repquant-fx: {message}")
        if advice:
            _tell(advice)


def verbatim(text: str) -> None:
    """Lines for --debug, such as a traceback; no event."""
    for line in text.rstrip("\n").split("\n"):
        _say(printable(line))


def _event(level: int, event: str, text: str, /, **fields: Any) -> None:
    _record(level, event, text, fields)
    if _Log.form == JSON:
        _say(
            json.dumps(
                {"event": event, "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), **fields}
            )
        )


def _record(level: int, event: str, text: str, fields: Mapping[str, Any]) -> None:
    _LOGGER.log(level, "%s", printable(text, _LONGEST), extra={"event": event, "fields": dict(fields)})


def _tell(message: str) -> None:
    _say(printable(message, _LONGEST))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

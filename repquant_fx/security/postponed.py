"""What a guarded block leaves behind to be called later: put back, or called under a guard.

A chain of calls that the guard refuses could be handed to somebody who calls it when the block is over.

| left with | what follows |
|---|---|
| `atexit`, `threading`'s functions for the end | called under a guard |
| `weakref.finalize` | called under a guard |
| `signal.signal` | put back, and refused by name |
| `sys.excepthook` and its kin, `sys.settrace`, `sys.setprofile`, `gc.callbacks` | put back |

Threads are the guard's own part. Not seen are methods `__del__`, callbacks of weak references and what libraries keep
in lists of their own.
"""

from __future__ import annotations

import atexit
import functools
import gc
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

Guard = Callable[[], AbstractContextManager[Any]]
_HOOKS = ((sys, "excepthook"), (sys, "unraisablehook"), (sys, "displayhook"), (threading, "excepthook"))


@contextmanager
def watched(guard: Guard, refuse: Callable[[str], None]) -> Iterator[None]:
    """Watch what the block leaves behind.

    Args:
        guard: gives what to call it in.
        refuse: is told of handlers of signals, in words that go after "it tried to"; may raise.
    """
    finalizers, ends = set(_finalizers()), list(_ends())
    hooks = [(place, name, getattr(place, name)) for place, name in _HOOKS]
    callbacks, trace, profile = list(gc.callbacks), sys.gettrace(), sys.getprofile()
    handlers = _handlers()
    fence = _Fence(guard)
    try:
        yield
    finally:
        fence.close()
        for finalizer, info in list(_finalizers().items()):
            if finalizer not in finalizers:
                info.func = functools.partial(_call, guard, info.func)
        known = _ends()
        known[:] = [each if each in ends else functools.partial(_call, guard, each) for each in known]
        for place, name, value in hooks:
            setattr(place, name, value)
        gc.callbacks[:] = callbacks
        if sys.gettrace() is not trace:
            sys.settrace(trace)
        if sys.getprofile() is not profile:
            sys.setprofile(profile)
        changed = [number for number, handler in _handlers().items() if handler is not handlers.get(number)]
        for number in changed:
            signal.signal(number, signal.SIG_DFL if handlers.get(number) is None else handlers[number])
    if changed:
        refuse(f"handle the signal {signal.Signals(changed[0]).name}")


class _Fence:
    """Around the functions for the end of the process that a block registers. They are called last first: what stands
    after them switches the guard on, what stands before them switches it off.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard, self.stack = guard, ExitStack()
        atexit.register(self.off)
        self.count = _registered()

    def close(self) -> None:
        if self.count is not None and _registered() == self.count:
            atexit.unregister(self.off)
        else:
            atexit.register(self.on)

    def on(self) -> None:
        self.stack.enter_context(self.guard())

    def off(self) -> None:
        self.stack.close()


def _registered() -> int | None:
    """How many functions are registered for the end; None where Python does not tell."""
    count: Callable[[], int] | None = getattr(atexit, "_ncallbacks", None)
    return None if count is None else count()


def _call(guard: Guard, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    with guard():
        return function(*args, **named)


def _finalizers() -> dict[Any, Any]:
    """Of `weakref.finalize`: to each one what it calls."""
    found: dict[Any, Any] = getattr(weakref.finalize, "_registry", {})
    return found


def _ends() -> list[Any]:
    """What `threading` calls before it joins the last threads."""
    found: list[Any] = getattr(threading, "_threading_atexits", [])
    return found


def _handlers() -> dict[int, Any]:
    """Handlers of signals by number; none outside the main thread, which alone can set them."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in signal.valid_signals()}

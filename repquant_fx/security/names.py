"""Names out of files. torch.fx pastes them into the source that it generates, so a name that is no name is code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from keyword import iskeyword

from torch import nn

from repquant_fx.errors import ModelFileError
from repquant_fx.torch_private import MODULES, SLOTS

_LONGEST = 1_000  # characters; the names of deep models have about a hundred
_SHOWN = 80
_MOST_WAYS = 100_000  # to the layers of a module, those of a shared one counted for each who shares it


def check_names(names: Iterable[str], where: str) -> None:
    """Refuse names of modules, parameters, buffers or inputs that are not identifiers or digits, joined by dots.

    Args:
        names: such as `blocks.0.attn.qkv.weight`.
        where: the file, for the message.

    Raises:
        ModelFileError: a name is something else, a double underscore's (`__class__`), or absurdly long; it is shown
            escaped.
    """
    for name in names:
        if not isinstance(name, str) or len(name) > _LONGEST or not all(_is_part(part) for part in name.split(".")):
            raise ModelFileError(
                f"{where} has a module, parameter or input called {_shown(name)}, which is not a name: "
                "expected identifiers or digits joined by dots; rename it and save the model again"
            )


def check_module_names(module: nn.Module, where: str) -> None:
    """`check_names` for every name inside a module, of modules and tensors that it holds more than once too.

    Raises:
        ModelFileError: see there; also a single name with a dot in it.
    """
    for child in modules_in(module, where):
        for slot in SLOTS:
            names = vars(child)[slot]
            check_names(names, where)
            if dotted := next((name for name in names if "." in name), None):
                raise ModelFileError(
                    f"{where} has a module or parameter called {_shown(dotted)}; a single name holds no dot"
                )
            if reserved := next((name for name in names if iskeyword(name)), None):
                raise ModelFileError(
                    f"{where} has a module or parameter called {reserved}, a word of Python; rename it"
                )


def modules_in(module: nn.Module, where: str) -> Iterator[nn.Module]:
    """A module and all below it, each once, found without calling any of them: a file may hide their methods.

    Raises:
        ModelFileError: one keeps its children or tensors in something else than a dict without attributes of its own.
    """
    waiting, seen = [module], set()
    while waiting:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        for slot in SLOTS:
            held = vars(found).get(slot)
            if not isinstance(held, dict) or getattr(held, "__dict__", None):
                raise ModelFileError(f"{where} is not whole: {type(found).__name__} without a plain dict {slot}")
        waiting.extend(child for child in vars(found)[MODULES].values() if isinstance(child, nn.Module))
        yield found


def check_calls(module: nn.Module, where: str) -> None:
    """Refuse a module whose layers share others so that running it does not end: each level twice the one below.

    Raises:
        ModelFileError: it reaches its layers on more ways than any model does, or holds itself.
    """
    ways: dict[int, int] = {}

    def count(found: nn.Module) -> int:
        if id(found) not in ways:
            ways[id(found)] = _MOST_WAYS  # while it is counted; who meets it again is inside of it
            children = (child for child in vars(found)[MODULES].values() if isinstance(child, nn.Module))
            ways[id(found)] = 1 + sum(count(child) for child in children)
        return ways[id(found)]

    if count(module) >= _MOST_WAYS:
        raise ModelFileError(f"{where} holds a module inside itself, or its layers on more than {_MOST_WAYS} ways")


def _is_part(part: str) -> bool:
    """A hyphen does no harm: torch.fx quotes a part that is no identifier, `getattr(self, "block1-0")`."""
    if part.isascii() and part.isdigit():
        return True
    plain = part.replace("-", "_") if part.isascii() else part
    return plain.isidentifier() and not (plain.startswith("__") and plain.endswith("__"))


def _shown(name: object) -> str:
    text = ascii(name)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"

"""Names out of files. torch.fx pastes them into the source that it generates, so a name that is no name is code."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from repquant_fx.errors import ModelFileError

_LONGEST = 1_000  # characters; the names of deep models have about a hundred
_SHOWN = 80


def check_names(names: Iterable[str], where: str) -> None:
    """Refuse names of modules, parameters, buffers or inputs that are not identifiers or digits, joined by dots.

    Args:
        names: such as `blocks.0.attn.qkv.weight`.
        where: the file, for the message.

    Raises:
        ModelFileError: a name is something else, a double underscore's (`__class__`), or absurdly long; it is shown escaped.
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
    for child in module.modules():
        for names in (child._modules, child._parameters, child._buffers):
            check_names(names, where)
            if dotted := next((name for name in names if "." in name), None):
                raise ModelFileError(
                    f"{where} has a module or parameter called {_shown(dotted)}; a single name holds no dot"
                )


def _is_part(part: str) -> bool:
    if part.isascii() and part.isdigit():
        return True
    return part.isidentifier() and not (part.startswith("__") and part.endswith("__"))


def _shown(name: object) -> str:
    text = ascii(name)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"

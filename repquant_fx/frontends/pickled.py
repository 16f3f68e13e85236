"""Files written by `torch.save`, read without executing what they name.

torch's weights-only unpickler does the reading; it resolves a global only if we admit it. What is admitted stands for
data: classes come in as stand-ins that make blank instances and cannot be called, so no constructor runs;
`functools.partial` becomes an object that holds but never calls. Everything else is refused by name. The unpickler's
own defaults (tensors, storages, dtypes, OrderedDict) stay torch's trust boundary.
"""

from __future__ import annotations

import enum
import functools
import importlib
import io
import pickle
import re
import warnings
from typing import Any, NoReturn

import torch
from torch import nn

from repquant_fx import limits
from repquant_fx.errors import InputError, ModelFileError, first_line
from repquant_fx.frontends.rebuilt import is_transformers_model, rebuild
from repquant_fx.frontends.rehearsal import rehearse
from repquant_fx.frontends.state import activation_functions, check_state, check_tensors
from repquant_fx.security.guard import guarded
from repquant_fx.security.names import check_calls, check_module_names, modules_in
from repquant_fx.torch_private import allowed_globals, children, put_child

# Only modules that match may be imported because a file names them: they define layers, models and configurations.
_IMPORTABLE = re.compile(
    r"torch\.nn\.modules\.\w+|torch\.nn\.parallel\.data_parallel"
    r"|timm\.(layers|models)(\.\w+)*"
    r"|torchvision\.(models|ops)(\.\w+)*"
    r"|transformers\.models\.\w+\.(modeling|configuration)_\w+"
    r"|transformers\.(activations|pytorch_utils|configuration_utils|modeling_layers)"
    r"|transformers\.generation\.configuration_utils"
)
_PLAIN_DATA = {"builtins.frozenset": frozenset, "builtins.slice": slice, "builtins.range": range}
_DEEPEST_CONFIG = 8


class ClassStandIn:
    """Stands for a class while a file is read: makes blank instances of it, and is never called.

    `object.__new__` runs no code of the class; the state that follows goes into `__dict__`. The equality lets torch's
    unpickler recognise instances of the real class as admitted.
    """

    def __init__(self, target: type) -> None:
        self.target = target
        self.__dict__["__new__"] = self._blank

    def _blank(self, _stand_in: object, *args: object) -> Any:
        if args:
            raise pickle.UnpicklingError(f"the file passes arguments to the constructor of {self.target.__qualname__}")
        return object.__new__(self.target)

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise pickle.UnpicklingError(
            f"the file calls {self.target.__qualname__}; only its state may be read from a file"
        )

    def __eq__(self, other: object) -> bool:
        return other is self or other is self.target

    def __hash__(self) -> int:
        return hash(self.target)

    def __deepcopy__(self, memo: object) -> ClassStandIn:
        return self

    def __repr__(self) -> str:
        return f"<class {self.target.__qualname__}, held and not callable>"


class InertPartial:
    """Stands for `functools.partial`: keeps an admitted class or activation and its arguments, and never calls it."""

    func: object
    args: tuple[object, ...]
    keywords: dict[str, object]

    def __init__(self, func: object) -> None:
        self._set(func, (), {})

    def __setstate__(self, state: tuple[object, ...]) -> None:
        if not isinstance(state, tuple) or len(state) != 4:
            raise pickle.UnpicklingError("malformed functools.partial")
        func, args, keywords, _ = state
        self._set(func, args, keywords)

    def __deepcopy__(self, memo: object) -> InertPartial:
        return self

    def _set(self, func: object, args: object, keywords: object) -> None:
        if not isinstance(func, ClassStandIn) and func not in activation_functions().values():
            raise pickle.UnpicklingError(f"functools.partial of {type(func).__name__}, which is not a known layer")
        if not isinstance(args, tuple) or not isinstance(keywords, dict):
            raise pickle.UnpicklingError("malformed functools.partial")
        self.func, self.args, self.keywords = func, args, keywords

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise ModelFileError(
            f"the model calls functools.partial({self.func!r}), which a file read without consent may only "
            "hold; pass --allow-pickle if you trust the file"
        )


def load_pickled(data: bytes, where: str, *, allow_pickle: bool = False) -> Any:
    """The object in a `torch.save` file, zip or legacy, on the CPU.

    Args:
        data: the bytes of the file.
        where: its name, for messages.
        allow_pickle: the user trusts the file: unpickle it in full, which executes what it says.

    Raises:
        ModelFileError: the file is damaged, or names something that is not known to be harmless.
    """
    if allow_pickle:
        return _load(data, where, weights_only=False)
    admitted = _screen(data, where)
    with (
        guarded(f"loading {where}"),
        torch.serialization.safe_globals([(value, name) for name, value in admitted.items()]),
    ):
        return _settled(_load(data, where, weights_only=True), where)


def check_pickle(data: bytes, where: str) -> None:
    """Refuse a `torch.save` file that holds anything but tensors and plain data, or that would not end. Executes
    nothing.

    Raises:
        ModelFileError: it does; the message names what.
    """
    refuse_bomb(data, where)
    known = allowed_globals()
    named, problem = rehearse(data)
    if others := sorted(named - known):
        raise ModelFileError(
            f"{where} cannot be loaded as plain tensors: it names {_shown(others)}. Nothing was executed"
        )
    if problem is not None:
        raise ModelFileError(
            f"{where} cannot be loaded as plain tensors: its pickle is damaged or does what tensors need not "
            f"({problem})"
        )


def refuse_bomb(data: bytes, where: str) -> None:
    """Refuse a zip archive that declares far more than it is (see `limits.unpacks_to`).

    Raises:
        ModelFileError: it does. Archives that cannot be read pass; reading them fails with a message of its own.
    """
    if (declared := limits.unpacks_to(data)) is not None:
        raise ModelFileError(f"not a model file: {where} has {len(data)} bytes but would unpack to {declared}")


def _screen(data: bytes, where: str) -> dict[str, Any]:
    """What to admit beyond torch's defaults, by name; refuses what is not known to be harmless."""
    named, problem = rehearse(data)
    admitted, refused = _admit(named)
    if refused:
        _refuse(where, refused)
    if problem is not None:
        raise ModelFileError(
            f"{where} is not a model file: its pickle is damaged or does what a model need not ({problem})"
        )
    return admitted


def _admit(named: set[str]) -> tuple[dict[str, Any], list[str]]:
    """(what to let the unpickler resolve, by name; the names to refuse). torch's defaults need neither."""
    known = allowed_globals()
    admitted, refused = {}, []
    for name in sorted(named - known):
        value = _admitted_value(name)
        if value is None:
            refused.append(name)
        else:
            admitted[name] = value
    return admitted, refused


def _admitted_value(name: str) -> Any:
    if name in _PLAIN_DATA:
        return _PLAIN_DATA[name]
    if name == "functools.partial":
        return InertPartial
    if name == "argparse.Namespace":
        import argparse

        return ClassStandIn(argparse.Namespace)
    if name in activation_functions():
        return activation_functions()[name]
    return _admitted_class(_resolve(name))


def _resolve(name: str) -> object:
    """The class a dotted name stands for, or None. Imports only modules of `_IMPORTABLE`."""
    module_name, _, attribute = name.rpartition(".")
    if not _IMPORTABLE.fullmatch(module_name):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return vars(importlib.import_module(module_name)).get(attribute)
    except Exception:
        return None


def _admitted_class(found: object) -> Any:
    if not isinstance(found, type) or not _IMPORTABLE.fullmatch(found.__module__):
        return None
    if issubclass(found, nn.Module):
        return ClassStandIn(found) if _is_harmless_module(found) else None
    if issubclass(found, enum.Enum):
        # gives a member; torch lets a file change the state of what is of an admitted class
        return functools.partial(found)
    if issubclass(found, tuple) and hasattr(found, "_fields"):
        return found
    if any(
        base.__module__.startswith("transformers.")
        and base.__name__ in ("PreTrainedConfig", "PretrainedConfig", "GenerationConfig")
        for base in found.__mro__
    ):
        return ClassStandIn(found) if not hasattr(found, "__setstate__") else None
    return None


def _is_harmless_module(cls: type[nn.Module]) -> bool:
    """Reading the state must run torch's own `__setstate__`, and no generated source may come with the class."""
    generated = (torch.jit.ScriptModule, torch.fx.GraphModule)
    setter: Any = cls.__setstate__
    return not issubclass(cls, generated) and str(setter.__module__).startswith("torch.nn.modules.")


def _load(data: bytes, where: str, *, weights_only: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=weights_only)
    except ModuleNotFoundError as error:
        raise ModelFileError(f"{where} needs the Python module {error.name!r}, which is not installed") from error
    except pickle.UnpicklingError as error:
        reason = first_line(error.__cause__ or error).removeprefix("Weights only load failed. ")
        unsafe = re.search(
            r"(the file (?:calls|passes)[^\n]*|functools\.partial of [^\n]*|Unsupported[^\n]*|Can only[^\n]*"
            r"|Trying to[^\n]*)",
            str(error),
        )
        detail = unsafe.group(1) if unsafe else reason
        raise ModelFileError(f"{where} cannot be read without executing what it says: {detail[:300]}. "
                             "Pass --allow-pickle if you trust the file") from error
    except Exception as error:
        raise ModelFileError(f"{where} is damaged or was written by another torch: {first_line(error)}") from error


def _refuse(where: str, names: list[str]) -> NoReturn:
    raise ModelFileError(
        f"{where} names code that is not known to be harmless: {_shown(names)}. Nothing was executed. Pass "
        "--allow-pickle if you trust the file, or save a state dict (or safetensors) and pass --arch"
    )


def _shown(names: list[str]) -> str:
    return ", ".join(names[:8])[:500] + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _settled(loaded: Any, where: str) -> Any:
    """What was read, with its modules checked or made anew."""
    if isinstance(loaded, nn.Module):
        return _settled_module(loaded, where)
    if isinstance(loaded, dict):
        return {
            key: _settled_module(value, where) if isinstance(value, nn.Module) else value
            for key, value in loaded.items()
        }
    return loaded


def _settled_module(module: nn.Module, where: str) -> nn.Module:
    """A model of transformers is built anew by its configuration and gets the file's tensors; of any other the state is
    checked.

    Raises:
        ModelFileError: its state is not what its class makes, or it cannot be built anew.
    """
    try:
        check_module_names(module, where)
        check_calls(module, where)
        _check_module(module, where)
        settled = _settle(module, where, "", {})
        check_tensors([*settled.named_parameters(), *settled.named_buffers()], where)
    except InputError:
        raise
    except Exception as error:
        raise ModelFileError(f"{where} holds a module that is not whole: {first_line(error)}") from error
    return settled


def _settle(module: nn.Module, where: str, path: str, known: dict[int, nn.Module]) -> nn.Module:
    if id(module) in known:
        return known[id(module)]
    place = f"{where}, {path or 'the model itself'}"
    if is_transformers_model(module):
        known[id(module)] = rebuild(
            module, place, lambda child, inner: _settle(child, where, f"{path}.{inner}".strip("."), known)
        )
        return known[id(module)]
    if type(module).__module__.startswith("transformers."):
        raise ModelFileError(
            f"{place} is a {type(module).__name__} outside of a model of transformers, so it cannot be built anew by a "
            "configuration. Save the model with torch.export.save, or pass --allow-pickle if you trust the file"
        )
    known[id(module)] = module
    check_state(module, place, (ClassStandIn, InertPartial))
    for name, child in children(module).items():
        put_child(module, name, _settle(child, where, f"{path}.{name}".strip("."), known))
    return module


def _check_module(module: nn.Module, where: str) -> None:
    """Refuse hooks, and configurations that fetch code by name, anywhere in a module that came from a file."""
    try:
        for child in modules_in(module, where):
            place = f"{where}, a {type(child).__name__}"
            for attribute, value in vars(child).items():
                if attribute.endswith("_hooks") and value:
                    raise ModelFileError(f"{place} carries hooks ({attribute}); hooks are code. "
                                         "Remove them before saving, or pass --allow-pickle if you trust the file")
            for value in (child, *vars(child).values()):
                _check_config(value, place)
    except ModelFileError:
        raise
    except Exception as error:
        raise ModelFileError(f"{where} holds a module that is not whole: {first_line(error)}") from error


def _check_config(config: object, place: str, depth: int = 0) -> None:
    """transformers fetches attention kernels from the hub where the implementation's name is a repository."""
    if depth > _DEEPEST_CONFIG:
        raise ModelFileError(f"{place} has a configuration inside itself")
    for key, value in getattr(config, "__dict__", {}).items():
        if (
            "implementation" in key
            and value is not None
            and re.search(r"[/:@]", str(value).replace("{", "").replace(": ", ""))
        ):
            raise ModelFileError(
                f"{place} asks for code from a repository: {key}={value!r}. "
                "Save the model with attn_implementation='sdpa', or pass --allow-pickle if you trust the file"
            )
        if hasattr(value, "__dict__") and not isinstance(value, type) and key.endswith("config"):
            _check_config(value, place, depth + 1)

"""Files written by `torch.save`, read without executing what they name.

torch's weights-only unpickler does the reading; it resolves a global only if we admit it. What is admitted stands for data:
classes come in as stand-ins that make blank instances and cannot be called, so no constructor runs; `functools.partial`
becomes an object that holds but never calls. Everything else is refused by name. The unpickler's own defaults (tensors,
storages, dtypes, OrderedDict) stay torch's trust boundary.
"""

from __future__ import annotations

import _compat_pickle
import enum
import functools
import importlib
import io
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from repquant_fx import limits
from repquant_fx.errors import ModelFileError

# Only modules that match may be imported because a file names them: they define layers, models and configurations.
_IMPORTABLE = re.compile(
    r"torch\.nn\.modules\.\w+|torch\.nn\.parallel\.data_parallel"
    r"|timm\.(layers|models)(\.\w+)*"
    r"|torchvision\.(models|ops)(\.\w+)*"
    r"|transformers\.models\.\w+\.(modeling|configuration)_\w+"
    r"|transformers\.(activations|pytorch_utils|configuration_utils|modeling_layers)"
    r"|transformers\.generation\.configuration_utils"
)
_ACTIVATIONS = ("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_softmax", "logsigmoid", "mish",
                "relu", "relu6", "selu", "sigmoid", "silu", "softmax", "softplus", "softsign", "tanh")
_PLAIN_DATA = {"builtins.frozenset": frozenset, "builtins.slice": slice, "builtins.range": range}
# torch admits this by default; it calls a function that the file chooses and sets attributes on the result. A tensor that
# carries Python attributes is saved so; nothing else needs it.
_INDIRECT_CALL = "torch._tensor._rebuild_from_type_v2"
_TENSOR_BUILDERS = {f"torch._utils._rebuild_{name}" for name in ("tensor_v2", "tensor_v3", "parameter", "parameter_with_state")}
_MOST_BYTES = 16 << 20  # of the pickle without its tensors; those of large models have a few hundred thousand
_MOST_GLOBALS = 10_000
_MOST_NESTED, _DEEPEST = 10_000_000, 100  # objects in a tuple, counted once for each way to them, and levels
_ZIP = b"PK\x03\x04"
_DEEPEST_CONFIG = 8
_LEGACY_HEADERS = 3  # a legacy file is a row of pickles: magic number, protocol, system, object, storage keys


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
        raise pickle.UnpicklingError(f"the file calls {self.target.__qualname__}; only its state may be read from a file")

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
        if not isinstance(func, ClassStandIn) and func not in _activation_functions().values():
            raise pickle.UnpicklingError(f"functools.partial of {type(func).__name__}, which is not a known layer")
        if not isinstance(args, tuple) or not isinstance(keywords, dict):
            raise pickle.UnpicklingError("malformed functools.partial")
        self.func, self.args, self.keywords = func, args, keywords

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise ModelFileError(f"the model calls functools.partial({self.func!r}), which a file read without consent may only "
                             "hold; pass --allow-pickle if you trust the file")


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
    with torch.serialization.safe_globals([(value, name) for name, value in admitted.items()]):
        loaded = _load(data, where, weights_only=True)
    for module in _modules_in(loaded):
        _check_module(module, where)
    return loaded


def check_pickle(data: bytes, where: str) -> None:
    """Refuse a `torch.save` file that holds anything but tensors and plain data, or that would not end. Executes nothing.

    Raises:
        ModelFileError: it does; the message names what.
    """
    refuse_bomb(data, where)
    known = _torch_defaults()
    named, problem = _rehearse(data)
    if others := sorted(named - known):
        raise ModelFileError(f"{where} cannot be loaded as plain tensors: it names {_shown(others)}. Nothing was executed")
    if problem is not None:
        raise ModelFileError(f"{where} cannot be loaded as plain tensors: its pickle is damaged or does what tensors need not ({problem})")


def globals_of(data: bytes, where: str) -> set[str]:
    """Every global, as `module.name`, that the pickles of a `torch.save` file name. Executes nothing.

    Raises:
        ModelFileError: the pickle is damaged.
    """
    named, problem = _rehearse(data)
    if problem is not None:
        raise ModelFileError(f"{where} is not a model file: its pickle is damaged ({problem})")
    return named


def refuse_bomb(data: bytes, where: str) -> None:
    """Refuse a zip archive that declares far more than it is (see `limits.unpacks_to`).

    Raises:
        ModelFileError: it does. Archives that cannot be read pass; reading them fails with a message of its own.
    """
    if (declared := limits.unpacks_to(data)) is not None:
        raise ModelFileError(f"not a model file: {where} has {len(data)} bytes but would unpack to {declared}")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, shortened; its type where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def _pickle_record(data: bytes) -> bytes:
    """What the unpickler reads. A legacy file goes on with its tensors, which need not be looked at."""
    if data[:4] != _ZIP:
        return data[:_MOST_BYTES]
    reader = torch._C.PyTorchFileReader(io.BytesIO(data))
    if reader.get_record_size("data.pkl") > _MOST_BYTES:
        raise pickle.UnpicklingError(f"its pickle has more than {_MOST_BYTES >> 20} MiB without the tensors")
    return bytes(reader.get_record("data.pkl"))


def _measure(items: tuple[object, ...]) -> tuple[int, int]:
    """(objects in a tuple, levels). 200 bytes of pickle can nest so many that hashing them does not end, or overflows the stack."""
    weight = sum(getattr(item, "measure", (1, 0))[0] for item in items)
    depth = 1 + max((getattr(item, "measure", (1, 0))[1] for item in items), default=0)
    if weight > _MOST_NESTED or depth > _DEEPEST:
        raise pickle.UnpicklingError("it nests tuples beyond measure")
    return weight, depth


class _Tuple(tuple[object, ...]):
    """A tuple with its measure."""

    measure: tuple[int, int]

    def __new__(cls, items: tuple[object, ...]) -> _Tuple:
        made = super().__new__(cls, items)
        made.measure = _measure(items)
        return made


class _Symbol(type):
    """A global met in a rehearsal: calling it checks the call and yields a blank object."""

    named: str

    def __call__(cls, *args: object) -> object:
        if cls.named == _INDIRECT_CALL and not _rebuilds_plain_tensor(args):
            raise pickle.UnpicklingError(f"{_INDIRECT_CALL} of something that is not a tensor")
        return _Inert.__new__(cls, *args)  # type: ignore[arg-type]


class _Inert(metaclass=_Symbol):
    """What every object of a rehearsal is: takes any state and items, keeps and does nothing."""

    named = ""
    measure: tuple[int, int] = (1, 0)

    def __new__(cls, *args: object) -> _Inert:
        made = object.__new__(cls)
        made.measure = _measure(args)  # the class may be that of a tuple
        return made

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, item: object) -> None: ...

    def extend(self, items: object) -> None: ...


class _Rehearsal(pickle._Unpickler):
    """Runs the opcodes of a pickle over inert objects and notes the globals.

    The implementation in Python is used on purpose: the one in C allocates its memo by the largest index in the file.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: io.BytesIO, named: set[str]) -> None:
        super().__init__(stream)
        self._named = named
        self._symbols: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _compat_pickle.NAME_MAPPING:
            module, name = _compat_pickle.NAME_MAPPING[module, name]
        full = f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
        self._named.add(full)
        if len(self._named) > _MOST_GLOBALS:
            raise pickle.UnpicklingError(f"it names more than {_MOST_GLOBALS} classes and functions")
        if full not in self._symbols:
            self._symbols[full] = type.__call__(_Symbol, "Symbol", (_Inert,), {"named": full})
        return self._symbols[full]

    def persistent_load(self, pid: object) -> object:
        if isinstance(pid, tuple) and pid[:1] == ("module",):
            raise pickle.UnpicklingError("a module pickled in the format before torch 1.6 carries its source; save it again")
        return object.__new__(_Inert)


def _weighed(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def weigh(unpickler: Any) -> None:
        load(unpickler)
        unpickler.stack[-1] = _Tuple(unpickler.stack[-1])

    return weigh


for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _Rehearsal.dispatch[_code[0]] = _weighed(_Rehearsal.dispatch[_code[0]])


def _rebuilds_plain_tensor(args: tuple[object, ...]) -> bool:
    return (len(args) == 4 and getattr(args[0], "named", None) in _TENSOR_BUILDERS
            and getattr(args[1], "named", None) in ("torch.Tensor", "torch.nn.parameter.Parameter"))


def _rehearse(data: bytes) -> tuple[set[str], str | None]:
    """(the globals that a `torch.save` file names, what stopped the rehearsal or None)."""
    named: set[str] = set()
    try:
        stream = io.BytesIO(_pickle_record(data))
        for _ in range(1 if data[:4] == _ZIP else _LEGACY_HEADERS + 2):
            _Rehearsal(stream, named).load()
    except Exception as error:
        return named, first_line(error)
    return named, None


def _screen(data: bytes, where: str) -> dict[str, Any]:
    """What to admit beyond torch's defaults, by name; refuses what is not known to be harmless."""
    named, problem = _rehearse(data)
    admitted, refused = _admit(named)
    if refused:
        _refuse(where, refused)
    if problem is not None:
        raise ModelFileError(f"{where} is not a model file: its pickle is damaged or does what a model need not ({problem})")
    return admitted


def _admit(named: set[str]) -> tuple[dict[str, Any], list[str]]:
    """(what to let the unpickler resolve, by name; the names to refuse). torch's defaults need neither."""
    known = _torch_defaults()
    admitted, refused = {}, []
    for name in sorted(named - known):
        value = _admitted_value(name)
        if value is None:
            refused.append(name)
        else:
            admitted[name] = value
    return admitted, refused


def _torch_defaults() -> set[str]:
    from torch import _weights_only_unpickler

    return set(_weights_only_unpickler._get_allowed_globals())


def _admitted_value(name: str) -> Any:
    if name in _PLAIN_DATA:
        return _PLAIN_DATA[name]
    if name == "functools.partial":
        return InertPartial
    if name == "argparse.Namespace":
        import argparse

        return ClassStandIn(argparse.Namespace)
    if name in _activation_functions():
        return _activation_functions()[name]
    return _admitted_class(_resolve(name))


@functools.cache
def _activation_functions() -> dict[str, Callable[..., Any]]:
    spaces = {"torch.nn.functional": nn.functional, "torch._C._nn": torch._C._nn}
    return {f"{space}.{name}": getattr(module, name)
            for space, module in spaces.items() for name in _ACTIVATIONS if hasattr(module, name)}


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
    if issubclass(found, enum.Enum) or (issubclass(found, tuple) and hasattr(found, "_fields")):
        return found
    if any(base.__module__.startswith("transformers.") and base.__name__ in ("PreTrainedConfig", "PretrainedConfig",
                                                                           "GenerationConfig") for base in found.__mro__):
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
        unsafe = re.search(r"(the file (?:calls|passes)[^\n]*|functools\.partial of [^\n]*|Unsupported[^\n]*|Can only[^\n]*"
                           r"|Trying to[^\n]*)", str(error))
        detail = unsafe.group(1) if unsafe else reason
        raise ModelFileError(f"{where} cannot be read without executing what it says: {detail[:300]}. "
                             "Pass --allow-pickle if you trust the file") from error
    except Exception as error:
        raise ModelFileError(f"{where} is damaged or was written by another torch: {first_line(error)}") from error


def _refuse(where: str, names: list[str]) -> NoReturn:
    raise ModelFileError(f"{where} names code that is not known to be harmless: {_shown(names)}. Nothing was executed. Pass "
                         "--allow-pickle if you trust the file, or save a state dict (or safetensors) and pass --arch")


def _shown(names: list[str]) -> str:
    return ", ".join(names[:8])[:500] + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _modules_in(loaded: Any) -> list[nn.Module]:
    values = list(loaded.values()) if isinstance(loaded, dict) else [loaded]
    return [value for value in values if isinstance(value, nn.Module)]


def _check_module(module: nn.Module, where: str) -> None:
    """Refuse hooks, and configurations that fetch code by name, anywhere in a module that came from a file."""
    try:
        for name, child in module.named_modules():
            place = f"{where}, module {name or '(root)'}"
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
        if "implementation" in key and value is not None and re.search(r"[/:@]", str(value).replace("{", "").replace(": ", "")):
            raise ModelFileError(f"{place} asks for code from a repository: {key}={value!r}. "
                                 "Save the model with attn_implementation='sdpa', or pass --allow-pickle if you trust the file")
        if hasattr(value, "__dict__") and not isinstance(value, type) and key.endswith("config"):
            _check_config(value, place, depth + 1)

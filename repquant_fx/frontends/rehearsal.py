"""A pickle run over inert objects: what it names, and whether reading it in earnest would end and fit into memory.

Nothing that the file says is called. What would take memory or time without limit is refused by its value, before it is
built.
"""

from __future__ import annotations

import _compat_pickle
import io
import pickle
from collections.abc import Callable
from typing import Any

from repquant_fx.errors import first_line
from repquant_fx.torch_private import REBUILDS_ANY_TYPE, REBUILDS_FROM_DEVICE, REBUILDS_TENSORS, archive_reader

_MOST_BYTES = 16 << 20  # of the pickle without its tensors; those of large models have a few hundred thousand
_MOST_GLOBALS = 10_000
_MOST_NESTED, _DEEPEST = 10_000_000, 100  # objects in a tuple, counted once for each way to them, and levels
_MOST_HASHED = 20_000_000  # objects in the tuples that are keys, of all of them together
_ZIP = b"PK\x03\x04"
_LEGACY_HEADERS = 3  # a legacy file is a row of pickles: magic number, protocol, system, object, storage keys
_COLLECTIONS = ("builtins.set", "builtins.frozenset", "collections.OrderedDict", "collections.Counter", "torch.Size")
_LIBRARIES = ("torch.nn.modules.", "timm.", "torchvision.", "transformers.", "argparse.")
_ENCODINGS = ("latin1", "latin-1", "ascii", "utf-8")


def _pickle_record(data: bytes) -> bytes:
    """What the unpickler reads. A legacy file goes on with its tensors, which need not be looked at."""
    if data[:4] != _ZIP:
        return data[:_MOST_BYTES]
    reader = archive_reader(data)
    if reader.get_record_size("data.pkl") > _MOST_BYTES:
        raise pickle.UnpicklingError(f"its pickle has more than {_MOST_BYTES >> 20} MiB without the tensors")
    return bytes(reader.get_record("data.pkl"))


def _measure(items: tuple[object, ...]) -> tuple[int, int]:
    """(objects in a tuple, levels).

    200 bytes of pickle can nest so many that hashing them does not end, or overflows the stack.
    """
    weight = sum(getattr(item, "measure", (1, 0))[0] for item in items)
    depth = 1 + max((getattr(item, "measure", (1, 0))[1] for item in items), default=0)
    if weight > _MOST_NESTED or depth > _DEEPEST:
        raise pickle.UnpicklingError("it nests tuples beyond measure")
    return weight, depth


class _Tuple(tuple[object, ...]):
    """A tuple with its measure. Its hash is cheap here; what it would cost in earnest is counted."""

    measure: tuple[int, int]
    spent: list[int]

    def __new__(cls, items: tuple[object, ...], spent: list[int]) -> _Tuple:
        made = super().__new__(cls, items)
        made.measure, made.spent = _measure(items), spent
        return made

    def __hash__(self) -> int:
        self.spent[0] += self.measure[0]
        if self.spent[0] > _MOST_HASHED:
            raise pickle.UnpicklingError("its keys are tuples that nest beyond measure")
        return len(self)


class _Symbol(type):
    """A global met in a rehearsal: calling it checks the call and yields a blank object."""

    named: str

    def __call__(cls, *args: object) -> object:
        if cls.named == REBUILDS_ANY_TYPE and not _rebuilds_plain_tensor(args):
            raise pickle.UnpicklingError(f"{REBUILDS_ANY_TYPE} of something that is not a tensor")
        if cls.named.startswith(REBUILDS_FROM_DEVICE):
            raise pickle.UnpicklingError(f"{cls.named}, which writes out any claimed size; save it from the CPU")
        return _Inert.__new__(cls, *args)  # type: ignore[arg-type]


class _Inert(metaclass=_Symbol):
    """What every object of a rehearsal is: takes any state and items, keeps and does nothing."""

    named = ""
    measure: tuple[int, int] = (1, 0)

    def __new__(cls, *args: object) -> _Inert:
        _check_call(cls.named, args)
        made = object.__new__(cls)
        made.measure = _measure(args)  # the class may be that of a tuple
        return made

    def __setstate__(self, state: object) -> None:
        _check_state(type(self).named, state)

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
        self.spent = [0]
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
            raise pickle.UnpicklingError(
                "a module pickled in the format before torch 1.6 carries its source; save it again"
            )
        return object.__new__(_Inert)


def _check_call(named: str, args: tuple[object, ...]) -> None:
    """Refuse what a builder of plain data would take memory or time for that its arguments do not have.

    Raises:
        UnpicklingError: such as `bytearray(3_000_000_000)`, `frozenset(range(n))`, `torch.FloatTensor(n)`.
    """
    first = args[0] if args else None
    if named == "builtins.bytearray" and args and not isinstance(first, (bytes, str, _Inert)):
        raise pickle.UnpicklingError(f"it asks for a bytearray of {str(first)[:40]} bytes")
    if named in _COLLECTIONS and args:
        if not isinstance(first, (list, tuple, dict)):
            raise pickle.UnpicklingError(f"it makes a {named.rpartition('.')[2]} of something that is not a list")
        if "set" in named:
            for item in first:
                hash(item)
    if named == "_codecs.encode" and (len(args) != 2 or args[1] not in _ENCODINGS or not isinstance(first, str)):
        raise pickle.UnpicklingError("it encodes a text in an unusual way")
    if args and named.startswith("torch.") and named.endswith(("Tensor", "Storage")):
        raise pickle.UnpicklingError(f"it calls {named}, which takes memory that the file does not fill")


def _check_state(named: str, state: object) -> None:
    """Refuse a state that is more than the attributes of a module or a configuration.

    Raises:
        UnpicklingError: attributes of a dict, which hide its methods (a state dict has its `_metadata` alone); a second
            part, which goes through setters, that of `num_labels` makes as many labels; or a recurrent layer as torch
            wrote it in 2017, which is set up anew for as many layers as it says.
    """
    if named in _COLLECTIONS and not (isinstance(state, dict) and set(state) <= {"_metadata"}):
        raise pickle.UnpicklingError(f"it sets attributes of a {named.rpartition('.')[2]}")
    if named.startswith(_LIBRARIES) and not isinstance(state, (dict, _Inert)):
        raise pickle.UnpicklingError(f"the state of a {named.rpartition('.')[2]} is no dict")
    if named.startswith("torch.nn.modules.rnn."):
        weights = state.get("_all_weights") if isinstance(state, dict) and "all_weights" not in state else None
        first = weights[0] if isinstance(weights, list) and weights else None
        if not (isinstance(first, list) and first and isinstance(first[0], str)):
            raise pickle.UnpicklingError("it holds a recurrent layer that does not list the names of its weights")


def _weighed(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def weigh(unpickler: Any) -> None:
        load(unpickler)
        unpickler.stack[-1] = _Tuple(unpickler.stack[-1], unpickler.spent)

    return weigh


for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _Rehearsal.dispatch[_code[0]] = _weighed(_Rehearsal.dispatch[_code[0]])


def _rebuilds_plain_tensor(args: tuple[object, ...]) -> bool:
    return (
        len(args) == 4
        and getattr(args[0], "named", None) in REBUILDS_TENSORS
        and getattr(args[1], "named", None) in ("torch.Tensor", "torch.nn.parameter.Parameter")
    )


def rehearse(data: bytes) -> tuple[set[str], str | None]:
    """(the globals that a `torch.save` file names, what stopped the rehearsal or None)."""
    named: set[str] = set()
    try:
        stream = io.BytesIO(_pickle_record(data))
        for _ in range(1 if data[:4] == _ZIP else _LEGACY_HEADERS + 2):
            _Rehearsal(stream, named).load()
    except Exception as error:
        return named, first_line(error)
    return named, None

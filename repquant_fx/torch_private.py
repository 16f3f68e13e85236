"""What this package uses of torch that torch does not promise to keep. No other file spells a private name of torch.

All of it was tried with torch 2.15.0 and with no other version; `docs/reference/versions.md` says which are promised.
When a torch release breaks one of these functions, its test in `tests/test_torch_private.py` fails: mend the function
here, keeping its contract. Long because it is the one place for all of it.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._ops import OpOverload  # one overload of an operator: what a node of an exported graph calls
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.export import ExportedProgram
from torch.nn.modules import module as registration
from torch.utils import _pytree as pytree  # torch's own, since exported programs keep its specs
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "FakeTensorMode",
    "OpOverload",
    "TorchDispatchMode",
    "UnsupportedOperatorException",
    "add_samples",
    "allowed_globals",
    "archive_reader",
    "build_program",
    "children",
    "dtype_codes",
    "fake_mode",
    "has_kernel",
    "largest_size",
    "load_archive",
    "native_functions",
    "parameters_on_meta",
    "plain_path",
    "propagating",
    "put_child",
    "pytree",
    "quick_translation",
    "schema",
    "shape_environment",
    "size_hint",
    "suggested_shapes",
    "translated_operators",
    "value_errors",
    "version",
    "watched_registration",
]

# functions that torch's pickles name: one calls a function that the file chooses and sets attributes on the result; one
# writes out what was expanded; and those that make tensors of storages
REBUILDS_ANY_TYPE = "torch._tensor._rebuild_from_type_v2"
REBUILDS_FROM_DEVICE = "torch._utils._rebuild_device_tensor_from"
REBUILDS_TENSORS = frozenset(
    f"torch._utils._rebuild_{name}" for name in ("tensor_v2", "tensor_v3", "parameter", "parameter_with_state")
)
# the dicts of an nn.Module that hold what it is made of, as its pickled state spells them, and its flags
SLOTS = PARAMETERS, BUFFERS, MODULES = "_parameters", "_buffers", "_modules"
FLAGS = {"_compiled_call_impl": type(None), "_version": int, "_is_fsdp_managed_module": bool}
# loggers of what an export does
EXPORT_LOGGERS = (
    "torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor", "torch.export", "torch.onnx"
)
_FIXES = "Suggested fixes"


# ---- modules and tensors -------------------------------------------------------------------------------------------


def children(module: nn.Module) -> dict[str, nn.Module]:
    """The modules that a module holds, by name; one that has two names has two here (`named_children` gives one)."""
    return {name: child for name, child in module._modules.items() if child is not None}


def put_child(module: nn.Module, name: str, child: nn.Module) -> None:
    """Hold another module under a name. No method of the module runs: it may come from a file."""
    module._modules[name] = child


def version(tensor: Tensor) -> int:
    """How often a tensor was written into; 0 for one made in inference mode, which keeps no count."""
    return 0 if tensor.is_inference() else tensor._version


def plain_path(path: str) -> str:
    """A module's path in dots: strict export writes `L['self'].layers[0]` or `getattr(L['self'].layers, '0')`."""
    while (called := re.fullmatch(r"getattr\((.*), '(\w[\w\-]*)'\)(.*)", path)) is not None:
        path = f"{called.group(1)}.{called.group(2)}{called.group(3)}"
    return (
        re.sub(r"\[['\"]?(\w[\w\-]*)['\"]?\]", r".\1", re.sub(r"^L\['self'\]\.?", "", path))
        .replace("._modules.", ".")
        .strip(".")
    )


# ---- files ---------------------------------------------------------------------------------------------------------


def archive_reader(data: bytes) -> Any:
    """torch's reader of its zip archives: `get_record(name)`, `get_record_size(name)`, `get_all_records()`.

    Tried with torch 2.15.0, and 2.9.0, which has no `get_record_size`. Where it is gone: `zipfile`, with the folder
    that all records of an archive share left out of their names.

    Raises:
        RuntimeError: not such an archive, or a damaged one.
    """
    reader = torch._C.PyTorchFileReader(io.BytesIO(data))
    return reader if hasattr(reader, "get_record_size") else SizedReader(reader, data)


class SizedReader:
    """A reader that has no sizes of its own, with those of the archive's directory."""

    def __init__(self, reader: Any, data: bytes) -> None:
        self._reader = reader
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            # a name that is there twice: the larger one counts against a limit
            self._sizes: dict[str, int] = {}
            for entry in archive.infolist():
                record = entry.filename.partition("/")[2]
                self._sizes[record] = max(entry.file_size, self._sizes.get(record, 0))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def get_record_size(self, record: str) -> int:
        """Bytes of a record."""
        return self._sizes[record]


def allowed_globals() -> set[str]:
    """Dotted names that `torch.load(weights_only=True)` admits without being told to.

    Tried with torch 2.15.0. Where it is gone: an empty set is safe, and refuses honest files; look for the
    unpickler's new table.
    """
    from torch import _weights_only_unpickler

    return set(_weights_only_unpickler._get_allowed_globals())


def dtype_codes() -> Mapping[int, torch.dtype]:
    """The numbers that stand for types of tensors in the documents of a `.pt2`.

    Tried with torch 2.15.0. Where it is gone: the numbers are those of `ScalarType` in `torch._export.serde.schema`.
    """
    from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

    return _SERIALIZE_TO_TORCH_DTYPE


def build_program(
    document: dict[str, Any], weights: Mapping[str, Tensor], constants: Mapping[str, Tensor]
) -> ExportedProgram:
    """The program that the document of a `.pt2` describes, on these tensors; no pickle is read.

    Tried with torch 2.15.0. Where it breaks: see what `torch.export.pt2_archive` calls behind `load_pt2`, and leave
    out the sample inputs, which torch unpickles.

    Raises:
        Exception: of any kind, where the document is not one that this torch writes.
    """
    from torch._export.serde import schema
    from torch._export.serde.serialize import ExportedProgramDeserializer, _dict_to_dataclass

    parsed = _dict_to_dataclass(schema.ExportedProgram, document)
    return ExportedProgramDeserializer().deserialize(parsed, dict(weights), dict(constants), b"")


def add_samples(program: ExportedProgram, samples: tuple[Any, Any] | None) -> None:
    """Give a program its example inputs (args, kwargs), unchecked: whoever uses them checks them.

    Tried with torch 2.15.0. Where it breaks: the public setter `program.example_inputs`, which raises its own errors.
    """
    program._example_inputs = samples


def load_archive(data: bytes) -> ExportedProgram:
    """The program of a `.pt2` as torch reads it, pickles and all: for trusted files only.

    Tried with torch 2.15.0. Where it is gone: `torch.export.load`, which tries an older format as well.
    """
    from torch.export.pt2_archive._package import load_pt2

    return load_pt2(io.BytesIO(data)).exported_programs["model"]


# ---- operators -----------------------------------------------------------------------------------------------------


def schema(operator: OpOverload) -> Any:
    """The schema of an operator: `name`, `is_mutable`, and `arguments` with `name`, `type`, `default_value` and
    `alias_info`.

    Tried with torch 2.15.0. Where it is gone: `torch._C.parse_schema(str(...))` reads the same from the operator's
    text.
    """
    return operator._schema


def has_kernel(operator: OpOverload) -> bool:
    """Whether the dispatcher knows an operator; a few are names that only TorchScript has.

    Tried with torch 2.15.0. Where it is gone: `torch._C._dispatch_dump` lists an operator's kernels as text.
    """
    return bool(torch._C._dispatch_has_kernel(operator.name()))


def native_functions() -> ModuleType:
    """The module of the functions that `torch.nn.functional` takes from C++; pickles name some of them by it.

    Tried with torch 2.15.0. Where it is gone: new files cannot name it either; `torch.nn.functional` serves.
    """
    return torch._C._nn


# ---- fake tensors and symbolic sizes --------------------------------------------------------------------------------


def fake_mode(value: object) -> FakeTensorMode | None:
    """The mode that a fake tensor was made in; None for anything else.

    Tried with torch 2.15.0. Where it is gone: `torch._guards.detect_fake_mode` finds it among a graph's values.
    """
    return value.fake_mode if isinstance(value, FakeTensor) else None


@contextmanager
def propagating(mode: FakeTensorMode) -> Iterator[None]:
    """Within the block values are computed anew in `mode`: constants may be real, and comparing a symbolic size does
    not make it constant.

    Tried with torch 2.15.0. Where it breaks: dynamic sizes turn into numbers in an exported graph, which tests of
    dynamic batches see.
    """
    with ExitStack() as stack:
        stack.enter_context(unset_fake_temporarily())
        if mode.shape_env is not None:
            stack.enter_context(mode.shape_env.suppress_guards())
        mode.allow_non_fake_inputs = True
        yield


def by_python_rules() -> AbstractContextManager[None]:
    """Within the block operators are decomposed by their definitions in Python, which keep symbolic sizes.

    Tried with torch 2.15.0. Where it is gone: see what `torch.fx.experimental.proxy_tensor.make_fx` enters.
    """
    from torch._dispatch.python import enable_python_dispatcher

    return cast("AbstractContextManager[None]", enable_python_dispatcher())


def shape_environment() -> Any:
    """A new environment of symbolic sizes, for a `FakeTensorMode`.

    Tried with torch 2.15.0. Where it is gone: look for what `torch.export.export` makes its own of.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return ShapeEnv()


def value_errors() -> tuple[type[Exception], ...]:
    """What a fake run raises where a size depends on the values of a tensor.

    Tried with torch 2.15.0. Where one is gone: leave it out; such a program is refused with another sentence then.
    """
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode


def size_hint(size: int | torch.SymInt) -> int | None:
    """A size; a symbolic one at its example value, None where it has none.

    Tried with torch 2.15.0. Where it is gone: `torch.fx.experimental.symbolic_shapes.guarding_hint_or_throw` or its
    successor.
    """
    if isinstance(size, int):
        return size
    value = getattr(size.node, "hint", None)
    return None if value is None else int(value)


def largest_size(size: torch.SymInt) -> int | None:
    """The largest value that the graph allows for a symbolic size, None where it has no limit.

    Tried with torch 2.15.0. Where it is gone: the `range_constraints` of an exported program hold the same by symbol.
    """
    environment = size.node.shape_env
    assert environment is not None  # a symbol without one is no symbol of an export
    upper = environment.bound_sympy(size.node.expr).upper
    return int(upper) if upper.is_Integer else None


def suggested_shapes(error: BaseException, shapes: Any) -> Any | None:
    """`dynamic_shapes` with the bounds that the message of a failed export asks for; None where it suggests nothing.

    Tried with torch 2.15.0. Where the text has changed, None: models with a table of positions fail to export with a
    dynamic length.

    Args:
        error: of `torch.export.export`.
        shapes: what it was called with.
    """
    from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes

    head, separator, fixes = str(error).partition(_FIXES)
    return (
        refine_dynamic_shapes_from_suggested_fixes(head + _FIXES + fixes.partition("\n\n")[0], shapes)
        if separator
        else None
    )


# ---- ONNX ----------------------------------------------------------------------------------------------------------

_translations: dict[int, Mapping[Any, list[Any]]] = {}  # torch's own, by opset and operator

@contextmanager
def quick_translation() -> Iterator[None]:
    """Within the block `torch.onnx.export` leaves out what a program of few operators does not need: its table of
    translations is made once per process, and a program in which nothing is to be decomposed is not traced again.

    Tried with torch 2.15.0. Where the names are gone nothing is left out: the files are right, and take longer.
    """
    try:
        from torch.onnx._internal.exporter import _fx_passes
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        read, decompose = ONNXRegistry.__dict__["from_torchlib"], _fx_passes.decompose_with_registry
    except (ImportError, AttributeError, KeyError):
        yield
        return

    def remembered(opset_version: int) -> Any:
        registry = ONNXRegistry()
        registry._opset_version = opset_version
        if opset_version not in _translations:
            _translations[opset_version] = read.__get__(None, ONNXRegistry)(opset_version).functions
        known = _translations[opset_version]
        registry.functions = {target: list(rules) for target, rules in known.items()}  # an export adds its own
        return registry

    def where_needed(program: ExportedProgram, registry: Any) -> ExportedProgram:
        translated = {target for target in registry.functions if isinstance(target, str)}
        return program if _is_decomposed(program, translated) else decompose(program, registry)

    ONNXRegistry.from_torchlib = staticmethod(remembered)  # type: ignore[method-assign,assignment]
    _fx_passes.decompose_with_registry = where_needed  # type: ignore[assignment]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = read  # type: ignore[method-assign]
        _fx_passes.decompose_with_registry = decompose


def translated_operators(opset_version: int) -> frozenset[str]:
    """Names of the operators that `torch.onnx` translates as they are, such as `aten::linear`.

    Tried with torch 2.15.0. Where the names are gone: none, so that whoever asks tries a translation.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        return frozenset()
    with quick_translation():
        functions = ONNXRegistry.from_torchlib(opset_version).functions
    return frozenset(target for target in functions if isinstance(target, str))


def _is_decomposed(program: ExportedProgram, translated: set[str]) -> bool:
    """Whether every operator of a program is translated as it is, and none writes into its arguments."""
    operators = [node.target for node in program.graph.nodes if node.op == "call_function"]
    if any(True for module in program.graph_module.children()):  # branches have graphs of their own
        return False
    return all(
        not isinstance(target, OpOverload) or (target.name() in translated and not schema(target).is_mutable)
        for target in operators
    )


# ---- modules -------------------------------------------------------------------------------------------------------


@contextmanager
def watched_registration(
    tensor: Callable[[nn.Module, str, Tensor | None], None], child: Callable[[nn.Module, str, nn.Module | None], None]
) -> Iterator[None]:
    """Within the block `tensor` hears of every parameter and buffer that a module registers, `child` of every module;
    both may raise.

    Tried with torch 2.15.0. Where the hooks are gone: wrap `nn.Module.register_parameter`, `register_buffer` and
    `add_module`; without either, the limits on the size of a model are not enforced.
    """
    with ExitStack() as stack:
        for register, heard in (
            (registration.register_module_parameter_registration_hook, tensor),
            (registration.register_module_buffer_registration_hook, tensor),
            (registration.register_module_module_registration_hook, child),
        ):
            stack.callback(register(heard).remove)
        yield


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built in the block have parameters without memory (on the meta device); their buffers are real.

    Tried with torch 2.15.0. Where `register_parameter` is called no more: build within `torch.device("meta")` and
    compute the buffers anew.
    """
    register = nn.Module.register_parameter

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False))

    nn.Module.register_parameter = empty  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]

"""`.pt2` files of torch.export.save, screened before torch loads them.

Loading one can execute code in more ways than unpickling: symbolic expressions are evaluated by sympy, targets are looked up by
name and called, names are pasted into generated source, tree specs import modules, compiled libraries are opened. So every
record and every string that reaches one of these must match a strict grammar. The screen reads the archive with torch's own
reader, from the same bytes that are loaded afterwards.
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from repquant_fx import limits
from repquant_fx.errors import InputError, ModelFileError
from repquant_fx.frontends.pickled import check_pickle, first_line

_MODEL = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_CONFIGS = {"data/weights/model_weights_config.json": re.compile(r"weight_\d+"),
            "data/constants/model_constants_config.json": re.compile(r"tensor_\d+")}
_RECORDS = re.compile(r"models/model\.json|data/sample_inputs/model\.pt|data/weights/(weight_\d+|model_weights_config\.json)"
                      r"|data/constants/(tensor_\d+|model_constants_config\.json)|archive_format|archive_version|byteorder|version"
                      r"|\.data/(version|serialization_id)|\.format_version|\.storage_alignment|extra/[\w.\-/]+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DOTTED = re.compile(r"(?!.*__\w+__)[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*", re.ASCII)  # no __class__ and the like
_SYMBOL = re.compile(r"[a-z]{1,4}[0-9]{1,9}")
# torch counts up to the number of an unbacked symbol
_CONSTRAINED = re.compile(r"(u|zuf)[0-9]{1,4}|(?!u|zuf)[A-Za-z0-9_+\-*/(), ]{1,200}")
_FLOAT = re.compile(r"-?[0-9]+(\.[0-9]*)?(e[+-]?[0-9]{1,4})?")

_OPERATORS = {f"_operator.{name}" for name in ("eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv and_ or_ lshift "
                                               "rshift getitem").split()}
_SYMBOLIC = {f"torch.sym_{name}" for name in "not int float ite max min sqrt".split()} | {"math.trunc", "math.ceil", "math.floor"}
_HIGHER_ORDER = {f"torch.ops.higher_order.{name}" for name in ("cond", "wrap_with_set_grad_enabled", "wrap_with_autocast")}
_OVERLOAD = re.compile(r"torch\.ops\.(aten|prims|quantized_decomposed)\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)

_RELATIONS = "Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan Eq Ne Lt Le Gt Ge"
_FUNCTIONS = set(f"""Add Mul Max Min Abs floor ceiling And Or Not Piecewise ExprCondPair {_RELATIONS} FloorDiv ModularIndexing
    Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv FloatTrueDiv IntTrueDiv TruncToFloat TruncToInt RoundToInt ToFloat
    Identity IsNonOverlappingAndDenseIndicator""".split())
_POWERS = {"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"}  # of small exponents, few times: numbers must stay small
_CONSTANTS = {"true", "false", "oo", "int_oo", "zoo", "nan"}
_MOST_NODES, _MOST_POWERS, _LARGEST_EXPONENT = 2000, 4, 64
_MOST_TERMS = 10_000  # of an expression when expanded, which torch does

_CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "torch.Size"}


def load_exported(data: bytes, where: str, *, allow_pickle: bool = False) -> tuple[ExportedProgram, tuple[Tensor, ...], bool]:
    """(the program, its example inputs, whether these were stored in the file).

    Inputs that are not stored are drawn with seed 0, with batch 2 where the batch is dynamic. A static batch, 1 or other,
    is kept as it is.

    Args:
        data: the bytes of the file.
        where: its name, for messages.
        allow_pickle: the user trusts the file: skip the screen.

    Raises:
        ModelFileError: damaged, unsafe (the message names the record), of another torch, or with inputs that are not
            positional tensors.
    """
    try:
        if not allow_pickle:
            _screen(data, where)
        program = _load(data, where)
        if not allow_pickle:
            program._guards_code = []  # source text; capture compares outputs instead
        inputs = _stored_inputs(program, where)
        return (program, inputs, True) if inputs is not None else (program, _drawn_inputs(program, where), False)
    except InputError:
        raise
    except Exception as error:  # a document of another form than torch writes
        raise ModelFileError(f"not a model file: {where} is damaged ({first_line(error)})") from error


def is_safe_expression(text: str) -> bool:
    """Whether a symbolic expression, in the form of sympy's srepr, consists of known functions, symbols and numbers."""
    if len(text) > 20_000:
        return False
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    nodes = list(ast.walk(tree))
    powers = sum(isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _POWERS for node in nodes)
    return len(nodes) <= _MOST_NODES and powers <= _MOST_POWERS and _is_safe_node(tree) and _terms(tree) <= _MOST_TERMS


def is_safe_target(target: str) -> bool:
    """Whether the target of a node is an operator of torch that computes, and does not touch files."""
    if target in _OPERATORS | _SYMBOLIC | _HIGHER_ORDER:
        return True
    match = _OVERLOAD.fullmatch(target)
    if match is None:
        return False
    namespace, name, overload = match.groups()
    operator = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if not isinstance(operator, torch._ops.OpOverload) or not torch._C._dispatch_has_kernel(operator.name()):
        return False
    return not any("file" in argument.name for argument in operator._schema.arguments)


def _is_safe_node(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) and abs(node.value) < 2**63
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant) and _is_safe_node(node.operand)
    if isinstance(node, ast.Name):
        return node.id in _CONSTANTS or bool(_SYMBOL.fullmatch(node.id))
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return False
    name, arguments = node.func.id, node.args
    if not all(keyword.arg and isinstance(keyword.value, ast.Constant) and type(keyword.value.value) in (bool, int)
               for keyword in node.keywords):
        return False
    if name in ("Symbol", "Float"):  # sympify would evaluate a string anywhere else
        text = arguments[0].value if len(arguments) == 1 and isinstance(arguments[0], ast.Constant) else None
        return isinstance(text, str) and bool((_SYMBOL if name == "Symbol" else _FLOAT).fullmatch(text))
    if name in ("Integer", "Rational"):
        return not node.keywords and all(_is_number(argument) for argument in arguments)
    if name in _POWERS:
        return len(arguments) == 2 and _is_safe_node(arguments[0]) and _is_small(arguments[1])
    return name in _FUNCTIONS and all(_is_safe_node(argument) for argument in arguments)


def _terms(node: ast.expr) -> float:
    """How many terms an expression of safe nodes has when it is expanded, at most."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return 1
    if node.func.id in ("Symbol", "Float", "Integer", "Rational"):
        return 1
    terms = [_terms(argument) for argument in node.args]
    if node.func.id in _POWERS and len(terms) == 2:
        inside = [inner.func.id for inner in ast.walk(node.args[0]) if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name)]
        if terms[0] > _MOST_TERMS or not _POWERS.isdisjoint(inside):
            return math.inf  # powers of powers make numbers of any length
        exponents = [abs(n.value) for n in ast.walk(node.args[1]) if isinstance(n, ast.Constant) and isinstance(n.value, int)]
        return float(terms[0] ** max(exponents, default=1))
    return math.prod(terms) if node.func.id == "Mul" else sum(terms)


def _is_number(node: ast.expr) -> bool:
    inner = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(inner, ast.Constant) and type(inner.value) is int and _is_safe_node(node)


def _is_small(node: ast.expr) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Integer", "Rational") and node.args:
        return _is_safe_node(node) and all(_is_small(argument) for argument in node.args)
    inner = node.operand if isinstance(node, ast.UnaryOp) else node
    value = inner.value if isinstance(inner, ast.Constant) else None
    return _is_number(node) and isinstance(value, int) and value <= _LARGEST_EXPONENT


def _screen(data: bytes, where: str) -> None:
    """Refuse what could execute code, or fill the memory, while torch loads the archive."""
    reader = _reader(data, where)
    records = reader.get_all_records()
    for record in records:
        if not _RECORDS.fullmatch(record):
            _refuse(where, record, "is a record that a program need not have")
    if len({record.lower() for record in records}) != len(records):
        _refuse(where, "the archive", "has two records of one name")  # look-ups ignore case
    if _MODEL not in records:
        raise ModelFileError(f"not a model file: {where} is an archive of torch.export without {_MODEL}")
    for config, payloads in _CONFIGS.items():
        if config in records:
            _screen_payloads(reader, config, payloads, where)
    _screen_samples(reader, records, where)
    _screen_program(_json(reader, _MODEL, where), where)


def _reader(data: bytes, where: str) -> Any:
    try:
        return torch._C.PyTorchFileReader(io.BytesIO(data))
    except Exception as error:
        raise ModelFileError(f"not a model file: {where} is truncated or damaged ({first_line(error)})") from error


def _json(reader: Any, record: str, where: str) -> Any:
    try:
        return json.loads(reader.get_record(record).decode())
    except (ValueError, RuntimeError, RecursionError) as error:
        raise ModelFileError(f"not a model file: {record} in {where} is damaged ({first_line(error)})") from error


def _screen_payloads(reader: Any, record: str, allowed: re.Pattern[str], where: str) -> None:
    """Weights and constants must be raw tensors: no pickles, custom objects or opaque objects."""
    config = _json(reader, record, where)
    payloads = config.get("config") if isinstance(config, dict) else None
    if not isinstance(payloads, dict):
        raise ModelFileError(f"not a model file: {record} in {where} is malformed")
    _screen_strings(config, record, where)
    for name, meta in payloads.items():
        path = meta.get("path_name") if isinstance(meta, dict) else None
        if not isinstance(path, str) or not allowed.fullmatch(path):
            _refuse(where, record, f"stores {name!r} as {path!r}, which is not a tensor")
        if meta.get("use_pickle") is not False:
            _refuse(where, record, f"stores {name!r} as a pickle")
        if not _DOTTED.fullmatch(name):
            _refuse(where, record, f"has the name {name[:60]!r}")
        folder = record.rpartition("/")[0]
        if reader.has_record(f"{folder}/{path}") and reader.get_record_size(f"{folder}/{path}") == 0 and _elements(meta) > 0:
            _refuse(where, record, f"declares a size for {name!r} but stores nothing")


def _elements(meta: dict[str, Any]) -> int:
    sizes = (meta.get("tensor_meta") or {}).get("sizes") or []
    return math.prod(size.get("as_int", 1) for size in sizes)


def _screen_samples(reader: Any, records: list[str], where: str) -> None:
    """torch falls back to an unrestricted unpickling where the restricted one fails; so it must not fail."""
    if _SAMPLES not in records or reader.get_record_size(_SAMPLES) == 0:
        return
    try:
        check_pickle(reader.get_record(_SAMPLES), _SAMPLES)
        samples = torch.load(io.BytesIO(reader.get_record(_SAMPLES)), weights_only=True, map_location="cpu")
    except Exception:
        _refuse(where, _SAMPLES, "is a pickle of something other than tensors")
    pending, seen = [samples], set()
    while pending:
        value = pending.pop()
        if isinstance(value, (list, tuple, dict)):
            if value and id(value) in seen:  # each level twice the one below, or inside itself: whoever walks it does not end
                _refuse(where, _SAMPLES, "has one container in two places")
            seen.add(id(value))
            pending.extend(value.values() if isinstance(value, dict) else value)
        elif not isinstance(value, (Tensor, int, float, str, bool, type(None))):
            _refuse(where, _SAMPLES, f"holds a {type(value).__name__}")


def _screen_program(program: Any, where: str) -> None:
    if not isinstance(program, dict) or not isinstance(program.get("graph_module"), dict):
        raise ModelFileError(f"not a model file: {_MODEL} in {where} is malformed")
    for symbol in program.get("range_constraints") or {}:
        if not _CONSTRAINED.fullmatch(symbol):
            _refuse(where, _MODEL, f"constrains the symbol {symbol[:60]!r}")
    for key in ("verifiers", "opset_version", "torch_version", "schema_version"):
        _check_text(program.get(key), where)
    _screen_strings(program["graph_module"], _MODEL, where)


def _check_text(value: object, where: str) -> None:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, str) and not re.fullmatch(r"[\w.+<=\- ]{0,80}", leaf):
            _refuse(where, _MODEL, f"holds the text {leaf[:60]!r}")


def _screen_strings(value: Any, record: str, where: str, key: str = "") -> None:
    """Walk a JSON document; each string is judged by the key that holds it, dict keys that are names as well."""
    if isinstance(value, str):
        if not _is_safe_string(key, value):
            _refuse(where, record, f"has {key} = {value[:80]!r}")
    elif isinstance(value, list):
        for item in value:
            _screen_strings(item, record, where, key)
    elif isinstance(value, dict):
        for inner, item in value.items():
            if not _DOTTED.fullmatch(inner):
                _refuse(where, record, f"has the key {inner[:60]!r}")
            if inner in _REFUSED_KEYS and item:
                _refuse(where, record, f"holds a custom object ({inner})")
            if not (inner == "metadata" and _is_metadata(item)):
                _screen_strings(item, record, where, inner)


def _is_metadata(item: object) -> bool:
    """Free text that is parsed as data only. The keys are checked, since a file chooses its own keys elsewhere."""
    return isinstance(item, dict) and _METADATA.issuperset(item) and all(isinstance(text, str) for text in item.values())


_METADATA = {"stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom", "from_node"}
_REFUSED_KEYS = {"as_custom_obj", "custom_obj", "custom_obj_values", "class_fqn"}


def _is_any_text(_: str) -> bool:
    return True


def _is_name(text: str) -> bool:
    return not text or bool(_NAME.fullmatch(text))


def _is_dotted(text: str) -> bool:
    return not text or bool(_DOTTED.fullmatch(text))


def _is_safe_tree(text: str) -> bool:
    """A tree spec: containers and output classes of transformers only; a context may import modules through `__enum__`."""
    try:
        version, tree = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return False
    return version == 1 and _is_safe_tree_node(tree)


def _is_safe_tree_node(node: Any) -> bool:
    if not isinstance(node, dict) or not isinstance(node.get("children_spec"), list):
        return False
    kind, context = node.get("type"), node.get("context")
    if kind is not None and kind not in _CONTAINERS and not re.fullmatch(r"transformers\.[A-Za-z_.0-9]+", str(kind)):
        return False
    if context is not None and not (isinstance(context, str) and re.fullmatch(r"null|\[(\"\w+\"(, )?)*\]", context)):
        return False
    return all(_is_safe_tree_node(child) for child in node["children_spec"])


# By key: what a string under it may be. Names and paths of attributes are pasted into generated source, targets are called,
# expressions are evaluated. Strings under unlisted keys must be names.
_RULES: dict[str, Callable[[str], bool]] = {
    "target": is_safe_target,
    "as_operator": is_safe_target,
    "expr_str": is_safe_expression,
    "in_spec": _is_safe_tree,
    "out_spec": _is_safe_tree,
    "as_string": _is_any_text,  # an argument, written into source by repr
    "as_strings": _is_any_text,
    "fqn": _is_dotted,
    "parameter_name": _is_dotted,
    "buffer_name": _is_dotted,
    "tensor_constant_name": _is_dotted,
    "user_input_name": _is_dotted,
}


def _is_safe_string(key: str, value: str) -> bool:
    return _RULES.get(key, _is_name)(value)


def _refuse(where: str, record: str, reason: str) -> NoReturn:
    raise ModelFileError(f"{where} is refused before loading, because loading it could execute code: {record} {reason}. "
                         "Pass --allow-pickle if you trust the file")


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs a traceback and a warning for each damaged file; ours is the message."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _load(data: bytes, where: str) -> ExportedProgram:
    from torch.export.pt2_archive._package import load_pt2  # torch.export.load tries an older, unscreened format as well

    _register_outputs_of_transformers(data)
    try:
        with _quiet():
            return load_pt2(io.BytesIO(data)).exported_programs["model"]
    except Exception as error:
        raise ModelFileError(f"{where} cannot be loaded by torch {torch.__version__}: {first_line(error)}. "
                             "Save it again with this torch") from error


def _register_outputs_of_transformers(data: bytes) -> None:
    """Output classes are known to tree specs once their module is imported."""
    for name in set(re.findall(rb"transformers\.(?:modeling_outputs|models\.\w+\.modeling_\w+)(?=\.\w)", data)):
        try:
            importlib.import_module(name.decode())
        except Exception:  # torch says which class it misses
            continue


def _stored_inputs(program: ExportedProgram, where: str) -> tuple[Tensor, ...] | None:
    stored = program.example_inputs
    if not stored:
        return None
    args, kwargs = stored
    if kwargs or not args or not all(isinstance(value, Tensor) for value in args):
        raise ModelFileError(f"{where} was exported with inputs that are not positional tensors; export it again with "
                             "tensors as args and without kwargs")
    return tuple(args)


def _drawn_inputs(program: ExportedProgram, where: str) -> tuple[Tensor, ...]:
    """Normal floats or zeros of integers, by the shapes of the program; a symbolic batch becomes 2, others their hint."""
    generator = torch.Generator().manual_seed(0)
    users = set(program.graph_signature.user_inputs)
    drawn = []
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in users:
            continue
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise ModelFileError(f"{where}: the input {node.name} is not a tensor; export the module with tensors only")
        shape = tuple(_size(size, first=position == 0) for position, size in enumerate(value.shape))
        limits.check_size(shape, f"{where}: the input {node.name}", value.element_size())
        drawn.append(torch.randn(shape, generator=generator).to(value.dtype) if value.dtype.is_floating_point
                     else torch.zeros(shape, dtype=value.dtype))
    return tuple(drawn)


def _size(size: int | torch.SymInt, *, first: bool) -> int:
    if isinstance(size, int):
        return size
    hint = getattr(size.node, "hint", None)
    return 2 if first or hint is None else int(hint)

"""What the source of a module class puts into its attributes, read without running it.

The kinds are coarse on purpose: a string where a number belongs, or a module where a tensor does, is what a file would
use to make a method mean something else. What cannot be told is `other`, which allows any kind.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

NUMBER, STRING, MAPPING, TENSOR, MODULE, OBJECT, OTHER = (
    "number",
    "string",
    "mapping",
    "tensor",
    "module",
    "object",
    "other",
)
Kinds = frozenset[str]
_NOTHING: Kinds = frozenset()
_UNKNOWN: Kinds = frozenset({OTHER})
_NUMBERS = (int, float, bool, complex, len, max, min, sum, round, abs)
_BY_NAME = {
    "int": NUMBER,
    "float": NUMBER,
    "bool": NUMBER,
    "str": STRING,
    "dict": MAPPING,
    "Dict": MAPPING,
    "Mapping": MAPPING,
    "Tensor": TENSOR,
    "Parameter": TENSOR,
}
_TRANSPARENT = {
    "Optional",
    "Union",
    "Tuple",
    "tuple",
    "List",
    "list",
    "Sequence",
    "Iterable",
    "Final",
    "None",
    "torch",
    "nn",
    "typing",
}
_ANYTHING = ast.Await(ast.Constant(None))  # an expression that no kind is known of
_ARITHMETIC = (ast.Sub, ast.Div, ast.FloorDiv, ast.Pow)


@dataclass
class Members:
    """Attributes of a class.

    Attributes:
        kinds: by name, what the class assigns; None alone is no kind.
        looks_up: whether a method fetches an attribute of `self` under a name that is no constant.
    """

    kinds: dict[str, Kinds] = field(default_factory=dict)
    looks_up: bool = False

    def add(self, name: str, kinds: Kinds) -> None:
        self.kinds[name] = self.kinds.get(name, _NOTHING) | kinds


@functools.cache
def members_of(cls: type) -> Members:
    """The attributes that a class and its bases assign. Where there is no source, there are none."""
    found = Members()
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        space = vars(sys.modules[base.__module__])
        for statement in class_body(base):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                found.add(statement.target.id, _annotated(statement.annotation))
            elif isinstance(statement, ast.FunctionDef):
                _read(statement, space, found)
    return found


def class_body(cls: type) -> list[ast.stmt]:
    """The statements of a class; none where its source is not at hand, as for classes made while the program runs."""
    return _classes_of(cls.__module__).get(cls.__qualname__, [])


@functools.cache
def _classes_of(module: str) -> dict[str, list[ast.stmt]]:
    """The bodies of the classes of a Python module, by qualified name."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, SyntaxError):
        return {}
    found: dict[str, list[ast.stmt]] = {}
    waiting: list[tuple[str, ast.AST]] = [("", tree)]
    while waiting:
        prefix, node = waiting.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found[prefix + child.name] = child.body
                waiting.append((f"{prefix}{child.name}.", child))
            elif isinstance(child, (ast.If, ast.Try)):
                waiting.append((prefix, child))
    return found


def looks_up_by_name(function: ast.AST) -> bool:
    """Whether code fetches, sets or imports something under a name that is not written in it."""
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        called = (
            node.func.id
            if isinstance(node.func, ast.Name)
            else node.func.attr
            if isinstance(node.func, ast.Attribute)
            else ""
        )
        if called in ("eval", "exec", "__import__", "import_module") and not (
            called == "eval" and isinstance(node.func, ast.Attribute)
        ):
            return True
        if called in (
            "getattr",
            "setattr",
            "delattr",
            "attrgetter",
            "get_submodule",
            "get_parameter",
            "get_buffer",
        ) and not all(isinstance(name, ast.Constant) for name in node.args[1:2] or node.args[:1]):
            return True
    return False


def _read(function: ast.FunctionDef, space: dict[str, Any], found: Members) -> None:
    found.looks_up |= looks_up_by_name(function)
    named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    if not named:
        return
    own = named[0].arg
    given = {name.arg: _annotated(name.annotation) if name.annotation else _UNKNOWN for name in named}
    for name, default in _defaults(function.args):
        given[name] = given[name] | _kinds(default, space, {})
    local = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    given.update(dict.fromkeys(local, _UNKNOWN))  # assigned anew: whatever it was, it may be something else now
    for node in ast.walk(function):
        for target, value in _assigned(node):
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == own:
                annotation = node.annotation if isinstance(node, ast.AnnAssign) else None
                kinds = _kinds(value, space, given) if value is not None else _NOTHING
                found.add(
                    target.attr, kinds | _annotated(annotation) if annotation is not None and OTHER in kinds else kinds
                )
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            if kind := {"register_buffer": TENSOR, "register_parameter": TENSOR, "add_module": MODULE}.get(
                node.func.attr
            ):
                found.add(str(node.args[0].value), frozenset({kind}))


def _defaults(arguments: ast.arguments) -> Iterator[tuple[str, ast.expr]]:
    positional = [*arguments.posonlyargs, *arguments.args]
    for name, default in zip(positional[len(positional) - len(arguments.defaults) :], arguments.defaults, strict=True):
        yield name.arg, default
    for name, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if value is not None:
            yield name.arg, value


def _assigned(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """(target, value) of an assignment; the value of unpacking is not known."""
    if isinstance(node, ast.AnnAssign):
        yield node.target, node.value
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            for part in target.elts if isinstance(target, (ast.Tuple, ast.List)) else (target,):
                yield part, node.value if part is target else _ANYTHING
    elif isinstance(node, (ast.For, ast.With, ast.NamedExpr)):
        bound = [item.optional_vars for item in node.items] if isinstance(node, ast.With) else [node.target]
        yield from ((target, _ANYTHING) for target in bound if target is not None)


def _annotated(annotation: ast.expr | None) -> Kinds:
    """Kinds that a type annotation allows."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            annotation = ast.parse(annotation.value, mode="eval").body
        except SyntaxError:
            return _UNKNOWN
    if annotation is None:
        return _UNKNOWN
    found: set[str] = set()
    for node in ast.walk(annotation):
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
        if (isinstance(node, ast.Constant) and isinstance(node.value, str)) or name == "Literal":
            return _UNKNOWN
        if name in _BY_NAME:
            found.add(_BY_NAME[name])
        elif name is not None and name not in _TRANSPARENT:
            return _UNKNOWN
    return frozenset(found)


def _kinds(value: ast.expr, space: dict[str, Any], given: dict[str, Kinds]) -> Kinds:
    """Kinds of the value of an expression."""

    def inner(*parts: ast.expr) -> Kinds:
        return _NOTHING.union(*(_kinds(part, space, given) for part in parts))

    if isinstance(value, ast.Constant):
        return _NOTHING if value.value is None else frozenset({STRING if isinstance(value.value, str) else NUMBER})
    if isinstance(value, ast.Name):
        return given.get(value.id, _UNKNOWN)
    if isinstance(value, ast.IfExp):
        return inner(value.body, value.orelse)
    if isinstance(value, ast.BoolOp):
        return inner(*value.values)
    if isinstance(value, (ast.Tuple, ast.List)):
        return inner(*value.elts)
    if isinstance(value, ast.Compare) or (isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.Not)):
        return frozenset({NUMBER})
    if isinstance(value, ast.BinOp):
        return frozenset({NUMBER, TENSOR}) if isinstance(value.op, _ARITHMETIC) else inner(value.left, value.right)
    if isinstance(value, ast.JoinedStr):
        return frozenset({STRING})
    if isinstance(value, (ast.Dict, ast.DictComp)):
        return frozenset({MAPPING})
    return _made(_resolved(value.func, space, given)) if isinstance(value, ast.Call) else _UNKNOWN


def _resolved(function: ast.expr, space: dict[str, Any], given: dict[str, Kinds]) -> object:
    """The function or class that a call names, None where that is not known."""
    if isinstance(function, ast.Name):
        return None if function.id in given else space.get(function.id, vars(builtins).get(function.id))
    if isinstance(function, ast.Attribute):
        holder = _resolved(function.value, space, given)
        return vars(holder).get(function.attr) if inspect.ismodule(holder) else None
    return None


def _made(called: object) -> Kinds:
    """Kinds of what a call gives."""
    if called in _NUMBERS:
        return frozenset({NUMBER})
    if called is dict:
        return frozenset({MAPPING})
    if isinstance(called, type):
        if issubclass(called, Tensor):
            return frozenset({TENSOR})
        if issubclass(called, nn.Module):
            return frozenset({MODULE})
        return (
            _UNKNOWN
            if called.__module__ in ("builtins", "functools", "collections") or issubclass(called, (tuple, torch.Size))
            else frozenset({OBJECT})
        )
    if called in (
        torch.zeros,
        torch.ones,
        torch.empty,
        torch.arange,
        torch.tensor,
        torch.randn,
        torch.full,
        torch.linspace,
    ):
        return frozenset({TENSOR})
    return _UNKNOWN

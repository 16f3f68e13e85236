"""The program of a `.pt2`, screened as a document before torch builds anything from it.

Symbolic expressions are evaluated by sympy, targets are looked up by name and called, names are pasted into generated
source, tree specs name classes. So every string that reaches one of these must match a strict grammar, and there are
only so many.
What inference does not need is taken out rather than judged: guards, stack traces, other annotations.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from repquant_fx.errors import ModelFileError
from repquant_fx.frontends.pt2_archive import MODEL, refuse
from repquant_fx.frontends.pt2_expressions import is_safe_expression
from repquant_fx.frontends.pt2_operators import is_safe_target
from repquant_fx.security.names import check_names
from repquant_fx.torch_private import plain_path

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,500}", re.ASCII)
_TEXT = re.compile(r"[\w.+<=\- ]{0,80}", re.ASCII)  # versions and names of verifiers
# torch counts up to the number of an unbacked symbol
_CONSTRAINED = re.compile(r"(u|zuf)[0-9]{1,4}|(?!u|zuf)[A-Za-z0-9_+\-*/(), ]{1,200}", re.ASCII)
_CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "torch.Size"}
_OUTPUT_CLASS = re.compile(r"transformers\.(modeling_outputs|models\.\w+\.modeling_\w+)\.\w+", re.ASCII)
_STACK_KEY = re.compile(r"[\w.\-@]*", re.ASCII)  # L__self__blocks.0
_CONTEXT = re.compile(r'null|\[("\w+"(, )?)*\]', re.ASCII)

_MOST_NODES, _MOST_VALUES, _MOST_EXPRESSIONS, _DEEPEST, _LONGEST_TEXT = 50_000, 8_000_000, 500_000, 40, 10_000
_MOST_LEAVES, _DEEPEST_TREE = 10_000, 50
_KEPT_METADATA = "nn_module_stack"
_REFUSED_KEYS = {
    "as_custom_obj",
    "custom_obj",
    "custom_obj_values",
    "class_fqn",
    "as_operator",
    "as_string_to_argument",
}


def screen_program(program: dict[str, Any], where: str) -> dict[str, Any]:
    """The document without what inference does not need, once every string and count in it is found harmless.

    Raises:
        ModelFileError: malformed, or with something that could execute code or would not end.
    """
    module = program.get("graph_module")
    constraints = program.get("range_constraints") or {}
    if not isinstance(module, dict) or not isinstance(module.get("graph"), dict) or not isinstance(constraints, dict):
        raise ModelFileError(f"not a model file: {MODEL} in {where} is malformed")
    for symbol, bounds in constraints.items():
        values = list(bounds.values()) if isinstance(bounds, dict) else [""]
        if not _CONSTRAINED.fullmatch(symbol) or not all(value is None or type(value) is int for value in values):
            refuse(where, MODEL, f"constrains the symbol {symbol[:60]!a}")
    kept: dict[str, Any] = {
        key: program.get(key)
        for key in ("verifiers", "opset_version", "torch_version", "schema_version")
        if key in program
    }
    _check_texts(kept, where)
    module = {
        **module,
        "metadata": {},
        "treespec_namedtuple_fields": {},
        "module_call_graph": _calls(module.get("module_call_graph"), where),
    }
    _Walk(where).value(module)
    return {**kept, "graph_module": module, "range_constraints": constraints, "guards_code": []}


def output_classes(program: dict[str, Any]) -> set[str]:
    """Modules of transformers whose output classes a screened program returns."""
    text = json.dumps(program["graph_module"]["module_call_graph"])
    return {found.group(0).rpartition(".")[0] for found in _OUTPUT_CLASS.finditer(text)}


def _check_texts(value: object, where: str, depth: int = 0) -> None:
    if isinstance(value, (dict, list)) and depth < 4 and len(value) < 100:
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_texts(item, where, depth + 1)
    elif not isinstance(value, (int, type(None))) and not (isinstance(value, str) and _TEXT.fullmatch(value)):
        refuse(where, MODEL, f"holds the text {ascii(value)[:60]}")


def _calls(calls: Any, where: str) -> list[Any]:
    """How the whole model is called; the entries of its modules serve to rebuild these only."""
    if not isinstance(calls, list) or not calls or not isinstance(calls[0], dict) or calls[0].get("fqn") != "":
        raise ModelFileError(f"not a model file: {MODEL} in {where} does not say how the model is called")
    return calls[:1]


class _Walk:
    """A walk through a JSON document: each string is judged by the key that holds it, keys that are names as well."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.values = self.nodes = self.depth = 0
        self.expressions: set[str] = set()
        self.expression_text = 0

    def value(self, value: Any, key: str = "") -> None:
        self.values += 1
        if self.values > _MOST_VALUES:
            refuse(self.where, MODEL, f"holds more than {_MOST_VALUES} values")
        if isinstance(value, str):
            self.text(key, value)
        elif isinstance(value, (list, dict)):
            self.depth += 1
            if self.depth > _DEEPEST:
                refuse(self.where, MODEL, f"is nested more than {_DEEPEST} deep")
            self.items(key, value)
            self.depth -= 1

    def items(self, key: str, value: list[Any] | dict[str, Any]) -> None:
        if isinstance(value, list):
            self.nodes += len(value) if key == "nodes" else 0
            if self.nodes > _MOST_NODES:
                refuse(self.where, MODEL, f"has more than {_MOST_NODES} nodes")
            for item in value:
                self.value(item, key)
            return
        if key == "nodes" and "metadata" in value:
            value["metadata"] = self.metadata(value["metadata"])
        if key == "as_device" or (key == "device" and "type" in value):
            self.device(value)
        for inner, item in value.items():
            if not _is_name(inner):
                refuse(self.where, MODEL, f"has the key {inner[:60]!a}")
            if inner in _REFUSED_KEYS and item:
                refuse(self.where, MODEL, f"holds a custom object ({inner})")
            if inner != "metadata" or key != "nodes":
                self.value(item, inner)

    def text(self, key: str, text: str) -> None:
        if len(text) > _LONGEST_TEXT:
            refuse(self.where, MODEL, f"has a {key} of {len(text)} characters")
        if key == "expr_str":
            if text in self.expressions:
                return
            self.expressions.add(text)
            self.expression_text += len(text)
            if self.expression_text > _MOST_EXPRESSIONS:
                refuse(self.where, MODEL, f"has more than {_MOST_EXPRESSIONS} characters of symbolic expressions")
        if key in ("target", "as_operator") and not is_safe_target(text):
            refuse(self.where, MODEL, f"has target = {text[:80]!a}, which is not an operator that inference needs")
        if key in _PATHS and text:
            check_names([text], self.where)
        elif not _RULES.get(key, _is_name)(text):
            refuse(self.where, MODEL, f"has {key} = {text[:80]!a}")

    def device(self, device: dict[str, Any]) -> None:
        if device.get("type") != "cpu" or device.get("index") not in (None, 0):
            kind = ascii(device.get("type"))[:20]
            raise ModelFileError(
                f"{self.where} was exported on the device {kind}; "
                "export it again with the model and its inputs on the CPU"
            )

    def metadata(self, found: Any) -> dict[str, str]:
        """Of what is known about a node, the modules that it came from, if these have names."""
        stack = found.get(_KEPT_METADATA) if isinstance(found, dict) else None
        if not isinstance(stack, str) or not stack:
            return {}
        entries = []
        for entry in stack[:_LONGEST_TEXT].split(";"):
            key, path = (entry.split(",", 2) + [""])[:2]
            path = plain_path(path.strip())
            if not _STACK_KEY.fullmatch(key):
                refuse(self.where, MODEL, f"names a module {entry[:80]!a}")
            check_names([path.split("@")[0]] if path else [], self.where)
            entries.append(f"{key},{path},torch.nn.Module")  # nothing reads its class
        return {_KEPT_METADATA: ";".join(entries)}


def _is_name(text: str) -> bool:
    return not text or bool(_NAME.fullmatch(text))


def _is_any_text(_: str) -> bool:
    return True


def _is_float(text: str) -> bool:
    return text in ("Infinity", "-Infinity", "NaN")


def _is_safe_tree(text: str) -> bool:
    """Containers and output classes of transformers only; a context may import modules through `__enum__`."""
    try:
        version, tree = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return False
    return version == 1 and _tree_leaves(tree, 0) <= _MOST_LEAVES


def _tree_leaves(node: Any, depth: int) -> float:
    """How many nodes a tree has; infinite where one is not known."""
    if not isinstance(node, dict) or not isinstance(node.get("children_spec"), list) or depth > _DEEPEST_TREE:
        return math.inf
    kind, context = node.get("type"), node.get("context")
    if kind is not None and kind not in _CONTAINERS and not (isinstance(kind, str) and _OUTPUT_CLASS.fullmatch(kind)):
        return math.inf
    if context is not None and not (isinstance(context, str) and _CONTEXT.fullmatch(context)):
        return math.inf
    return 1 + sum(_tree_leaves(child, depth + 1) for child in node["children_spec"])


# By key: what a string under it may be. Names and paths of attributes are pasted into generated source, targets
# are called, expressions are evaluated. Strings under unlisted keys must be names.
_RULES: dict[str, Callable[[str], bool]] = {
    "target": _is_any_text,  # judged before
    "expr_str": is_safe_expression,
    "in_spec": _is_safe_tree,
    "out_spec": _is_safe_tree,
    "as_string": _is_any_text,  # an argument, written into source by repr
    "as_strings": _is_any_text,
    "as_float": _is_float,
    "as_floats": _is_float,
    "real": _is_float,
    "imag": _is_float,
}
_PATHS = {"parameter_name", "buffer_name", "tensor_constant_name", "user_input_name"}

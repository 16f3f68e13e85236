"""Symbolic expressions of `.pt2` files: a strict grammar of what sympy is given to evaluate, and how much of it.

They are sizes, such as `Mul(Integer(2), Symbol('s0'))`, as sympy's srepr writes them. sympy evaluates what it parses,
and an innocent-looking term can keep it busy for hours; so functions, numbers, lengths and powers are bounded.
"""

from __future__ import annotations

import ast
import math
import re

_SYMBOL = re.compile(r"[a-z]{1,4}[0-9]{1,9}", re.ASCII)
_FLOAT = re.compile(r"-?[0-9]{1,40}(\.[0-9]{0,60})?(e[+-]?[0-9]{1,2})?", re.ASCII)
_ASSUMPTIONS = {"integer", "positive", "nonnegative", "real", "nonzero", "negative", "finite"}
_MOST_DIGITS = 128  # of a Float; torch writes 53 bits

_RELATIONS = "Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan Eq Ne Lt Le Gt Ge"
_FUNCTIONS = set(
    f"""Add Mul Max Min Abs floor ceiling And Or Not Piecewise ExprCondPair {_RELATIONS} FloorDiv
    ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv FloatTrueDiv IntTrueDiv TruncToFloat
    TruncToInt RoundToInt ToFloat Identity IsNonOverlappingAndDenseIndicator""".split()
)
_BRANCHING = {
    "Max",
    "Min",
    "And",
    "Or",
    "Piecewise",
    "Mod",
    "PythonMod",
    "ModularIndexing",
    "IsNonOverlappingAndDenseIndicator",
}
_POWERS = {
    "Pow",
    "PowByNatural",
    "FloatPow",
    "LShift",
    "RShift",
}  # of small exponents, few times: numbers must stay small
_CONSTANTS = {"true", "false", "oo", "int_oo", "zoo", "nan"}
_MOST_TEXT, _MOST_NODES, _MOST_BRANCHING, _MOST_POWERS, _LARGEST_EXPONENT = 8_000, 600, 16, 4, 64
_MOST_TERMS = 1_000  # of an expression when expanded, which torch does


def is_safe_expression(text: str) -> bool:
    """Whether an expression, as sympy's srepr writes it, consists of few known functions, symbols and numbers."""
    if len(text) > _MOST_TEXT:
        return False
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    nodes = list(ast.walk(tree))
    called = [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    if len(nodes) > _MOST_NODES or sum(name in _POWERS for name in called) > _MOST_POWERS:
        return False
    return (
        sum(name in _BRANCHING for name in called) <= _MOST_BRANCHING
        and _is_safe_node(tree)
        and _terms(tree) <= _MOST_TERMS
    )


def _is_safe_node(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) and abs(node.value) < 2**63
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant) and _is_safe_node(node.operand)
    if isinstance(node, ast.Name):
        return node.id in _CONSTANTS or bool(_SYMBOL.fullmatch(node.id))
    if (
        not isinstance(node, ast.Call)
        or not isinstance(node.func, ast.Name)
        or not _are_safe_keywords(node.func.id, node.keywords)
    ):
        return False
    name, arguments = node.func.id, node.args
    if name in ("Symbol", "Float"):  # sympify would evaluate a string anywhere else
        text = arguments[0].value if len(arguments) == 1 and isinstance(arguments[0], ast.Constant) else None
        return isinstance(text, str) and bool((_SYMBOL if name == "Symbol" else _FLOAT).fullmatch(text))
    if name in ("Integer", "Rational"):
        return all(_is_number(argument) for argument in arguments)
    if name in _POWERS:
        return len(arguments) == 2 and _is_safe_node(arguments[0]) and _is_small(arguments[1])
    return name in _FUNCTIONS and all(_is_safe_node(argument) for argument in arguments)


def _are_safe_keywords(name: str, keywords: list[ast.keyword]) -> bool:
    """Assumptions of a symbol, and a precision of few digits: sympy takes the memory for as many as it is told."""
    given = [
        (keyword.arg, keyword.value.value if isinstance(keyword.value, ast.Constant) else None) for keyword in keywords
    ]
    if name == "Symbol":
        return all(key in _ASSUMPTIONS and type(value) is bool for key, value in given)
    if name == "Float":
        return all(
            key in ("precision", "dps") and type(value) is int and 0 < value <= _MOST_DIGITS for key, value in given
        )
    return not given


def _terms(node: ast.expr) -> float:
    """How many terms an expression of safe nodes has when it is expanded, at most."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return 1
    if node.func.id in ("Symbol", "Float", "Integer", "Rational"):
        return 1
    terms = [_terms(argument) for argument in node.args]
    if node.func.id in _POWERS and len(terms) == 2:
        inside = [
            inner.func.id
            for inner in ast.walk(node.args[0])
            if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name)
        ]
        if terms[0] > _MOST_TERMS or not _POWERS.isdisjoint(inside):
            return math.inf  # powers of powers make numbers of any length
        exponents = [
            abs(n.value) for n in ast.walk(node.args[1]) if isinstance(n, ast.Constant) and isinstance(n.value, int)
        ]
        return float(terms[0] ** max(exponents, default=1))
    return math.prod(terms) if node.func.id == "Mul" else sum(terms)


def _is_number(node: ast.expr) -> bool:
    inner = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(inner, ast.Constant) and type(inner.value) is int and _is_safe_node(node)


def _is_small(node: ast.expr) -> bool:
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("Integer", "Rational")
        and node.args
    ):
        return _is_safe_node(node) and all(_is_small(argument) for argument in node.args)
    inner = node.operand if isinstance(node, ast.UnaryOp) else node
    value = inner.value if isinstance(inner, ast.Constant) else None
    return _is_number(node) and isinstance(value, int) and abs(value) <= _LARGEST_EXPONENT

"""Whether a task's own function can keep anything from one call to the next, by the source of its module.

Most tasks bring a few lines of Python: a pattern that is replaced, a label that is looked up. Where a module holds nothing but
functions, patterns and constants, imports only libraries that keep nothing for it, and writes to nothing but its functions' own
variables and arguments, its functions give the same for the same, however often they are called. All else counts as keeping a
state.
"""

from __future__ import annotations

import ast
import functools
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_LIBRARIES = {
    "__future__", "ast", "collections", "datasets", "functools", "itertools", "json", "math", "numpy", "operator", "re",
    "statistics", "string", "textwrap", "typing", "unicodedata",
}  # fmt: skip
_NAMES = {"__import__", "delattr", "eval", "exec", "globals", "input", "open", "random", "setattr", "vars"}
_STATEMENTS = (ast.Global, ast.Nonlocal, ast.ClassDef, ast.AsyncFunctionDef)
_CONSTANT_CALLS = {"re.compile", "frozenset", "tuple"}


def keeps_no_state(function: Any) -> bool:
    if not isinstance(function, types.FunctionType) or function.__closure__ or function.__qualname__ != function.__name__:
        return False
    try:
        return _is_stateless(Path(function.__code__.co_filename).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return False


@functools.lru_cache(maxsize=256)
def _is_stateless(source: str) -> bool:
    """Of a whole module: its functions call each other."""
    tree = ast.parse(source)
    own = {name for node in tree.body for name in _names_of(node)}
    return all(map(_is_plain_statement, tree.body)) and all(_is_harmless(node, own) for node in ast.walk(tree))


def _names_of(statement: ast.stmt) -> Iterable[str]:
    """What a statement of a module defines."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [(one.asname or one.name).partition(".")[0] for one in statement.names]
    if isinstance(statement, ast.FunctionDef):
        return [statement.name]
    return [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def _is_plain_statement(statement: ast.stmt) -> bool:
    match statement:
        case ast.Import(names=names):
            return all(one.name.partition(".")[0] in _LIBRARIES for one in names)
        case ast.ImportFrom(module=module, level=0):
            return str(module).partition(".")[0] in _LIBRARIES
        case ast.FunctionDef(decorator_list=decorators):
            return not decorators
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
            return _is_constant(value)
    return False


def _is_constant(value: ast.expr) -> bool:
    """Whether nothing can be written into a value."""
    match value:
        case ast.Constant():
            return True
        case ast.Tuple(elts=parts):
            return all(map(_is_constant, parts))
        case ast.UnaryOp(operand=operand):
            return _is_constant(operand)
        case ast.Call(func=called, args=arguments, keywords=[]):
            return ast.unparse(called) in _CONSTANT_CALLS and all(map(_is_literal, arguments))
    return False


def _is_literal(value: ast.expr) -> bool:
    return all(isinstance(node, (ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Load)) for node in ast.walk(value)) or (
        ast.unparse(value).startswith("re.") and isinstance(value, ast.Attribute)
    )


def _is_harmless(node: ast.AST, own: set[str]) -> bool:
    """own: names of the module itself."""
    match node:
        case ast.arguments(defaults=defaults, kw_defaults=more):
            return all(one is None or _is_constant(one) for one in (*defaults, *more))
        case ast.Attribute(attr=name, ctx=context):
            return isinstance(context, ast.Load) and name not in _NAMES
        case ast.Subscript(value=value, ctx=context):
            return isinstance(context, ast.Load) or (_root(value) not in own and _root(value) is not None)
        case ast.Name(id=name):
            return name not in _NAMES
    return not isinstance(node, _STATEMENTS)


def _root(value: ast.expr) -> str | None:
    """The variable that an expression such as a[0]["b"] is a part of; None where it is a part of something else."""
    while isinstance(value, ast.Subscript):
        value = value.value
    return value.id if isinstance(value, ast.Name) else None

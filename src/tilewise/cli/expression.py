"""A mask written as text becomes a mask, without `eval`.

Understood are the names of the masks that can be written down, with or without parentheses, arguments that are
literals, and `&`, `|`, `~` between them. Anything else is refused with the place where it stands.
"""

from __future__ import annotations

import ast
from typing import Any, NoReturn

from ..masks.algebra import Mask
from ..masks.primitives import blocks, causal, dense, documents, intervals, lengths, prefix, window

MASKS = {make.__name__: make for make in (blocks, causal, dense, documents, intervals, lengths, prefix, window)}

# Python's own parser may crash on expressions nested many thousands deep, which this keeps out of its reach.
_LONGEST = 10_000


def parse(text: str) -> Mask:
    """The mask that `text` writes, such as "causal & window(256)" or 'prefix(64) | causal("end")'.

    Raises:
        ValueError: the text is no such expression, or a mask refuses the values of its arguments.
        TypeError: a mask refuses their types or their number.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"mask: the expression has {len(text)} characters, expected at most {_LONGEST}")
    try:
        return _mask(text.strip(), ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"mask: {text!r} is not an expression: {error.msg}") from None
    except (MemoryError, RecursionError):
        raise ValueError("mask: the expression is nested too deeply") from None


def _mask(text: str, node: ast.expr) -> Mask:
    match node:
        case ast.BinOp(left, ast.BitAnd(), right):
            return _mask(text, left) & _mask(text, right)
        case ast.BinOp(left, ast.BitOr(), right):
            return _mask(text, left) | _mask(text, right)
        case ast.UnaryOp(ast.Invert(), part):
            return ~_mask(text, part)
        case ast.Name(name):
            return _call(text, node, name, [], {})
        case ast.Call(ast.Name(name), args, keywords):
            named = {keyword.arg: _literal(text, keyword.value) for keyword in keywords if keyword.arg}
            if len(named) != len(keywords):
                _refuse(text, node, "takes its arguments one by one, not from **")
            return _call(text, node, name, [_literal(text, arg) for arg in args], named)
        case ast.BoolOp() | ast.UnaryOp(ast.Not(), _):
            _refuse(text, node, "is not how masks combine; write & for and, | for or, ~ for not")
    _refuse(text, node, "is neither a mask nor a combination of masks with &, | and ~")


def _call(text: str, node: ast.expr, name: str, args: list[Any], named: dict[str, Any]) -> Mask:
    if name not in MASKS:
        _refuse(text, node, f"is not a mask that can be written here; expected {', '.join(MASKS)}")
    try:
        return MASKS[name](*args, **named)
    except TypeError as error:
        # Python's own complaints about a call ("missing 1 required positional argument") do not name the expression.
        raise TypeError(f"mask: {ast.get_source_segment(text, node)}: {error}") from None


def _literal(text: str, node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        _refuse(text, node, "is not a literal; numbers, strings, None, True, False and lists of them are")


def _refuse(text: str, node: ast.expr, why: str) -> NoReturn:
    piece = ast.get_source_segment(text, node)
    raise ValueError(f"mask: {piece!r} (column {node.col_offset + 1} of {text!r}) {why}")

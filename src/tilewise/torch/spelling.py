"""A mask as text, arrays and integers, and back: the form in which it passes torch's dispatcher.

An operator of torch takes tensors, numbers and strings. The text holds the structure alone, so it is the same for all
calls of a layer and its parse is remembered; integers travel beside it, so that a compiled program may leave them open.

    causal("end") & lengths(k=tensor)   ->   And((Causal("end",None),Lengths(None,T)))     T: the next tensor
    window(128) | prefix(n)             ->   Or((Window(I,None,None,None),Prefix(I)))      I: the next integer
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._arrays import family_of, torch_of
from ..masks import primitives as _primitives  # noqa: F401  (defines the kinds that a text may name)
from ..masks.algebra import Mask
from ..masks.primitives.predicate import Predicate, name_of, named

_NAME = re.compile(r"Predicate\((\d+)\)")
_LARGEST = 2**62  # torch's integers have 64 bits; larger ones are part of the text

_compiled: list[Predicate] = []  # those made in compiled programs, which may run for as long as the process


def _below(kind: type[Mask]) -> Iterator[type[Mask]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from _below(sub)


_KINDS = {kind.__name__: kind for kind in _below(Mask)}
_FIELDS = {name: tuple(field.name for field in dataclasses.fields(kind)) for name, kind in _KINDS.items()}


def spell(mask: Mask, tensors: list[Tensor], integers: list[int]) -> str:
    """The mask's text; its arrays and integers are appended to the two lists, in the order in which it names them."""
    kind = type(mask)
    if isinstance(mask, Predicate):
        return f"Predicate({_name(mask)})"
    parts = [_field(getattr(mask, name), tensors, integers) for name in _FIELDS[kind.__name__]]
    return f"{kind.__name__}({','.join(parts)})"


def read(text: str, tensors: Sequence[Tensor], integers: Sequence[int]) -> Mask | None:
    """The mask of a text, or None of an empty one.

    Raises:
        RuntimeError: a predicate in it is no longer alive, or belongs to another process.
    """
    return _build(_parsed(text), iter(tensors), iter(integers)) if text else None


def has_predicate(text: str) -> bool:
    """Whether a function of positions is part of the mask."""
    return "Predicate(" in text


def predicates_of(text: str) -> list[Predicate]:
    """The predicates in it. Whoever wants to read the text later holds them until then."""
    return [_alive(name) for name in _NAME.findall(text)] if has_predicate(text) else []


def _field(value: Any, tensors: list[Tensor], integers: list[int]) -> str:
    if value is None:
        return "None"
    if isinstance(value, Mask):
        return spell(value, tensors, integers)
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return "(" + "".join([_field(part, tensors, integers) + "," for part in value]) + ")"
    if isinstance(value, Tensor):
        tensors.append(value)
        return "T"
    if family_of(value) == "numpy":
        tensors.append(torch_of(value))
        return "T"
    if abs(value) > _LARGEST:
        return str(value)
    integers.append(value)
    return "I"


def _name(mask: Predicate) -> str:
    if not torch.compiler.is_compiling():
        return name_of(mask)
    # One made outside the program has its name, on which the compiler guards; one made inside it gets one now.
    name = getattr(mask, "_name", None)
    if name is not None:
        return name
    return _name_outside(mask) if mask.function.__code__.co_freevars else _name_for_good(mask.function)


def _name_outside(mask: Predicate) -> str:
    """A function that looks at values of the program cannot be a constant in it: the program is cut in two here."""
    return name_of(mask)


def _name_for_good(function: Any) -> str:
    mask = Predicate(function)
    _compiled.append(mask)
    return name_of(mask)


# What `torch.compiler.disable` and `assume_constant_result` do, which would load the whole compiler just to set these.
_name_outside._torchdynamo_disable = True  # type: ignore[attr-defined]
_name_for_good._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Slot(NamedTuple):
    """ "T", the next tensor, or "I", the next integer."""

    name: str


class _Function(NamedTuple):
    """The predicate of a name."""

    name: str


class _Tree(NamedTuple):
    """A mask of a kind; its fields in order."""

    kind: type[Mask]
    parts: tuple[Any, ...]


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Any:
    return _template(ast.parse(text, mode="eval").body)


def _template(node: ast.expr) -> Any:
    match node:
        case ast.Name(name):
            return _Slot(name)
        case ast.Tuple(parts):
            return [_template(part) for part in parts]
        case ast.Call(ast.Name("Predicate"), [name]):
            return _Function(str(ast.literal_eval(name)))
        case ast.Call(ast.Name(name), parts):
            return _Tree(_KINDS[name], tuple(_template(part) for part in parts))
    return ast.literal_eval(node)


def _alive(name: str) -> Predicate:
    mask = named(name)
    if mask is None:
        raise RuntimeError(
            "mask: this program holds a predicate whose function is gone or belongs to another process; "
            "make the mask again and trace again, or write it with the other masks, which can be stored"
        )
    return mask


def _build(template: Any, tensors: Iterator[Tensor], integers: Iterator[int]) -> Any:
    match template:
        case _Slot("T"):
            return next(tensors)
        case _Slot():
            return next(integers)
        case _Function(name):
            return _alive(name)
        case _Tree(kind, parts):
            # Field by field, not through __init__: it was checked when it was first made.
            mask = object.__new__(kind)
            for name, part in zip(_FIELDS[kind.__name__], parts, strict=True):
                object.__setattr__(mask, name, _build(part, tensors, integers))
            return mask
        case list():
            return tuple(_build(part, tensors, integers) for part in template)
    return template

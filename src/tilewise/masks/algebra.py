"""Masks as values, and `&`, `|`, `~` between them.

A mask says which key positions a query position may see; True means "attend". It is a frozen value: a hashable
structure plus named array operands, and combining masks builds a small tree and never touches Sq * Sk of anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from .._arrays import Array, dtype_name, family_of, introduce
from .ranges import Ranges
from .site import Site

# Under which names torch asks `Mask.__torch_function__` for the two operators.
_AND = ("__and__", "__rand__", "and_", "bitwise_and")
_OR = ("__or__", "__ror__", "or_", "bitwise_or")


@dataclass(frozen=True, eq=False)
class Mask:
    """Base of all masks. Subclasses are frozen dataclasses that name their array fields in `arrays`.

    A primitive answers two questions: `ranges` (or `labels`), its lowered form where it has one, and `visible`, its
    definition element by element, from which everything else can be derived.
    """

    arrays: ClassVar[tuple[str, ...]] = ()
    told: ClassVar[bool] = True  # whether its fields say all about it

    def __post_init__(self) -> None:
        introduce()
        for name in self.arrays:
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, np.asarray(value))

    def __and__(self, other: Mask) -> Mask:
        return And((*_parts(self, And), *_parts(as_mask(other), And)))

    def __or__(self, other: Mask) -> Mask:
        return Or((*_parts(self, Or), *_parts(as_mask(other), Or)))

    def __rand__(self, other: object) -> Mask:
        return as_mask(other) & self

    def __ror__(self, other: object) -> Mask:
        return as_mask(other) | self

    def __invert__(self) -> Mask:
        return Not(self)

    # NumPy would otherwise take `array & mask` apart element by element.
    __array_ufunc__ = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`mask & tensor` and its like; torch's compiler asks nobody else whether that is a function of tensors."""
        if function.__name__ in _AND:
            return as_mask(args[0]) & as_mask(args[1])
        return as_mask(args[0]) | as_mask(args[1]) if function.__name__ in _OR else NotImplemented

    def __bool__(self) -> bool:
        raise TypeError("mask: a mask has no truth value; combine masks with &, | and ~, not with and, or and not")

    def check(self, site: Site) -> None:
        """Raise ValueError or TypeError, beginning with "mask:", if the mask does not fit the sizes of the call."""

    def extent(self) -> tuple[int, int]:
        """(B, H), the batch rows and heads that the operands tell apart; 1 where all are alike."""
        return 1, 1

    def ranges(self, site: Site) -> Ranges | None:
        """The mask as key intervals per query row, or None when it is not of that form."""
        return None

    def diagonal(self, site: Site) -> int | None:
        """c where the mask is exactly "key j is seen by query i iff j <= i + c" for a known c, else None."""
        return None

    def labels(self, site: Site) -> tuple[Array, Array] | None:
        """The mask as equality of a query label (B', H', Sq) and a key label (B', H', Sk), or None."""
        return None

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        """Whether query i of head h in batch row b sees key j.

        Args:
            b, h, i, j: positions, integer arrays of `site`'s namespace that broadcast against each other in 4-D.

        Returns:
            Booleans that broadcast to the same shape.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """The mask as it is written."""
        return type(self).__name__.lower() + "()"

    def __str__(self) -> str:
        return self.describe()

    def primitives(self) -> Iterator[Mask]:
        """The leaves of the tree, left to right."""
        yield self

    def operands(self) -> list[Array]:
        """The array operands of the tree, left to right: what a framework may trace or move."""
        values = [getattr(leaf, name) for leaf in self.primitives() for name in leaf.arrays]
        return [value for value in values if value is not None and family_of(value) is not None]

    def replace_operands(self, take: Callable[[], Any]) -> Mask:
        """The same tree with each operand replaced by what `take()` gives, in the order of `operands`."""
        changed = {name: take() for name in self.arrays if family_of(getattr(self, name)) is not None}
        # Field by field, not through __init__: a framework may put placeholders where arrays belong.
        copy = object.__new__(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(copy, field.name, changed.get(field.name, getattr(self, field.name)))
        return copy

    def structure(self) -> tuple[Any, ...]:
        """All that is not an array: type, static fields, and the shape and dtype of each operand. Hashable."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return (type(self).__name__, *(_static(value) for value in values))

    @cached_property
    def fixed(self) -> tuple[Any, ...] | None:
        """`structure()` of a mask that is nothing else: without arrays and functions. None of others."""
        return self.structure() if all(leaf.told for leaf in self.primitives()) and not self.operands() else None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask) or self.structure() != other.structure():
            return False
        return all(a is b for a, b in zip(self.operands(), other.operands(), strict=True))

    def __hash__(self) -> int:
        return hash((self.structure(), *map(id, self.operands())))


@dataclass(frozen=True, eq=False)
class _Combination(Mask):
    parts: tuple[Mask, ...]
    symbol: ClassVar[str] = ""

    def check(self, site: Site) -> None:
        for part in self.parts:
            part.check(site)

    def extent(self) -> tuple[int, int]:
        batches, heads = zip(*(part.extent() for part in self.parts), strict=True)
        return told_apart(*batches), told_apart(*heads)

    def describe(self) -> str:
        return f" {self.symbol} ".join(_bracketed(part) for part in self.parts)

    def primitives(self) -> Iterator[Mask]:
        for part in self.parts:
            yield from part.primitives()

    def replace_operands(self, take: Callable[[], Any]) -> Mask:
        return type(self)(tuple(part.replace_operands(take) for part in self.parts))

    def structure(self) -> tuple[Any, ...]:
        return (type(self).__name__, *(part.structure() for part in self.parts))


class And(_Combination):
    """Visible where every part says so."""

    symbol = "&"

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        answer = self.parts[0].visible(site, b, h, i, j)
        for part in self.parts[1:]:
            answer = answer & part.visible(site, b, h, i, j)
        return answer


class Or(_Combination):
    """Visible where any part says so."""

    symbol = "|"

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        answer = self.parts[0].visible(site, b, h, i, j)
        for part in self.parts[1:]:
            answer = answer | part.visible(site, b, h, i, j)
        return answer


@dataclass(frozen=True, eq=False)
class Not(Mask):
    """Visible where the part says it is not."""

    part: Mask

    def check(self, site: Site) -> None:
        self.part.check(site)

    def extent(self) -> tuple[int, int]:
        return self.part.extent()

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        return ~self.part.visible(site, b, h, i, j)

    def describe(self) -> str:
        return "~" + _bracketed(self.part)

    def primitives(self) -> Iterator[Mask]:
        yield from self.part.primitives()

    def replace_operands(self, take: Callable[[], Any]) -> Mask:
        return Not(self.part.replace_operands(take))

    def structure(self) -> tuple[Any, ...]:
        return ("Not", self.part.structure())


def told_apart(*sizes: int) -> int:
    """The common size of axes that broadcast: the one that is not 1, if any."""
    return next((size for size in sizes if size != 1), 1)


def _parts(mask: Mask, kind: type[_Combination]) -> tuple[Mask, ...]:
    return mask.parts if isinstance(mask, kind) else (mask,)


def as_mask(value: object) -> Mask:
    """A mask as it is, a boolean array as a dense mask; TypeError, beginning with "mask:", for all else."""
    if isinstance(value, Mask):
        return value
    from .primitives import dense  # the one primitive that the algebra itself makes, out of `mask & array`

    if family_of(value) is not None:
        return dense(value)
    raise TypeError(f"mask: got {type(value).__name__}, expected a mask or a boolean array")


def _bracketed(mask: Mask) -> str:
    return f"({mask})" if isinstance(mask, _Combination) else str(mask)


def _static(value: Any) -> Any:
    return ("array", tuple(value.shape), dtype_name(value)) if family_of(value) is not None else value

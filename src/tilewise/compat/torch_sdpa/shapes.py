"""Any number of leading axes, broadcast as torch's math path does, brought to (B, H, S, D) and back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .checks import SdpaError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Folding:
    """The tensors of a call in four axes.

    Attributes:
        query: (B, Hq, L, E); key: (B, Hkv, S, E); value: (B, Hkv, S, Ev); views where strides allow.
        mask: (B or 1, Hq or 1, L or 1, S or 1) or None.
        leading: the leading axes of the result. order: those axes as batch and heads have them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    leading: Shape
    order: Shape

    def unfold(self, out: Tensor) -> Tensor:
        """out (B, Hq, L, Ev) as (*leading, L, Ev)."""
        if len(self.leading) == 2:
            return out
        out = out.reshape(*(self.leading[axis] for axis in self.order), *out.shape[2:])
        if self.order == tuple(range(len(self.order))):
            return out
        back = [self.order.index(axis) for axis in range(len(self.order))]
        return out.permute(*back, -2, -1)


def fold(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool) -> Folding:
    """Broadcast the leading axes and fold them.

    Raises:
        SdpaError: sizes that do not fit.
    """
    _check_matrices(query, key, value)
    leading = query.shape[:-2]
    if len(leading) == 2 and leading == key.shape[:-2] == value.shape[:-2]:  # nothing to do, so not for long
        mask = mask if mask is None else _full_rank(mask, (*leading, query.shape[2], key.shape[2]))
        return Folding(query, key, value, mask, leading, (0, 1))
    leading, kv_heads, key, value = _leading(query, key, value, enable_gqa)
    if mask is not None:
        mask = _full_rank(mask, (*leading, query.shape[-2], key.shape[-2]))
    shared = (*leading[:-1], kv_heads) if leading else ()
    query = _expanded(query, leading)
    key, value = _expanded(key, shared), _expanded(value, shared)
    if len(leading) == 2:
        return Folding(query, key, value, mask, leading, (0, 1))
    if mask is not None:
        mask = _unexpanded(mask, len(leading))
    order, batch_axes = _grouped(leading, mask)
    query, key, value = (_four(x, order, batch_axes) for x in (query, key, value))
    return Folding(query, key, value, None if mask is None else _four(mask, order, batch_axes), leading, order)


def _check_matrices(query: Tensor, key: Tensor, value: Tensor) -> None:
    rows, width = key.shape[-2:]
    if width != query.shape[-1]:
        raise SdpaError(
            f"key: has shape {tuple(key.shape)}, expected {query.shape[-1]} features as query {tuple(query.shape)} has"
        )
    if rows != value.shape[-2]:
        raise SdpaError(
            f"value: has shape {tuple(value.shape)}, expected {key.shape[-2]} rows as key {tuple(key.shape)} has"
        )


def _leading(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Shape, int, Tensor, Tensor]:
    """Leading axes of the result, heads of key and value, and these two with that number of heads."""
    shapes = [tuple(x.shape[:-2]) for x in (query, key, value)]
    if not enable_gqa:
        leading = _broadcast(*shapes)
        heads = [shape[-1] if shape else 1 for shape in shapes]
        one_head = bool(leading) and heads[1] == heads[2] == 1  # read by all query heads, so not repeated
        return leading, 1 if one_head else leading[-1] if leading else 1, key, value
    if not all(shapes):
        raise SdpaError(f"enable_gqa: needs an axis of heads, but query has shape {tuple(query.shape)}")
    q_heads, k_heads, v_heads = (shape[-1] for shape in shapes)
    for name, count in (("key", k_heads), ("value", v_heads)):
        if (q_heads % count) if count else q_heads:
            raise SdpaError(
                f"{name}: Number of heads in key and value must divide the number of heads in query, but got {count} "
                f"and {q_heads}"
            )
    leading = (*_broadcast(*(shape[:-1] for shape in shapes)), q_heads)
    if k_heads != v_heads:
        key, value = (x.repeat_interleave(q_heads // x.shape[-3], -3) for x in (key, value))
    return leading, k_heads if k_heads == v_heads else q_heads, key, value


def _broadcast(*shapes: Shape) -> Shape:
    rank = max(len(shape) for shape in shapes)
    full = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    sizes = tuple(next((size for size in axis if size != 1), 1) for axis in zip(*full, strict=True))
    for name, shape in zip(("query", "key", "value"), full, strict=True):
        if any(got not in (1, size) for got, size in zip(shape, sizes, strict=True)):
            raise SdpaError(
                f"{name}: leading axes of query, key and value are {', '.join(map(str, shapes))}; the size of each "
                "must match at every non-singleton dimension"
            )
    return sizes


def _full_rank(mask: Tensor, full: Shape) -> Tensor:
    """The mask with an axis for each of `full`."""
    shape = (1,) * (len(full) - mask.dim()) + tuple(mask.shape)
    if len(shape) != len(full) or any(got not in (1, size) for got, size in zip(shape, full, strict=True)):
        raise SdpaError(
            f"attn_mask: has shape {tuple(mask.shape)}, expected one that broadcasts to {full}; the size of each must "
            "match at every non-singleton dimension"
        )
    return mask[(None,) * (len(full) - mask.dim())]


def _unexpanded(mask: Tensor, leading: int) -> Tensor:
    """The mask with size 1 where it was expanded, so that folding its axes need not write them out."""
    if mask.requires_grad:  # the gradient belongs to every element of the mask as it was given
        return mask
    for axis in range(leading):
        if mask.shape[axis] > 1 and not mask.stride(axis):
            mask = mask.narrow(axis, 0, 1)
    return mask


def _expanded(x: Tensor, leading: Shape) -> Tensor:
    shape = (*leading, *x.shape[-2:])
    return x if tuple(x.shape) == shape else x.expand(shape)


def _grouped(leading: Shape, mask: Tensor | None) -> tuple[Shape, int]:
    """An order of the leading axes, and how many of them are the batch: the rest are heads.

    Attention knows no order of its leading axes but that of the heads within a group. So axes along which the mask
    stays the same stand together, and it need not be repeated to become four-dimensional.
    """
    *batch, head = range(len(leading)) if leading else [0]
    if mask is None or not batch:
        return (*batch, head) if leading else (), len(batch)
    varies = [mask.shape[axis] != 1 for axis in (*batch, head)]
    if len(set(varies[:-1])) == 1:
        return (*batch, head), len(batch)
    other = [axis for axis in batch if varies[axis] != varies[head]]
    same = [axis for axis in batch if varies[axis] == varies[head]]
    return (*other, *same, head), len(other)


def _four(x: Tensor, order: Shape, batch_axes: int) -> Tensor:
    """x (*leading, rows, columns) as (batch, heads, rows, columns)."""
    if order != tuple(range(len(order))):
        x = x.permute(*order, -2, -1)
    sizes = tuple(x.shape)
    batch, heads = 1, 1
    for axis, size in enumerate(sizes[:-2]):
        batch, heads = (batch * size, heads) if axis < batch_axes else (batch, heads * size)
    return x.reshape(batch, heads, *sizes[-2:])

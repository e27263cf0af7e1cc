"""The projections in front of multi-head attention, from packed or separate weights."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from .checks import ShapeError


def project(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    separate: bool,
    weights: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """q (..., E), k, v (..., E), from `packed` (3 E, E) or `weights` (E, E), (E, Ek), (E, Ev).

    Where the inputs are the same array one product serves them together.

    Raises:
        ValueError (also an AssertionError): the weights asked for are missing or of another shape.
    """
    width = query.shape[-1]
    if separate:
        return _separate(query, key, value, weights, bias)
    if packed is None:
        raise ShapeError("in_proj_weight: use_separate_proj_weight is False but in_proj_weight is None")
    if key is value and query is key:
        q, k, v = linear(query, packed, bias).chunk(3, -1)
        return q, k, v
    if key is value:
        first, rest = packed.split([width, 2 * width])
        first_bias, rest_bias = bias.split([width, 2 * width]) if bias is not None else (None, None)
        k, v = linear(key, rest, rest_bias).chunk(2, -1)
        return linear(query, first, first_bias), k, v
    return _separate(query, key, value, packed.chunk(3), bias)


def _separate(
    query: Tensor, key: Tensor, value: Tensor, weights: tuple[Tensor | None, ...], bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    width = query.shape[-1]
    biases = bias.chunk(3) if bias is not None else (None, None, None)
    found = []
    for name, array, weight, offset in zip("qkv", (query, key, value), weights, biases, strict=True):
        if weight is None:
            raise ShapeError(f"{name}_proj_weight: use_separate_proj_weight is True but {name}_proj_weight is None")
        expected = (width, array.shape[-1])
        if tuple(weight.shape) != expected:
            word = {"q": "query", "k": "key", "v": "value"}[name]
            raise ShapeError(
                f"{name}_proj_weight: expecting {word} weights shape of {expected}, but got {tuple(weight.shape)}"
            )
        found.append(linear(array, weight, offset))
    q, k, v = found
    return q, k, v

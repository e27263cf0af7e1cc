"""The two products of attention where a mask hides values that may be NaN or inf.

An ordinary matrix product multiplies hidden values by 0, and 0 * NaN is NaN. These take part only where visible. They
cost several products each, so they serve only those tiles that are partly hidden and hold a value that is not finite.
Each is the other's derivative, so that derivatives of any order are as blind to hidden values (`torch_products.py`).
"""

from __future__ import annotations

from typing import Any

from ..._arrays import Array

_INF, _NAN = float("inf"), float("nan")


def visible_pairs(xp: Any, x: Array, y: Array, visible: Array) -> Array:
    """x (…, M, D), y (…, N, D), visible (…, M, N): x y^T where visible, else 0."""
    return xp.where(visible, x @ y.swapaxes(-1, -2), 0.0)


def visible_sum(xp: Any, a: Array, y: Array, visible: Array) -> Array:
    """a (…, M, N), y (…, N, D), visible (…, M, N): the sum over visible n of a[m, n] y[n], (…, M, D).

    The finite values are summed as usual. What is not finite can only turn a sum into +inf, -inf or NaN; which of them
    is found by counting, with products of zeros and ones, the visible terms of each kind.
    """
    a = xp.where(visible, a, 0.0)
    total = a @ xp.where(xp.isfinite(y), y, 0.0)

    ones, zeros = xp.ones_like(total[..., :1, :1]), xp.zeros_like(total[..., :1, :1])

    def count(where: Array, values: Array) -> Array:
        return xp.where(where, ones, zeros) @ xp.where(values, ones, zeros)

    up, down = a > 0, a < 0
    plus, minus = y == _INF, y == -_INF
    high = count(up, plus) + count(down, minus)
    low = count(up, minus) + count(down, plus)
    # A visible weight that is 0 (or NaN) makes NaN of an inf, and any weight makes NaN of a NaN.
    undefined = count(visible, y != y) + count(visible & ~up & ~down, plus | minus)
    total = xp.where(high > 0, total + _INF, total)
    total = xp.where(low > 0, total - _INF, total)
    return xp.where(undefined > 0, _NAN, total)

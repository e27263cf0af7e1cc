"""Every argument of an attention call but the arrays."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .._arrays import Array, Family, as_array, device_kind, dtype_name, family_of, namespace
from ..contract import Dropout
from ..masks.algebra import Mask
from ..masks.biases import Bias, LoweredBias, as_bias, lower_bias
from ..masks.primitives import dense
from ..masks.site import site_for
from ..problem import ACCUMULATOR, Invariance
from .arrays import Arrays
from .dropout import check_dropout
from .operand import check_framework, check_same_device, real


class Checked(NamedTuple):
    """Arguments that were found right; the mask is checked against the sizes when it is lowered.

    Attributes:
        arrays: queries, keys, values.
        mask, dropout: as given, arrays made masks, the seed made words; scale, softcap: numbers or None.
        biases, sinks: lowered, in the accumulator's dtype but for dense biases.
    """

    arrays: Arrays
    mask: Mask | None
    biases: LoweredBias
    scale: float | None
    softcap: float | None
    sinks: Array | None
    dropout: Dropout | None


def check_options(
    arrays: Arrays,
    mask: Mask | Array | None,
    bias: Bias | Array | None,
    scale: float | None,
    softcap: float | None,
    sinks: Array | float | None,
    dropout: Dropout | None,
) -> Checked:
    """Check all other arguments of `tilewise.attention`.

    Raises:
        ValueError, TypeError: as `check_arrays`.
    """
    family, q, _, _, sizes = arrays
    biases, sink_row = LoweredBias(), None
    if bias is not None or sinks is not None:
        xp = namespace(family, getattr(q, "device", None))
        accumulator = getattr(xp, ACCUMULATOR[dtype_name(q)])
        biases = _bias(bias, family, q, sizes, xp, accumulator)
        sink_row = check_sinks(sinks, family, q)
    return Checked(
        arrays,
        _mask(mask, family, q),
        biases,
        None if scale is None else real("scale", scale),
        _softcap(softcap),
        sink_row,
        _dropout(dropout, family, q),
    )


def check_invariance(invariance: str, dropout: Dropout | None) -> Invariance:
    """Check what a row's bits may not depend on.

    Raises:
        ValueError: unknown, or "row" with dropout whose numbering changes with the call's lengths.
    """
    if invariance == "batch":
        return "batch"
    if invariance != "row":
        raise ValueError(f"invariance: got {invariance!r}, expected 'batch' or 'row'")
    if dropout is not None and dropout.strides is None:
        raise ValueError(
            "invariance: got 'row' with dropout, which numbers pairs by the call's own lengths; expected 'batch', or "
            "Dropout(first=, strides=), which say where the call's pairs stand in a whole"
        )
    return "row"


def _softcap(softcap: float | None) -> float | None:
    if softcap is None:
        return None
    value = real("softcap", softcap)
    if value <= 0:
        raise ValueError(f"softcap: got {value}, expected a positive number or None")
    return value


def _mask(mask: Mask | Array | None, family: Family, q: Array) -> Mask | None:
    if mask is None:
        return None
    if not isinstance(mask, Mask):
        mask = dense(mask)
    operands = mask.operands()
    if not operands:
        return mask
    check_framework("mask", family, operands)
    # A mask on the host is fine wherever q is: it is lowered on the host and its facts follow q.
    check_same_device("mask", family, q, [operand for operand in operands if device_kind(operand) != "cpu"])
    return mask


def _bias(
    bias: Bias | Array | None, family: Family, q: Array, sizes: tuple[int, int, int, int], xp: Any, accumulator: Any
) -> LoweredBias:
    if bias is None:
        return LoweredBias()
    bias = as_bias(bias)
    operands = list(bias.operands())
    check_framework("bias", family, operands)
    check_same_device("bias", family, q, operands)
    return lower_bias(bias, site_for(family, getattr(q, "device", None), sizes, []), xp, accumulator)


def _dropout(dropout: Dropout | None, family: Family, q: Array) -> Dropout | None:
    checked = check_dropout(dropout, family)
    if checked is not None:
        numbers = [value for value in (checked.seed, checked.first) if family_of(value) is not None]
        # As of a mask: numbers on the host are fine wherever q is.
        check_same_device("dropout", family, q, [number for number in numbers if device_kind(number) != "cpu"])
    return checked


def check_sinks(sinks: Any, family: Family, q: Array) -> Array | None:
    """The sinks of queries (B, Hq, Sq, D) as (Hq,) in the accumulator's dtype.

    Raises:
        ValueError, TypeError: beginning with "sinks:".
    """
    if sinks is None:
        return None
    heads, xp = q.shape[1], namespace(family, getattr(q, "device", None))
    accumulator = getattr(xp, ACCUMULATOR[dtype_name(q)])
    sinks = as_array("sinks", sinks)
    if family_of(sinks) is None:
        # As in an array: -inf adds exp(-inf) = 0 to a denominator, as if there were no sink.
        number = sinks if isinstance(sinks, float) and sinks == -math.inf else real("sinks", sinks)
        return xp.full((heads,), number, dtype=accumulator)
    check_framework("sinks", family, [sinks])
    check_same_device("sinks", family, q, [sinks])
    if dtype_name(sinks) not in ACCUMULATOR:
        raise TypeError(f"sinks: got dtype {dtype_name(sinks)}, expected {', '.join(ACCUMULATOR)}")
    if sinks.ndim > 1 or (sinks.ndim == 1 and sinks.shape[0] != heads):
        raise ValueError(f"sinks: has shape {tuple(sinks.shape)}, expected one per query head, ({heads},), or a number")
    return xp.broadcast_to(xp.asarray(sinks, dtype=accumulator), (heads,))

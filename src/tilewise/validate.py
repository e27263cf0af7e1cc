"""Arrays and options become a problem and its operands, or an error that begins with the argument's name.

Everything is checked before any work is done, and nothing the caller owns is changed.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ._arrays import Array, Family, device_kind, device_model, dtype_name, family_of, is_abstract, namespace
from .contract import Dropout, Operands
from .masks.algebra import Mask
from .masks.biases import Bias, LoweredBias, as_bias, lower_bias
from .masks.lower import LoweredMask, lower
from .masks.primitives import Predicate, dense
from .masks.site import site_for
from .problem import ACCUMULATOR, AttentionProblem, BiasFacts, Gradient, Invariance

# Axis names per layout; letters as in semantics: batch, heads, sequence, (head) dimension, tokens.
LAYOUTS = {"bhsd": "(B, H, S, D)", "bshd": "(B, S, H, D)", "thd": "(T, H, D)"}

# Whether equal inputs must give equal bits. TILEWISE_DETERMINISTIC=0 admits kernels of others whose order of summation
# depends on the number of threads or on chance.
DETERMINISTIC = os.environ.get("TILEWISE_DETERMINISTIC", "1") != "0"

_NO_BIAS = LoweredBias()


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A validated call: the problem, its operands in (B, H, S, D) views."""

    problem: AttentionProblem
    operands: Operands


class Arrays(NamedTuple):
    """Queries, keys and values that fit each other: views (B, H, S, D) of one framework; sizes are B, Hq, Sq, Sk."""

    family: Family
    q: Array
    k: Array
    v: Array
    sizes: tuple[int, int, int, int]


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


def check_arrays(q: Array, k: Array, v: Array, layout: str) -> Arrays:
    """Check q, k, v and the layout.

    Raises:
        ValueError, TypeError: whose first word is the argument, with what was got and what was expected.
    """
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(map(repr, LAYOUTS))}")
    family = _family(q, k, v)
    _check_dtypes(q, k, v)
    _check_devices(family, q, k, v)
    q, k, v = _bhsd("q", q, layout), _bhsd("k", k, layout), _bhsd("v", v, layout)
    return Arrays(family, q, k, v, _check_shapes(q, k, v))


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
    biases, sink_row = _NO_BIAS, None
    if bias is not None or sinks is not None:
        xp = namespace(family, getattr(q, "device", None))
        accumulator = getattr(xp, ACCUMULATOR[dtype_name(q)])
        biases = _bias(bias, family, q, sizes, xp, accumulator)
        sink_row = _sinks(sinks, family, q, sizes[1], xp, accumulator)
    return Checked(
        arrays,
        _mask(mask, family, q),
        biases,
        None if scale is None else _real("scale", scale),
        _softcap(softcap),
        sink_row,
        _dropout(dropout, family),
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


def prepare(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask | Array | None,
    bias: Bias | Array | None,
    scale: float | None,
    softcap: float | None,
    sinks: Array | float | None,
    dropout: Dropout | None,
    layout: str,
    return_lse: bool,
    invariance: str = "batch",
) -> Call:
    """Check every argument of `tilewise.attention` and translate them.

    Raises:
        ValueError, TypeError: whose first word is the argument, with what was got and what was expected.
    """
    arrays = check_arrays(q, k, v, layout)
    checked = check_options(arrays, mask, bias, scale, softcap, sinks, dropout)
    same = check_invariance(invariance, checked.dropout)
    family, q, k, v, _ = arrays
    lowered = _lowered(checked)
    operands = Operands(q, k, v, lowered, checked.biases.dense, checked.biases.table, checked.sinks, checked.dropout)
    traced = any(is_abstract(array) for array in (q, k, v, *mask_operands(lowered)))
    problem = problem_of(
        family,
        operands,
        layout=layout,
        scale=checked.scale,
        softcap=checked.softcap,
        gradients=_wanted(family, operands, traced),
        return_lse=bool(return_lse),
        traced=traced,
        invariance=same,
    )
    return Call(problem, operands)


def problem_of(
    family: Family,
    operands: Operands,
    *,
    layout: str,
    scale: float | None,
    softcap: float | None,
    gradients: frozenset[Gradient],
    return_lse: bool = False,
    traced: bool = False,
    invariance: Invariance = "batch",
) -> AttentionProblem:
    """The question that validated operands ask."""
    q, k, v = operands.q, operands.k, operands.v
    model, architecture = device_model(q)
    return AttentionProblem(
        family=family,
        device=device_kind(q),
        dtype=dtype_name(q),
        batch=q.shape[0],
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        q_len=q.shape[2],
        k_len=k.shape[2],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        layout=layout,
        scale=1.0 / math.sqrt(q.shape[3]) if scale is None else scale,
        mask=operands.mask.facts,
        bias=BiasFacts(
            tuple(_four(array.shape) for array in operands.dense),
            operands.table is not None,
            tuple(dtype_name(array) for array in operands.dense),
        ),
        softcap=softcap,
        sinks=operands.sinks is not None,
        dropout=operands.dropout.p if operands.dropout is not None else 0.0,
        gradients=gradients,
        return_lse=return_lse,
        traced=traced,
        invariance=invariance,
        model=model,
        architecture=architecture,
        deterministic=DETERMINISTIC,
    )


def restore(out: Array, lse: Array, layout: str) -> tuple[Array, Array]:
    """out (B, Hq, Sq, Dv) and lse (B, Hq, Sq) as the caller's layout has them; views, no copies."""
    if layout == "bshd":
        return _swap(out, 1, 2), lse
    if layout == "thd":
        return _swap(out[0], 0, 1), lse[0]
    return out, lse


def mask_operands(lowered: LoweredMask) -> list[Array]:
    """The arrays of a lowered mask."""
    bounds = (lowered.ranges.starts, lowered.ranges.stops) if lowered.ranges else ()
    return [array for array in (*bounds, lowered.q_labels, lowered.k_labels, lowered.dense) if array is not None]


def _family(q: Array, k: Array, v: Array) -> Family:
    families: dict[str, Family] = {}
    for name, array in (("q", q), ("k", k), ("v", v)):
        family = family_of(array)
        if family is None:
            raise TypeError(
                f"{name}: got {type(array).__name__}, expected a NumPy array, a torch tensor or a jax array"
            )
        families[name] = family
        if family != families["q"]:
            raise TypeError(f"{name}: is a {family} array, but q is a {families['q']} array; expected one framework")
    return families["q"]


def _check_dtypes(q: Array, k: Array, v: Array) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        dtype = dtype_name(array)
        if dtype not in ACCUMULATOR:
            raise TypeError(f"{name}: got dtype {dtype}, expected {', '.join(ACCUMULATOR)}")
        if dtype != dtype_name(q):
            raise TypeError(f"{name}: got dtype {dtype}, but q has {dtype_name(q)}; q, k and v must share a dtype")


def _check_devices(family: Family, q: Array, k: Array, v: Array) -> None:
    if family != "torch":
        return  # NumPy has one device; jax places and reports by itself
    for name, array in (("k", k), ("v", v)):
        if array.device != q.device:
            raise ValueError(f"{name}: is on {array.device}, but q is on {q.device}; expected one device")


def _bhsd(name: str, array: Array, layout: str) -> Array:
    rank = len(LAYOUTS[layout].split(","))
    if array.ndim != rank:
        raise ValueError(
            f"{name}: has shape {tuple(array.shape)}, expected {rank} axes {LAYOUTS[layout]} for layout={layout!r}"
        )
    if layout == "bhsd":
        return array
    return _swap(array, 1, 2) if layout == "bshd" else _swap(array, 0, 1)[None]


def _swap(array: Array, a: int, b: int) -> Array:
    return array.swapaxes(a, b)


def _check_shapes(q: Array, k: Array, v: Array) -> tuple[int, int, int, int]:
    (batch, q_heads, q_len, head_dim), (_, kv_heads, k_len, _) = q.shape, k.shape
    if head_dim < 1:
        raise ValueError(f"q: has head dimension {head_dim}, expected at least 1")
    if v.shape[3] < 1:
        raise ValueError(f"v: has head dimension {v.shape[3]}, expected at least 1")
    for name, what, axis, got, expected in (
        ("k", "batch size", 0, k, batch),
        ("v", "batch size", 0, v, batch),
        ("k", "head dimension", 3, k, head_dim),
        ("v", "heads", 1, v, kv_heads),
        ("v", "keys", 2, v, k_len),
    ):
        if got.shape[axis] != expected:
            other = "k" if what in ("heads", "keys") else "q"
            raise ValueError(f"{name}: has {got.shape[axis]} as {what}, expected {expected} as {other} has")
    if (q_heads % kv_heads) if kv_heads else q_heads:
        raise ValueError(f"k: has {kv_heads} heads, expected a divisor of q's {q_heads} heads")
    return batch, q_heads, q_len, k_len


def _softcap(softcap: float | None) -> float | None:
    if softcap is None:
        return None
    value = _real("softcap", softcap)
    if value <= 0:
        raise ValueError(f"softcap: got {value}, expected a positive number or None")
    return value


def _real(name: str, value: Any) -> float:
    """A finite real number; the value is part of the plan, so tracers and arrays that vary cannot be taken."""
    if isinstance(value, float):
        value = value.__float__()  # unlike float(), fixes a number that torch's compiler would leave open
    if (
        is_abstract(value)
        or isinstance(value, bool | str | bytes)
        or (getattr(value, "ndim", 0) > 0 and np.size(value) != 1)
    ):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a real number known at the call")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a real number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: got {number}, expected a finite number")
    return number


def _mask(mask: Mask | Array | None, family: Family, q: Array) -> Mask | None:
    if mask is None:
        return None
    if not isinstance(mask, Mask):
        mask = dense(mask)
    operands = mask.operands()
    if not operands:
        return mask
    _check_framework("mask", family, operands)
    # A mask on the host is fine wherever q is: it is lowered on the host and its facts follow q.
    _check_same_device("mask", family, q, [operand for operand in operands if device_kind(operand) != "cpu"])
    return mask


def _lowered(checked: Checked) -> LoweredMask:
    mask, (family, q, _, _, sizes) = checked.mask, checked.arrays
    operands = [] if mask is None else mask.operands()
    if mask is not None and any(isinstance(leaf, Predicate) for leaf in mask.primitives()):
        operands.append(q)  # a function may close over tracers; it is asked in the call's own world
    return lower(mask, site_for(family, getattr(q, "device", None), sizes, operands))


def _bias(
    bias: Bias | Array | None, family: Family, q: Array, sizes: tuple[int, int, int, int], xp: Any, accumulator: Any
) -> LoweredBias:
    if bias is None:
        return LoweredBias()
    bias = as_bias(bias)
    operands = list(bias.operands())
    _check_framework("bias", family, operands)
    _check_same_device("bias", family, q, operands)
    return lower_bias(bias, site_for(family, getattr(q, "device", None), sizes, []), xp, accumulator)


def _sinks(sinks: Any, family: Family, q: Array, heads: int, xp: Any, accumulator: Any) -> Array | None:
    if sinks is None:
        return None
    if family_of(sinks) is None:
        return xp.full((heads,), _real("sinks", sinks), dtype=accumulator)
    _check_framework("sinks", family, [sinks])
    _check_same_device("sinks", family, q, [sinks])
    if "float" not in dtype_name(sinks):
        raise TypeError(f"sinks: got dtype {dtype_name(sinks)}, expected floats")
    if sinks.ndim > 1 or (sinks.ndim == 1 and sinks.shape[0] != heads):
        raise ValueError(f"sinks: has shape {tuple(sinks.shape)}, expected one per query head, ({heads},), or a number")
    return xp.broadcast_to(xp.asarray(sinks, dtype=accumulator), (heads,))


def _dropout(dropout: Dropout | None, family: Family) -> Dropout | None:
    if dropout is None:
        return None
    if not isinstance(dropout, Dropout):
        raise TypeError(f"dropout: got {type(dropout).__name__}, expected tilewise.Dropout(p, seed) or None")
    p = _real("dropout", dropout.p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: got p = {p}, expected a probability from 0 to 1")
    if isinstance(dropout.stream, bool) or not isinstance(dropout.stream, int) or not 0 <= dropout.stream < 2**64:
        raise ValueError(f"dropout: got stream = {dropout.stream!r}, expected an int from 0 to 2^64 - 1")
    strides = dropout.strides
    if strides is None:
        if not isinstance(dropout.first, int) or dropout.first != 0:
            raise ValueError("dropout: got first without strides, expected both or neither")
    elif len(strides) != 4 or not all(isinstance(n, int | np.integer) and -(2**63) <= n < 2**63 for n in strides):
        raise ValueError(f"dropout: got strides = {strides!r}, expected four integers of 64 bits")
    elif not any(strides):
        raise ValueError("dropout: got strides = (0, 0, 0, 0), expected pairs of different numbers")
    if not p:
        return None
    first: Any = 0 if strides is None else _words("first", dropout.first, family)
    return replace(dropout, p=p, seed=_words("seed", dropout.seed, family), first=first)


def _words(name: str, seed: Any, family: Family) -> Any:
    """A 64-bit number as (low, high) 32-bit words: two ints, or an array of two where it is an array."""
    if isinstance(seed, int | np.integer) and not isinstance(seed, bool):
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"dropout: got {name} = {seed}, expected an integer of 64 bits")
        return int(seed) & 0xFFFFFFFF, (int(seed) >> 32) & 0xFFFFFFFF
    kind = family_of(seed)
    if kind is None or (kind != family and kind != "numpy"):
        raise TypeError(
            f"dropout: got a {name} of type {type(seed).__name__}, expected an int or an integer array of q's framework"
        )
    if kind == "jax" and str(seed.dtype).startswith("key<"):
        seed = sys.modules["jax"].random.key_data(seed)
    if not dtype_name(seed).startswith(("int", "uint")) or math.prod(seed.shape) not in (1, 2):
        raise TypeError(
            f"dropout: got a {name} of dtype {dtype_name(seed)} and shape {tuple(seed.shape)}, expected 1 or 2 integers"
        )
    words = seed.reshape(-1)
    if kind == "numpy":
        low, *high = (int(word) for word in words)
        return (low & 0xFFFFFFFF, high[0] & 0xFFFFFFFF) if high else (low & 0xFFFFFFFF, (low >> 32) & 0xFFFFFFFF)
    xp = namespace(family, getattr(seed, "device", None))
    if words.shape[0] == 1:
        narrow = dtype_name(words) in ("int8", "int16", "int32", "uint8", "uint16", "uint32")
        # A narrow signed seed continues its sign, as the same number does in 64 bits; shifts by 32 need 64 bits.
        high = words >> 31 if narrow and dtype_name(words).startswith("int") else 0 * words if narrow else words >> 32
        words = xp.concatenate([words, high], 0)
    if kind == "jax":
        return words.astype(xp.uint32)
    return words.to(xp.int64) & 0xFFFFFFFF


def _check_framework(name: str, family: Family, operands: list[Array]) -> None:
    for operand in operands:
        kind = family_of(operand)
        if kind not in (family, "numpy"):
            raise TypeError(
                f"{name}: holds a {kind} array, but q is a {family} array; expected a {family} or NumPy array"
            )


def _check_same_device(name: str, family: Family, q: Array, operands: list[Array]) -> None:
    for operand in operands:
        if family == "torch" and family_of(operand) == "torch" and operand.device != q.device:
            raise ValueError(f"{name}: is on {operand.device}, but q is on {q.device}; expected one device")


def _wanted(family: Family, operands: Operands, traced: bool) -> frozenset[Gradient]:
    """The operands whose gradient will be asked: torch knows; jax may differentiate whatever it traces."""
    named: list[tuple[Gradient, Array | None]] = [("q", operands.q), ("k", operands.k), ("v", operands.v)]
    named += [("bias", array) for array in operands.dense]
    named += [("table", operands.table), ("sinks", operands.sinks)]
    if family == "jax":
        return frozenset(name for name, array in named if array is not None) if traced else frozenset()
    if family == "torch" and sys.modules["torch"].is_grad_enabled():
        return frozenset(name for name, array in named if array is not None and array.requires_grad)
    return frozenset()


def _four(shape: Any) -> tuple[int, int, int, int]:
    a, b, c, d = (int(size) for size in shape)
    return a, b, c, d

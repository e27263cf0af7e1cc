"""The door of attention over a sequence that is spread over a mesh: inside a `shard_map`, or around one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import jax

from ...contract import Dropout
from ...distributed import Kind, Layout, Schedule, all_gather, choose_strategy, grid, ring, ulysses
from ...distributed.cost import pick
from ...masks.algebra import Mask
from ...masks.biases import Bias
from ...validate import check_arrays, restore
from .device import Settings, of_shards
from .order import devices_of, equal_layout, names_of
from .spread import devices_along, of_whole_arrays
from .whole import Whole, whole_call

Array = Any
Strategy = Literal["auto", "ring", "all_gather", "ulysses", "grid"]
_KERNELS = ("native", "portable")


def context_parallel_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask | Array | None = None,
    bias: Bias | Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | float | None = None,
    dropout: Dropout | None = None,
    layout: str = "bhsd",
    return_lse: bool = False,
    kernel: str | None = None,
    axis_name: str | tuple[str, ...] = "sp",
    strategy: Strategy = "auto",
    sharding: Kind = "contiguous",
    mesh: Any = None,
) -> Any:
    """`tilewise.attention` over sequences that are spread over the devices of a mesh.

    Inside `shard_map`, q, k and v are this device's shards, of one size on all devices; with `mesh` they are whole
    arrays, and this function makes the `shard_map`. Masks, biases and dropout are those of the whole sequence, written
    in its own positions and the same on every device, so any mask of the language means what it means on one device.

    Differentiable in reverse. The backward pass is a course of its own: memory is linear in what one device holds
    (but for "all_gather", linear in Sk), and gradients of keys and values travel in float32. Forward mode is defined
    for "ulysses" alone. The program has one step for each visit of keys, so it grows with the number of devices.

    Args:
        q, k, v: (B, Hq, Sq / devices, D), (B, Hkv, Sk / devices, D), (B, Hkv, Sk / devices, Dv) inside `shard_map`.
        mask, bias, scale, softcap, sinks, dropout: as for `tilewise.attention`, in global positions. Boolean masks and
            dense biases may be given whole, (…, Sq, Sk), or inside `shard_map` as this device's rows,
            (…, Sq / devices, Sk).
        layout: "bhsd" or "bshd".
        return_lse: also return lse of this device's rows, with a gradient.
        kernel: "native" or "portable"; None lets the planner choose. Predicates run on the portable one.
        axis_name: the mesh axis, or axes, that the sequence is spread over; for "grid" the axes of the ring and, last,
            the one along which heads are spread.
        strategy: "ring" passes keys and values round, each device only as far as somebody needs them; "all_gather"
            gives every device all of them; "ulysses" exchanges sequences for heads, needs Hq divisible by the devices
            and gives the bits of one device; "grid" does that along the last axis and a ring along the others; "auto"
            chooses by the cost table of `tilewise.distributed`.
        sharding: which rows a device holds: "contiguous", "zigzag" or "stripe", see `tilewise.distributed.Layout`;
            `tilewise.jax.shard` puts whole arrays in that order.
        mesh: makes the `shard_map` over `axis_name`; other axes of the mesh, automatic ones, are left to jax.

    Returns:
        out, and with `return_lse` lse, of this device's rows, or whole with `mesh`; as `tilewise.attention`.

        Gradients of operands that all devices hold alike (biases given whole, tables, slopes, sinks) are summed over
        the devices by `shard_map` itself; with `check_vma=False` and a gradient taken inside, each device has its own
        contribution.

    Raises:
        ValueError, TypeError: an argument is wrong; the message begins with its name.
        KernelRefused: the kernel asked for cannot run the problem.
    """
    names = names_of(axis_name)
    if kernel is not None and kernel not in _KERNELS:
        raise ValueError(f"kernel: got {kernel!r}, expected {' or '.join(map(repr, _KERNELS))} or None")
    if layout == "thd":
        raise ValueError(
            "layout: got 'thd', expected 'bhsd' or 'bshd'; packed sequences are one batch row and a documents mask"
        )
    arrays = check_arrays(q, k, v, layout)
    if arrays.family != "jax":
        raise TypeError(f"q: is a {arrays.family} array, expected a jax array")
    ranks, inner = (devices_of(n) if mesh is None else devices_along(mesh, n) for n in (names, names[-1:]))
    batch, heads, q_len, k_len = arrays.sizes
    times = ranks if mesh is None else 1
    rows, keys = (equal_layout(n, sharding, times * size, ranks) for n, size in (("q", q_len), ("k", k_len)))
    arrays = arrays._replace(sizes=(batch, heads, rows.length, keys.length))
    whole = whole_call(arrays, q_len, mask, bias, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout)
    if strategy == "auto":
        strategy = _cheapest(whole, rows, keys, inner if len(names) > 1 else None)
    schedule = _schedule(strategy, whole, rows, keys, inner)
    settings = Settings(whole.problem, kernel, jax.config.jax_default_matmul_precision, names, schedule)
    if mesh is None:
        out, lse = of_shards(settings, whole.smooth, whole.facts)
    else:
        out, lse = of_whole_arrays(settings, mesh, whole.smooth, whole.facts)
    out, lse = restore(out, lse, layout)
    return (out, lse) if return_lse else out


def _cheapest(whole: Whole, q: Layout, k: Layout, inner: int | None) -> Any:
    """The strategy of the least predicted time; `inner` is how many devices a grid could spread heads over here."""
    problem = replace(whole.problem, part=False, gradients=frozenset({"q", "k", "v"}))
    choice = choose_strategy(problem, whole.mask, q, k)
    here = tuple(cost for cost in choice.costs if cost.strategy != "grid" or cost.inner == inner)
    return pick(problem, here, choice.machine, q.ranks).strategy


def _schedule(strategy: Strategy, whole: Whole, q: Layout, k: Layout, inner: int) -> Schedule:
    heads = whole.problem.q_heads, whole.problem.kv_heads
    match strategy:
        case "ring":
            return ring(q, k, whole.mask)
        case "all_gather":
            return all_gather(q, k, whole.mask)
        case "ulysses":
            return ulysses(q, k, whole.mask, *heads)
        case "grid":
            return grid(q, k, whole.mask, *heads, inner)
    raise ValueError(f"strategy: got {strategy!r}, expected one of {', '.join(map(repr, get_args(Strategy)))}")

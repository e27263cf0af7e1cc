"""A pytest plugin that stands in for the compiled module: calls run in the program $TILEWISE_SERVER (tools/qemu.sh).

Each call's structs and every array that they point to are sent as one block of memory, and what the call writes is
copied back. The functions have the names and arguments of native/bind/module.cpp. $TILEWISE_PAGES names the pages that
the program's processor must run, the best first.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

from request import BACKWARD, DESCRIBE, FORWARD, PAGE_IN_USE, PAGES, PHILOX, TANGENT, THREADS, Block, ask
from structs import structs

_STRUCTS = structs(Path(__file__).parents[2] / "native/core/problem.h")
_PROBLEM, _GRADIENTS, _TANGENTS, _DESCRIPTION = (
    _STRUCTS[f"tw_{name}"] for name in ("problem", "gradients", "tangents", "description")
)
_ITEM_BYTES = (4, 8, 2, 2)  # of each tw_dtype
_SIZES = "batch q_heads kv_heads q_len k_len head_dim value_dim"
_OVER_PAIRS = "stride_b stride_h stride_i stride_j"


def _integers(kind: Any, address: int, count: int) -> list[int]:
    return list((kind * count).from_address(address)) if count else []


def _set(of: Any, names: str, values: Sequence[Any]) -> None:
    for name, value in zip(names.split(), values, strict=True):
        setattr(of, name, value)


@dataclass(frozen=True)
class _Sequence:
    """A batch row: where its queries, keys and table begin, and its lengths."""

    q_begin: int
    q_len: int
    k_begin: int
    k_len: int
    table_begin: int


class _Call:
    """A problem in a block, with whatever else the call takes."""

    def __init__(self, *more: ctypes.Structure, dtype: int, threads: int, sizes: tuple, **facts: Any) -> None:
        self.problem = p = _PROBLEM(dtype=dtype, threads=threads)
        self.block = Block(p, *more)
        self.item, self.wide = _ITEM_BYTES[dtype], 8 if dtype == 1 else 4
        _set(p, _SIZES, sizes)
        self.sequences = [_Sequence(0, p.q_len, 0, p.k_len, 0)] * p.batch
        if facts:
            self._facts(**facts)

    def tensor(self, of: Any, value: tuple, item: int, out: bool = False, *, width: int, keys: bool = False) -> None:
        """(address, strides) of (B, heads, length, width), of query rows and heads, or of those of keys."""
        address, *strides = value
        _set(of, "stride_b stride_h stride_s", strides)
        heads = self.problem.kv_heads if keys else self.problem.q_heads
        places = [(x.k_begin, x.k_len) if keys else (x.q_begin, x.q_len) for x in self.sequences]
        boxes = [
            (n * strides[0] + begin * strides[2], (heads, length, width), (*strides[1:], 1))
            for n, (begin, length) in enumerate(places)
        ]
        self.block.array(of, "data", address, item, boxes, out)

    def rows(self, of: Any, name: str, address: int, out: bool = False) -> None:
        """A number for each query row, as in lse."""
        p = self.problem
        boxes = [
            (n * p.lse_stride_b + x.q_begin, (p.q_heads, x.q_len), (p.lse_stride_h, 1))
            for n, x in enumerate(self.sequences)
        ]
        self.block.array(of, name, address, self.wide, boxes, out)

    def heads(self, of: Any, name: str, address: int, out: bool = False) -> None:
        """A number for each query head."""
        self.block.array(of, name, address, self.wide, [(0, (self.problem.q_heads,), (1,))], out)

    def pairs(self, of: Any, name: str, address: int, item: int, strides: Sequence[int], out: bool = False) -> None:
        """A number for each pair of a query and a key."""
        boxes = [
            (n * strides[0], (self.problem.q_heads, x.q_len, x.k_len), strides[1:])
            for n, x in enumerate(self.sequences)
        ]
        self.block.array(of, name, address, item, boxes, out)

    def _facts(
        self,
        rows,
        q,
        k,
        v,
        out,
        lse,
        scale,
        softcap,
        ranges,
        labels,
        mask,
        bits,
        biases,
        table,
        sinks,
        dropout,
        part,
        write,
        as_forward=True,
        row_invariant=False,
        pages=None,
        sequences=None,
    ) -> None:
        """`write`: whether the call gives out and lse; `as_forward`: whether out has forward's type, also in a part."""
        p, block = self.problem, self.block
        self.result = self.wide if part else self.item
        _set(p, "row_begin row_end scale softcap part row_invariant", (*rows, scale, softcap, part, row_invariant))
        _set(p, "lse_stride_b lse_stride_h", (p.q_heads * p.q_len, p.q_len))
        if sequences:
            self._cut(*sequences)
        self.tensor(p.q, q, self.item, width=p.head_dim)
        if pages:
            self._pages(k, v, *pages)
        else:
            self.tensor(p.k, k, self.item, width=p.head_dim, keys=True)
            self.tensor(p.v, v, self.item, width=p.value_dim, keys=True)
        self.tensor(p.out, out, self.result if as_forward else self.item, write, width=p.value_dim)
        self.rows(p, "lse", lse, write)
        if ranges:
            *sides, wide, count, stride_b, stride_h = ranges
            _set(p.ranges, "wide count stride_b stride_h", (wide, count, stride_b, stride_h))
            boxes = [
                (n * stride_b + x.q_begin * count, (p.q_heads, x.q_len, count), (stride_h, count, 1))
                for n, x in enumerate(self.sequences)
            ]
            for name, address in zip(("starts", "stops"), sides, strict=True):
                block.array(p.ranges, name, address, 8 if wide else 4, boxes)
        if labels:
            *sides, q_b, q_h, k_b, k_h = labels
            _set(p.labels, "q_stride_b q_stride_h k_stride_b k_stride_h", (q_b, q_h, k_b, k_h))
            own = enumerate(self.sequences)
            block.array(p.labels, "q", sides[0], 4, [(n * q_b, (p.q_heads, x.q_len), (q_h, 1)) for n, x in own])
            own = enumerate(self.sequences)
            block.array(p.labels, "k", sides[1], 4, [(n * k_b, (p.q_heads, x.k_len), (k_h, 1)) for n, x in own])
        if mask:
            _set(p.mask, _OVER_PAIRS, mask[1:])
            self.pairs(p.mask, "data", mask[0], 1, mask[1:])
        if bits:
            self._bits(*bits)
        self.additions(p, biases, table, sinks)
        if dropout:
            _set(p.dropout, "enabled threshold inverse_keep seed stream first " + _OVER_PAIRS, (1, *dropout))

    def _cut(self, *places_and_strides: int) -> None:
        """Batch rows of different lengths."""
        p, (*places, stride_b, stride_h) = self.problem, places_and_strides
        _set(p, "lse_stride_b lse_stride_h", (stride_b, stride_h))
        names = [field.name for field in fields(_Sequence)]
        numbers = []
        for name, address in zip(names, places, strict=True):
            numbers.append(_integers(ctypes.c_int64, address, p.batch) if address else [0] * p.batch)
            self.block.array(p.sequences, name, address, 8, [(0, (p.batch,), (1,))])
        self.sequences = [_Sequence(*own) for own in zip(*numbers, strict=True)]

    def _pages(self, k: tuple, v: tuple, table: int, stride_b: int, size: int) -> None:
        """Keys and values in pages; of these, those that hold a key are sent."""
        p = self.problem
        _set(p.pages, "stride_b size", (stride_b, size))
        needed = [-(-x.k_len // size) for x in self.sequences]
        own = [(n * stride_b, (count,), (1,)) for n, count in enumerate(needed)]
        self.block.array(p.pages, "table", table, 4, own)
        held = [
            (page, min(size, x.k_len - at * size))
            for n, x in enumerate(self.sequences)
            for at, page in enumerate(_integers(ctypes.c_int32, table + 4 * n * stride_b, needed[n]))
        ]
        for of, (address, *strides), width in ((p.k, k, p.head_dim), (p.v, v, p.value_dim)):
            _set(of, "stride_b stride_h stride_s", strides)
            boxes = [(page * strides[0], (p.kv_heads, rows, width), (*strides[1:], 1)) for page, rows in held]
            self.block.array(of, "data", address, self.item, boxes)

    def additions(self, of: Any, biases: Sequence[tuple], table: tuple | None, sinks: int) -> None:
        """Biases, a table over j - i and sinks, or their tangents."""
        of.bias_count = len(biases)
        for bias, (address, dtype, *strides) in zip(of.bias, biases, strict=False):
            _set(bias, "dtype " + _OVER_PAIRS, (dtype, *strides))
            self.pairs(bias, "data", address, _ITEM_BYTES[dtype], strides)
        if table:
            address, stride_b, stride_h = table
            _set(of.table, "stride_b stride_h", (stride_b, stride_h))
            boxes = [
                (n * stride_b + x.table_begin, (self.problem.q_heads, max(0, x.q_len + x.k_len - 1)), (stride_h, 1))
                for n, x in enumerate(self.sequences)
            ]
            self.block.array(of.table, "data", address, self.wide, boxes)
        self.heads(of, "sinks", sinks)

    def _bits(self, index: int, words: int, stride_b: int, stride_h: int, *tiles_and_offset: int) -> None:
        p = self.problem
        _set(p.bits, "stride_b stride_h tiles_q tiles_k q_offset", (stride_b, stride_h, *tiles_and_offset))
        sizes = (p.batch, p.q_heads, *tiles_and_offset[:2])
        self.block.array(p.bits, "index", index, 4, [(0, sizes, (stride_b, stride_h, sizes[3], 1))])
        numbers = (sizes[0] - 1) * stride_b + (sizes[1] - 1) * stride_h + sizes[2] * sizes[3]
        stored = max(_integers(ctypes.c_int32, index, numbers)) + 1 if prod(sizes) else 0
        self.block.array(p.bits, "words", words, 8, [(0, (64 * stored,), (1,))])


def forward(**call: Any) -> None:
    """As tilewise._native.forward."""
    _Call(**call, write=True).block.run(FORWARD)


def backward(
    *,
    d_out: tuple,
    d_lse: int,
    d_q: tuple,
    d_k: tuple,
    d_v: tuple,
    adds: bool = False,
    gather: tuple,
    d_sinks: int,
    **call: Any,
) -> None:
    """As tilewise._native.backward."""
    g = _GRADIENTS(gather_count=len(gather), adds=adds)
    whole = _Call(g, **call, write=False, as_forward=False)
    p = whole.problem
    whole.tensor(g.d_out, d_out, whole.item, width=p.value_dim)
    whole.rows(g, "d_lse", d_lse)
    whole.tensor(g.d_q, d_q, whole.result, True, width=p.head_dim)
    given = whole.wide if adds else whole.result
    whole.tensor(g.d_k, d_k, given, True, width=p.head_dim, keys=True)
    whole.tensor(g.d_v, d_v, given, True, width=p.value_dim, keys=True)
    for own, (address, *strides) in zip(g.gather, gather, strict=False):
        _set(own, _OVER_PAIRS, strides)
        whole.pairs(own, "data", address, whole.wide, strides, True)
    whole.heads(g, "sinks", d_sinks, out=True)
    whole.block.run(BACKWARD)


def tangent(
    *,
    d_q: tuple,
    d_k: tuple,
    d_v: tuple,
    d_biases: tuple,
    d_table: tuple | None,
    d_sinks: int,
    d_out: tuple,
    d_lse: int,
    **call: Any,
) -> None:
    """As tilewise._native.tangent."""
    t = _TANGENTS()
    whole = _Call(t, **call, write=False)
    p = whole.problem
    whole.tensor(t.q, d_q, whole.item, width=p.head_dim)
    whole.tensor(t.k, d_k, whole.item, width=p.head_dim, keys=True)
    whole.tensor(t.v, d_v, whole.item, width=p.value_dim, keys=True)
    whole.additions(t, d_biases, d_table, d_sinks)
    whole.tensor(t.out, d_out, whole.result, True, width=p.value_dim)
    whole.rows(t, "lse", d_lse, out=True)
    whole.block.run(TANGENT)


def describe(dtype: int, threads: int, sizes: tuple, row_invariant: bool = False) -> tuple[Any, ...]:
    """As tilewise._native.describe."""
    call = _Call(_DESCRIPTION(), dtype=dtype, threads=threads, sizes=sizes)
    call.problem.row_invariant = row_invariant
    call.problem.row_end = call.problem.q_len
    after = call.block.run(DESCRIBE)
    return *struct.unpack("5q", after[-40:]), isa()


def prefer_large_pages(address: int, bytes: int) -> None:
    """Advice to the system, of which an emulated processor has no use."""


def isa() -> str:
    """As tilewise._native.isa."""
    return ask(PAGE_IN_USE)[0]


def build_info() -> dict[str, Any]:
    """As tilewise._native.build_info, as far as tests ask."""
    compiled, supported, _ = ask(PAGES)[0].split(";")
    return {
        "compiler": "cross",
        "pages": tuple(compiled.split()),
        "supported_pages": tuple(supported.split()),
        "refused_pages": {},
    }


def num_threads() -> int:
    """As tilewise._native.num_threads."""
    return int(ask(THREADS, struct.pack("q", -1))[0])


def set_num_threads(threads: int) -> None:
    """As tilewise._native.set_num_threads."""
    ask(THREADS, struct.pack("q", threads))


def philox_word(seed: int, stream: int, index: int) -> int:
    """As tilewise._native.philox_word."""
    _, after = ask(PHILOX, struct.pack("4Q", seed, stream, index, 0))
    return struct.unpack("I", after[24:28])[0]


def pytest_report_header() -> str:
    return f"kernels: {' '.join(build_info()['supported_pages'])}, by {os.environ['TILEWISE_SERVER']}"


_sizes = [int(size) for size in ask(PAGES)[0].split(";")[2].split()]
assert _sizes == [ctypes.sizeof(each) for each in (_PROBLEM, _GRADIENTS, _TANGENTS)], (
    "the server was built from another problem.h"
)
_pages = build_info()["supported_pages"]
assert list(_pages) == os.environ["TILEWISE_PAGES"].split() and isa() == _pages[0], f"this processor runs {_pages}"
sys.modules["tilewise._native"] = sys.modules[__name__]

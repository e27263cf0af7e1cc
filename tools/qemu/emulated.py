"""A pytest plugin that stands in for the compiled module: calls run in the program $TILEWISE_SERVER (tools/qemu.sh).

Each call's structs and every array that they point to are sent as one block of memory, and what the call writes is
copied back. The functions have the names and arguments of native/bind/module.cpp. $TILEWISE_PAGES names the pages that
the program's processor must run, the best first.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import struct
import subprocess
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from structs import structs

_STRUCTS = structs(Path(__file__).parents[2] / "native/core/problem.h")
_PROBLEM, _GRADIENTS, _TANGENTS, _DESCRIPTION = (
    _STRUCTS[f"tw_{name}"] for name in ("problem", "gradients", "tangents", "description")
)
_FORWARD, _BACKWARD, _TANGENT, _DESCRIBE, _PAGES, _PAGE_IN_USE, _THREADS, _PHILOX = range(8)
_ERRORS = {1: ValueError, 3: MemoryError}  # of enum tw_status; RuntimeError for the rest
_ITEM_BYTES = (4, 8, 2, 2)  # of each tw_dtype
_server = subprocess.Popen(
    shlex.split(os.environ["TILEWISE_SERVER"]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=-1
)
assert _server.stdin and _server.stdout
_to_server, _from_server = _server.stdin, _server.stdout


class _Block:
    """The memory of a call: structs first, then copies of arrays."""

    def __init__(self, *heads: ctypes.Structure) -> None:
        self.heads = heads
        self.arrays: list[tuple[int, int, int, bool]] = []  # first byte here, first byte there, bytes, is written
        self.pointers: list[int] = []
        self.size = sum(ctypes.sizeof(head) for head in heads)

    def array(
        self,
        of: Any,
        name: str,
        address: int,
        item: int,
        sizes: Sequence[int],
        strides: Sequence[int],
        out: bool = False,
    ) -> None:
        """Point `of.name` to a copy of the array at `address`, of such sizes and strides in elements."""
        if not address:
            return
        ends = [(size - 1) * stride * item for size, stride in zip(sizes, strides, strict=True)]
        low, high = sum(min(0, end) for end in ends), sum(max(0, end) for end in ends) + item
        self.size += -self.size % 64
        setattr(of, name, self.size - low)
        self.pointers.append(self._place(of, name))
        if prod(sizes):
            self.arrays.append((address + low, self.size, high - low, out))
            self.size += high - low

    def _place(self, of: Any, name: str) -> int:
        place = ctypes.addressof(of) + getattr(type(of), name).offset
        before = 0
        for head in self.heads:
            if 0 <= place - ctypes.addressof(head) < ctypes.sizeof(head):
                return before + place - ctypes.addressof(head)
            before += ctypes.sizeof(head)
        raise AssertionError(f"{name} is in no struct of this call")

    def run(self, operation: int) -> bytes:
        """The block after the call; arrays that it writes are copied back."""
        memory = bytearray(self.size)
        heads = b"".join(bytes(head) for head in self.heads)
        memory[: len(heads)] = heads
        for here, there, size, _ in self.arrays:
            memory[there : there + size] = ctypes.string_at(here, size)
        _, after = _ask(operation, bytes(memory), self.pointers)
        for here, there, size, out in self.arrays:
            if out:
                ctypes.memmove(here, after[there : there + size], size)
        return after


def _ask(operation: int, block: bytes = b"", pointers: Sequence[int] = ()) -> tuple[str, bytes]:
    page = os.environ.get("TILEWISE_ISA", "").encode()
    _to_server.write(struct.pack("3q40s", operation, len(pointers), len(block), page))
    _to_server.write(struct.pack(f"{len(pointers)}q", *pointers) + block)
    _to_server.flush()
    head = _from_server.read(16)
    if not head:
        raise RuntimeError(f"{os.environ['TILEWISE_SERVER']}: ended with status {_server.wait()}")
    status, length = struct.unpack("2q", head)
    text, after = _from_server.read(length).decode(), _from_server.read(len(block))
    if status:
        raise _ERRORS.get(status, RuntimeError)(text)
    return text, after


def _set(of: Any, names: str, values: Sequence[Any]) -> None:
    for name, value in zip(names.split(), values, strict=True):
        setattr(of, name, value)


_SIZES = "batch q_heads kv_heads q_len k_len head_dim value_dim"
_OVER_PAIRS = "stride_b stride_h stride_i stride_j"


class _Call:
    """A problem in a block, with whatever else the call takes."""

    def __init__(self, *more: ctypes.Structure, dtype: int, threads: int, sizes: tuple, **facts: Any) -> None:
        self.problem = p = _PROBLEM(dtype=dtype, threads=threads)
        self.block = _Block(p, *more)
        self.item, self.wide = _ITEM_BYTES[dtype], 8 if dtype == 1 else 4
        _set(p, _SIZES, sizes)
        self.pairs = (p.batch, p.q_heads, p.q_len, p.k_len)
        if facts:
            self._facts(**facts)

    def tensor(self, of: Any, value: tuple, item: int, heads: int, length: int, width: int, out: bool = False) -> None:
        """(address, strides) of (B, heads, length, width)."""
        address, *strides = value
        _set(of, "stride_b stride_h stride_s", strides)
        self.block.array(of, "data", address, item, (self.problem.batch, heads, length, width), (*strides, 1), out)

    def rows(self, of: Any, name: str, address: int, out: bool = False) -> None:
        """A number for each query row."""
        self.block.array(of, name, address, self.wide, (prod(self.pairs[:3]),), (1,), out)

    def heads(self, of: Any, name: str, address: int, out: bool = False) -> None:
        """A number for each query head."""
        self.block.array(of, name, address, self.wide, (self.problem.q_heads,), (1,), out)

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
        assert pages is None and sequences is None, "pages and packed sequences are not sent to the emulated processor"
        self.result = self.wide if part else self.item
        batch, q_heads, q_len, k_len = self.pairs
        _set(p, "row_begin row_end scale softcap part row_invariant", (*rows, scale, softcap, part, row_invariant))
        _set(p, "lse_stride_b lse_stride_h", (q_heads * q_len, q_len))
        self.tensor(p.q, q, self.item, q_heads, q_len, p.head_dim)
        self.tensor(p.k, k, self.item, p.kv_heads, k_len, p.head_dim)
        self.tensor(p.v, v, self.item, p.kv_heads, k_len, p.value_dim)
        self.tensor(p.out, out, self.result if as_forward else self.item, q_heads, q_len, p.value_dim, write)
        self.rows(p, "lse", lse, write)
        _set(p, "lse_stride_b lse_stride_h", (q_heads * q_len, q_len))
        if ranges:
            *sides, wide, count, stride_b, stride_h = ranges
            _set(p.ranges, "wide count stride_b stride_h", (wide, count, stride_b, stride_h))
            strides = (stride_b, stride_h, count, 1)
            for name, address in zip(("starts", "stops"), sides, strict=True):
                block.array(p.ranges, name, address, 8 if wide else 4, (*self.pairs[:3], count), strides)
        if labels:
            q_labels, k_labels, *strides = labels
            _set(p.labels, "q_stride_b q_stride_h k_stride_b k_stride_h", strides)
            block.array(p.labels, "q", q_labels, 4, (batch, q_heads, q_len), (*strides[:2], 1))
            block.array(p.labels, "k", k_labels, 4, (batch, q_heads, k_len), (*strides[2:], 1))
        if mask:
            _set(p.mask, _OVER_PAIRS, mask[1:])
            block.array(p.mask, "data", mask[0], 1, self.pairs, mask[1:])
        if bits:
            self._bits(*bits)
        self.additions(p, biases, table, sinks)
        if dropout:
            _set(p.dropout, "enabled threshold inverse_keep seed stream first " + _OVER_PAIRS, (1, *dropout))

    def additions(self, of: Any, biases: Sequence[tuple], table: tuple | None, sinks: int) -> None:
        """Biases, a table over j - i and sinks, or their tangents."""
        batch, q_heads, q_len, k_len = self.pairs
        of.bias_count = len(biases)
        for bias, (address, dtype, *strides) in zip(of.bias, biases, strict=False):
            _set(bias, "dtype " + _OVER_PAIRS, (dtype, *strides))
            self.block.array(bias, "data", address, _ITEM_BYTES[dtype], self.pairs, strides)
        if table:
            _set(of.table, "stride_b stride_h", table[1:])
            diagonals = (batch, q_heads, q_len + k_len - 1)
            self.block.array(of.table, "data", table[0], self.wide, diagonals, (*table[1:], 1))
        self.heads(of, "sinks", sinks)

    def _bits(self, index: int, words: int, stride_b: int, stride_h: int, *tiles_and_offset: int) -> None:
        p = self.problem
        _set(p.bits, "stride_b stride_h tiles_q tiles_k q_offset", (stride_b, stride_h, *tiles_and_offset))
        sizes = (*self.pairs[:2], *tiles_and_offset[:2])
        self.block.array(p.bits, "index", index, 4, sizes, (stride_b, stride_h, sizes[3], 1))
        numbers = (sizes[0] - 1) * stride_b + (sizes[1] - 1) * stride_h + sizes[2] * sizes[3]
        stored = max((ctypes.c_int32 * numbers).from_address(index)) + 1 if prod(sizes) else 0
        self.block.array(p.bits, "words", words, 8, (64 * stored,), (1,))


def forward(**call: Any) -> None:
    """As tilewise._native.forward."""
    _Call(**call, write=True).block.run(_FORWARD)


def backward(
    *,
    d_out: tuple,
    d_lse: int,
    d_q: tuple,
    d_k: tuple,
    d_v: tuple,
    gather: tuple,
    d_sinks: int,
    **call: Any,
) -> None:
    """As tilewise._native.backward."""
    g = _GRADIENTS(gather_count=len(gather))
    whole = _Call(g, **call, write=False, as_forward=False)
    p = whole.problem
    whole.tensor(g.d_out, d_out, whole.item, p.q_heads, p.q_len, p.value_dim)
    whole.rows(g, "d_lse", d_lse)
    whole.tensor(g.d_q, d_q, whole.result, p.q_heads, p.q_len, p.head_dim, out=True)
    whole.tensor(g.d_k, d_k, whole.wide, p.kv_heads, p.k_len, p.head_dim, out=True)
    whole.tensor(g.d_v, d_v, whole.wide, p.kv_heads, p.k_len, p.value_dim, out=True)
    for own, (address, *strides) in zip(g.gather, gather, strict=False):
        _set(own, _OVER_PAIRS, strides)
        whole.block.array(own, "data", address, whole.wide, whole.pairs, strides, out=True)
    whole.heads(g, "sinks", d_sinks, out=True)
    whole.block.run(_BACKWARD)


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
    whole.tensor(t.q, d_q, whole.item, p.q_heads, p.q_len, p.head_dim)
    whole.tensor(t.k, d_k, whole.item, p.kv_heads, p.k_len, p.head_dim)
    whole.tensor(t.v, d_v, whole.item, p.kv_heads, p.k_len, p.value_dim)
    whole.additions(t, d_biases, d_table, d_sinks)
    whole.tensor(t.out, d_out, whole.result, p.q_heads, p.q_len, p.value_dim, out=True)
    whole.rows(t, "lse", d_lse, out=True)
    whole.block.run(_TANGENT)


def describe(dtype: int, threads: int, sizes: tuple, row_invariant: bool = False) -> tuple[int, ...]:
    """As tilewise._native.describe."""
    call = _Call(_DESCRIPTION(), dtype=dtype, threads=threads, sizes=sizes)
    call.problem.row_invariant = row_invariant
    call.problem.row_end = call.problem.q_len
    after = call.block.run(_DESCRIBE)
    return struct.unpack("4q", after[-32:])


def isa() -> str:
    """As tilewise._native.isa."""
    return _ask(_PAGE_IN_USE)[0]


def build_info() -> dict[str, Any]:
    """As tilewise._native.build_info, as far as tests ask."""
    compiled, supported, _ = _ask(_PAGES)[0].split(";")
    return {"compiler": "cross", "pages": tuple(compiled.split()), "supported_pages": tuple(supported.split())}


def num_threads() -> int:
    """As tilewise._native.num_threads."""
    return int(_ask(_THREADS, struct.pack("q", -1))[0])


def set_num_threads(threads: int) -> None:
    """As tilewise._native.set_num_threads."""
    _ask(_THREADS, struct.pack("q", threads))


def philox_word(seed: int, stream: int, index: int) -> int:
    """As tilewise._native.philox_word."""
    _, after = _ask(_PHILOX, struct.pack("4Q", seed, stream, index, 0))
    return struct.unpack("I", after[24:28])[0]


def pytest_report_header() -> str:
    return f"kernels: {' '.join(build_info()['supported_pages'])}, by {os.environ['TILEWISE_SERVER']}"


_sizes = [int(size) for size in _ask(_PAGES)[0].split(";")[2].split()]
assert _sizes == [ctypes.sizeof(each) for each in (_PROBLEM, _GRADIENTS, _TANGENTS)], (
    "the server was built from another problem.h"
)
_pages = build_info()["supported_pages"]
assert list(_pages) == os.environ["TILEWISE_PAGES"].split() and isa() == _pages[0], f"this processor runs {_pages}"
sys.modules["tilewise._native"] = sys.modules[__name__]

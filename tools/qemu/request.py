"""A call as one block of memory, sent to the program $TILEWISE_SERVER (tools/qemu.sh), which runs it."""

from __future__ import annotations

import ctypes
import os
import shlex
import struct
import subprocess
from collections.abc import Sequence
from math import prod
from typing import Any

FORWARD, BACKWARD, TANGENT, DESCRIBE, PAGES, PAGE_IN_USE, THREADS, PHILOX = range(8)
_ERRORS = {1: ValueError, 3: MemoryError}  # of enum tw_status; RuntimeError for the rest
_server = subprocess.Popen(
    shlex.split(os.environ["TILEWISE_SERVER"]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=-1
)
assert _server.stdin and _server.stdout
_to_server, _from_server = _server.stdin, _server.stdout

# Part of an array: its first element, and sizes and strides in elements from there.
Box = tuple[int, Sequence[int], Sequence[int]]


class Block:
    """The memory of a call: structs first, then copies of arrays."""

    def __init__(self, *heads: ctypes.Structure) -> None:
        self.heads = heads
        self.arrays: list[tuple[int, int, int, bool]] = []  # first byte here, first byte there, bytes, is written
        self.pointers: list[int] = []
        self.size = sum(ctypes.sizeof(head) for head in heads)

    def array(self, of: Any, name: str, address: int, item: int, boxes: Sequence[Box], out: bool = False) -> None:
        """Point `of.name` to a copy of the array at `address`, as far as these boxes reach."""
        if not address:
            return
        low, high = _reach(boxes)
        self.size += -self.size % 64
        if self.size == low * item:
            self.size += 64  # an offset of 0 would be NULL
        setattr(of, name, self.size - low * item)
        self.pointers.append(self._place(of, name))
        if low < high:
            self.arrays.append((address + low * item, self.size, (high - low) * item, out))
            self.size += (high - low) * item

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
        _, after = ask(operation, bytes(memory), self.pointers)
        for here, there, size, out in self.arrays:
            if out:
                ctypes.memmove(here, after[there : there + size], size)
        return after


def _reach(boxes: Sequence[Box]) -> tuple[int, int]:
    """The elements [low, high) between which all of the boxes lie."""
    lows, highs = [], []
    for first, sizes, strides in boxes:
        if prod(sizes):
            ends = [(size - 1) * stride for size, stride in zip(sizes, strides, strict=True)]
            lows.append(first + sum(min(0, end) for end in ends))
            highs.append(first + sum(max(0, end) for end in ends) + 1)
    return min(lows, default=0), max(highs, default=0)


def ask(operation: int, block: bytes = b"", pointers: Sequence[int] = ()) -> tuple[str, bytes]:
    """The text and the block that the program answers; `pointers` are the places of pointers in the block.

    Raises:
        ValueError, MemoryError, RuntimeError: what the core refused, as in the module; or the program ended.
    """
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

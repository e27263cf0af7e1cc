"""`PagedKVCache`: pages handed out to sequences that come, grow, share a beginning and go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache.checks import check_count, check_dtype
from .attention import paged_attention


class PagedKVCache:
    """Keys and values of many sequences, of one layer, in pages of one size (Kwon et al., PagedAttention, 2023).

    A sequence is known by the number that `add` returned. It takes pages as it grows and gives them back by `free`. A
    sequence that begins as another one shares its pages; the page that both still write to is copied before the first
    of them does. Memory grows by half where it must, unless `fixed`.

    Args:
        pages: pages there is room for at first.
        page_size: tokens of a page.
        kv_heads, head_dim: Hkv and D; value_dim: Dv, None is D.
        dtype, device: of keys and values.
        fixed: never grow; a call that would need more pages raises.

    Raises:
        ValueError, TypeError: an argument is wrong; the message begins with its name.
    """

    def __init__(
        self,
        *,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        page_size: int = 64,
        pages: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        fixed: bool = False,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        for name, value in (
            ("kv_heads", kv_heads), ("head_dim", head_dim), ("value_dim", value_dim), ("page_size", page_size),
            ("pages", pages),
        ):  # fmt: skip
            check_count(name, value, 1)
        check_dtype("dtype", dtype)
        self.page_size, self._fixed = page_size, fixed
        with torch.inference_mode(False):
            self.k_pages, self.v_pages = (
                torch.empty((pages, page_size, kv_heads, width), dtype=dtype, device=device)
                for width in (head_dim, value_dim)
            )
        self._users = np.zeros(pages, np.int64)  # how many sequences hold each page
        self._spare = list(range(pages - 1, -1, -1))
        self._held: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._spare)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        self._check([sequence], "sequence")
        return self._lengths[sequence]

    def add(self, like: int | None = None, length: int | None = None) -> int:
        """A new sequence, empty, or with the first `length` tokens of the sequence `like`, whose pages it shares.

        Returns:
            its number.

        Raises:
            ValueError: no such sequence, or `length` longer than it is.
        """
        held: list[int] = []
        tokens = 0
        if like is not None:
            self._check([like], "like")
            tokens = self._lengths[like] if length is None else length
            check_count("length", tokens, 0)
            if tokens > self._lengths[like]:
                raise ValueError(f"length: got {tokens}, expected 0 to {self._lengths[like]}")
            held = self._held[like][: -(-tokens // self.page_size)]
            self._users[held] += 1
        elif length:
            raise ValueError(f"length: got {length} without like=, expected a sequence to take tokens from")
        number, self._next = self._next, self._next + 1
        self._held[number], self._lengths[number] = held, tokens
        return number

    def free(self, sequence: int) -> None:
        """Forget a sequence; pages that no other one holds can be used again."""
        self._check([sequence], "sequence")
        self._release(self._held.pop(sequence))
        del self._lengths[sequence]

    def crop(self, sequence: int, length: int) -> None:
        """Take the last tokens of a sequence back, as when a guess was wrong (speculative decoding)."""
        self._check([sequence], "sequence")
        check_count("length", length, 0)
        if length > self._lengths[sequence]:
            raise ValueError(f"length: got {length}, expected 0 to {self._lengths[sequence]}")
        held = self._held[sequence]
        kept = -(-length // self.page_size)
        self._release(held[kept:])
        del held[kept:]
        self._lengths[sequence] = length

    def block_table(self, sequences: Sequence[int]) -> Tensor:
        """(B, entries) int32 on the CPU: the pages of these sequences; entries beyond a sequence's pages are 0."""
        self._check(sequences)
        rows = [self._held[sequence] for sequence in sequences]
        table = np.zeros((len(rows), max(map(len, rows), default=0)), np.int32)
        for n, row in enumerate(rows):
            table[n, : len(row)] = row
        return torch.from_numpy(table)

    def attend(self, q: Tensor, sequences: Sequence[int], **options: Any) -> Any:
        """Attention of queries to all tokens of these sequences.

        Args:
            q: (B, n, Hq, D), or packed with `cu_seqlens_q`: n-th for the n-th of `sequences`.
            options: those of `paged_attention`, but for pages, table, lengths, k and v.
        """
        table, lengths = self.block_table(sequences), [self._lengths[sequence] for sequence in sequences]
        return paged_attention(
            q,
            self.k_pages,
            self.v_pages,
            block_table=table,
            lengths=torch.tensor(lengths, dtype=torch.int64, device="cpu"),
            **options,
        )

    def append_and_attend(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequence[int], **options: Any) -> Any:
        """Append the tokens k (B, m, Hkv, D), v (B, m, Hkv, Dv) to these sequences, each named once, and attend to all.

        Args:
            q, k, v: or packed with `cu_seqlens_q` and `cu_seqlens_k`, as of `paged_attention`.
            options: those of `paged_attention`, `mask=tilewise.causal("end")` among them.

        Raises:
            ValueError, TypeError: an argument is wrong, or more pages are needed than a fixed cache has; the lengths
                are as before.
        """
        self._check(sequences)
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"sequences: got {list(sequences)}, expected each sequence once")
        before = [self._lengths[sequence] for sequence in sequences]
        counts = _counts(k, len(before), options)
        self._make_room(sequences, counts)
        found = paged_attention(
            q, self.k_pages, self.v_pages, block_table=self.block_table(sequences),
            lengths=torch.tensor(before, dtype=torch.int64, device="cpu"), k=k, v=v, **options,
        )  # fmt: skip
        for sequence, length, count in zip(sequences, before, counts, strict=True):
            self._lengths[sequence] = length + count
        return found

    def _make_room(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Give each sequence the pages for so many more tokens, none of which another one holds."""
        size, needed = self.page_size, 0
        written = Counter[int]()
        for sequence, count in zip(sequences, counts, strict=True):
            held, length = self._held[sequence], self._lengths[sequence]
            needed += max(0, -(-(length + count) // size) - len(held))
            if count and length % size:
                written[held[length // size]] += 1
        # Whoever is the last to hold a page writes to it without a copy.
        needed += sum(min(writers, int(self._users[page]) - 1) for page, writers in written.items())
        if needed > len(self._spare):
            self._grow(needed - len(self._spare))
        for sequence, count in zip(sequences, counts, strict=True):
            held, length = self._held[sequence], self._lengths[sequence]
            last = length // size
            if count and length % size and self._users[held[last]] > 1:
                copy = self._take()
                for pages in (self.k_pages, self.v_pages):
                    pages[copy, : length % size] = pages[held[last], : length % size]
                self._users[held[last]] -= 1
                held[last] = copy
            while len(held) * size < length + count:
                held.append(self._take())

    def _take(self) -> int:
        page = self._spare.pop()
        self._users[page] = 1
        return page

    def _release(self, pages: list[int]) -> None:
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                self._spare.append(page)

    def _grow(self, missing: int) -> None:
        there = len(self._users)
        if self._fixed:
            raise ValueError(f"k: needs {missing} pages more than the {there} of a fixed cache")
        more = max(missing, there // 2)
        with torch.inference_mode(False), torch.no_grad():
            grown = []
            for pages in (self.k_pages, self.v_pages):
                target = torch.empty((there + more, *pages.shape[1:]), dtype=pages.dtype, device=pages.device)
                target[:there] = pages
                grown.append(target)
        self.k_pages, self.v_pages = grown
        self._users = np.concatenate([self._users, np.zeros(more, np.int64)])
        self._spare = [*range(there + more - 1, there - 1, -1), *self._spare]

    def _check(self, sequences: Sequence[int], name: str = "sequences") -> None:
        for sequence in sequences:
            if sequence not in self._held:
                raise ValueError(f"{name}: got {sequence}, expected the number of a sequence that was added")


def _counts(k: Tensor, batch: int, options: dict[str, Any]) -> list[int]:
    """How many tokens each sequence gets."""
    cumulative = options.get("cu_seqlens_k")
    cumulative = options.get("cu_seqlens_q") if cumulative is None else cumulative
    if cumulative is None:
        return [k.shape[1]] * batch
    counts = torch.as_tensor(cumulative, device="cpu").diff().tolist()
    if len(counts) != batch:
        raise ValueError(f"sequences: got {batch}, expected {len(counts)} as there are cumulative lengths for")
    return counts

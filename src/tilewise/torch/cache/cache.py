"""`KVCache`: append keys and values, attend to them with the queries of the last tokens."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..._api import attention
from ...kernels.state import merge
from ...masks.biases import Bias, relative
from ...validate import check_sinks
from .checks import check_count, check_room, check_tokens, counts_of, own
from .segments import Distances, by_distance, segments
from .slots import Slots

_LAYOUTS = ("bhsd", "bshd")


class KVCache:
    """Keys and values of the tokens so far, of one layer, for generation.

    Memory is allocated by the first append and grows by half where it must; with a window it stays within about twice
    the window and the largest chunk. Attending copies nothing: it reads a view of the slots that some query sees.
    Positions are absolute: dropped tokens leave causality, windows and biases of the distance as they are.

    Batch rows may have different lengths: `append(k, v, lengths=…)` takes rows padded at their end.

    Args:
        window: how many tokens a query sees, its own included; older ones are dropped. None keeps all.
        keep_first: with a window, how many first tokens stay visible to all (Xiao et al., StreamingLLM, 2024).
        rewind: with a window, how many tokens `crop` must be able to take back.
        capacity: tokens there is room for at first.
        fixed: never grow; appending beyond the capacity raises.
        layout: of k, v, q and the output: "bhsd", or "bshd" for (B, S, H, D).

    Raises:
        ValueError, TypeError: an argument is wrong; the message begins with its name.
    """

    def __init__(
        self,
        *,
        window: int | None = None,
        keep_first: int = 0,
        rewind: int = 0,
        capacity: int = 256,
        fixed: bool = False,
        layout: str = "bhsd",
    ) -> None:
        for name, value, least in (("keep_first", keep_first, 0), ("rewind", rewind, 0), ("capacity", capacity, 1)):
            check_count(name, value, least)
        if window is not None:
            check_count("window", window, 1)
        elif keep_first or rewind:
            raise ValueError(f"window: got None beside keep_first={keep_first} and rewind={rewind}, expected a width")
        if layout not in _LAYOUTS:
            raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(map(repr, _LAYOUTS))}")
        self.window, self.keep_first, self.rewind, self.layout = window, keep_first, rewind, layout
        self._capacity, self._fixed = capacity, fixed
        self._slots: Slots | None = None
        self._last: np.ndarray | None = None  # how many tokens each row got in the last append
        self._last_width = 0

    @property
    def lengths(self) -> Tensor:
        """Tokens appended to each batch row, dropped ones included, (B,) int64 on the CPU; (0,) before the first."""
        return (
            torch.zeros(0, dtype=torch.int64, device="cpu")
            if self._slots is None
            else torch.from_numpy(self._slots.length.copy())
        )

    @property
    def capacity(self) -> int:
        """Tokens per batch row that there is memory for."""
        return 0 if self._slots is None else self._slots.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of that memory."""
        return 0 if self._slots is None else sum(buffer.nbytes for buffer in self._slots.buffers)

    def append(self, k: Tensor, v: Tensor, lengths: Any = None) -> None:
        """Append the keys and values of n tokens.

        Args:
            k: (B, Hkv, n, D); v: (B, Hkv, n, Dv), in the cache's layout, dtype and device, which the first append sets.
            lengths: how many of the n are real in each row, the first ones, (B,) integers; None is all.

        Raises:
            ValueError, TypeError: an argument is wrong, asks for a gradient, or does not fit a fixed capacity; the
                message begins with its name, and the cache is as before.
        """
        k, v = own("k", k, self.layout), own("v", v, self.layout)
        check_tokens(k, v, self._slots)
        counts = counts_of(lengths, k.shape[0], k.shape[2])
        if self._slots is None:
            needed = int(counts.max(initial=0))
            check_room(needed, self._capacity if self._fixed else None)
            capacity = self._capacity if self._fixed else max(self._capacity, needed)
            self._slots = Slots.like(k, v, capacity, self.keep_first)
        else:
            self._make_room(self._slots, counts)
        self._slots.write(k, v, counts)
        self._last, self._last_width = counts, k.shape[2]

    def attend(
        self,
        q: Tensor,
        *,
        lengths: Any = None,
        causal: bool = True,
        bias: Bias | Distances | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | float | None = None,
        return_lse: bool = False,
        kernel: str | None = None,
        invariance: Literal["batch", "row"] = "batch",
    ) -> Any:
        """Attention of the queries of the last tokens to all that they see.

        Args:
            q: (B, Hq, n, D), the queries of the last n tokens of each row; with `lengths` the first lengths[b] of them
                are those of the row's last lengths[b] tokens, and the rest is padding, whose output is 0.
            lengths: (B,) integers; None is as in the last append where q is as wide as that, else n.
            causal: False lets every query see every token (cross-attention); q may then have any n. Needs no window.
            bias: `alibi` or `t5`, or a function of the distances (m,) int64 from a query to a key, negative for the
                past, that gives (Hq, m) floats, or (B, Hq, m).
            scale, softcap, sinks, return_lse, kernel: as for `tilewise.attention`.
            invariance: likewise; "row" gives a token the same bits in a prompt, in chunks and alone. Excludes a window.

        Returns:
            out (B, Hq, n, Dv) in the cache's layout, or with `return_lse` (out, lse), lse (B, Hq, n).

        Raises:
            ValueError, TypeError: an argument is wrong, or asks for what was dropped; the message begins with its name.
        """
        if self._slots is None:
            raise ValueError("q: the cache is empty, expected an append before")
        slots, q = self._slots, own("q", q, self.layout)
        counts = self._query_counts(slots, q, lengths, causal)
        distances = by_distance(bias)
        if invariance != "batch" and self.window is not None:
            raise ValueError(f"invariance: got {invariance!r} with a window, whose tokens move; expected 'batch'")
        options: dict[str, Any] = {
            "scale": scale, "softcap": softcap, "kernel": kernel, "invariance": invariance, "return_lse": True,
        }  # fmt: skip
        row = check_sinks(sinks, "torch", q)
        parts, results = segments(slots, q.shape[2], counts, self.window, causal), []
        for part in parts:
            k, v = (buffer[:, :, part.slots] for buffer in slots.buffers)
            table = relative(part.table(distances, q.shape[2], q.device)) if distances and k.shape[2] else None
            sink = row if len(parts) == 1 else None
            results += attention(q, k, v, mask=part.mask, bias=table, sinks=sink, **options)
        out, lse = merge(*results) if len(parts) > 1 else results
        if len(parts) > 1 and row is not None:
            out, lse = _with_sinks(out, lse, row)
        out = out if self.layout == "bhsd" else out.transpose(1, 2)
        return (out, lse) if return_lse else out

    def append_and_attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Any = None, **options: Any) -> Any:
        """`append(k, v, lengths)`, then `attend(q, lengths=lengths, **options)`: a step of decoding, a prompt's chunk.

        Args, Returns, Raises: as those two.
        """
        self.append(k, v, lengths)
        return self.attend(q, lengths=lengths, **options)

    def reorder(self, index: Any) -> None:
        """Row n becomes what row index[n] is: beams that survive, or rows copied into several beams.

        Args:
            index: (B',) integers; B' may differ from B.

        Raises:
            ValueError: before the first append, or an index outside the batch.
        """
        if self._slots is None or self._last is None:
            raise ValueError("index: the cache is empty, expected an append before")
        index, batch = torch.as_tensor(index, device="cpu"), len(self._slots.length)
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise TypeError(f"index: got dtype {index.dtype}, expected integers")
        index = index.long()
        if index.ndim != 1 or (index.numel() and not (int(index.min()) >= 0 and int(index.max()) < batch)):
            raise ValueError(f"index: got {index.tolist()}, expected a list of rows from 0 to {batch - 1}")
        self._slots.select(index)
        self._last = self._last[index.cpu().numpy()]

    def crop(self, length: Any) -> None:
        """Take the last tokens back, as when a guess was wrong (speculative decoding).

        Args:
            length: tokens that remain, an int or one per row, (B,); a negative int is how many to take back.

        Raises:
            ValueError: longer than a row is, or so short that its window reaches to what was dropped.
        """
        if self._slots is None:
            raise ValueError("length: the cache is empty, expected an append before")
        slots = self._slots
        wanted = np.asarray(length.cpu() if isinstance(length, Tensor) else length)
        if wanted.dtype.kind not in "iu" or wanted.shape not in ((), slots.length.shape):
            raise ValueError(f"length: got {length!r}, expected an int or {len(slots.length)} integers")
        remain = (
            slots.length + wanted if wanted.ndim == 0 and wanted < 0 else np.broadcast_to(wanted, slots.length.shape)
        )
        if ((remain < 0) | (remain > slots.length)).any():
            raise ValueError(f"length: got {length!r}, expected at most the rows' {slots.length.tolist()} tokens")
        if self._dropped(slots, remain + 1):
            raise ValueError(f"length: got {length!r}, whose window reaches to dropped tokens; see rewind=")
        slots.length = remain.astype(np.int64)
        self._last, self._last_width = np.zeros_like(remain), 0

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        if self._slots is not None:
            self._slots.length, self._slots.base = np.zeros_like(self._slots.length), np.zeros_like(self._slots.base)

    def _make_room(self, slots: Slots, counts: np.ndarray) -> None:
        retained = None if self.window is None else self.window - 1 + self.rewind
        base = slots.base_retaining(retained)
        needed = int((slots.length - base + counts).max(initial=0))
        check_room(needed, self._capacity if self._fixed else None)
        roomy = max(self._capacity, 2 * needed)
        if self.window is not None and not self._fixed and slots.capacity > 2 * roomy:
            slots.move(base, roomy)  # a long prompt has passed
        elif int((slots.ends + counts).max(initial=0)) <= slots.capacity:
            return
        elif self._fixed or (self.window is not None and 2 * needed <= slots.capacity):
            slots.move(base, slots.capacity)
        else:
            slots.move(base, roomy if self.window is not None else needed + needed // 2)

    def _query_counts(self, slots: Slots, q: Tensor, lengths: Any, causal: bool) -> np.ndarray:
        """How many queries of each row are real."""
        batch, width = len(slots.length), q.shape[2]
        if q.shape[0] != batch:
            raise ValueError(f"q: has {q.shape[0]} as batch size, expected {batch} as k has")
        if not causal:
            if self.window is not None:
                raise ValueError("causal: got False with a window, whose dropped tokens cannot be attended to")
            return counts_of(lengths, batch, width)
        counts = self._last if lengths is None and width == self._last_width else counts_of(lengths, batch, width)
        if (counts > slots.length).any():
            raise ValueError(f"q: has {width} queries, expected at most the {slots.length.tolist()} tokens of each row")
        if self._dropped(slots, slots.length - counts + 1):
            raise ValueError(f"q: has {width} queries, the first of which would see tokens that were dropped")
        return counts

    def _dropped(self, slots: Slots, length: np.ndarray) -> bool:
        """Whether the window of a row's token number `length` reaches to tokens that were dropped."""
        if self.window is None:
            return False
        first = np.maximum(length - self.window, slots.kept)
        return bool(((slots.base > 0) & (first < slots.kept + slots.base)).any())


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The sink's exponent added to the denominators: no segment is sure to hold a key for every row."""
    sinks = sinks.to(lse.dtype)[:, None]
    nothing = lse == -torch.inf
    total = torch.where(nothing, lse, torch.logaddexp(lse, sinks))
    share = torch.where(nothing, 0.0, torch.exp(lse - total))
    return (out * share[..., None]).to(out.dtype), total

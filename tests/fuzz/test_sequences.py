"""Random batches of packed sequences, and keys in pages: each sequence has the bits that it has alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from support.random_problems import dropouts, groups, on_page, pages, search, widths

import tilewise as tw

torch = pytest.importorskip("torch")
pytest.importorskip("tilewise._native")
pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("loud_memory")]

from tilewise.torch import paged_attention, varlen_attention  # noqa: E402

_length = st.one_of(st.integers(0, 5), st.integers(0, 90), st.sampled_from([64, 65, 130, 260]))
_key_length = st.one_of(_length, _length, _length, st.sampled_from([513, 600, 1025]))
_masks = {
    "all": lambda: None,
    "start": lambda: tw.causal("start"),
    "end": lambda: tw.causal("end"),
    "window": lambda: tw.window(17, 2, "end"),
    "sinks": lambda: tw.causal("end") & (tw.window(5, 0, "end") | tw.prefix(3)),
    "rule": lambda: tw.predicate(lambda b, h, i, j: (h + i + 2 * j) % 3 > 0),
}


class _Batch:
    """Queries (Tq, Hq, D), keys (Tk, Hkv, D), values (Tk, Hkv, Dv), lengths, and the options of sequence n alone."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.lengths = draw(st.lists(st.tuples(_length, _key_length), min_size=1, max_size=5))
        kv_heads, dim, value = draw(st.integers(1, 2)), draw(widths), draw(widths)
        self.heads = kv_heads * draw(groups)
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        dtype = getattr(torch, draw(st.sampled_from(["float32", "bfloat16", "bfloat16", "float16", "float64"])))
        q_rows, k_rows = (sum(pair[side] for pair in self.lengths) for side in (0, 1))
        shapes = (q_rows, self.heads, dim), (k_rows, kv_heads, dim), (k_rows, kv_heads, value)
        self.tensors = [torch.tensor(2 * self.rng.standard_normal(shape)).to(dtype) for shape in shapes]
        self.cumulative = [np.cumsum([0, *(pair[side] for pair in self.lengths)]) for side in (0, 1)]
        most = [max(pair[side] for pair in self.lengths) for side in (0, 1)]
        self.mask = draw(st.sampled_from(sorted(_masks)))
        self.common: dict[str, Any] = {"scale": draw(st.sampled_from([None, 0.3]))}
        self.common["softcap"] = draw(st.sampled_from([None, None, 3.0]))
        if draw(st.integers(0, 2)) == 0:
            self.common["sinks"] = torch.tensor(self.rng.standard_normal(self.heads))
        self.dropout = draw(st.one_of(st.none(), dropouts((1, 1, 1, 1)).filter(lambda one: one.strides is None)))
        kind = draw(st.sampled_from(["none", "none", "alibi", "t5", "dense", "keys"]))
        slopes, weights = (torch.tensor(self.rng.standard_normal(shape)) for shape in ((self.heads,), (8, self.heads)))
        shape = len(self.lengths), 1, most[0] if kind == "dense" else 1, most[1]
        self.dense = torch.tensor(self.rng.standard_normal(shape if kind in ("dense", "keys") else (1, 1, 1, 1)))
        self.bias = {"alibi": tw.alibi(slopes, "end"), "t5": tw.t5(weights), "none": None}.get(kind, self.dense)

    def __repr__(self) -> str:
        shapes = [tuple(x.shape) for x in self.tensors]
        given = {name: value for name, value in self.options().items() if value is not None}
        return f"{self.tensors[0].dtype} {shapes}, lengths {self.lengths}, mask {self.mask!r}, {sorted(given)}"

    def options(self) -> dict[str, Any]:
        return {**self.common, "mask": _masks[self.mask](), "bias": self.bias, "dropout": self.dropout}

    def alone(self, n: int) -> dict[str, Any]:
        """What `tilewise.attention` takes for sequence n."""
        options = self.options()
        if self.bias is self.dense:
            q_len, k_len = self.lengths[n]
            options["bias"] = self.dense[n : n + 1, :, :q_len, :k_len]
        if self.dropout:
            stream = (self.dropout.stream + (n << 32)) % 2**64
            options["dropout"] = tw.Dropout(self.dropout.p, self.dropout.seed, stream)
        return {**options, "layout": "bshd", "return_lse": True, "kernel": "native"}

    def parts(self, n: int) -> tuple[slice, slice, slice]:
        rows, keys = (slice(int(cu[n]), int(cu[n + 1])) for cu in self.cumulative)
        return rows, keys, keys


_batches = st.composite(_Batch)()


def _check_bits(name: str, got: Any, expected: Any) -> None:
    assert torch.equal(got, expected), f"{name}: {int((got != expected).sum())} of {got.numel()} differ"


def test_packed() -> None:
    """out, lse and the gradients to q, k and v."""

    def once(batch: _Batch, gradients: bool, page: str) -> None:
        tensors = [x.clone().requires_grad_(gradients) for x in batch.tensors]
        with on_page(page):
            cumulative = [torch.tensor(cu) for cu in batch.cumulative]
            out, lse = varlen_attention(*tensors, *cumulative, return_lse=True, kernel="native", **batch.options())
            d_out = torch.tensor(batch.rng.standard_normal(out.shape)).to(out.dtype)
            found = torch.autograd.grad(out, tensors, d_out) if gradients else ()
            for n in range(len(batch.lengths)):
                parts = batch.parts(n)
                own = [x[None, part].requires_grad_(gradients) for x, part in zip(batch.tensors, parts, strict=True)]
                alone, alone_lse = tw.attention(*own, **batch.alone(n))
                _check_bits("out", out[parts[0]], alone[0])
                _check_bits("lse", lse[:, parts[0]], alone_lse[0])
                if gradients:
                    expected = torch.autograd.grad(alone, own, d_out[None, parts[0]])
                    for name, x, part, want in zip("qkv", found, parts, expected, strict=True):
                        _check_bits(f"gradient to {name}", x[part], want[0])

    search(once, _batches, st.booleans(), pages())


def test_pages() -> None:
    """Pages and rows of pages that no key stands in hold NaN, and other entries of the table name no page."""

    def once(batch: _Batch, size: int, heads_first: bool, page: str) -> None:
        q, *keys_and_values = batch.tensors
        needed = [-(-k_len // size) for _, k_len in batch.lengths]
        order = iter(batch.rng.permutation(sum(needed) + 1).tolist())
        table = torch.full((len(needed), max(needed) + 1), 2**31 - 1, dtype=torch.int32)
        held = []
        for x in keys_and_values:
            shape = sum(needed) + 1, *((x.shape[1], size) if heads_first else (size, x.shape[1])), x.shape[2]
            some = torch.full(shape, torch.nan, dtype=x.dtype)
            held.append(some.transpose(1, 2) if heads_first else some)
        for n, entries in enumerate(needed):
            for entry in range(entries):
                table[n, entry] = at = next(order)
                for x, some in zip(keys_and_values, held, strict=True):
                    part = x[batch.parts(n)[1]][entry * size : (entry + 1) * size]
                    some[at, : len(part)] = part
        with on_page(page):
            out, lse = paged_attention(
                q, *held, block_table=table, lengths=torch.tensor([k_len for _, k_len in batch.lengths]),
                cu_seqlens_q=torch.tensor(batch.cumulative[0]), return_lse=True, kernel="native", **batch.options(),
            )  # fmt: skip
            for n in range(len(needed)):
                parts = batch.parts(n)
                own = [x[None, part] for x, part in zip(batch.tensors, parts, strict=True)]
                alone, alone_lse = tw.attention(*own, **batch.alone(n))
                _check_bits("out", out[parts[0]], alone[0])
                _check_bits("lse", lse[:, parts[0]], alone_lse[0])

    search(once, _batches, st.sampled_from([1, 3, 16, 64, 100]), st.booleans(), pages())

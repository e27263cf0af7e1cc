"""Sequences in pages that the Triton kernel is held to, and the checks: shared by the tests and the GPU's script.

Run as a script it checks some cases and prints a line of JSON for each:
`python paged_cases.py DEVICE DTYPE [NAME ...]`.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[2] / "lib"))

from accuracy import assert_accurate

import tilewise as tw
from tilewise.torch import PagedKVCache, paged_attention
from tilewise.torch.ragged import pages as pages_module

HEADS, KV, D, DV = 4, 2, 24, 40
LENGTHS = (5, 130, 0, 1)
Options = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Sequences of LENGTHS keys: the page size, the queries of each, and the options of all and of sequence n."""

    name: str
    size: int = 16
    queries: tuple[int, ...] = (3, 3, 3, 3)
    of_all: Callable[[], Options] = dict
    of_one: Callable[[int], Options] = field(default=lambda n: {})


def _mask(mask: tw.Mask) -> dict[str, Any]:
    return {"of_all": lambda: {"mask": mask}, "of_one": lambda n: {"mask": mask}}


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _dense_of_one(n: int) -> Options:
    keys = slice(LENGTHS[n])
    return {
        "mask": (_random(1, HEADS, 3, 130) < 0.3)[..., keys],
        "bias": _random(4, 1, 1, 130)[n : n + 1, ..., keys],
    }


_ONE, _MANY, _PACKED = (1, 1, 1, 1), (40, 40, 0, 40), (70, 3, 2, 0)
_SLOPES = _random(HEADS).abs() / 10

CASES = (
    *(Case(f"pages of {size}", size, _ONE) for size in (1, 7, 16, 64, 200)),
    Case("causal", 7, **_mask(tw.causal("end"))),
    Case("window", 16, **_mask(tw.window(40, 0, "end"))),
    Case("many queries", 7, _MANY, **_mask(tw.causal("end"))),
    Case("packed queries", 32, _PACKED, **_mask(tw.causal("end") & tw.window(60, None, "end"))),
    Case("offsets", of_all=lambda: {"mask": tw.causal(offset=torch.tensor([2, 100, 0, 5]))},
         of_one=lambda n: {"mask": tw.causal(offset=[2, 100, 0, 5][n])}),
    Case("alibi", 7, _MANY, lambda: {"bias": tw.alibi(_SLOPES, "end")}, lambda n: {"bias": tw.alibi(_SLOPES, "end")}),
    Case("t5", 7, _PACKED, lambda: {"bias": tw.t5(_random(8, HEADS))}, lambda n: {"bias": tw.t5(_random(8, HEADS))}),
    Case("dense mask and bias", 16, of_all=lambda: {"mask": _random(1, HEADS, 3, 130) < 0.3,
         "bias": _random(4, 1, 1, 130)}, of_one=_dense_of_one),
    Case("options", 16, of_all=lambda: {"softcap": 2.0, "sinks": 0.3, "scale": 0.4},
         of_one=lambda n: {"softcap": 2.0, "sinks": 0.3, "scale": 0.4}),
    Case("negative scale", 7, of_all=lambda: {"scale": -0.3}, of_one=lambda n: {"scale": -0.3}),
    Case("dropout", 7, _PACKED, lambda: {"dropout": tw.Dropout(0.3, 2**40 + 7, 2)},
         lambda n: {"dropout": tw.Dropout(0.3, 2**40 + 7, 2 + n * 2**32)}),
    Case("a tensor's seed", 16, of_all=lambda: {"dropout": tw.Dropout(0.3, torch.tensor(11))},
         of_one=lambda n: {"dropout": tw.Dropout(0.3, 11, n * 2**32)}),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Pages:
    """Pages, NaN wherever no key stands, a table whose other entries are garbage, and the keys of each sequence."""

    k_pages: torch.Tensor
    v_pages: torch.Tensor
    table: torch.Tensor
    k: list[torch.Tensor]
    v: list[torch.Tensor]

    @classmethod
    def of(cls, size: int, dtype: torch.dtype, device: Any, lengths: tuple[int, ...] = LENGTHS) -> Pages:
        needed = [-(-length // size) for length in lengths]
        order = iter(torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(size)).tolist())
        pages = [torch.full((sum(needed) + 2, size, KV, width), math.nan, dtype=dtype) for width in (D, DV)]
        table = torch.full((len(lengths), max(needed) + 1), 2**31 - 1, dtype=torch.int32)
        keys = [[_random(n, KV, width, seed=n + width, dtype=dtype) for n in lengths] for width in (D, DV)]
        for n, entries in enumerate(needed):
            for entry in range(entries):
                table[n, entry] = page = next(order)
                for target, parts in zip(pages, keys, strict=True):
                    part = parts[n][entry * size : (entry + 1) * size]
                    target[page, : len(part)] = part
        return cls(*(x.to(device) for x in pages), table, *keys)


def check(case: Case, dtype: torch.dtype, device: Any) -> None:
    """Raise AssertionError unless out and lse are those of each sequence alone, and no token was gathered."""
    pages = Pages.of(case.size, dtype, device)
    q = _random(sum(case.queries), HEADS, D, seed=9, dtype=dtype)
    cu = torch.tensor([0, *case.queries]).cumsum(0)
    with _nothing_gathered():
        out, lse = paged_attention(
            q.to(device), pages.k_pages, pages.v_pages, block_table=pages.table, lengths=torch.tensor(LENGTHS),
            cu_seqlens_q=cu, return_lse=True, kernel="triton", **case.of_all(),
        )  # fmt: skip
    assert out.dtype == dtype and lse.dtype == torch.float32
    for n in range(len(LENGTHS)):
        rows = slice(int(cu[n]), int(cu[n + 1]))
        options = {"kernel": "reference", "allow_quadratic": True, "layout": "bshd", "return_lse": True}
        one = (x.double()[None] for x in (q[rows], pages.k[n], pages.v[n]))
        exact_out, exact_lse = tw.attention(*one, **options, **case.of_one(n))
        assert_accurate("out", out[rows].cpu(), exact_out[0].numpy())
        assert_accurate("lse", lse[:, rows].cpu(), exact_lse[0].numpy())


def bits(dtype: torch.dtype, device: Any) -> None:
    """A row's bits depend neither on the size of a page, nor on the other sequences, nor on there being pages."""

    def run(size: int, lengths: tuple[int, ...], q: torch.Tensor) -> torch.Tensor:
        pages = Pages.of(size, dtype, device, lengths)
        return paged_attention(
            q, pages.k_pages, pages.v_pages, block_table=pages.table, lengths=torch.tensor(lengths),
            mask=tw.causal("end"), kernel="triton",
        )  # fmt: skip

    lengths = (600, 1300) if device == "cuda" else (90, 130)
    q = _random(2, 3, HEADS, D, seed=9, dtype=dtype).to(device)
    found = run(16, lengths, q)
    for size in (1, 7, 64, 200):
        assert torch.equal(run(size, lengths, q), found), f"pages of {size} give other bits"
    assert torch.equal(run(16, lengths[1:], q[1:]), found[1:]), "a sequence alone has other bits"
    whole = Pages.of(16, dtype, device, lengths)
    for n in range(2):
        one = (x[None].to(device) for x in (q[n], whole.k[n], whole.v[n]))
        alone = tw.attention(*one, layout="bshd", mask=tw.causal("end"), kernel="triton")
        assert torch.equal(alone[0], found[n]), "keys in one piece give other bits"


def cache(dtype: torch.dtype, device: Any) -> None:
    """Steps of a `PagedKVCache`, against the same by the definition, for which tokens are gathered."""
    caches = [
        PagedKVCache(kv_heads=KV, head_dim=D, value_dim=DV, page_size=5, pages=2, dtype=dtype, device=device)
        for _ in range(2)
    ]
    kernels = ("triton", "reference")
    numbers = [[each.add(), each.add()] for each in caches]
    for step, tokens in enumerate((37, 1, 3)):
        q, k, v = (
            _random(2, tokens, heads, width, seed=step, dtype=dtype).to(device)
            for heads, width in ((HEADS, D), (KV, D), (KV, DV))
        )
        got, want = (
            each.append_and_attend(q, k, v, of_each, mask=tw.causal("end"), kernel=kernel, allow_quadratic=True)
            for each, of_each, kernel in zip(caches, numbers, kernels, strict=True)
        )
        assert_accurate("out", got.cpu(), want.double().cpu().numpy())


LAWS = {"bits": bits, "cache": cache}


class _nothing_gathered:
    """Tokens that are brought together are an error."""

    def __enter__(self) -> None:
        self.gathered = pages_module.gathered
        pages_module.gathered = self._refuse

    def __exit__(self, *_: object) -> None:
        pages_module.gathered = self.gathered

    @staticmethod
    def _refuse(*_: object) -> None:
        raise AssertionError("tokens were gathered")


NAMES = (*(case.name for case in CASES), *LAWS)


def main(device: str, dtype: str, names: list[str]) -> None:
    """Check some cases and laws, or all; a line of JSON for each: its name, and None or what went wrong."""
    checks = {case.name: lambda *where, case=case: check(case, *where) for case in CASES} | LAWS
    for name in names or NAMES:
        error = None
        try:
            checks[name](getattr(torch, dtype), device)
        except Exception:
            error = traceback.format_exc(limit=-2)
        print(json.dumps({"case": name, "error": error}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])

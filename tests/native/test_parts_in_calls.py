"""float32 and float16 in parts of bfloat16 (test_parts.py), in batches, sequences and pages: the bits are a row's own.

Numbers that parts cannot hold stand among all others here, since rows and values that have them take other ways.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.parts_cases import run, same

import tilewise as tw

_native = pytest.importorskip("tilewise._native")
pytestmark = pytest.mark.usefixtures("tile_page")
STRANGE = {"float32": [np.nan, np.inf, -1e37, 2.0**56, 1e-31, -1e-40], "float16": [np.nan, np.inf, -np.inf]}


def _mixed(*shape: int, rare: int = 100, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Normal numbers; one row of `rare` has a strange one."""
    rng = np.random.default_rng([*shape, seed])
    x = rng.standard_normal(shape).astype(dtype)
    rows = x.reshape(-1, shape[-1])
    for n, row in enumerate(rng.permutation(len(rows))[: 1 + len(rows) // rare]):
        rows[row, rng.integers(shape[-1])] = STRANGE[dtype][n % len(STRANGE[dtype])]
    return x


CALLS = {  # query heads, kv heads, queries, keys, head size, value size
    "one tile": (2, 2, 32, 70, 40, 24),
    "a group's rows in one tile": (6, 2, 11, 1000, 64, 80),
    "many tiles": (2, 1, 333, 333, 16, 33),
    "many keys": (2, 2, 70, 3000, 33, 16),
    "long rows": (2, 1, 50, 300, 300, 256),
}
MASKS = {"all": None, "causal": tw.causal("end"), "window": tw.window(200, 0, "end")}


@pytest.mark.parametrize("dtype", STRANGE)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_batches_and_threads(call, mask, dtype) -> None:
    heads, kv, q_len, k_len, dim, value = call
    q, v = _mixed(2, heads, q_len, dim, dtype=dtype), _mixed(2, kv, k_len, value, dtype=dtype)
    k = _mixed(2, kv, k_len, dim, rare=200, dtype=dtype)
    answers = []
    for threads in (1, 2, 3, 1):
        tw.set_num_threads(threads)
        answers.append(run(q, k, v, mask=mask))
    tw.set_num_threads(0)
    for other in answers[1:]:
        same(other, answers[0])
    group = heads // kv
    for b in range(2):
        for h in range(kv):
            own = slice(b, b + 1), slice(h, h + 1)
            alone = run(q[b : b + 1, h * group : (h + 1) * group], k[own], v[own], mask=mask)
            same(alone, [x[b : b + 1, h * group : (h + 1) * group] for x in answers[0]])


@pytest.mark.parametrize("keys", [1, 31, 64, 100, 513, 700, 1023, 1100])  # with padding they are cut into splits
def test_padding_is_as_if_it_were_absent(keys) -> None:
    q, k, v = _mixed(1, 2, 40, 33), _mixed(1, 2, 1500, 33), _mixed(1, 2, 1500, 40)
    expected = run(q, k[:, :, :keys].copy(), v[:, :, :keys].copy())
    same(run(q, k, v, mask=tw.lengths(k=np.array([keys]))), expected)
    k[:, :, keys:], v[:, :, keys:] = np.nan, np.inf
    same(run(q, k, v, mask=tw.lengths(k=np.array([keys]))), expected)


Q_LENGTHS, K_LENGTHS = [40, 9, 130, 33], [70, 1000, 131, 33]


def _sequences(heads: int, kv: int, dim: int, value: int, dtype: str):
    """Queries, keys and values of each sequence, tokens first; the last keys of each are strange."""
    q = [_mixed(n, heads, dim, rare=50, dtype=dtype) for n in Q_LENGTHS]
    k = [_mixed(n, kv, dim, rare=60, dtype=dtype) for n in K_LENGTHS]
    v = [_mixed(n, kv, value, rare=60, seed=1, dtype=dtype) for n in K_LENGTHS]
    for keys, values in zip(k, v, strict=True):
        keys[-1, 0, 0], values[-1, 0, 2], values[-2, 1, 3] = STRANGE[dtype][-2], np.inf, STRANGE[dtype][-1]
    return q, k, v


def _each(q, k, v, mask):
    for own in zip(q, k, v, strict=True):
        out, lse = run(*(x[None] for x in own), layout="bshd", mask=mask)
        yield out[0], lse[0]


@pytest.mark.parametrize("dtype", STRANGE)
@pytest.mark.parametrize("mask", [None, tw.causal("end")], ids=["all", "causal"])
@pytest.mark.parametrize("sizes", [(2, 2, 40, 24), (6, 2, 64, 300)], ids=str)
def test_packed_sequences(sizes, mask, dtype) -> None:
    torch = pytest.importorskip("torch")
    from tilewise.torch import varlen_attention

    q, k, v = _sequences(*sizes, dtype)
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (Q_LENGTHS, K_LENGTHS))
    packed = [torch.from_numpy(np.concatenate(x)) for x in (q, k, v)]
    out, lse = varlen_attention(*packed, cu_q, cu_k, mask=mask, kernel="native", return_lse=True)
    for n, expected in enumerate(_each(q, k, v, mask)):
        rows = slice(int(cu_q[n]), int(cu_q[n + 1]))
        same((out[rows].numpy(), lse[:, rows].numpy()), expected)


@pytest.mark.parametrize("dtype", STRANGE)
@pytest.mark.parametrize("size", [1, 7, 16, 40, 64, 200])
def test_pages_that_cut_blocks(size, dtype) -> None:
    """Pages hold NaN where no key stands, and entries of the table beyond a sequence's keys name no page."""
    torch = pytest.importorskip("torch")
    from tilewise.torch import paged_attention

    q, k, v = _sequences(4, 2, 40, 24, dtype)
    needed = [-(-n // size) for n in K_LENGTHS]
    pages = [np.full((sum(needed) + 1, size, *x[0].shape[1:]), np.nan, dtype) for x in (k, v)]
    table = np.full((len(k), max(needed) + 2), 2**31 - 1, np.int32)
    order = iter(np.random.default_rng(size).permutation(sum(needed) + 1))
    for n, entries in enumerate(needed):
        for entry in range(entries):
            table[n, entry] = place = next(order)
            for target, rows in zip(pages, (k[n], v[n]), strict=True):
                part = rows[entry * size : (entry + 1) * size]
                target[place, : len(part)] = part
    cu = torch.tensor([0, *Q_LENGTHS]).cumsum(0)
    out, lse = paged_attention(
        torch.from_numpy(np.concatenate(q)), *map(torch.from_numpy, pages), block_table=torch.from_numpy(table),
        lengths=torch.tensor(K_LENGTHS), cu_seqlens_q=cu, mask=tw.causal("end"), kernel="native", return_lse=True,
    )  # fmt: skip
    for n, expected in enumerate(_each(q, k, v, tw.causal("end"))):
        rows = slice(int(cu[n]), int(cu[n + 1]))
        same((out[rows].numpy(), lse[:, rows].numpy()), expected)


# Gives the first large piece of memory asked for, once watched, pages that nothing may be read or written beside.
_GUARD = """
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
static int watching;
static size_t asked;
void watch(void) { watching = 1; }
size_t bytes_asked(void) { return asked; }
void *aligned_alloc(size_t alignment, size_t bytes) {
    void *memory = NULL;
    if (!watching || alignment != 64) return posix_memalign(&memory, alignment, bytes) ? NULL : memory;
    watching = 0;
    asked = bytes;
    size_t page = 4096, whole = (bytes + page - 1) / page * page;
    char *begin = mmap(NULL, whole + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (begin == MAP_FAILED) return NULL;
    mprotect(begin, page, PROT_NONE);
    mprotect(begin + page + whole, page, PROT_NONE);
    memset(begin + page, 255, whole); /* NaN */
    return begin + page + whole - bytes;
}
"""

_CALL = """
import ctypes, sys
import numpy as np, tilewise as tw
heads, kv, q_len, k_len, dim, value = map(int, sys.argv[1:7])
rng = np.random.default_rng(0)
shapes = (heads, q_len, dim), (kv, k_len, dim), (kv, k_len, value)
q, k, v = (rng.standard_normal((2, *shape)).astype(sys.argv[8]) for shape in shapes)
q[:, :, ::7, 0], k[:, :, 5, 0], v[:, :, ::20] = np.nan, np.nan, np.inf
promised = tw.explain(q, k, v, kernel="native", invariance=sys.argv[7]).workspace
guard = ctypes.CDLL(None)
guard.bytes_asked.restype = ctypes.c_size_t
guard.watch()
tw.attention(q, k, v, kernel="native", invariance=sys.argv[7])
print(promised, guard.bytes_asked())
"""


@pytest.mark.parametrize("invariance, dtype", [("batch", "float32"), ("batch", "float16"), ("row", "float32")])
@pytest.mark.parametrize(
    "call", [*CALLS.values(), (2, 2, 9, 64, 1, 1), (2, 2, 284, 220, 512, 256), (6, 2, 1, 3000, 40, 24)], ids=str
)
def test_the_workspace_is_what_is_promised(call, invariance, dtype, tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler, or no Linux")
    if "LD_PRELOAD" in os.environ:
        pytest.skip("a sanitizer watches memory itself")
    (tmp_path / "guard.c").write_text(_GUARD)
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", tmp_path / "guard.c", "-o", tmp_path / "guard.so"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "guard.so"), "TILEWISE_NUM_THREADS": "2"}
    ended = subprocess.run(
        [sys.executable, "-c", _CALL, *map(str, call), invariance, dtype],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr or f"ended by signal {-ended.returncode}"
    promised, asked = map(int, ended.stdout.split())
    assert asked - 128 < promised <= 2 * asked  # whole lines of 64, and one to align the first

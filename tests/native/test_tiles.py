"""The page for tile registers: it is polite to other users of them, and what it sums carefully has the same bits."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np
import pytest
from accuracy import assert_accurate
from support.parts_cases import run, same

import tilewise as tw
from tilewise.kernels.reference.arrays import float64

_native = pytest.importorskip("tilewise._native")
pytestmark = pytest.mark.usefixtures("tile_page")


def _arrays(q_len: int, k_len: int, dim: int, value: int, dtype: str = "bfloat16") -> list[np.ndarray]:
    rng = np.random.default_rng(q_len)
    shapes = [(1, 2, q_len, dim), (1, 2, k_len, dim), (1, 2, k_len, value)]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def _gradients(torch, q, k, v, d_out, **options):
    operands = [torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).clone().requires_grad_() for x in (q, k, v)]
    out = tw.attention(*operands, kernel="native", **options)
    out.backward(torch.from_numpy(d_out.view(np.int16)).view(torch.bfloat16))
    return [x.grad.view(torch.int16).numpy().view("bfloat16") for x in operands]


_HELPER = """
#include <immintrin.h>
unsigned long long in_use(void) { return _xgetbv(1); }
void take(void) {
    _Alignas(64) unsigned char shape[64] = {1};
    shape[16] = 64, shape[48] = 16;
    __asm__ volatile("" : : "r"(shape) : "memory");
    _tile_loadconfig(shape);
    _tile_zero(0);
}
void give_back(void) { _tile_release(); }
"""


def test_the_registers_are_given_back(tmp_path: Path) -> None:
    # XGETBV says which parts of a thread's state are not as at its start: 17 is the tiles' shape, 18 their contents.
    torch = pytest.importorskip("torch")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("no C compiler")
    (tmp_path / "tiles.c").write_text(_HELPER)
    library = tmp_path / "tiles.so"
    flags = ["-shared", "-fPIC", "-O1", "-mxsave", "-mamx-tile"]
    subprocess.run([compiler, *flags, tmp_path / "tiles.c", "-o", library], check=True)
    helper = ctypes.CDLL(str(library))
    helper.in_use.restype = ctypes.c_ulonglong
    tiles = 1 << 17 | 1 << 18
    helper.take()
    assert helper.in_use() & 1 << 17
    helper.give_back()
    assert not helper.in_use() & tiles
    q, k, v = _arrays(100, 200, 64, 64)
    tw.set_num_threads(1)
    run(q, k, v, mask=tw.causal("end"))
    after_forward = helper.in_use()
    _gradients(torch, q, k, v, q)
    tw.set_num_threads(0)
    assert not (after_forward | helper.in_use()) & tiles


def test_beside_another_user_of_the_registers() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = _arrays(100, 300, 64, 96)
    matrix = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, product = run(q, k, v), matrix @ matrix
    for _ in range(3):
        assert torch.equal(matrix @ matrix, product)
        same(run(q, k, v), expected)


_REFUSED = """
import ctypes, os
class Stack(ctypes.Structure):
    _fields_ = [("memory", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
stack = Stack(ctypes.addressof(memory), 0, 4096)
if ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None):
    print("no such stack")
    raise SystemExit
os.environ.pop("TILEWISE_ISA", None)
from tilewise import _native
from tilewise.cli import findings
found = _native.build_info()
print("amx_bf16" in found["supported_pages"], "amx_bf16" in found["refused_pages"], _native.isa())
print([finding.present for finding in findings.native() if finding.name == "page amx_bf16"])
os.environ["TILEWISE_ISA"] = "amx_bf16"
try:
    _native.isa()
except RuntimeError as error:
    print(error)
"""


def test_a_refusal_is_said() -> None:
    # Linux grants no thread tiles that has a stack for signals on which they could not be saved.
    ended = subprocess.run([sys.executable, "-c", _REFUSED], capture_output=True, text=True, check=True)
    lines = ended.stdout.splitlines()
    if lines == ["no such stack"]:
        pytest.skip("this system lets nobody have a signal stack that is too small for the registers")
    assert lines[0] == "False True avx512_bf16"
    assert lines[1] == "[False]"
    assert lines[2].startswith("TILEWISE_ISA: the system refuses")


@pytest.mark.parametrize("dtype, q_len", [("float32", 5), ("float64", 40), ("float16", 5)])
def test_what_tiles_do_not_take_is_left_to_the_next_page(monkeypatch, dtype, q_len) -> None:
    q, k, v = _arrays(q_len, 70, 24, 24, dtype)
    found = run(q, k, v, mask=tw.causal("end"))
    pages = _native.build_info()["supported_pages"]  # of a build for work on some pages, other ones
    monkeypatch.setenv("TILEWISE_ISA", pages[pages.index("amx_bf16") + 1])
    same(found, run(q, k, v, mask=tw.causal("end")))


@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("q_len, k_len", [(33, 31), (64, 300)])
def test_scales_that_are_not_positive(scale, q_len, k_len) -> None:
    q, k, v = _arrays(q_len, k_len, 40, 24)
    # Every row sees something of some groups of 32 keys, and nothing of others.
    options = {"scale": scale, "mask": tw.window(20, 5, "end")}
    wide = [x.astype("float64") for x in (q, k, v)]
    exact = tw.attention(*wide, kernel="reference", allow_quadratic=True, return_lse=True, **options)
    found = run(q, k, v, **options)
    assert_accurate("out", found[0], exact[0])
    assert_accurate("lse", found[1], exact[1], dtype="float32")


def test_keys_far_below_add_nothing() -> None:
    # Scores of 0 and of -90: e^-90 is below the smallest number that is not denormal.
    q, k, v = _arrays(40, 96, 32, 32)
    q[:], k[:] = 1, 0
    k[:, :, 10:90, 0] = -90
    seen = np.ones((40, 96), bool)
    seen[:, 10:90] = False
    same(run(q, k, v, scale=1.0), run(q, k, v, scale=1.0, mask=tw.dense(seen)))


def _spoilt(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Who sees what of 70 keys; and keys, some in one group of 32, that some rows do not see."""
    seen = np.random.default_rng(seed).random((45, 70)) < 0.5
    keys = np.array([3, 7, 30, 31, 40, 69])
    seen[:9, keys] = False
    seen[9, keys[:3]], seen[9, keys[3:]] = True, False
    return seen, keys


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"bias": np.ones((1, 1, 45, 70))}], ids=str)
def test_values_that_only_some_rows_see(options) -> None:
    seen, keys = _spoilt(0)
    q, k, v = _arrays(45, 70, 24, 40)
    options = {"mask": tw.dense(seen), **options}
    clean = run(q, k, v, **options)
    v[:, :, keys, 5], v[:, :, keys, 21] = np.nan, np.inf
    out, lse = run(q, k, v, **options)
    assert lse.tobytes() == clean[1].tobytes()
    sees = seen[:, keys].any(1)
    assert sees.any() and not sees.all()
    assert out[:, :, ~sees].tobytes() == clean[0][:, :, ~sees].tobytes()
    assert np.isnan(float64(out)[:, :, sees, 5]).all() and not np.isfinite(float64(out)[:, :, sees, 21]).any()
    # What a row does see spoils the columns in which it is not finite, and no other.
    others = np.delete(np.arange(40), [5, 21])
    assert out[..., others].tobytes() == clean[0][..., others].tobytes()


def test_gradients_of_what_only_some_rows_see() -> None:
    torch = pytest.importorskip("torch")
    seen, keys = _spoilt(1)
    q, k, v = _arrays(45, 70, 24, 40)
    d_out = _arrays(45, 45, 24, 40)[2]
    clean = _gradients(torch, q, k, v, d_out, mask=tw.dense(seen))
    k[:, :, keys], v[:, :, keys] = np.nan, np.inf
    found = _gradients(torch, q, k, v, d_out, mask=tw.dense(seen))
    rows = ~seen[:, keys].any(1)
    assert found[0][:, :, rows].tobytes() == clean[0][:, :, rows].tobytes()
    assert np.isnan(float64(found[0])[:, :, ~rows]).all()
    # Rows that are spoilt give their NaN to the keys that they see; the others' gradients are as they were.
    untouched = ~seen[~rows].any(0)
    for got, other in zip(found[1:], clean[1:], strict=True):
        assert got[:, :, untouched].tobytes() == other[:, :, untouched].tobytes()


def test_gradients_beside_rows_that_are_not_finite() -> None:
    torch = pytest.importorskip("torch")
    seen = np.random.default_rng(2).random((45, 70)) < 0.5
    seen[[4, 20, 44]] = False
    seen[4, :10] = seen[20, 5:15] = seen[44, 64:] = True
    q, k, v = _arrays(45, 70, 24, 40)
    d_out = _arrays(45, 45, 24, 40)[2]
    clean = _gradients(torch, q, k, v, d_out, mask=tw.dense(seen))
    q[:, :, [4, 44]], d_out[:, :, 20] = np.nan, np.inf
    found = _gradients(torch, q, k, v, d_out, mask=tw.dense(seen))
    rows, keys = np.isin(np.arange(45), [4, 20, 44]), seen[[4, 20, 44]].any(0)
    assert found[0][:, :, ~rows].tobytes() == clean[0][:, :, ~rows].tobytes()
    for got, other in zip(found[1:], clean[1:], strict=True):
        assert got[:, :, ~keys].tobytes() == other[:, :, ~keys].tobytes()
        assert not np.isfinite(float64(got)[:, :, keys]).any()


def test_threads_have_their_own_registers() -> None:
    q, k, v = _arrays(700, 400, 64, 64)
    answers = []
    for threads in (1, 3):
        tw.set_num_threads(threads)
        answers.append(run(q, k, v, mask=tw.causal("start")))
    tw.set_num_threads(0)
    same(answers[1], answers[0])

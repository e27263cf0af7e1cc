"""Large results of torch lie in memory that was advised to be in large pages; what is small is left alone."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
native = pytest.importorskip("tilewise._native")
if not Path("/sys/kernel/mm/transparent_hugepage").exists():
    pytest.skip("this system has no transparent large pages", allow_module_level=True)

import tilewise as tw  # noqa: E402
from tilewise.torch import varlen_attention  # noqa: E402


def advised(address: int) -> bool:
    """Whether Linux was asked for large pages at the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            begin, end = (int(part, 16) for part in name.split("-"))
            inside = begin <= address < end
        elif inside and name == "VmFlags:":
            return "hg" in rest
    raise AssertionError("nothing is mapped there")


def middle(tensor) -> int:
    return tensor.data_ptr() + tensor.nbytes // 2


MASK = tw.causal() & tw.window(16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_results_and_gradients_are_in_large_pages(dtype):
    q, k, v = (torch.randn(1, 8, 8192, 64, dtype=dtype, requires_grad=True) for _ in range(3))  # of 8 or 16 MB
    for _ in range(3):  # then on the way of remembered calls
        out = tw.attention(q, k, v, mask=MASK, kernel="native")
        assert advised(middle(out))
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert advised(middle(gradient))


def test_a_large_lse_is_in_large_pages():
    q, k, v = (torch.randn(1, 128, 9000, 8) for _ in range(3))
    for _ in range(3):
        _, lse = tw.attention(q, k, v, mask=MASK, kernel="native", return_lse=True)
        assert advised(middle(lse))


def test_packed_results_are_in_large_pages():
    q, k, v = (torch.randn(8192, 4, 64, requires_grad=True) for _ in range(3))
    starts = torch.tensor([0, 100, 8192], dtype=torch.int32)
    out = varlen_attention(q, k, v, starts, starts, mask=MASK)
    assert advised(middle(out))
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert advised(middle(gradient))


def test_less_than_four_megabytes_are_left_alone():
    memory = mmap.mmap(-1, 8 << 20)
    held = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(held)
    native.prefer_large_pages(address, (4 << 20) - 1)
    assert not advised(address + (1 << 20))
    native.prefer_large_pages(address, 4 << 20)
    assert advised(address + (1 << 20)) and not advised(address + (5 << 20))
    del held
    memory.close()

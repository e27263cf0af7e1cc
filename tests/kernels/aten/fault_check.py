"""Try whether torch's known faults are still there: `PYTHONPATH=src python tests/kernels/aten/fault_check.py`.

Runs the reproducer of every row of `tilewise.kernels.aten.faults` in a process of its own, since some crash, and prints
one line for each: PRESENT, REPAIRED, or why it could not be tried here. The functions below say True where the fault
shows. Leaves with 1 where a fault shows outside the versions or architectures of its row.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilewise.kernels.aten import faults

Tensor = torch.Tensor


def _half(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def _sdpa(backend: SDPBackend, *arrays: Tensor, **options: Any) -> Tensor:
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(*arrays, **options)


def _differs(got: Tensor, want: Tensor) -> bool:
    return not bool((got.double() - want.double()).abs().max() <= 0.05)


def _exact(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    options = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    return _sdpa(SDPBackend.MATH, q.double(), k.double(), v.double(), **options)


def cudnn_half_tile() -> bool:
    """d_q with a bias, a length of 704 and log-sum-exps far below -88.7."""
    q, k, v = (_half(1, 1, 704, 64).requires_grad_() for _ in range(3))
    bias = torch.full((1, 1, 704, 704), -120.0, dtype=torch.bfloat16, device="cuda")
    out = _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v, attn_mask=bias)
    return not bool(torch.isfinite(torch.autograd.grad(out.sum(), q)[0]).all())


def cudnn_bias_dtype() -> bool:
    """A float32 bias of bfloat16 queries."""
    q, k, v = (_half(1, 2, 128, 64) for _ in range(3))
    bias = torch.randn(1, 2, 128, 128, device="cuda")
    return _differs(_sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v, attn_mask=bias), _exact(q, k, v, attn_mask=bias))


def cudnn_few_heads() -> bool:
    """Decoding and prefill with 28 query heads on 4 key heads, 64 batch rows."""
    for q_len in (1, 7, 512):
        q, k, v = _half(64, 28, q_len, 128), _half(64, 4, 700, 128), _half(64, 4, 700, 128)
        got = _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v, enable_gqa=True)
        if _differs(got[:4], _exact(q[:4], k[:4], v[:4], enable_gqa=True)):
            return True
    return False


def cudnn_one_query() -> bool:
    """d_k and d_v of a single query whose scores are near -128."""
    q = torch.full((1, 1, 1, 128), 1.0, dtype=torch.bfloat16, device="cuda")
    k = torch.full((1, 1, 128, 128), -11.3, dtype=torch.bfloat16, device="cuda").requires_grad_()
    v = _half(1, 1, 128, 128).requires_grad_()
    out = _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v)
    return not all(bool(torch.isfinite(x).all()) for x in torch.autograd.grad(out.sum(), (k, v)))


def _last_rows_differ(length: int, biased: bool) -> bool:
    q, k, v = (_half(1, 1, length, 64) for _ in range(3))
    bias = _half(1, 1, length, length) if biased else None
    got = _sdpa(SDPBackend.EFFICIENT_ATTENTION, q, k, v, attn_mask=bias, is_causal=not biased)[:, :, -64:]
    rows = None if bias is None else bias[:, :, -64:]
    if rows is None:
        rows = torch.zeros(64, length, dtype=torch.bfloat16, device="cuda")
        rows.masked_fill_(torch.ones_like(rows, dtype=torch.bool).triu(length - 63), float("-inf"))
    return _differs(got, _exact(q[:, :, -64:], k, v, attn_mask=rows))


def efficient_far_bias() -> bool:
    """The last rows of 73728 x 73728 with a bias, which takes 11 GB."""
    return _last_rows_differ(73_728, True)


def efficient_long() -> bool:
    """The last rows of a causal call with 65600 queries."""
    return _last_rows_differ(65_600, False)


def many_heads() -> bool:
    """A batch of 65536 in the flash and memory-efficient kernels."""
    q, k, v = (_half(65_536, 1, 8, 16) for _ in range(3))
    want = _exact(q, k, v)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            got = _sdpa(backend, q, k, v)
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        if _differs(got, want):
            return True
    return False


def cpu_no_keys() -> bool:
    """No keys: the process ends with SIGFPE, which the caller sees."""
    q, k = torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 0, 8)
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k)
    return False


def cpu_half_lse() -> bool:
    """lse of bfloat16 against float64: promised is 4e-6 relative."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 4, 50, 16).bfloat16() for _ in range(2))
    lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k)[1].double()
    want = torch.logsumexp(q.double() @ k.double().mT / 4, -1)
    return bool(((lse - want).abs() / want.abs().clamp(min=1)).max() > 4e-6)


REPRODUCERS: dict[str, Callable[[], bool]] = {
    run.__name__: run
    for run in (
        cudnn_half_tile, cudnn_bias_dtype, cudnn_few_heads, cudnn_one_query, efficient_far_bias, efficient_long,
        many_heads, cpu_no_keys, cpu_half_lse,
    )
}  # fmt: skip

_PRESENT, _ABSENT, _REFUSED = 10, 11, 12


def shows(name: str) -> bool | str:
    """Whether the fault shows here, in a process of its own; or why that could not be found out."""
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, name], capture_output=True, text=True)
    if done.returncode == _REFUSED:
        return "torch refuses the call: " + done.stderr.strip().splitlines()[-1][:160]
    if done.returncode in (_PRESENT, _ABSENT):
        return done.returncode == _PRESENT
    if done.returncode < 0:
        return True  # a signal: it crashed
    return f"the process ended with {done.returncode}: {done.stderr.strip()[-300:]}"


def _expected(fault: faults.Fault) -> bool:
    """Whether this torch, cuDNN and GPU are inside the row's ranges."""
    architecture = ""
    if fault.way != "cpu":
        major, minor = torch.cuda.get_device_capability()
        architecture = f"sm_{major}{minor}"
    return fault.reaches(architecture)


def _try(name: str) -> int:
    try:
        return _PRESENT if REPRODUCERS[name]() else _ABSENT
    except RuntimeError as error:
        print(str(error).splitlines()[0], file=sys.stderr)
        return _REFUSED


def main() -> int:
    """Print a line for each row."""
    unforeseen = 0
    for fault in faults.FAULTS:
        what = f"{fault.reproducer:18} {fault.issue:30}"
        if fault.way != "cpu" and not torch.cuda.is_available():
            print(f"{what} not tried: no GPU here", flush=True)
            continue
        found, expected = shows(fault.reproducer), _expected(fault)
        text = found if isinstance(found, str) else "PRESENT" if found else "REPAIRED"
        note = "" if found is not True or expected else "  outside the versions or architectures of its row"
        unforeseen += found is True and not expected
        print(f"{what} {text}{note}", flush=True)
    return 1 if unforeseen else 0


if __name__ == "__main__":
    sys.exit(_try(sys.argv[1]) if len(sys.argv) > 1 else main())

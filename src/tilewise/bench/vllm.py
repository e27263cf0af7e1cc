"""vLLM's attention for x86-64 CPUs: its operators alone, from the shared object in its package, which is not imported.

Its import would bring its other dependencies, and change settings of torch.compile that another peer runs under. Keys
and values lie in its cache and the schedule is made before the time begins: in a model the first is done once for each
token, the second once for all layers.
"""

from __future__ import annotations

import platform
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .cases import Case
from .runs import Answers, Prepared, Refused, forward_alone, torch_tensors

PAGE = 128  # tokens, what vLLM takes on a CPU unless it is told otherwise


def paged(case: Case, data: dict[str, np.ndarray], dtype: str) -> Prepared:
    """Causal, windowed, grouped, padded, packed and decoding cases, as packed queries over pages of keys and values."""
    import torch

    forward_alone(case)
    if case.mask.endswith("dense"):
        raise Refused("no boolean masks")
    operators, kernel = _operators(), _kernel(case, dtype)
    # Contiguous, since it writes its output as if it were, whatever its strides.
    q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in torch_tensors(case, data, dtype))
    packed = case.mask == "packed"
    starts = case.starts() if packed else np.arange(case.batch + 1, dtype=np.int32) * case.q_len
    held = np.diff(starts) if packed else np.full(case.batch, case.k_len)
    seen = held if case.mask != "padding" else case.mask_of().operands()[0]  # type: ignore[union-attr]
    slots, table = (torch.from_numpy(x) for x in pages(held))
    lengths, starts = torch.from_numpy(seen.astype(np.int32)), torch.from_numpy(starts)
    # A page holds its keys, then its values, of each head.
    stored = torch.zeros(int(table[-1, -1]) + 1, case.kv_heads, 2 * PAGE, case.dim, dtype=q.dtype)
    keys, values = stored.chunk(2, dim=2)
    window = 513 if case.mask == "window" else -1  # it counts the key of the query itself
    ends = case.mask in ("causal", "window", "packed") or case.kind == "decode"
    heads = case.q_heads, case.kv_heads, case.dim
    try:
        operators.cpu_attn_reshape_and_cache(k, v, keys, values, slots, kernel)
        schedule = operators.get_scheduler_metadata(
            len(lengths), *heads, lengths, q.dtype, starts, ends, window, kernel, True, None
        )
    except RuntimeError as error:
        raise Refused(str(error).splitlines()[0]) from None

    def run() -> Any:
        out = torch.empty_like(q)
        operators.cpu_attention_with_kv_cache(
            q, keys, values, out, starts, lengths, case.dim**-0.5, ends, None, window, table, 0.0, schedule, None, None
        )
        return out

    def answers(out: Any) -> Answers:
        return (out.unflatten(0, (case.batch, case.q_len)).transpose(1, 2).float().numpy(),)

    return run, answers


def pages(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the tokens of some sequences lie when each has pages of its own, one after another.

    Args:
        lengths: (N,) of the sequences, 0 or more.

    Returns:
        slots: (sum of the lengths,) int64, the row of each token, page by page.
        table: (N, entries) int32, the pages of each sequence in order, then pages that are not read.
    """
    needed = -(-lengths // PAGE)
    first = np.cumsum(needed) - needed
    slots = np.concatenate([start * PAGE + np.arange(length) for start, length in zip(first, lengths, strict=True)])
    table = first[:, None] + np.minimum(np.arange(needed.max()), np.maximum(needed[:, None] - 1, 0))
    return slots.astype(np.int64), table.astype(np.int32)


def _kernel(case: Case, dtype: str) -> str:
    """The name of the kernel that vLLM would take for heads of this width."""
    import torch

    if case.dim % 32:
        return "vec16"
    return "amx" if dtype == "bfloat16" and torch.cpu.get_capabilities().get("amx_tile") else "vec"


@cache
def _operators() -> Any:
    """vLLM's operators for this processor: of its three builds the one that it would load."""
    import torch

    if platform.machine() != "x86_64":
        raise Refused("asked on x86-64 alone")
    has = torch.cpu.get_capabilities()
    build = "_C" if has.get("avx512_bf16") else "_C_AVX512" if has.get("avx512_f") else "_C_AVX2"
    package = find_spec("vllm")
    assert package is not None and package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / f"{build}.abi3.so"
    if not path.exists():
        raise Refused(f"its package has no {path.name}: it is no build for CPUs")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise Refused(f"{path.name} does not load: {error}") from None
    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        raise Refused(f"{path.name} has no attention for CPUs")
    return torch.ops._C

"""The limits of Triton's card, on problems of GPUs that need not be here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tilewise.plan.choose import choose
from tilewise.problem import AttentionProblem

WIDE = AttentionProblem(
    "torch", "cuda", "float32", batch=1, q_heads=2, kv_heads=2, q_len=1024, k_len=1024, head_dim=512, value_dim=512,
    gradients=frozenset({"q", "k", "v"}), architecture="sm_89",
)  # fmt: skip


def test_wide_float32_on_little_shared_memory_takes_another_backward() -> None:
    """Its own would need 128 KiB for a step, of 99 that a block may have."""
    plan = choose(WIDE, "triton")
    assert plan.kernel == "triton" and plan.backward not in (None, "triton")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_wide_float32_elsewhere_takes_its_own(arch: str) -> None:
    assert choose(replace(WIDE, architecture=arch), "triton").backward == "triton"


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"head_dim": 256, "value_dim": 256}])
def test_half_precision_and_narrower_heads_take_its_own(change: dict[str, str | int]) -> None:
    assert choose(replace(WIDE, **change), "triton").backward == "triton"

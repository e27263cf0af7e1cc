"""Which of torch's operators fit which problem, and the table of known faults: pure questions, no tensor anywhere."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tilewise.kernels.aten import faults, limits
from tilewise.problem import AttentionProblem, BiasFacts, MaskFacts

sys.path.append(str(Path(__file__).parent))

import fault_check

HALF = AttentionProblem(
    "torch", "cuda", "bfloat16", batch=2, q_heads=16, kv_heads=16, q_len=4096, k_len=4096, head_dim=128, value_dim=128,
    model="NVIDIA H200", architecture="sm_90",
)  # fmt: skip
CAUSAL = replace(HALF, mask=MaskFacts("causal()", ranges=1, diagonal=0))
BIASED = replace(HALF, bias=BiasFacts(((2, 16, 4096, 4096),), dtypes=("bfloat16",)))


def wanting(problem: AttentionProblem, *names: str) -> AttentionProblem:
    return replace(problem, gradients=frozenset(names or ("q", "k", "v")))


@pytest.mark.parametrize(
    ("problem", "ways"),
    [
        (HALF, ("cudnn", "flash", "efficient")),
        (CAUSAL, ("cudnn", "flash", "efficient")),
        (replace(HALF, head_dim=256, value_dim=256), ("flash", "efficient")),
        (replace(HALF, head_dim=192), ("efficient",)),
        (replace(HALF, head_dim=72, value_dim=72), ("cudnn", "flash", "efficient")),
        (replace(HALF, head_dim=70, value_dim=70), ()),
        (replace(HALF, kv_heads=2), ("cudnn", "flash")),
        (replace(HALF, architecture="sm_80"), ("flash", "efficient")),
        (replace(HALF, architecture="gfx942"), ()),
        (replace(HALF, dtype="float32"), ()),
        (replace(HALF, dtype="float64"), ()),
        (replace(HALF, q_len=1), ("cudnn", "flash", "efficient")),
        (replace(HALF, k_len=1), ("flash", "efficient")),
        (replace(HALF, k_len=0), ()),
        (BIASED, ("cudnn", "efficient")),
        (replace(BIASED, bias=BiasFacts(((1, 1, 4096, 4096),), dtypes=("bfloat16",))), ("cudnn", "efficient")),
        (replace(BIASED, bias=BiasFacts(((1, 1, 1, 4096),), dtypes=("bfloat16",))), ()),
        (replace(BIASED, bias=BiasFacts(((1, 1, 4096, 4096),), dtypes=("float32",))), ()),
        (replace(CAUSAL, k_len=5000), ()),
        (replace(HALF, mask=MaskFacts("window(9, 0)", ranges=1)), ()),
        (replace(HALF, mask=MaskFacts("documents(…)", labels=True)), ()),
        (replace(HALF, softcap=30.0), ()),
        (replace(HALF, sinks=True), ()),
        (replace(HALF, part=True), ()),
        (replace(HALF, dropout=0.1), ()),
    ],
)
def test_ways_forward(problem: AttentionProblem, ways: tuple[str, ...]) -> None:
    assert limits.ways(problem) == ways
    refusals = limits.refusals("forward", problem)
    assert bool(refusals) == (not ways) and all(sentence.strip() for sentence in refusals)


@pytest.mark.parametrize(
    ("problem", "ways"),
    [
        (wanting(CAUSAL), ("efficient",)),
        (wanting(replace(CAUSAL, deterministic=False)), ("cudnn", "flash", "efficient")),
        (wanting(replace(CAUSAL, return_lse=True)), ()),
        (wanting(replace(CAUSAL, kv_heads=4)), ()),
        (wanting(replace(CAUSAL, kv_heads=4, deterministic=False)), ("cudnn", "flash")),
        (wanting(BIASED, "q", "k", "v", "bias"), ("efficient",)),
        (wanting(replace(BIASED, bias=BiasFacts(((1, 16, 4096, 4096),), dtypes=("bfloat16",))), "bias"), ()),
        (wanting(replace(BIASED, deterministic=False)), ("cudnn", "efficient")),
    ],
)
def test_ways_backward(problem: AttentionProblem, ways: tuple[str, ...]) -> None:
    assert limits.backward_ways(problem) == ways


# Each row with the least change that leads out of it.
LONG = replace(HALF, batch=1, q_len=65_600, k_len=65_600)
ROWS = {
    "cudnn_half_tile": ("cudnn", "backward", replace(BIASED, q_len=4032), replace(BIASED, q_len=4096)),
    "cudnn_bias_dtype": (
        "cudnn", "forward", replace(BIASED, bias=BiasFacts(BIASED.bias.dense, dtypes=("float32",))), BIASED,
    ),
    "cudnn_few_heads": (
        "cudnn", "forward", replace(HALF, architecture="sm_100", kv_heads=4),
        replace(HALF, architecture="sm_100", kv_heads=8),
    ),
    "cudnn_one_query": ("cudnn", "backward", replace(HALF, q_len=1), replace(HALF, q_len=2)),
    "efficient_far_bias": (
        "efficient", "forward", replace(BIASED, q_len=65_536, k_len=65_536),
        replace(BIASED, q_len=32_768, k_len=65_536),
    ),
    "efficient_long": ("efficient", "forward", LONG, replace(LONG, q_len=65_536, k_len=65_536)),
    "many_heads": ("flash", "forward", replace(HALF, batch=4096), replace(HALF, batch=4095)),
    "cpu_no_keys": ("cpu", "forward", replace(HALF, device="cpu", k_len=0), replace(HALF, device="cpu", k_len=1)),
    "cpu_half_lse": ("cpu", "forward", replace(HALF, device="cpu"), replace(HALF, device="cpu", dtype="float32")),
}  # fmt: skip


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.reproducer)
def test_each_fault_refuses_what_it_concerns_and_no_more(fault: faults.Fault) -> None:
    way, step, inside, outside = ROWS[fault.reproducer]
    assert fault.holds(way, step, inside) and not fault.holds(way, step, outside)
    assert any(fault.issue in sentence for sentence in limits.reasons(way, step, inside))
    assert not any(fault.issue in sentence for sentence in limits.reasons(way, step, outside))


def test_each_fault_has_a_reproducer_and_each_reproducer_a_fault() -> None:
    assert [fault.reproducer for fault in faults.FAULTS] == list(fault_check.REPRODUCERS)
    assert set(ROWS) == set(fault_check.REPRODUCERS)


@pytest.mark.parametrize("name", ["cpu_no_keys", "cpu_half_lse"])
def test_faults_that_need_no_gpu_are_still_there(name: str) -> None:
    """Where this fails, torch was repaired: close the row's range of versions."""
    assert fault_check.shows(name) is True


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(faults.FAULTS[0], torch=((2, 11), (2, 14)), cudnn=((9, 12), (9, 20)))
    cases = [
        ((2, 10), (9, 15), False), ((2, 11), (9, 15), True), ((2, 13), (9, 19), True), ((2, 14), (9, 15), False),
        ((2, 12), (9, 20), False), ((2, 12), (9, 11), False), (None, None, True), ((2, 12), None, True),
    ]  # fmt: skip
    for torch_version, cudnn_version, reached in cases:
        monkeypatch.setattr(faults, "torch_version", lambda found=torch_version: found)
        monkeypatch.setattr(faults, "cudnn_version", lambda found=cudnn_version: found)
        assert row.reaches("sm_90") is reached and not row.reaches("sm_80")

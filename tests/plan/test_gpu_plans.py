"""Plans for GPUs that are not here: hand-made problems, fake tensors, measured tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise.masks.lower import lower  # noqa: E402
from tilewise.masks.part import Run, mask_part  # noqa: E402
from tilewise.masks.site import Site  # noqa: E402
from tilewise.plan import measured  # noqa: E402
from tilewise.plan.choose import choose, planned  # noqa: E402
from tilewise.problem import AttentionProblem, BiasFacts, MaskFacts, kind_of  # noqa: E402

HALF = AttentionProblem(
    "torch", "cuda", "bfloat16", batch=2, q_heads=16, kv_heads=16, q_len=4096, k_len=4096, head_dim=128, value_dim=128,
    model="NVIDIA H200", architecture="sm_90",
)  # fmt: skip
CAUSAL = replace(HALF, mask=MaskFacts("causal()", ranges=1, diagonal=0))
WINDOW = replace(HALF, mask=MaskFacts("window(1023, 0)", ranges=1))
GRADIENTS = frozenset({"q", "k", "v"})


def row(kind: str, step: str = "forward", width: int = 128, length: int = 4096, **tflops: float) -> dict[str, Any]:
    rates = {name.replace("_", "/"): rate for name, rate in tflops.items()}
    return {"kind": kind, "dtype": "bfloat16", "width": width, "length": length, "step": step, "tflops": rates}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that puts a measured table in place, for the time of a test."""

    def put(*rows: dict[str, Any], device: str = "NVIDIA H200") -> None:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({"device": device, "architecture": "sm_90", "torch": "2.11.0", "rows": rows}))
        monkeypatch.setenv("TILEWISE_TABLE", str(path))
        planned.cache_clear()

    yield put
    monkeypatch.undo()
    planned.cache_clear()


def test_an_unknown_device_gets_the_cautious_order() -> None:
    plan = choose(replace(CAUSAL, model="", architecture="", gradients=GRADIENTS))
    assert (plan.kernel, plan.way, plan.backward, plan.backward_way) == ("aten", "cudnn", "aten", "efficient")
    assert plan.careful == "portable"
    assert "name is not known" in " ".join(plan.refusals["triton"])
    assert "cuDNN" not in str(plan) and "computed again by portable" in str(plan)
    window = choose(WINDOW)
    assert window.kernel == "portable" and window.careful is None
    assert "no table of NVIDIA H200" in " ".join(window.refusals["triton"])
    assert "no mask but none" in " ".join(window.refusals["aten"])


def test_triton_runs_unasked_where_the_table_has_it(table: Any) -> None:
    table(row("ranges", triton=400.0), row("causal", triton=450.0, aten_cudnn=600.0, aten_flash=330.0))
    assert choose(WINDOW).kernel == "triton"
    assert (choose(CAUSAL).kernel, choose(CAUSAL).way) == ("aten", "cudnn")
    full = choose(HALF)
    assert full.kernel == "aten" and "nothing like this problem" in " ".join(full.refusals["triton"])


def test_the_faster_wins_by_the_table(table: Any) -> None:
    table(row("causal", triton=450.0, aten_cudnn=300.0, aten_flash=330.0))
    assert choose(CAUSAL).kernel == "triton" and "triton is estimated faster" in str(choose(CAUSAL))
    table(row("causal", triton=250.0, aten_cudnn=300.0, aten_flash=330.0))
    assert (choose(CAUSAL).kernel, choose(CAUSAL).way) == ("aten", "flash")


def test_backward_is_ranked_by_itself(table: Any) -> None:
    table(
        row("causal", triton=450.0, aten_cudnn=600.0),
        row("causal", "backward", triton_split=300.0, aten_efficient=150.0),
    )
    plan = choose(replace(CAUSAL, gradients=GRADIENTS))
    assert (plan.kernel, plan.way, plan.backward, plan.backward_way) == ("aten", "cudnn", "triton", "split")
    table(
        row("causal", triton=450.0, aten_cudnn=600.0),
        row("causal", "backward", triton_split=100.0, aten_efficient=150.0),
    )
    assert choose(replace(CAUSAL, gradients=GRADIENTS)).backward_way == "efficient"


def test_sums_in_no_fixed_order_are_a_way_that_must_be_allowed(table: Any) -> None:
    forward = row("causal", triton=450.0)
    table(forward, row("causal", "backward", triton_split=300.0, triton_atomics=500.0, aten_efficient=150.0))
    fixed = replace(CAUSAL, gradients=GRADIENTS)
    plan = choose(fixed)
    assert (plan.backward, plan.backward_way) == ("triton", "split") and "fixed order" not in str(plan)
    plan = choose(replace(fixed, deterministic=False))
    assert (plan.backward, plan.backward_way) == ("triton", "atomics")
    assert "triton (atomics)" in str(plan) and "no fixed order, which TILEWISE_DETERMINISTIC=0 allows" in str(plan)
    rates = {"aten_efficient": 150.0, "aten_cudnn": 150.0, "aten_flash": 150.0}
    table(forward, row("causal", "backward", triton_split=300.0, triton_atomics=200.0, **rates))
    assert choose(replace(fixed, deterministic=False)).backward_way == "split"


def test_nearest_length_and_next_width(table: Any) -> None:
    table(
        row("causal", width=64, triton=900.0, aten_cudnn=1.0),
        row("causal", length=1024, triton=100.0, aten_cudnn=200.0),
        row("causal", length=16384, triton=500.0, aten_cudnn=200.0),
    )
    assert choose(replace(CAUSAL, q_len=2000, k_len=2000)).kernel == "aten"
    assert choose(replace(CAUSAL, q_len=9000, k_len=9000)).kernel == "triton"
    assert choose(replace(CAUSAL, head_dim=64, value_dim=64)).kernel == "triton"
    assert choose(replace(CAUSAL, head_dim=96, value_dim=96, q_len=2000, k_len=2000)).kernel == "aten"


def test_devices_are_found_by_name_or_words_of_it(table: Any) -> None:
    table(row("ranges", triton=400.0))
    for model, kernel in (("H200", "triton"), ("nvidia h200", "triton"), ("NVIDIA H100 80GB HBM3", "portable")):
        assert choose(replace(WINDOW, model=model)).kernel == kernel


def test_a_file_that_holds_no_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "empty.json"
    path.write_text("{}")
    monkeypatch.setenv("TILEWISE_TABLE", str(path))
    with pytest.raises(ValueError, match=r"TILEWISE_TABLE: .*empty.json holds no table"):
        measured.table_for("another device")


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        (HALF, "full"),
        (CAUSAL, "causal"),
        (WINDOW, "ranges"),
        (replace(WINDOW, softcap=30.0, sinks=True), "ranges+softcap+sinks"),
        (replace(CAUSAL, bias=BiasFacts(table=True)), "causal+table"),
        (replace(HALF, bias=BiasFacts(((1, 1, 4096, 4096),)), dropout=0.1), "full+bias+dropout"),
        (replace(HALF, mask=MaskFacts("documents", labels=True)), "labels"),
        (replace(HALF, mask=MaskFacts("dense", bits="dense")), "bits"),
        (replace(HALF, q_len=1), "decode"),
    ],
)
def test_classes_of_problems(problem: AttentionProblem, kind: str) -> None:
    assert kind_of(problem) == kind


@pytest.mark.parametrize(
    ("mask", "sizes", "diagonal"),
    [
        (tw.causal(), (8, 8), 0),
        (tw.causal("start"), (8, 12), 0),
        (tw.causal("end"), (8, 12), 4),
        (tw.causal(offset=2), (8, 12), 2),
        (tw.window(None, 0), (8, 8), 0),
        (tw.window(None, 3, "start"), (8, 12), 3),
        (tw.window(3, 0), (8, 8), None),
        (tw.causal() & tw.prefix(2), (8, 8), None),
        (tw.causal(offset=torch.tensor([2])), (8, 12), None),
        (tw.causal("end"), (1, 12), None),  # sees everything
    ],
)
def test_a_diagonal_is_known_where_the_mask_is_nothing_else(mask: Any, sizes: tuple[int, int], diagonal: Any) -> None:
    site = Site(1, 1, *sizes)
    facts = lower(mask, site).facts
    assert facts.diagonal == diagonal
    if diagonal is not None:
        seen = lower(mask, site).visible(slice(0, sizes[0]), slice(0, sizes[1]))[0, 0]
        assert all(seen[i, j] == (j <= i + diagonal) for i in range(sizes[0]) for j in range(sizes[1]))


def test_a_part_keeps_no_diagonal_of_the_whole() -> None:
    whole = lower(tw.causal(), Site(1, 1, 8, 8))
    assert whole.diagonal == 0 and mask_part(whole, Run(4, 4), Run(0, 4)).facts.diagonal is None
    assert mask_part(whole, Run(0, 8, 1), Run(1, 7)).facts.diagonal is None


def test_fake_tensors_on_a_gpu_are_planned() -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 8, 256, 64, dtype=torch.float16, device="cuda", requires_grad=True) for _ in range(3))
        plan = tw.explain(q, k, v, mask=tw.causal())
        assert (plan.kernel, plan.backward, plan.problem.device) == ("aten", "aten", "cuda")
        forced = tw.explain(q, k, v, mask=tw.window(9, 0), kernel="triton")
        assert forced.kernel == "triton" and forced.workspace > 0
        with pytest.raises(tw.KernelRefused, match="no mask but none"):
            tw.explain(q, k, v, mask=tw.window(9, 0), kernel="aten")


def test_the_command_explains_a_gpu_by_name() -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from tilewise.cli.app import app

    result = CliRunner().invoke(app, ["explain", "--device", "cuda:H200", "--dtype", "bfloat16", "--mask", "causal()"])
    assert result.exit_code == 0, result.output
    assert "aten (cudnn)" in result.output and "cuda (H200)" in result.output and "no table of H200" in result.output

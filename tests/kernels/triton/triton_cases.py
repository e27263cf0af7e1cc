"""The problems that the Triton kernels are held to, and the check: shared by the tests and the GPU's script.

Run as a script it checks some cases and prints a line of JSON for each:
`python triton_cases.py DEVICE DTYPE [NAME ...]`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[2] / "lib"))

from accuracy import assert_accurate

import tilewise as tw
from tilewise.contract import Gradients, Operands, Plan, Tiles
from tilewise.kernels.reference import dense as oracle
from tilewise.validate import prepare

Options = dict[str, Any]
DEFAULTS: Options = dict.fromkeys(("mask", "bias", "scale", "softcap", "sinks", "dropout")) | {
    "layout": "bhsd",
    "return_lse": True,
}


class Site(NamedTuple):
    """Sq, Sk, Hq and the device of a case."""

    sq: int
    sk: int
    h: int
    device: Any


@dataclass(frozen=True)
class Case:
    """A problem: sizes, a function from the sizes to options, what to plant among the inputs, the backward pass's way.

    `wide` ones are left to the slow tests.
    """

    name: str
    options: Callable[[Site], Options] = lambda s: {}
    batch: int = 1
    heads: tuple[int, int] = (2, 1)
    lengths: tuple[float, float] = (0.8, 1.0)
    widths: tuple[int, int] = (24, 40)
    plant: Callable[..., None] | None = None
    wide: bool = False
    way: str = "split"


# One ragged tile of queries, for what other cases cover on several: the interpreter takes its time for each.
FEW = (0.5, 1.0)

CAUSAL: Options = {"mask": tw.causal("end")}


def _random(shape: tuple[int, ...], device: Any, seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _dense(s: Site) -> Options:
    array = _random((1, s.h, s.sq, s.sk), "cpu") > 0
    array[:, :, 5] = False
    return {"mask": tw.dense(array.to(s.device))}


def _minus_inf(s: Site) -> Options:
    bias = _random((1, s.h, s.sq, s.sk), "cpu")
    bias[0, 0, :, s.sk // 2 :] = -np.inf
    bias[0, -1, 3] = -np.inf
    return {"bias": bias.to(s.device)}


def _far(s: Site) -> Options:
    """Rows whose lse is too far from 0 to hold the logarithm of a sum as well, and sinks as far."""
    bias = _random((1, s.h, s.sq, s.sk), "cpu")
    bias[:, :, 1 : s.sq // 2], bias[:, :, -2:] = -(2.0**100), 2.0**100
    bias[:, :, 0, : s.sk // 2] = torch.finfo(torch.float32).min
    return {"bias": bias.to(s.device), "sinks": torch.tensor([-(2.0**100), 0.5], device=s.device)}


def _three_biases(s: Site) -> Options:
    first, second, third = (_random(shape, s.device) for shape in ((1, s.h, s.sq, s.sk), (s.sq, 1), (1, 1, 1, s.sk)))
    return {
        "bias": tw.relative(_random((s.h, s.sq + s.sk - 1), s.device)) + first + second + third,
        "mask": tw.causal("end"),
    }


def _row_mask(s: Site) -> Options:
    return {"mask": tw.dense(_random((1, 1, s.sq, 1), s.device) > 0) & tw.causal("end")}


def _one_table(s: Site) -> Options:
    return {"bias": tw.relative(_random((1, s.sq + s.sk - 1), s.device)), "mask": tw.predicate(_some)}


def _scattered(s: Site) -> tw.Mask:
    ids = np.random.default_rng(0).integers(0, 3, s.sk)
    return tw.documents(ids[: s.sq], ids)


def _thirds(s: Site) -> Options:
    return {"mask": tw.documents(np.arange(s.sk)[s.sk - s.sq :] * 3 // s.sk, np.arange(s.sk) * 3 // s.sk)}


def _plant_documents(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Rubbish in the first third, which the others must not see, and in q too for the backward pass."""
    v[:, :, 2], v[:, :, 3, 0], k[:, :, 4] = float("nan"), float("inf"), float("nan")
    q[:, :, 0] = float("nan")


def _plant_late(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Rubbish in late keys, which early rows of a causal mask must not see."""
    n = k.shape[2]
    v[:, :, n // 2], k[:, :, n // 2 + 1], v[:, :, n - 3, 1] = float("nan"), float("nan"), float("inf")


def _plant_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Rubbish in the first third of the keys, which the late queries must not see."""
    v[:, :, 2], v[:, :, 3, 0], k[:, :, 4] = float("nan"), float("inf"), float("nan")


def _plant_one_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Rubbish in one head of one batch row alone: what is found unsound there is no other program's."""
    k[1, 1, 2], v[1, 1, 3], q[1, 3, 0] = float("nan"), float("inf"), float("nan")


def _plant_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Values so large that the rounding of out to a half type is."""
    v *= 1 if v.dtype == torch.float32 else 64


def _plant_large(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Queries and keys whose scores carry lse far from 0, each key twice, so that rows do not see one key alone."""
    q.mul_(100)
    k.mul_(100)
    k[:, :, 1::2] = k[:, :, : k.shape[2] - 1 : 2]


def _some(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i * 7 + j * 3 + h + b) % 5 < 2


CASES = (
    Case("plain"),
    Case("batch and group", batch=2, heads=(4, 2)),
    Case("causal", lambda s: CAUSAL),  # before the same mask with a batch of two: what is kept must serve both
    Case("causal end", lambda s: CAUSAL, batch=2, heads=(4, 2)),
    Case("causal start", lambda s: {"mask": tw.causal("start")}, lengths=(1.0, 0.6)),
    Case("rows that see nothing", lambda s: {"mask": tw.causal("end"), "sinks": 0.5}, lengths=(1.0, 0.4)),
    Case("window or prefix", lambda s: {"mask": tw.window(s.sk // 5, 3, "end") | tw.prefix(4)}),
    Case("lengths", lambda s: {"mask": tw.lengths(k=torch.tensor([s.sk // 2, s.sk - 1], device=s.device))}, 2, (2, 1),
         FEW),
    Case("scattered documents", lambda s: {"mask": _scattered(s)}),
    Case("scattered and causal", lambda s: {"mask": _scattered(s) & tw.causal("end")}),
    Case("dense mask", _dense),
    Case("row mask and causal", _row_mask),
    Case("predicate", lambda s: {"mask": tw.predicate(_some)}, batch=2, lengths=FEW),
    Case("predicate or causal", lambda s: {"mask": tw.predicate(_some) | tw.causal("start")}),
    Case("bias", lambda s: {"bias": _random((2, s.h, s.sq, s.sk), s.device)}, batch=2, lengths=FEW),
    Case("bias for all heads", lambda s: {"bias": _random((s.sq, s.sk), s.device)}, batch=2, lengths=FEW),
    Case("bias with -inf", _minus_inf),
    Case("far rows", _far),
    Case("large queries and keys", plant=_plant_large),
    Case("large, sinks and dropout", lambda s: CAUSAL | {"dropout": tw.Dropout(0.3, 9),
         "sinks": torch.tensor([-2e3, 1e4], device=s.device)}, lengths=FEW, plant=_plant_large),
    Case("three biases and a table", _three_biases),
    Case("alibi", lambda s: CAUSAL | {"bias": tw.alibi(_random((s.h,), s.device).abs(), "end")}, batch=2, lengths=FEW),
    Case("one table, predicate", _one_table),
    Case("soft cap", lambda s: {"softcap": 1.5, "mask": tw.causal("end")}),
    Case("soft cap far", lambda s: {"softcap": 50.0}),
    Case("negative scale", lambda s: {"scale": -0.3, "mask": tw.causal("end")}),
    Case("no scale", lambda s: {"scale": 0.0}),
    Case("sinks", lambda s: {"sinks": _random((s.h,), s.device), "mask": tw.causal("end")}, batch=2, lengths=FEW),
    Case("dropout", lambda s: CAUSAL | {"dropout": tw.Dropout(0.3, seed=2**40 + 5, stream=3)}, batch=2, lengths=FEW),
    Case("dropout by a tensor's seed", lambda s: {
        "dropout": tw.Dropout(0.3, torch.tensor(2**40 + 5, device=s.device))}),
    # A bias that a row's keys share moves lse alone: it shows out's rounding, which dropout has multiplied by ten.
    Case("dropout of most", lambda s: {"bias": torch.zeros(s.sq, 1, device=s.device), "dropout": tw.Dropout(0.9, 1)},
         2, plant=_plant_values),
    Case("drop all", lambda s: {"dropout": tw.Dropout(1.0, seed=1)}),
    Case("one query", lambda s: CAUSAL, lengths=(0.0, 1.0), heads=(4, 1)),
    # Few queries: those of a group share a tile, and keys are split; two heads of queries more than a split has keys.
    Case("decode", lambda s: CAUSAL | {"sinks": _random((s.h,), s.device)}, 2, (6, 2), (0.05, 1.6)),
    Case("decode in a window", lambda s: {"mask": tw.window(s.sk // 3, 1, "end")}, 2, (4, 2), (0.07, 2.1)),
    Case("decode, labels, a table", lambda s: {"mask": _scattered(s),
         "bias": tw.alibi(_random((s.h,), s.device), "end")}, 1, (4, 2), (0.05, 1.5)),
    Case("decode, bias and dropout", lambda s: {"bias": _random((1, s.h, s.sq, s.sk), s.device),
         "dropout": tw.Dropout(0.3, 7), "softcap": 2.0}, 2, (3, 1), (0.05, 1.5)),
    Case("decode, dense mask per head", lambda s: {"mask": tw.dense(_random((1, s.h, s.sq, s.sk), s.device) > 0)},
         1, (4, 2), (0.05, 1.5)),
    Case("decode with rubbish", _thirds, 1, (4, 2), (0.05, 1.5), plant=_plant_keys),
    Case("one key", lengths=(1.0, 0.0)),
    Case("width 1", widths=(1, 1)),
    Case("width 64", lambda s: CAUSAL, widths=(64, 64)),
    Case("width 128", lambda s: CAUSAL, widths=(128, 128), wide=True),
    Case("width 192 and 128", lambda s: CAUSAL, widths=(192, 128), wide=True),
    Case("width 256", lambda s: CAUSAL, widths=(256, 256), wide=True),
    Case("width 512", lambda s: CAUSAL, widths=(512, 512), wide=True),
    Case("tokens before heads", lambda s: {"mask": tw.causal("end"), "layout": "bshd"}, batch=2),
    Case("no queries", lengths=(-1.0, 1.0)),
    Case("no keys", lengths=(1.0, -1.0)),
    Case("rubbish in a document", _thirds, plant=_plant_documents),
    Case("rubbish and soft cap", lambda s: _thirds(s) | {"softcap": 2.0}, plant=_plant_documents),
    Case("rubbish in late keys", lambda s: {"mask": tw.causal("start")}, plant=_plant_late, lengths=(0.6, 1.0)),
    Case("rubbish in one row and head", _thirds, 2, (4, 2), plant=_plant_one_row),
    Case("rubbish, width 256", _thirds, widths=(256, 256), plant=_plant_documents, wide=True),
    Case("rubbish behind a dense mask", _dense, plant=_plant_late, lengths=FEW),
    Case("rubbish behind -inf", _minus_inf, plant=_plant_late, lengths=FEW),
    # The gradient of q in the keys' pass.
    Case("atomics", lambda s: CAUSAL, batch=2, way="atomics"),
    Case("atomics, all pairs", way="atomics"),
    Case("atomics, all options", lambda s: _three_biases(s) | {"softcap": 2.0, "dropout": tw.Dropout(0.3, 7),
         "sinks": 0.5, "layout": "bshd"}, way="atomics"),
    Case("atomics, far rows", _far, way="atomics"),
    Case("atomics, large queries and keys", lambda s: CAUSAL, plant=_plant_large, way="atomics"),
    Case("atomics, rubbish", _thirds, plant=_plant_documents, way="atomics"),
    Case("atomics, late rubbish", lambda s: {"mask": tw.causal("start")}, plant=_plant_late, lengths=(0.6, 1.0),
         way="atomics"),
    Case("atomics, -inf and rubbish", _minus_inf, plant=_plant_late, wide=True, way="atomics"),
    Case("atomics, width 256", lambda s: CAUSAL, widths=(256, 256), wide=True, way="atomics"),
)  # fmt: skip


def build(case: Case, size: int, dtype: torch.dtype, device: Any) -> tuple[Plan, Operands, torch.Tensor, torch.Tensor]:
    """The case with `size` keys (about): its plan, operands, and gradients to out and lse."""
    sq, sk = (0 if share < 0 else max(1, int(size * share)) for share in case.lengths)
    (heads, kv_heads), (d, dv) = case.heads, case.widths
    random = torch.Generator().manual_seed(3)
    shapes = (
        (case.batch, heads, sq, d),
        (case.batch, kv_heads, sk, d),
        (case.batch, kv_heads, sk, dv),
        (case.batch, heads, sq, dv),
    )
    q, k, v, d_out = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
    d_lse = torch.randn(shapes[0][:3], generator=random).to(device)
    if case.plant is not None:
        case.plant(q, k, v)
    options = DEFAULTS | case.options(Site(sq, sk, heads, device))
    if options["layout"] == "bshd":
        q, k, v = (array.transpose(1, 2).contiguous() for array in (q, k, v))
    call = prepare(q.to(device), k.to(device), v.to(device), **options)
    wanted = frozenset({"q", "k", "v", "bias", "table", "sinks"})
    plan = Plan(dataclasses.replace(call.problem, gradients=wanted), "triton", "triton", Tiles(0, 0), 0, {},
                backward_way=case.way)  # fmt: skip
    return plan, call.operands, d_out.to(device), d_lse


def check(case: Case, size: int, dtype: torch.dtype, device: Any) -> None:
    """Raise AssertionError unless forward and backward are as accurate as promised, complete and repeatable."""
    from tilewise.kernels.triton.backward import backward
    from tilewise.kernels.triton.forward import forward

    plan, operands, d_out, d_lse = build(case, size, dtype, device)
    before = [array.clone() for array in (operands.q, operands.k, operands.v)]
    with _loud_memory():
        out, lse = forward(plan, operands)
        found = backward(plan, operands, out, lse, d_out, d_lse)
    for array, copy in zip((operands.q, operands.k, operands.v), before, strict=True):
        assert torch.equal(array.nan_to_num(7.0), copy.nan_to_num(7.0)), "an input was changed"
    # The oracle is NumPy's: it gets the same problem, built on the CPU.
    host = build(case, size, dtype, "cpu")
    exact = oracle.attention(plan.problem, host[1])
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_accurate("out", out.cpu(), exact.out)
    assert_accurate("lse", lse.cpu(), exact.lse)
    exact_gradients = oracle.gradients(exact, *host[2:])
    name_of_dtype = str(dtype).removeprefix("torch.")
    for name, got, want in _pairs(found, exact_gradients):
        assert_accurate(name, got.cpu(), want, dtype=name_of_dtype)
    if device != "cpu":
        again, _ = forward(plan, operands)
        twice = backward(plan, operands, out, lse, d_out, d_lse)
        assert torch.equal(out.nan_to_num(7.0), again.nan_to_num(7.0)), "out differs between two runs"
        for name, got, want in _pairs(found, twice):
            if name == "q" and case.way == "atomics":
                continue  # its sum has no fixed order
            assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), f"{name} differs between two runs"


def _pairs(found: Gradients, exact: Any) -> Iterator[tuple[str, Any, Any]]:
    for name in ("q", "k", "v"):
        yield name, getattr(found, name), getattr(exact, name)
    for n, (got, want) in enumerate(zip(found.dense, exact.dense, strict=True)):
        yield f"bias {n}", got, want
    for name in ("table", "sinks"):
        if getattr(found, name) is not None:
            yield name, getattr(found, name), getattr(exact, name)


@contextmanager
def _loud_memory() -> Iterator[None]:
    """Fresh floating-point memory holds NaN, so that an element that nobody wrote is seen."""
    empty, empty_like = torch.empty, torch.empty_like

    def loud(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **options: Any) -> torch.Tensor:
            array = make(*args, **options)
            return array.fill_(float("nan")) if array.is_floating_point() else array

        return made

    torch.empty, torch.empty_like = loud(empty), loud(empty_like)
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like


def main(device: str, dtype: str, size: int, names: list[str]) -> None:
    """Check some cases, or all; a line of JSON for each: its name, and None or what went wrong."""
    with np.errstate(all="ignore"):
        for case in CASES:
            if names and case.name not in names:
                continue
            error = None
            try:
                check(case, size, getattr(torch, dtype), device)
            except Exception:
                error = traceback.format_exc(limit=-2)
            print(json.dumps({"case": case.name, "error": error}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])

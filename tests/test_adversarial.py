"""Inputs that break attention elsewhere: rows that see nothing, NaN behind masks, huge scores, odd strides, no data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from accuracy import assert_accurate
from support.conformance import card, check, prepared, to_family

import tilewise as tw
from tilewise.kernels.reference import dense as reference
from tilewise.kernels.reference.arrays import float64
from tilewise.plan.preset import Example

pytestmark = pytest.mark.usefixtures("loud_memory")

B, HQ, HKV, SQ, SK, D, DV = 2, 4, 2, 13, 70, 6, 5
COMBINATIONS = [
    (kernel, family) for kernel in ("native", "portable", "reference") for family in ("numpy", "torch", "jax")
]
each = pytest.mark.parametrize(("kernel", "family"), COMBINATIONS)
# jax compiles the portable kernel anew for every case, a second each: some stand for all unless the slow sweep is run.
COMPILED = pytest.param("portable", "jax", marks=pytest.mark.slow)
most = pytest.mark.parametrize(
    ("kernel", "family"), [COMPILED if c == ("portable", "jax") else c for c in COMBINATIONS]
)
FRAMEWORKS = [("native", "numpy"), ("portable", "numpy"), ("native", "torch"), ("portable", "torch")]


def qkv(seed: int = 0, dtype: str = "float32", **sizes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = {"b": B, "hq": HQ, "hkv": HKV, "sq": SQ, "sk": SK, "d": D, "dv": DV} | sizes
    rng = np.random.default_rng(seed)
    shapes = (
        (n["b"], n["hq"], n["sq"], n["d"]),
        (n["b"], n["hkv"], n["sk"], n["d"]),
        (n["b"], n["hkv"], n["sk"], n["dv"]),
    )
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return q, k, v


def run(kernel: str, family: str, q: Any, k: Any, v: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) in float64."""
    case = prepared(Example(q, k, v, options), kernel, family, str(q.dtype), gradients=False)
    if isinstance(case, tuple):
        pytest.skip("; ".join(case))
    out, lse = case.run(case.operands)
    return float64(out), float64(lse)


def verify(kernel: str, family: str, q: Any, k: Any, v: Any, *, gradients: bool = False, **options: Any) -> None:
    """Hold the kernel against the oracle on these inputs."""
    dtype = str(q.dtype)
    if check(Example(q, k, v, options), kernel, family, dtype, gradients=gradients):
        pytest.skip("; ".join(card(kernel).refuse(_problem(q, k, v, family))))


def _problem(q: Any, k: Any, v: Any, family: str) -> Any:
    return tw.explain(*(to_family(array, family) for array in (q, k, v)), kernel="portable").problem


# --- rows that see nothing

NOTHING = {
    "dense": tw.dense(np.zeros((SQ, SK), bool)),
    "intervals": tw.intervals(np.zeros(SQ, int), np.zeros(SQ, int)),
    "lengths": tw.lengths(k=0),
    "offset": tw.causal(offset=-(2**40)),
    "documents": tw.documents(np.zeros(SQ, int), np.ones(SK, int)),
    "contradiction": tw.causal("end") & ~tw.causal("end"),
    "predicate": tw.predicate(lambda b, h, i, j: (i < 0) & (j < 0)),
}


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", NOTHING)
@most
def test_nobody_sees_anything(kernel, family, name, sinks):
    options = {"sinks": np.linspace(-1, 50, HQ, dtype=np.float32)} if sinks else {}
    out, lse = run(kernel, family, *qkv(), mask=NOTHING[name], **options)
    assert (out == 0).all() and (lse == -np.inf).all()


@pytest.mark.parametrize(("kernel", "family"), [pair for pair in COMBINATIONS if pair != ("native", "jax")])
def test_gradients_of_rows_that_see_nothing_are_zero(kernel, family):
    hidden = np.arange(SQ)[:, None] % 3 == 0
    options = {"mask": ~tw.dense(hidden), "sinks": np.zeros(HQ, np.float32), "bias": np.zeros((SQ, SK), np.float32)}
    verify(kernel, family, *qkv(), gradients=True, **options)


@each
def test_a_bias_of_minus_infinity_is_a_mask(kernel, family):
    bias = np.zeros((SQ, SK), np.float32)
    bias[3], bias[:, 5], bias[7, ::2] = -np.inf, -np.inf, -np.inf
    verify(kernel, family, *qkv(), bias=bias)
    out, lse = run(kernel, family, *qkv(), bias=bias)
    same, same_lse = run(kernel, family, *qkv(), mask=tw.dense(bias == 0))
    np.testing.assert_allclose(out, same, atol=1e-6)
    assert (out[:, :, 3] == 0).all() and (lse[:, :, 3] == -np.inf).all() and np.isfinite(np.delete(lse, 3, 2)).all()
    np.testing.assert_allclose(lse, same_lse, rtol=1e-6)


@each
def test_a_table_of_minus_infinity_is_a_mask(kernel, family):
    table = np.where(np.arange(SQ + SK - 1) % 4 == 0, -np.inf, 0.25).astype(np.float32)
    verify(kernel, family, *qkv(), bias=tw.relative(table))
    out, _ = run(kernel, family, *qkv(), bias=tw.relative(np.full(SQ + SK - 1, -np.inf, np.float32)))
    assert (out == 0).all()


# --- what is masked cannot be seen, and what is seen shows

MASKS = {
    "causal": tw.causal("start"),
    "window": tw.window(3, 2, "start"),
    "lengths": tw.lengths(q=np.array([SQ, 6]), k=np.array([9, 40])),
    "documents": tw.documents(np.arange(SQ) // 5, np.arange(SK) // 9),
    "labels": tw.documents(np.arange(SQ) % 3, np.arange(SK) % 4),
    "dense": tw.dense(np.random.default_rng(1).random((B, HQ, SQ, SK)) < 0.2),
    "one row": tw.dense(np.arange(SQ)[:, None] == 4) & tw.prefix(20),
    "predicate": tw.predicate(lambda b, h, i, j: (i * 3 + j + h + b) % 5 == 0),
    "sinks and window": tw.causal("start") & (tw.window(2, 0, "start") | tw.prefix(2)),
    "blocks": tw.blocks(np.random.default_rng(2).random((HQ, 4, 9)) < 0.3, (4, 8)),
}
KEYS = (1, 8, 11, 33)


def poisoned(value: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q, k, v = qkv()
    k[:, :, KEYS[0]] = value
    v[:, :, KEYS[1], 2] = value
    k[1, 0, KEYS[2], 0] = v[1, 1, KEYS[3], 0] = -value
    return q, k, v


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("name", MASKS)
@most
def test_masked_garbage_reaches_no_row_that_does_not_see_it(kernel, family, name, value):
    seen = tw.materialize(MASKS[name], SQ, SK, batch=B, heads=HQ)[..., list(KEYS)].any(-1)
    clean = run(kernel, family, *qkv(), mask=MASKS[name])
    dirty = run(kernel, family, *poisoned(value), mask=MASKS[name])
    for before, after in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(after[~seen], before[~seen], err_msg="not the same bits as without the garbage")


@pytest.mark.parametrize("name", MASKS)
@most
def test_a_nan_that_is_seen_shows_where_the_definition_says(kernel, family, name):
    q, k, v = poisoned(np.nan)
    q[0, 1, 2, 3] = np.nan  # a query of its own, too
    case = prepared(Example(q, k, v, {"mask": MASKS[name]}), "reference", "numpy", "float32", False)
    oracle = reference.attention(case.plan.problem, case.operands)
    out, lse = run(kernel, family, q, k, v, mask=MASKS[name])
    np.testing.assert_array_equal(np.isnan(out), np.isnan(oracle.out))
    np.testing.assert_array_equal(np.isnan(lse), np.isnan(oracle.lse))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["causal", "labels", "dense", "predicate", "lengths"])
@pytest.mark.parametrize(("kernel", "family"), [*FRAMEWORKS, ("reference", "numpy")])
def test_masked_garbage_reaches_no_gradient(kernel, family, name, value):
    hidden = MASKS[name] & ~tw.dense(np.isin(np.arange(SK), KEYS)[None])
    q, k, v = poisoned(value)
    for array in (k, v):  # every hidden key is garbage in all of it
        array[:, :, list(KEYS)] = value
    verify(kernel, family, q, k, v, mask=hidden, gradients=True)


@pytest.mark.parametrize("kernel", ["portable"])
def test_masked_garbage_reaches_no_gradient_in_jax(kernel):
    q, k, v = poisoned(np.nan)
    hidden = MASKS["causal"] & ~tw.dense(np.isin(np.arange(SK), KEYS)[None])
    verify(kernel, "jax", q, k, v, mask=hidden, gradients=True)


@pytest.mark.parametrize("name", ["lengths", "labels", "dense", "sinks and window"])
def test_garbage_in_jax(name):
    test_masked_garbage_reaches_no_row_that_does_not_see_it("portable", "jax", name, np.nan)
    test_a_nan_that_is_seen_shows_where_the_definition_says("portable", "jax", name)


@pytest.mark.parametrize("sink", [1e4, -np.inf])
def test_sinks_in_jax(sink):
    test_sinks_of_every_size("portable", "jax", sink)


@each
def test_garbage_beyond_the_ends_of_a_view_is_not_read(kernel, family):
    q, k, v = qkv()
    padded = [np.full((*a.shape[:2], a.shape[2] + 9, a.shape[3] + 3), np.nan, np.float32) for a in (q, k, v)]
    for whole, part in zip(padded, (q, k, v), strict=True):
        whole[:, :, 4:-5, 1:-2] = part
    views = [to_family(whole, family)[:, :, 4:-5, 1:-2] for whole in padded]
    out = tw.attention(*views, kernel=kernel, allow_quadratic=True)
    np.testing.assert_array_equal(float64(out), run(kernel, family, q, k, v)[0])


# --- numbers at the edges


@pytest.mark.parametrize("size", [1e4, 1e8])
@most
def test_huge_scores(kernel, family, size):
    q, k, v = qkv()
    verify(kernel, family, (size * q).astype(np.float32), k, v, mask=tw.causal("end"))


@each
def test_huge_scores_under_a_cap(kernel, family):
    q, k, v = qkv()
    verify(kernel, family, 1e4 * q, k, v, softcap=20.0)


@each
def test_scores_that_overflow_float32_are_as_the_definition_in_float32_has_them(kernel, family):
    q, k, v = (np.full_like(array, 1e30) for array in qkv())
    out, _ = run(kernel, family, q, k, v)
    assert np.isnan(out).all() or (out == np.float32(1e30)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["numpy", "torch", "jax"])
def test_halves_filled_with_256_do_not_overflow(family, dtype):
    # The scores, 80 * 65,536, are far beyond float16's range; pytorch issue 160841.
    shapes = {"d": 80, "dv": 80}
    q, k, v = (np.full_like(array, 256.0) for array in qkv(**shapes))
    converted = [to_family(array, family, dtype) for array in (q, k, v)]
    out, lse = tw.attention(*converted, return_lse=True)
    np.testing.assert_array_equal(float64(out), 256.0)
    assert_accurate("lse", lse, np.full((B, HQ, SQ), 80 * 65536 / np.sqrt(80) + np.log(SK)))


@pytest.mark.parametrize("sink", [-1e4, 0.0, 90.0, 1e4, -np.inf])
@most
def test_sinks_of_every_size(kernel, family, sink):
    sinks = np.full(HQ, sink, np.float32)
    sinks[0] = 1.0
    verify(kernel, family, *qkv(), sinks=sinks, mask=tw.causal("start"))


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@most
def test_dropout_of_every_probability(kernel, family, p):
    verify(kernel, family, *qkv(), dropout=tw.Dropout(p, 2**63 + 5, 2**40))


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-30])
@most
def test_scales_of_every_kind(kernel, family, scale):
    verify(kernel, family, *qkv(), scale=scale, mask=tw.causal("end"))


# --- memory

VIEWS = {
    "reversed": lambda a: a[:, :, ::-1],
    "every other": lambda a: np.repeat(a, 2, 2)[:, :, ::2],
    "last axis reversed": lambda a: a[..., ::-1],
    "last axis strided": lambda a: np.repeat(a, 3, 3)[..., ::3],
    "transposed": lambda a: np.ascontiguousarray(a.transpose(3, 1, 0, 2)).transpose(2, 1, 3, 0),
    "broadcast over the batch": lambda a: np.broadcast_to(a[:1], a.shape),
    "broadcast over heads": lambda a: np.broadcast_to(a[:, :1], a.shape),
    "broadcast over positions": lambda a: np.broadcast_to(a[:, :, :1], a.shape),
    "broadcast over the width": lambda a: np.broadcast_to(a[..., :1], a.shape),
    "misaligned": lambda a: _misaligned(a),
    "read-only": lambda a: _read_only(a),
    "fortran": lambda a: np.asfortranarray(a),
}


def _misaligned(array: np.ndarray) -> np.ndarray:
    raw = np.zeros(array.nbytes + 1, np.uint8)[1:]
    view = raw.view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def _read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("kernel", ["native", "portable", "reference"])
def test_numpy_views_of_every_kind(kernel, name):
    views = [VIEWS[name](array) for array in qkv()]
    plain = [np.ascontiguousarray(view).astype(np.float32) for view in views]
    options = {"mask": tw.causal("end"), "kernel": kernel, "allow_quadratic": True, "return_lse": True}
    for got, want in zip(tw.attention(*views, **options), tw.attention(*plain, **options), strict=True):
        np.testing.assert_array_equal(got, want)


TORCH_VIEWS = ("every other", "last axis strided", "transposed", "broadcast over the batch", "broadcast over heads",
               "broadcast over positions", "broadcast over the width")  # fmt: skip


@pytest.mark.parametrize("name", TORCH_VIEWS)
@pytest.mark.parametrize("kernel", ["native", "portable"])
def test_torch_views_and_their_gradients(kernel, name):
    torch = pytest.importorskip("torch")
    bases = [torch.tensor(array, requires_grad=True) for array in qkv()]
    views = [_torch_view(name, base) for base in bases]
    copies = [base.detach().clone().requires_grad_() for base in bases]
    plain = [_torch_view(name, copy).contiguous() for copy in copies]
    got, want = (tw.attention(*group, mask=tw.causal("end"), kernel=kernel) for group in (views, plain))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    got.sum().backward()
    want.sum().backward()
    for base, copy in zip(bases, copies, strict=True):
        torch.testing.assert_close(base.grad, copy.grad, rtol=1e-5, atol=1e-5)


def _torch_view(name: str, a: Any) -> Any:
    return {
        "every other": lambda: a.repeat_interleave(2, 2)[:, :, ::2],
        "last axis strided": lambda: a.repeat_interleave(3, 3)[..., ::3],
        "transposed": lambda: a.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "broadcast over the batch": lambda: a[:1].expand(a.shape),
        "broadcast over heads": lambda: a[:, :1].expand(a.shape),
        "broadcast over positions": lambda: a[:, :, :1].expand(a.shape),
        "broadcast over the width": lambda: a[..., :1].expand(a.shape),
    }[name]()


@pytest.mark.parametrize("kernel", ["native", "portable", "reference"])
def test_masks_and_biases_of_every_stride(kernel):
    rng = np.random.default_rng(3)
    seen, bias = rng.random((B, HQ, SK, SQ)) < 0.7, rng.standard_normal((2 * SQ, SK)).astype(np.float32)
    options = {"kernel": kernel, "allow_quadratic": True}
    got = tw.attention(*qkv(), mask=seen.swapaxes(2, 3)[:, ::-1], bias=bias[::-2, ::-1], **options)
    want = tw.attention(*qkv(), mask=seen.swapaxes(2, 3)[:, ::-1].copy(), bias=bias[::-2, ::-1].copy(), **options)
    np.testing.assert_array_equal(got, want)


@each
def test_one_array_may_be_q_k_and_v(kernel, family):
    x, _, _ = qkv(hkv=HQ, sk=SQ, dv=D)
    array = to_family(x, family)
    out = tw.attention(array, array, array, mask=tw.causal(), kernel=kernel, allow_quadratic=True)
    np.testing.assert_array_equal(float64(out), run(kernel, family, x, x.copy(), x.copy(), mask=tw.causal())[0])
    np.testing.assert_array_equal(float64(array), x)


@pytest.mark.parametrize(("kernel", "family"), FRAMEWORKS)
def test_nothing_the_caller_owns_is_changed(kernel, family):
    rng = np.random.default_rng(4)
    seen, bias = rng.random((SQ, SK)) < 0.5, rng.standard_normal((HQ, 1, SK)).astype(np.float32)
    given = [to_family(array, family) for array in (*poisoned(np.nan), seen, bias, np.ones(HQ, np.float32))]
    before = [float64(array).copy() for array in given]
    tw.attention(*given[:3], mask=given[3], bias=given[4], sinks=given[5], kernel=kernel)
    for array, copy in zip(given, before, strict=True):
        np.testing.assert_array_equal(float64(array), copy)


# --- sizes

ZEROS = [{"b": 0}, {"hq": 0, "hkv": 0}, {"hq": 0}, {"sq": 0}, {"sk": 0}, {"sq": 0, "sk": 0}, {"b": 0, "sk": 0}]


@pytest.mark.parametrize("sizes", ZEROS, ids=str)
@each
def test_sizes_of_zero(kernel, family, sizes):
    q, k, v = qkv(**sizes)
    options = {"mask": tw.causal("end") & tw.lengths(k=3), "sinks": np.zeros(q.shape[1], np.float32)}
    for chosen in ({}, options):
        out, lse = run(kernel, family, q, k, v, **chosen)
        assert out.shape == (*q.shape[:3], DV) and lse.shape == q.shape[:3]
        if "sk" in sizes:
            assert (out == 0).all() and (lse == -np.inf).all()


@pytest.mark.parametrize("sizes", [{"b": 0}, {"sq": 0}, {"sk": 0}], ids=str)
@pytest.mark.parametrize(("kernel", "family"), [*FRAMEWORKS, ("portable", "jax")])
def test_gradients_of_no_elements(kernel, family, sizes):
    q, k, v = qkv(**sizes)
    bias = np.zeros((1, HQ, q.shape[2], k.shape[2]), np.float32)
    verify(kernel, family, q, k, v, mask=tw.causal("end"), bias=bias, sinks=np.zeros(HQ, np.float32), gradients=True)


@pytest.mark.parametrize(
    "sizes", [{"sq": 1, "sk": 1}, {"sq": 1}, {"sk": 1}, {"d": 1, "dv": 1}, {"d": 1, "dv": 67}], ids=str
)
@most
def test_sizes_of_one(kernel, family, sizes):
    verify(kernel, family, *qkv(**sizes), mask=tw.causal("end"))


@pytest.mark.parametrize(("kernel", "family"), FRAMEWORKS)
def test_more_heads_than_sixteen_bits_count(kernel, family):
    q, k, v = qkv(b=9, hq=7300, hkv=7300, sq=1, sk=2, d=1, dv=1)
    out, _ = run(kernel, family, q, k, v)
    scores = (q * k)[:, :, :, 0].astype(np.float64)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = (weights * v[..., 0]).sum(-1) / weights.sum(-1)
    np.testing.assert_allclose(out[:, :, 0, 0], want, atol=2e-6)


@pytest.mark.parametrize(("sq", "sk"), [(63, 65), (64, 64), (65, 63), (128, 129), (1, 257), (257, 1), (31, 1025)])
@pytest.mark.parametrize(("kernel", "family"), FRAMEWORKS)
def test_lengths_around_the_edges_of_tiles(kernel, family, sq, sk):
    verify(kernel, family, *qkv(sq=sq, sk=sk, b=1), mask=tw.causal("end"))
    verify(kernel, family, *qkv(sq=sq, sk=sk, b=1))


@pytest.mark.parametrize("d", [1, 3, 7, 8, 15, 16, 17, 33, 59, 64, 65, 111, 128, 130, 256, 300])
@pytest.mark.parametrize(("kernel", "family"), [("native", "numpy"), ("portable", "torch")])
def test_widths_that_are_no_multiples(kernel, family, d):
    verify(kernel, family, *qkv(b=1, d=d, dv=max(1, d - 1)), mask=tw.causal("end"))


# --- the same bits


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kernel", ["native", "portable"])
def test_two_runs_give_the_same_bits(kernel, name):
    first, second = (run(kernel, "numpy", *qkv(), mask=MASKS[name]) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sq", [1, 3, 40, 130])
def test_native_rows_do_not_depend_on_their_company(sq):
    q, k, v = qkv(b=3, sq=sq, sk=300, d=32, dv=32)
    whole = run("native", "numpy", q, k, v)
    for b in range(3):
        alone = run("native", "numpy", q[b : b + 1], k[b : b + 1], v[b : b + 1])
        for part, all_ in zip(alone, whole, strict=True):
            np.testing.assert_array_equal(part[0], all_[b])

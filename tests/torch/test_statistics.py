"""Statistics of attention against those of a dense float64 matrix of probabilities."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from accuracy import assert_accurate  # noqa: E402
from support.largest import Largest  # noqa: E402
from support.portable_cases import CASES, arrays  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise.contract import Tiles  # noqa: E402
from tilewise.kernels.reference import dense  # noqa: E402
from tilewise.statistics import attention_statistics, attention_weights  # noqa: E402
from tilewise.validate import prepare  # noqa: E402

EVERYTHING = {"column_sums": True, "entropy": True, "max_logit": True, "top_k": 4}
QUIET = {name: case for name, case in CASES.items() if "dropout" not in case(lambda array: array)}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr("tilewise.statistics.api.default_tiles", lambda problem: Tiles(5, 7))


def as_array(value):
    return value.detach().double().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, np.float64)


def oracle(q, k, top_k=4, **options):
    """The statistics, one at a time, from all scores at once, float64."""
    defaults = dict.fromkeys(("mask", "bias", "scale", "softcap", "sinks", "dropout"))
    call = prepare(q, k, k, **{**defaults, "layout": "bhsd", "return_lse": True, **options})
    exact = dense.attention(call.problem, call.operands)
    p, seen = exact.p, exact.visible
    nothing = exact.lse == -np.inf
    with np.errstate(all="ignore"):
        scores = np.where(seen, np.log(p) + np.where(nothing, 0, exact.lse)[..., None], -np.inf)
        entropy = -np.where(p > 0, p * np.log(p), 0).sum(-1)
        if call.operands.sinks is not None:
            sink = np.where(nothing, 0, np.exp(as_array(call.operands.sinks)[:, None] - exact.lse))
            entropy -= np.where(sink > 0, sink * np.log(sink), 0)
    order = np.argsort(-p, axis=-1, kind="stable")
    order = np.concatenate([order, np.zeros((*order.shape[:-1], top_k), int)], -1)[..., :top_k]
    values = np.take_along_axis(p, order, -1)
    order = np.where(values > 0, order, -1)
    return {
        "lse": exact.lse,
        "column_sums": p.sum(-2),
        "entropy": entropy,
        "max_logit": scores.max(-1, initial=-np.inf),
        "top_values": values,
        "top_indices": order,
    }, exact.p * exact.z


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("name", QUIET)
def test_values(name, convert, small_tiles):
    q, k = (convert(arrays()[part]) for part in "qk")
    options = QUIET[name](convert)
    found = attention_statistics(q, k, **EVERYTHING, **options)
    expected, weights = oracle(q, k, **options)
    for field, value in expected.items():
        got = getattr(found, field)
        assert type(got) is type(q)
        np.testing.assert_allclose(as_array(got), value, rtol=0, atol=1e-12, err_msg=field)
    each = attention_weights(q, k, allow_quadratic=True, **options)
    np.testing.assert_allclose(as_array(each), weights, rtol=0, atol=1e-12)
    mean = attention_weights(q, k, average=True, rows=slice(3, 9), **options)
    np.testing.assert_allclose(as_array(mean), weights.mean(1)[:, 3:9], rtol=0, atol=1e-12)


def test_weights_after_dropout(small_tiles):
    q, k = arrays()["q"], arrays()["k"]
    options = CASES["dropout"](np.asarray)
    np.testing.assert_allclose(attention_weights(q, k, allow_quadratic=True, **options), oracle(q, k, **options)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    q, k = (torch.from_numpy(arrays(q_len=70, k_len=300, dim=16)[part]).to(dtype) for part in "qk")
    options = {"mask": tw.causal("end"), "softcap": 5.0, "bias": tw.alibi(torch.rand(4), "end")}
    found, (expected, weights) = attention_statistics(q, k, **EVERYTHING, **options), oracle(q, k, **options)
    for field in ("lse", "column_sums", "entropy", "max_logit", "top_values"):
        got = getattr(found, field)
        assert got.dtype == torch.float32
        assert_accurate("lse" if field == "lse" else "out", got, expected[field])
    each = attention_weights(q, k, allow_quadratic=True, **options)
    assert each.dtype == dtype
    assert_accurate("out", each, weights)


@pytest.mark.parametrize("top_k", [1, 3, 30, 40])
def test_ties_go_to_the_lower_key(top_k, small_tiles):
    q, k = np.ones((1, 1, 3, 2)), np.zeros((1, 1, 33, 2))
    k[:, :, [4, 20, 31]] = 1.0
    expected = np.array([4, 20, 31, *(n for n in range(33) if n not in (4, 20, 31)), *[-1] * 7])
    for convert in (np.asarray, torch.as_tensor):
        found = attention_statistics(convert(q), convert(k), top_k=top_k)
        np.testing.assert_array_equal(as_array(found.top_indices)[0, 0, 1], expected[:top_k])
        assert as_array(found.top_values)[..., 33:].sum() == 0


def test_a_row_that_sees_few_or_nothing(small_tiles):
    q, k = (torch.from_numpy(arrays()[part]).requires_grad_() for part in "qk")
    found = attention_statistics(q, k, mask=tw.causal(offset=-2), sinks=0.5, **EVERYTHING)
    assert (found.top_indices[:, :, :2] == -1).all() and (found.top_indices[:, :, 2, 1:] == -1).all()
    assert (found.max_logit[:, :, :2] == -torch.inf).all() and (found.entropy[:, :, :2] == 0).all()
    parts = (found.entropy, found.column_sums, found.top_values, found.max_logit[:, :, 2:])
    for gradient in torch.autograd.grad(sum(part.sum() for part in parts), (q, k)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("hidden", [float("nan"), float("inf")])
def test_what_is_hidden_is_not_seen(hidden, small_tiles):
    q, k = (torch.from_numpy(arrays()[part]) for part in "qk")
    poisoned = k.clone()
    poisoned[:, :, 9:] = hidden
    mask = tw.lengths(k=9)
    found, expected = (attention_statistics(q, keys, mask=mask, **EVERYTHING) for keys in (poisoned, k))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("convert", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_what_is_seen_stays_where_it_is_seen(convert, small_tiles):
    q, k = (convert(arrays(q_len=17)[part]) for part in "qk")
    k[:, :, 6] = float("nan")
    mask = tw.window(3, 0)  # rows 6 to 9 see key 6, and keys 3 to 9
    found = attention_statistics(q, k, mask=mask, **EVERYTHING)
    rows, keys = np.arange(17), np.arange(17)
    for values, touched in (
        (found.entropy, (rows >= 6) & (rows <= 9)),
        (found.max_logit, (rows >= 6) & (rows <= 9)),
        (found.column_sums, (keys >= 3) & (keys <= 9)),
    ):
        assert (np.isnan(as_array(values)) == touched).all()
    weights = attention_weights(q, k, mask=mask, allow_quadratic=True)
    seen = tw.materialize(mask, 17, 17) & ((rows >= 6) & (rows <= 9))[:, None]
    assert (np.isnan(as_array(weights)) == seen).all()


def test_gradients_stay_where_it_is_seen(small_tiles):
    q, k = (torch.tensor(arrays(q_len=17)[part]) for part in "qk")
    k[:, :, 6] = float("nan")
    found = attention_statistics(q.requires_grad_(), k.requires_grad_(), mask=tw.window(3, 0), **EVERYTHING)
    d_q, d_k = torch.autograd.grad(found.entropy.sum() + found.column_sums.square().sum(), (q, k))
    # Rows that see key 6, and those that see a key whose column sum is NaN because such a row sees it too.
    touched = torch.arange(17)
    assert (d_q.isnan().any(-1) == (touched >= 3) & (touched <= 12)).all()
    assert (d_k.isnan().any(-1) == (touched <= 12)).all()


@pytest.mark.parametrize("heads", ["each", "kv", "mean", "sum"])
def test_column_sums_over_heads(heads):
    q, k = (torch.from_numpy(arrays()[part]) for part in "qk")
    each = attention_statistics(q, k, column_sums=True).column_sums
    expected = {"each": each, "kv": each.reshape(2, 2, 2, 17).sum(2), "mean": each.mean(1), "sum": each.sum(1)}
    found = attention_statistics(q, k, column_sums=True, column_heads=heads).column_sums
    torch.testing.assert_close(found, expected[heads], rtol=0, atol=1e-13)
    torch.testing.assert_close(each.sum(), torch.tensor(2.0 * 4 * 13).double(), rtol=0, atol=1e-11)


def test_layouts(small_tiles):
    q, k = (torch.from_numpy(arrays(batch=1)[part]) for part in "qk")
    expected = attention_statistics(q, k, **EVERYTHING)
    for found in (
        attention_statistics(q.transpose(1, 2), k.transpose(1, 2), layout="bshd", **EVERYTHING),
        [
            x[None]
            for x in attention_statistics(q[0].mT.mT.transpose(0, 1), k[0].transpose(0, 1), layout="thd", **EVERYTHING)
        ],
    ):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    weights = attention_weights(
        q[0].transpose(0, 1), k[0].transpose(0, 1), layout="thd", average=True, rows=slice(4, 5)
    )
    torch.testing.assert_close(weights, attention_weights(q, k, average=True, allow_quadratic=True)[0, 4:5])


def test_a_given_lse_is_used():
    q, k = (torch.from_numpy(arrays()[part]) for part in "qk")
    lse = tw.attention(q, k, k, return_lse=True)[1]
    halved = attention_statistics(q, k, lse=lse + np.log(2.0), column_sums=True, top_k=1)
    whole = attention_statistics(q, k, column_sums=True, top_k=1)
    torch.testing.assert_close(2 * halved.column_sums, whole.column_sums)
    torch.testing.assert_close(2 * halved.top_values, whole.top_values)


DIFFERENTIABLE = {
    "plain": ((), lambda: {}),
    "causal softcap": ((), lambda: {"mask": tw.causal("end"), "softcap": 0.9}),
    "bias": (((1, 4, 4, 5),), lambda bias: {"bias": bias, "mask": tw.causal("end")}),
    "bias of keys": (((1, 1, 1, 5),), lambda bias: {"bias": bias}),
    "table": (((4, 8),), lambda table: {"bias": tw.relative(table), "mask": tw.window(2, 1, "end")}),
    "sinks": (((4,),), lambda sinks: {"sinks": sinks, "mask": tw.causal("start") & ~tw.prefix(1)}),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_first_derivatives(name, monkeypatch):
    monkeypatch.setattr("tilewise.statistics.api.default_tiles", lambda problem: Tiles(3, 2))
    shapes, options = DIFFERENTIABLE[name]
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 4, 2).double(), torch.randn(1, 2, 5, 2).double()
    extra = [torch.randn(*shape).double() for shape in shapes]

    def function(q, k, *extra):
        found = attention_statistics(q, k, column_sums=True, entropy=True, max_logit=True, top_k=2, **options(*extra))
        largest = torch.where(found.max_logit == -torch.inf, 0.0, found.max_logit)
        weights = attention_weights(q, k, average=True, rows=slice(1, 4), **options(*extra))
        return found.column_sums, found.entropy, largest, found.top_values, weights

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in (q, k, *extra)])


def test_other_derivatives_are_refused():
    q, k = (torch.from_numpy(arrays()[part]).requires_grad_() for part in "qk")
    (first,) = torch.autograd.grad(attention_statistics(q, k, entropy=True).entropy.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(first.sum(), q)
    entropy = lambda q: attention_statistics(q, k.detach(), entropy=True).entropy.sum()  # noqa: E731
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(entropy, (q.detach(),), (q.detach(),))
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(entropy)(q.detach())


def test_memory_is_linear(monkeypatch):
    for name in ("_HEAD_SCORES", "_SLAB_SCORES", "_VARIED_SCORES"):
        monkeypatch.setattr(f"tilewise.kernels.portable.tiles.{name}", 1 << 12)
    x = torch.randn(1, 2, 900, 4, requires_grad=True)
    with Largest() as largest:
        found = attention_statistics(x, x, mask=tw.window(80, 0, "end"), **EVERYTHING)
        sum(value.sum() for value in (found.column_sums, found.entropy, found.max_logit, found.top_values)).backward()
        attention_weights(x.detach(), x.detach(), rows=slice(5, 9))
    assert largest.elements <= 900 * 2 * 4 * 4 < 900 * 900 / 16
    with Largest() as largest:
        attention_weights(x.detach(), x.detach(), average=True, allow_quadratic=True)
    assert largest.elements == 900 * 900


def test_errors():
    q, k = arrays()["q"], arrays()["k"]
    with pytest.raises(tw.QuadraticMemory, match="^allow_quadratic"):
        attention_weights(q, k)
    for error, message, options in (
        (TypeError, "^top_k", {"top_k": 1.5}),
        (ValueError, "^top_k", {"top_k": -1}),
        (ValueError, "^column_heads", {"column_heads": "all"}),
        (ValueError, "^lse: has shape", {"lse": np.zeros((2, 4, 3))}),
        (TypeError, "^lse", {"lse": torch.zeros(2, 4, 13)}),
        (ValueError, "^mask", {"mask": tw.causal()}),
        (TypeError, "^sinks", {"sinks": "many"}),
    ):
        with pytest.raises(error, match=message):
            attention_statistics(q, k, **options)
    with pytest.raises(TypeError, match="^rows"):
        attention_weights(q, k, rows=3)
    with pytest.raises(ValueError, match="^rows"):
        attention_weights(q, k, rows=slice(0, 4, 2))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"q_len": 0}, {"k_len": 0}], ids=str)
def test_nothing_to_do(sizes):
    q, k = (torch.from_numpy(arrays(**sizes)[part]) for part in "qk")
    found = attention_statistics(q, k, **EVERYTHING)
    assert found.top_indices.shape == (*q.shape[:3], 4) and (found.top_indices == -1).all()
    assert found.column_sums.shape == (q.shape[0], 4, k.shape[2]) and (found.entropy == 0).all()

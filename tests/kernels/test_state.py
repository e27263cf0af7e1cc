"""The online softmax as a monoid, and the public merge of results over parts of the keys."""

import numpy as np
import pytest

import tilewise as tw
from tilewise.kernels.state import State


def _scores(seed=0, rows=5, keys=12):
    scores = np.random.default_rng(seed).standard_normal((rows, keys)) * 5
    scores[1] = -np.inf  # sees nothing
    scores[2, :6] = -np.inf  # sees nothing in the first half
    return scores, np.random.default_rng(seed + 1).standard_normal((keys, 3))


def _absorb(scores, values, cuts):
    state = State.empty(np.zeros, scores.shape[:1], values.shape[1])
    for start, stop in zip((0, *cuts), (*cuts, scores.shape[1]), strict=True):
        state = state.absorb(np, scores[:, start:stop], lambda w, start=start, stop=stop: w @ values[start:stop])
    return state


def _softmax(scores, values, sinks=None):
    weights = np.exp(scores)
    total = weights.sum(-1) + (np.exp(sinks) if sinks is not None else 0)
    seen = weights.sum(-1) > 0
    total = np.where(seen, total, 1.0)
    return weights @ values / total[:, None], np.where(seen, np.log(total), -np.inf)


@pytest.mark.parametrize("cuts", [(), (6,), (1, 2, 3), tuple(range(1, 12))])
@pytest.mark.parametrize("sinks", [None, np.linspace(-3, 40, 5)], ids=["", "sinks"])
def test_tiles_do_not_matter(cuts, sinks):
    scores, values = _scores()
    out, lse = _absorb(scores, values, cuts).finish(np, sinks)
    expected_out, expected_lse = _softmax(scores, values, sinks)
    np.testing.assert_allclose(out, expected_out, atol=1e-14)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-13)
    assert (out[1] == 0).all() and lse[1] == -np.inf


def test_merge_of_states():
    scores, values = _scores()
    parts = [_absorb(scores[:, part], values[part], ()) for part in (slice(0, 4), slice(4, 6), slice(6, 12))]
    empty = State.empty(np.zeros, (5,), 3)
    left = parts[0].merge(np, parts[1]).merge(np, parts[2]).merge(np, empty)
    right = empty.merge(np, parts[0]).merge(np, parts[1].merge(np, parts[2]))
    for state in (left, right):
        for got, expected in zip(state.finish(np), _softmax(scores, values), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-13)


def test_large_scores_stay_exact():
    scores, values = _scores()
    out, _ = _absorb(scores.astype(np.float32) + np.float32(2**20), values.astype(np.float32), (3, 7)).finish(np)
    rounded = (scores.astype(np.float32) + np.float32(2**20)).astype(np.float64) - 2**20
    np.testing.assert_allclose(out, _softmax(rounded, values)[0], rtol=0, atol=1e-5)


def _parts(dtype=np.float64):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, n, 4)).astype(dtype) for n in (5, 9, 9))
    mask = tw.causal("start")

    def part(keys):
        seen = tw.materialize(mask, 5, 9)[..., keys]
        return tw.attention(q, k[:, :, keys], v[:, :, keys], mask=tw.dense(seen), return_lse=True, kernel="portable")

    whole = tw.attention(q, k, v, mask=mask, return_lse=True, kernel="portable")
    return [part(slice(0, 2)), part(slice(2, 4)), part(slice(4, 9))], whole


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("family", ["numpy", "torch", "jax"])
def test_merge(family, order):
    parts, whole = _parts(np.float32 if family == "jax" else np.float64)
    convert = {"numpy": lambda: np.asarray, "torch": _torch, "jax": _jax}[family]()
    flat = [convert(array) for n in order for array in parts[n]]
    for got, expected in zip(tw.merge(*flat), whole, strict=True):
        np.testing.assert_allclose(np.asarray(got), expected, atol=1e-6 if family == "jax" else 1e-14)


def _torch():
    return pytest.importorskip("torch").as_tensor


def _jax():
    return pytest.importorskip("jax.numpy").asarray


def test_merge_of_empty_parts_and_its_gradients():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    out_a, out_b = (torch.from_numpy(rng.standard_normal((1, 1, 4, 2))) for _ in range(2))
    lse_a, lse_b = (torch.from_numpy(rng.standard_normal((1, 1, 4))) for _ in range(2))
    lse_a[..., [0, 1]] = lse_b[..., [0, 2]] = -torch.inf
    out_a[..., :2, :] = torch.nan  # whatever a part that saw nothing holds
    out, lse = tw.merge(out_a, lse_a, out_b, lse_b)
    assert (out[..., 0, :] == 0).all() and lse[..., 0] == -torch.inf
    torch.testing.assert_close(out[..., 1, :], out_b[..., 1, :])
    torch.testing.assert_close(lse[..., 2], lse_a[..., 2])
    inputs = [tensor.requires_grad_() for tensor in (out_a, lse_a, out_b, lse_b)]
    out, lse = tw.merge(*inputs)
    gradients = torch.autograd.grad(out.sum() + torch.where(lse == -torch.inf, 0.0, lse).sum(), inputs)
    for gradient in gradients:
        assert gradient.isfinite().all() and (gradient[:, :, 0] == 0).all()
    assert (gradients[0][:, :, 1] == 0).all() and (gradients[1][:, :, 1] == 0).all()


def test_merge_passes_gradcheck_twice():
    torch = pytest.importorskip("torch")
    inputs = [torch.randn(1, 2, 3, 2, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64)] * 2
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(tw.merge, inputs)
    assert torch.autograd.gradgradcheck(tw.merge, inputs)


@pytest.mark.parametrize(("layout", "axes"), [("bhsd", None), ("bshd", (0, 2, 1, 3))])
def test_layouts(layout, axes):
    parts, whole = _parts()
    turned = [(out if axes is None else out.transpose(axes), lse) for out, lse in parts]
    out, _ = tw.merge(*(array for part in turned for array in part), layout=layout)
    np.testing.assert_allclose(out, whole[0] if axes is None else whole[0].transpose(axes), atol=1e-14)


def test_half_precision_is_merged_in_float32():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    parts, whole = _parts(np.float32)
    flat = [
        array.astype(ml_dtypes.bfloat16) if n % 2 == 0 else array for n, array in enumerate(a for p in parts for a in p)
    ]
    out, lse = tw.merge(*flat)
    assert out.dtype == ml_dtypes.bfloat16 and lse.dtype == np.float32
    np.testing.assert_allclose(out.astype(np.float32), whole[0], atol=0.03)


def test_errors_name_the_argument():
    out, lse = np.zeros((1, 2, 3, 4)), np.zeros((1, 2, 3))
    with pytest.raises(TypeError, match=r"^out_a: "):
        tw.merge([1.0], lse, out, lse)
    with pytest.raises(ValueError, match=r"^lse_b: has shape \(1, 2\)"):
        tw.merge(out, lse, out, lse[..., 0])
    with pytest.raises(ValueError, match=r"^more: "):
        tw.merge(out, lse, out, lse, out)
    with pytest.raises(ValueError, match=r"^layout: "):
        tw.merge(out, lse, out, lse, layout="sbhd")
    with pytest.raises(TypeError, match=r"^out_b: got dtype int64"):
        tw.merge(out, lse, out.astype(np.int64), lse)

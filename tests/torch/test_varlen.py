"""Packed sequences against a loop over them: values, lse, gradients, bits, memory, errors."""

from __future__ import annotations

import math
import tracemalloc
from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")

from torch.autograd import gradcheck, gradgradcheck  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise.torch.ragged import traced, varlen_attention  # noqa: E402
from tilewise.torch.ragged.packed import options_of  # noqa: E402

close = torch.testing.assert_close
Q_LENGTHS, K_LENGTHS = [3, 0, 7, 5, 7, 1], [4, 6, 9, 0, 9, 2]
B, MOST_Q, MOST_K, HEADS = len(Q_LENGTHS), max(Q_LENGTHS), max(K_LENGTHS), 4


def cumulative(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


CU_Q, CU_K = cumulative(Q_LENGTHS), cumulative(K_LENGTHS)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bits(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def packed(dtype=torch.float64, q_rows=None, k_rows=None, kv_heads=2):
    q_rows, k_rows = q_rows or sum(Q_LENGTHS), k_rows or sum(K_LENGTHS)
    return tuple(
        normal(*shape, seed=n, dtype=dtype)
        for n, shape in enumerate(((q_rows, HEADS, 6), (k_rows, kv_heads, 6), (k_rows, kv_heads, 5)))
    )


def one(n, q, k, v, options=None, kernel="reference", **more):
    """Sequence n on its own: out (S, H, Dv), lse (H, S)."""
    rows, keys = (slice(int(cu[n]), int(cu[n + 1])) for cu in (CU_Q, CU_K))
    out, lse = tw.attention(
        *(x[None, part] for x, part in ((q, rows), (k, keys), (v, keys))),
        layout="bshd", return_lse=True, kernel=kernel, allow_quadratic=True, **(options or {}), **more,
    )  # fmt: skip
    return out[0], lse[0]


def looped(q, k, v, options_of, **more):
    found = [one(n, q, k, v, options_of(n), **more) for n in range(B)]
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found], -1)


def row(n, x, q_axis=None, k_axis=None):
    """An operand's part for sequence n: its batch row, cut to its lengths."""
    x = x[n : n + 1] if x.shape[0] == B else x
    if q_axis is not None and x.shape[q_axis] > 1:
        x = x.narrow(q_axis, 0, Q_LENGTHS[n])
    return x.narrow(k_axis, 0, K_LENGTHS[n]) if k_axis is not None and x.shape[k_axis] > 1 else x


OFFSETS, COUNTS = torch.tensor([1, -2, 2, 0, 4, 1]), torch.tensor([1, 0, 3, 2, 2, 5])
Q_IDS, K_IDS = torch.arange(B * MOST_Q).reshape(B, -1) % 3, torch.arange(B * MOST_K).reshape(B, -1) % 4
DENSE = {
    shape: bits(*shape)
    for shape in ((MOST_Q, MOST_K), (HEADS, MOST_Q, 1), (B, 1, 1, MOST_K), (B, HEADS, MOST_Q, MOST_K))
}
STARTS = torch.tensor([[n % 3, 5] for n in range(MOST_Q)])
BLOCKS = bits(B, 1, 3, 3, seed=3)
LONGER = bits(1, 1, MOST_Q + 2, MOST_K + 5)

MASKS = {  # the mask of all, the mask of sequence n
    "causal start": (tw.causal("start"), lambda n: tw.causal("start")),
    "causal end": (tw.causal("end"), lambda n: tw.causal("end")),
    "causal offsets": (tw.causal(offset=OFFSETS), lambda n: tw.causal(offset=row(n, OFFSETS))),
    "window": (tw.window(2, 1, "end"), lambda n: tw.window(2, 1, "end")),
    "window offsets": (tw.window(2, offset=OFFSETS), lambda n: tw.window(2, offset=row(n, OFFSETS))),
    "prefix": (tw.causal("end") | tw.prefix(COUNTS), lambda n: tw.causal("end") | tw.prefix(row(n, COUNTS))),
    "lengths": (tw.lengths(q=COUNTS, k=2), lambda n: tw.lengths(q=row(n, COUNTS), k=2)),
    "documents": (
        tw.documents(Q_IDS, K_IDS), lambda n: tw.documents(row(n, Q_IDS, 1), row(n, K_IDS, k_axis=1)),
    ),
    "shared documents": (
        tw.documents(Q_IDS[0], K_IDS[0]), lambda n: tw.documents(Q_IDS[0, : Q_LENGTHS[n]], K_IDS[0, : K_LENGTHS[n]]),
    ),
    "intervals": (
        tw.intervals(STARTS, STARTS + 2), lambda n: tw.intervals(STARTS[: Q_LENGTHS[n]], STARTS[: Q_LENGTHS[n]] + 2),
    ),
    "blocks": (
        tw.blocks(BLOCKS, (3, 4)),
        lambda n: tw.blocks(BLOCKS[n : n + 1, :, : -(-Q_LENGTHS[n] // 3), : -(-K_LENGTHS[n] // 4)], (3, 4)),
    ),
    "predicate": (
        tw.predicate(lambda b, h, i, j: (b + h + i + j) % 3 > 0),
        lambda n: tw.predicate(lambda b, h, i, j: (n + h + i + j) % 3 > 0),
    ),
    "combination": (
        ~(tw.causal("end") & tw.dense(LONGER)),
        lambda n: ~(tw.causal("end") & tw.dense(row(n, LONGER, 2, 3))),
    ),
    **{f"dense {shape}": (tw.dense(x), lambda n, x=x: tw.dense(row(n, x, -2, -1))) for shape, x in DENSE.items()},
}  # fmt: skip


@pytest.mark.parametrize(("mask", "of_one"), MASKS.values(), ids=MASKS)
def test_masks_of_each_sequence(mask, of_one):
    q, k, v = packed()
    found = varlen_attention(q, k, v, CU_Q, CU_K, mask=mask, return_lse=True)
    close(found, looped(q, k, v, lambda n: {"mask": of_one(n)}))


SLOPES, SLOPE_ROWS, TABLE, WEIGHT = normal(4), normal(B, 4), normal(HEADS, MOST_Q + MOST_K - 1), normal(8, HEADS)
TABLE_ROWS = normal(B, 1, MOST_Q + MOST_K - 1)


def cut_table(n, table):
    return row(n, table)[..., MOST_Q - Q_LENGTHS[n] :][..., : max(Q_LENGTHS[n] + K_LENGTHS[n] - 1, 0)]


BIASES = {  # tensors, the bias of all, the bias of sequence n
    "dense": ([normal(1, HEADS, MOST_Q, MOST_K)], lambda x: x, lambda n, x: row(n, x, 2, 3)),
    "dense per sequence": ([normal(B, 1, MOST_Q, MOST_K)], lambda x: x, lambda n, x: row(n, x, 2, 3)),
    "dense of keys": ([normal(B, 1, 1, MOST_K)], lambda x: x, lambda n, x: row(n, x, 2, 3)),
    "dense 2-D": ([normal(MOST_Q, MOST_K)], lambda x: x, lambda n, x: row(n, x, 0, 1)),
    "alibi": ([SLOPES], lambda x: tw.alibi(x, "end"), lambda n, x: tw.alibi(x, "end")),
    "alibi per sequence": ([SLOPE_ROWS], lambda x: tw.alibi(x, "start"), lambda n, x: tw.alibi(row(n, x), "start")),
    "relative": ([TABLE], tw.relative, lambda n, x: tw.relative(cut_table(n, x))),
    "relative per sequence": ([TABLE_ROWS], tw.relative, lambda n, x: tw.relative(cut_table(n, x))),
    "t5": ([WEIGHT], tw.t5, lambda n, x: tw.t5(x)),
    "sum": (
        [SLOPES, normal(B, 1, MOST_Q, 1)],
        lambda a, b: tw.alibi(a, "end") + b,
        lambda n, a, b: tw.alibi(a, "end") + row(n, b, 2),
    ),
}


@pytest.mark.parametrize(("tensors", "of_all", "of_one"), BIASES.values(), ids=BIASES)
def test_biases_of_each_sequence_and_their_gradients(tensors, of_all, of_one):
    found = []
    for function in (
        lambda q, k, v, bias: varlen_attention(q, k, v, CU_Q, CU_K, bias=of_all(*bias), return_lse=True),
        lambda q, k, v, bias: looped(q, k, v, lambda n: {"bias": of_one(n, *bias)}, kernel="portable"),
    ):
        leaves = [x.clone().requires_grad_() for x in (*packed(), *tensors)]
        out, lse = function(*leaves[:3], leaves[3:])
        finite = torch.where(lse.isfinite(), lse, 0.0)
        found.append((out, lse, *torch.autograd.grad(out.square().sum() + finite.sin().sum(), leaves)))
    close(*found)


def test_every_option_at_once():
    q, k, v = packed()
    options = {"mask": tw.causal("end"), "bias": tw.alibi(SLOPES, "end"), "sinks": normal(HEADS), "scale": -0.4}
    options["softcap"] = 2.0
    close(varlen_attention(q, k, v, CU_Q, CU_K, return_lse=True, **options), looped(q, k, v, lambda n: options))


def test_dropout_is_that_of_each_sequence():
    q, k, v = packed()
    dropout = tw.Dropout(0.4, 9, 3)
    out = varlen_attention(q, k, v, CU_Q, CU_K, dropout=dropout)
    close(out, looped(q, k, v, lambda n: {"dropout": tw.Dropout(0.4, 9, 3 + n * 2**32)})[0])
    same = torch.cat([q[:3]] * 2), torch.cat([k[:4]] * 2), torch.cat([v[:4]] * 2)
    twice = varlen_attention(*same, [0, 3, 6], [0, 4, 8], dropout=dropout)
    assert not torch.equal(twice[:3], twice[3:]), "two sequences do not drop alike"


def test_streams_beyond_64_bits_begin_again():
    """In one call for all sequences as in one for each."""
    q, k, v = packed()
    calls = {"dropout": tw.Dropout(0.4, 9, 2**64 - 1), "return_lse": True}
    found = [varlen_attention(q, k, v, CU_Q, CU_K, kernel=kernel, **calls) for kernel in ("native", "portable")]
    close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_are_those_of_the_sequence_alone(dtype):
    """Whatever its neighbours: lengths like its own, longer ones, garbage."""
    lengths = [70, 33, 70, 1, 128, 33]
    cu = cumulative(lengths, torch.int64)
    q, k, v = packed(dtype, int(cu[-1]), int(cu[-1]))
    for options in ({}, {"mask": tw.causal("end")}, {"mask": tw.window(16, 0, "end"), "softcap": 5.0}):
        out, lse = varlen_attention(q, k, v, cu, return_lse=True, **options)
        for start, stop in pairwise(cu.tolist()):
            part = slice(start, stop)
            alone, alone_lse = tw.attention(
                q[None, part], k[None, part], v[None, part], layout="bshd", return_lse=True, **options
            )
            assert torch.equal(out[part], alone[0])
            assert torch.equal(lse[:, part], alone_lse[0])
            single = varlen_attention(q[part], k[part], v[part], [0, stop - start], **options)
            assert torch.equal(out[part], single)
    spoiled = [x.clone() for x in (q, k, v)]
    for x in spoiled:
        x[:103] = math.nan
    assert torch.equal(varlen_attention(*spoiled, cu)[103:], varlen_attention(q, k, v, cu)[103:])


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_rows_past_the_used_ones_never_show(garbage):
    q, k, v = packed()
    used_q, used_k = torch.tensor([2, 0, 7, 4, 0, 1]), torch.tensor([4, 0, 3, 0, 8, 1])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    hidden = [torch.ones(x.shape[0], dtype=torch.bool) for x in leaves]
    for x, cu, used in ((0, CU_Q, used_q), (1, CU_K, used_k), (2, CU_K, used_k)):
        for n in range(B):
            hidden[x][cu[n] : cu[n] + used[n]] = False
    spoiled = [
        x.detach().masked_fill(h[:, None, None], garbage).requires_grad_() for x, h in zip(leaves, hidden, strict=True)
    ]
    found = []
    for tensors in (leaves, spoiled):
        out, lse = varlen_attention(
            *tensors, CU_Q, CU_K, seqused_q=used_q, seqused_k=used_k, mask=tw.causal("end"), return_lse=True
        )
        found.append((out, lse, *torch.autograd.grad(out.square().sum(), tensors)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    out, lse, *gradients = found[1]
    assert not out[hidden[0]].any() and torch.all(lse[:, hidden[0]] == -math.inf)
    for gradient, h in zip(gradients, hidden, strict=True):
        assert not gradient[h].any()
    n, rows, keys = 2, slice(3, 10), slice(10, 13)
    assert [int(CU_Q[n]), int(CU_K[n])] == [rows.start, keys.start]
    alone = tw.attention(q[None, rows], k[None, keys], v[None, keys], layout="bshd", mask=tw.causal("end"))
    assert torch.equal(out[rows], alone[0]), "causal('end') ends at the last used key"


def test_derivatives():
    q, k, v = (x[:9, :2, :2].contiguous().requires_grad_() for x in packed())
    bias = normal(2, 1, 5, 4).requires_grad_()

    def function(q, k, v, bias):
        return varlen_attention(
            q,
            k,
            v,
            [0, 5, 9],
            [0, 4, 8],
            mask=tw.causal("start"),
            bias=bias,
            dropout=tw.Dropout(0.3, 5),
            return_lse=True,
        )

    assert gradcheck(function, (q, k, v, bias), fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(function, (q, k, v, bias), fast_mode=True)


def test_transforms():
    q, k, v = packed()

    def loss(q):
        return varlen_attention(q, k, v, CU_Q, CU_K, mask=tw.causal("end")).square().sum()

    many = torch.stack([q, -q, 2 * q])
    per_sample = torch.func.vmap(torch.func.grad(loss))(many)
    close(per_sample, torch.stack([torch.func.grad(loss)(x) for x in many]))


def test_lengths_may_change_in_place_between_calls():
    q, k, v = packed(torch.float32, q_rows=24, k_rows=24, kv_heads=HEADS)
    cu, used = torch.tensor([0, 8, 16, 24]), torch.tensor([8, 8, 8])

    def call(mask=None):
        return varlen_attention(q, k, v, cu, seqused_k=used, mask=mask, return_lse=True)

    for bounds, lengths in (([0, 8, 16, 24], [8, 8, 8]), ([0, 2, 16, 22], [1, 8, 6]), ([0, 8, 16, 24], [8, 3, 8])):
        cu.copy_(torch.tensor(bounds))
        used.copy_(torch.tensor(lengths))
        for mask in (tw.causal("start"), tw.window(2, 0, "start"), tw.causal("start") & tw.window(1, 1, "start")):
            want, want_lse = torch.zeros(24, HEADS, 5), torch.full((HEADS, 24), -torch.inf)
            for (start, stop), length in zip(pairwise(bounds), lengths, strict=True):
                rows, keys = slice(start, stop), slice(start, start + length)
                out, lse = tw.attention(
                    q[None, rows], k[None, keys], v[None, keys], mask=mask, layout="bshd", return_lse=True
                )
                want[rows], want_lse[:, rows] = out[0], lse[0]
            for _ in range(2):  # as found, and as remembered
                assert all(map(torch.equal, call(mask), (want, want_lse)))


@pytest.mark.parametrize("as_given", [torch.int32, torch.int64, "list", "numpy"], ids=str)
def test_kinds_of_lengths(as_given):
    q, k, v = packed()
    kinds = {"list": lambda x: x.tolist(), "numpy": lambda x: x.numpy()}
    cu_q, cu_k = (kinds[as_given](cu) if as_given in kinds else cu.to(as_given) for cu in (CU_Q, CU_K))
    out = varlen_attention(q, k, v, cu_q, cu_k, MOST_Q, torch.tensor(MOST_K))
    close(out, looped(q, k, v, lambda n: {})[0])


def test_nothing_at_all():
    q, k, v = (x.requires_grad_() for x in packed())
    for cu, rows in (([0], 0), ([0, 0, 0], 0), ([0, 0], 5)):
        out, lse = varlen_attention(q[:rows], k, v, cu, [0] * len(cu), return_lse=True)
        assert out.shape == (rows, HEADS, 5) and lse.shape == (HEADS, rows)
        assert not out.any() and torch.all(lse == -math.inf)
        assert not any(
            g.any() for g in torch.autograd.grad(out.sum(), (q, k, v), materialize_grads=True, allow_unused=True)
        )


def test_distances_of_no_query_and_no_key():
    q, k, v = (x[:0] for x in packed())
    bias = tw.alibi(normal(HEADS), "end")
    out, lse = varlen_attention(q, k, v, [0, 0], [0, 0], bias=bias, kernel="native", return_lse=True)
    assert out.shape == (0, HEADS, 5) and lse.shape == (HEADS, 0)


@pytest.mark.parametrize(
    "mask",
    [
        tw.documents(torch.tensor([0, 1, 0]), torch.tensor([0])),
        tw.blocks(torch.ones(2, 1, dtype=torch.bool), (2, 3)),
        tw.dense(torch.ones(3, 1, dtype=torch.bool)),
    ],
    ids=str,
)
def test_a_sequence_without_keys_beside_one_of_a_single_key(mask):
    q, k = normal(5, 2, 4), normal(1, 2, 4)
    out = varlen_attention(q, k, k, [0, 3, 5], [0, 1, 1], mask=mask)
    assert torch.equal(out[3:], torch.zeros(2, 2, 4))
    alone = tw.attention(*(x.transpose(0, 1)[None] for x in (q[:3], k, k)), mask=mask)
    assert torch.equal(out[:3], alone[0].transpose(0, 1))


def test_rows_outside_all_sequences():
    q, k, v = packed(q_rows=30, k_rows=40)
    q[:2], k[:3], v[:3], q[25:], k[33:], v[33:] = (math.nan,) * 6
    out, lse = varlen_attention(q, k, v, CU_Q + 2, CU_K + 3, return_lse=True)
    expected, expected_lse = looped(q[2:], k[3:], v[3:], lambda n: {})
    rows = sum(Q_LENGTHS)
    close(out[2 : 2 + rows], expected)
    close(lse[:, 2 : 2 + rows], expected_lse)
    assert not out[:2].any() and not out[2 + rows :].any()


def test_the_larger_sizes_that_a_table_was_made_for():
    q, k, v = packed()
    table = normal(MOST_Q + 3 + MOST_K + 2 - 1)
    out = varlen_attention(q, k, v, CU_Q, CU_K, MOST_Q + 3, MOST_K + 2, bias=tw.relative(table))
    close(out, varlen_attention(q, k, v, CU_Q, CU_K, bias=tw.relative(table[3:])))


def test_memory_is_linear_in_the_rows():
    """One sequence of 4000 rows among thousands of one row: padded to the longest it would be 16 million rows."""
    lengths = [4000, *[1] * 4000]
    cu = cumulative(lengths)
    x = torch.ones(int(cu[-1]), 1, 1)
    tracemalloc.start()
    out = varlen_attention(x, x, x, cu, mask=tw.causal("end"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    close(out, x)
    assert peak < 64e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_sequence_in_any_packing(dtype):
    """Alone, between others, in another order, with garbage around: one call for all gives the bits of one for each."""
    from tilewise import _api

    lengths = [(1, 1500), (200, 200), (3, 70), (40, 1100), (70, 0)]
    rows = [
        [normal(n, heads, 24, seed=10 * at + heads + n, dtype=dtype) for n, heads in ((a, 4), (b, 2), (b, 2))]
        for at, (a, b) in enumerate(lengths)
    ]
    garbage = [torch.full((5, heads, 24), math.nan, dtype=dtype) for heads in (4, 2, 2)]
    options = {"mask": tw.window(300, 0, "end"), "softcap": 8.0, "sinks": 0.2}
    for order in ([0, 1, 2, 3, 4], [3, 4, 1, 0], [2]):
        tensors = [torch.cat([g, *(rows[n][x] for n in order), g]).requires_grad_() for x, g in enumerate(garbage)]
        cu_q, cu_k = (5 + cumulative([lengths[n][side] for n in order]) for side in (0, 1))
        out, lse = varlen_attention(*tensors, cu_q, cu_k, return_lse=True, **options)
        d_out = normal(*out.shape, seed=3, dtype=dtype)
        found = torch.autograd.grad(out, tensors, d_out)
        for place, n in enumerate(order):
            parts = [slice(int(cu[place]), int(cu[place + 1])) for cu in (cu_q, cu_k, cu_k)]
            own = [x[None].requires_grad_() for x in rows[n]]
            alone, alone_lse = _api.attention(*own, layout="bshd", return_lse=True, kernel="native", **options)
            expected = torch.autograd.grad(alone, own, d_out[None, parts[0]])
            assert torch.equal(out[parts[0]], alone[0]) and torch.equal(lse[:, parts[0]], alone_lse[0])
            for gradient, part, want in zip(found, parts, expected, strict=True):
                assert torch.equal(gradient[part], want[0])


def test_one_tensor_as_queries_keys_and_values():
    x = normal(sum(Q_LENGTHS), HEADS, 6, dtype=torch.bfloat16).requires_grad_()
    parts = [x.detach().clone().requires_grad_() for _ in range(3)]
    gradient = torch.autograd.grad(varlen_attention(x, x, x, CU_Q).sum(), x)[0]
    close(gradient, sum(torch.autograd.grad(varlen_attention(*parts, CU_Q).sum(), parts)), rtol=0.02, atol=0.02)


def test_equal_lengths_share_a_call(monkeypatch):
    from tilewise import _api

    calls, attention = [], _api.attention
    monkeypatch.setattr("tilewise._api.attention", lambda *a, **o: calls.append(a[0].shape) or attention(*a, **o))
    q, k, v = packed()
    varlen_attention(q, k, v, CU_Q, CU_K, kernel="portable")
    assert sorted(shape[:2] for shape in calls) == [(1, 1), (1, 3), (1, 5), (2, 7)]


q, k, v = packed()
WRONG = {
    "q": (TypeError, lambda: varlen_attention([1], k, v, CU_Q, CU_K)),
    "q axes": (ValueError, lambda: varlen_attention(q[None], k, v, CU_Q, CU_K)),
    "v": (ValueError, lambda: varlen_attention(q, k, v[1:], CU_Q, CU_K)),
    "cu_seqlens_q floats": (TypeError, lambda: varlen_attention(q, k, v, CU_Q.double(), CU_K)),
    "cu_seqlens_q axes": (ValueError, lambda: varlen_attention(q, k, v, CU_Q[None], CU_K)),
    "cu_seqlens_q empty": (ValueError, lambda: varlen_attention(q, k, v, [], CU_K)),
    "cu_seqlens_q falls": (ValueError, lambda: varlen_attention(q, k, v, [0, 5, 3], [0, 1, 2])),
    "cu_seqlens_q beyond": (ValueError, lambda: varlen_attention(q, k, v, CU_Q + 1, CU_K)),
    "cu_seqlens_q negative": (ValueError, lambda: varlen_attention(q, k, v, [-1, 3], [0, 3])),
    "cu_seqlens_q text": (TypeError, lambda: varlen_attention(q, k, v, "0 5", CU_K)),
    "cu_seqlens_q nothing": (TypeError, lambda: varlen_attention(q, k, v, None, CU_K)),
    "max_seqlen_q text": (TypeError, lambda: varlen_attention(q, k, v, CU_Q, CU_K, "long")),
    "cu_seqlens_k": (ValueError, lambda: varlen_attention(q, k, v, CU_Q, CU_K[:-1])),
    "max_seqlen_q": (ValueError, lambda: varlen_attention(q, k, v, CU_Q, CU_K, 6)),
    "max_seqlen_k": (ValueError, lambda: varlen_attention(q, k, v, CU_Q, CU_K, 7, 8)),
    "seqused_q": (ValueError, lambda: varlen_attention(q, k, v, CU_Q, CU_K, seqused_q=[4, 0, 0, 0, 0, 0])),
    "seqused_k": (ValueError, lambda: varlen_attention(q, k, v, CU_Q, CU_K, seqused_k=[1, 2])),
    "mask": (ValueError, lambda: varlen_attention(q, k, v, CU_Q, CU_K, mask=bits(2, 1, 7, 9))),
    "mask short": (ValueError, lambda: varlen_attention(q, k, v, CU_Q, CU_K, mask=bits(7, 8))),
    "mask offsets": (ValueError, lambda: varlen_attention(q, k, v, CU_Q, CU_K, mask=tw.causal(offset=COUNTS[:2]))),
    "mask kind": (TypeError, lambda: varlen_attention(q, k, v, CU_Q, CU_K, mask="causal")),
    "bias": (ValueError, lambda: varlen_attention(q, k, v, CU_Q, CU_K, bias=normal(3, 1, 7, 9))),
    "bias short": (ValueError, lambda: varlen_attention(q, k, v, CU_Q, CU_K, bias=normal(1, 1, 6, 9))),
    "bias table": (ValueError, lambda: varlen_attention(q, k, v, CU_Q, CU_K, bias=tw.relative(normal(14)))),
    "dropout": (TypeError, lambda: varlen_attention(q, k, v, CU_Q, CU_K, dropout=0.5)),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name):
    kind, call = WRONG[name]
    with pytest.raises(kind, match=f"^{name.split()[0]}: "):
        call()


RUNS = {
    "none": None,
    "causal end": tw.causal("end"),
    "causal offsets": tw.causal(offset=OFFSETS),
    "joined": tw.window(3, 2, "end") & tw.prefix(COUNTS + 1) & tw.lengths(q=5, k=7) & tw.causal("start"),
    "window": tw.window(2, None, "start"),
}


@pytest.mark.parametrize("mask", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("used", [None, torch.tensor([4, 5, 2, 0, 8, 1])], ids=["all", "used"])
def test_one_call_for_all_sequences(mask, used):
    """What a compiled program does; here without one. NaN outside of all sequences, and past the used keys."""
    q, k, v = packed(q_rows=27, k_rows=34)
    k[:1], v[:1], k[31:], v[31:] = (math.nan,) * 4
    if used is not None:
        for n in range(B):
            k[1 + CU_K[n] + used[n] : 1 + CU_K[n + 1]] = math.nan
    options = options_of(
        mask=mask, bias=None, dropout=None, scale=0.3, softcap=None, sinks=0.5, kernel=None, allow_quadratic=False
    )
    bounds = traced.bounds_of(CU_Q + 2, None, q.device), traced.bounds_of(CU_K + 1, used, k.device)
    found = traced.attend(q, k, v, *bounds, options)
    out, lse = varlen_attention(
        q, k, v, CU_Q + 2, CU_K + 1, seqused_k=used, mask=mask, scale=0.3, sinks=0.5, return_lse=True
    )
    close(found, (out, lse.T))


def test_compiled_for_any_lengths():
    """One graph: where each query sees one run of keys, no length need be read."""

    def model(q, k, v, cu_q, cu_k):
        return varlen_attention(q, k, v, cu_q, cu_k, mask=RUNS["joined"], return_lse=True)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    q, k, v = (x.requires_grad_() for x in packed(q_rows=27))
    for cu_q, cu_k in ((CU_Q, CU_K), (CU_Q + 2, int(CU_K[-1]) - CU_K.flip(0))):
        found = []
        for function in (compiled, model):
            out, lse = function(q, k, v, cu_q, cu_k)
            loss = out.square().sum() + torch.where(lse.isfinite(), lse, 0.0).sin().sum()
            found.append((out, lse, *torch.autograd.grad(loss, (q, k, v))))
        close(*found)


def test_compiled_with_breaks_for_all_else():
    q, k, v = packed()
    options = {"mask": DENSE[MOST_Q, MOST_K], "bias": tw.alibi(SLOPES, "end"), "dropout": tw.Dropout(0.2, 3)}

    def model(q):
        return varlen_attention(2 * q, k, v, CU_Q, CU_K, **options) + 1

    with torch.no_grad():
        close(torch.compile(model, backend="eager")(q), model(q))
    with pytest.raises(Exception, match="disable"):
        torch.compile(model, fullgraph=True, backend="eager")(q)

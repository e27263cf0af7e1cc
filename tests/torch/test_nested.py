"""Nested tensors of both layouts against a loop over their sequences: masks, biases, gradients, holes, errors."""

from __future__ import annotations

import math
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch.nested import nested_tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise.compat.torch_sdpa import scaled_dot_product_attention as sdpa  # noqa: E402
from tilewise.compat.torch_sdpa import sdpa as in_place  # noqa: E402
from tilewise.torch.ragged import nested_attention  # noqa: E402

close = torch.testing.assert_close
Q_LENGTHS, K_LENGTHS, HEADS = [3, 7, 1, 7], [4, 2, 9, 5], 4
MOST_Q, MOST_K = max(Q_LENGTHS), max(K_LENGTHS)

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(lengths, heads, width, seed):
    """One (S, H, D) per sequence."""
    return [normal(length, heads, width, seed=10 * seed + n) for n, length in enumerate(lengths)]


def jagged(sequences):
    """A leaf (B, S, H, D) and (B, H, S, D) of it, as a model has it."""
    leaf = nested_tensor(sequences, layout=torch.jagged, requires_grad=True)
    return leaf, leaf.transpose(1, 2)


def jagged_in_place(sequences):
    """A leaf (B, H, S, D) whose values are contiguous (H, T, D)."""
    values = torch.cat([x.transpose(0, 1) for x in sequences], 1).requires_grad_()
    offsets = torch.tensor([0, *(len(x) for x in sequences)]).cumsum(0)
    return values, torch.nested.nested_tensor_from_jagged(values, offsets, jagged_dim=2)


def jagged_with_holes(sequences):
    """A leaf (B, longest + 2, H, D), narrowed to other places in each batch row."""
    longest = max(len(x) for x in sequences) + 2
    starts = torch.tensor([n % 3 for n in range(len(sequences))])
    padded = torch.full((len(sequences), longest, *sequences[0].shape[1:]), math.nan, dtype=torch.float64)
    for row, start, x in zip(padded, starts, sequences, strict=True):
        row[start : start + len(x)] = x
    lengths = torch.tensor([len(x) for x in sequences])
    leaf = padded.requires_grad_()
    return leaf, torch.nested.narrow(leaf, 1, starts, lengths, layout=torch.jagged).transpose(1, 2)


def strided(sequences):
    leaf = nested_tensor([x.transpose(0, 1) for x in sequences], requires_grad=True)
    return leaf, leaf


def strided_transposed(sequences):
    leaf = nested_tensor(sequences, requires_grad=True)
    return leaf, leaf.transpose(1, 2)


KINDS = [jagged, jagged_in_place, jagged_with_holes, strided, strided_transposed]
SEQUENCES = parts(Q_LENGTHS, HEADS, 6, 1), parts(K_LENGTHS, 2, 6, 2), parts(K_LENGTHS, 2, 5, 3)


def rows(x):
    """Each sequence of (B, H, S, D) as (S, H, D)."""
    return [part.transpose(0, 1) for part in x.unbind()]


def looped(sequences, options_of):
    """Outputs (S, H, Dv) of each sequence on its own."""
    return [
        tw.attention(
            *(x[None] for x in one), layout="bshd", kernel="portable", **options_of(n, len(one[0]), len(one[1]))
        )[0]
        for n, one in enumerate(zip(*sequences, strict=True))
    ]


DENSE, BIAS = (
    torch.rand(4, HEADS, MOST_Q, MOST_K, generator=torch.Generator().manual_seed(0)) < 0.6,
    normal(1, HEADS, 7, 9),
)
OPTIONS = {  # options of all, options of sequence n of lengths q, k
    "none": ({}, lambda n, q, k: {}),
    "causal": ({"mask": tw.causal("end")}, lambda n, q, k: {"mask": tw.causal("end")}),
    "dense": ({"mask": DENSE}, lambda n, q, k: {"mask": DENSE[n : n + 1, :, :q, :k]}),
    "everything": (
        {"mask": tw.causal("start") & DENSE, "bias": BIAS, "softcap": 3.0, "scale": 0.3, "sinks": 0.5},
        lambda n, q, k: {
            "mask": tw.causal("start") & DENSE[n : n + 1, :, :q, :k], "bias": BIAS[:, :, :q, :k], "softcap": 3.0,
            "scale": 0.3, "sinks": 0.5,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "of_one"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make", KINDS)
def test_values_and_gradients(make, options, of_one):
    leaves, tensors = zip(*map(make, SEQUENCES), strict=True)
    out = nested_attention(*tensors, **options)
    assert out.is_nested and out.layout == tensors[0].layout
    found = rows(out)
    sequences = [[x.clone().requires_grad_() for x in kind] for kind in SEQUENCES]
    expected = looped(sequences, of_one)
    close(found, expected)
    sum(x.square().sum() for x in found).backward()
    sum(x.square().sum() for x in expected).backward()
    for leaf, wanted in zip(leaves, sequences, strict=True):
        assert_gradients(make, leaf.grad, [x.grad for x in wanted])


def assert_gradients(make, gradient, wanted):
    if make is jagged_in_place:
        close(gradient, torch.cat([x.transpose(0, 1) for x in wanted], 1))
    elif make is jagged_with_holes:
        for n, (row, x) in enumerate(zip(gradient, wanted, strict=True)):
            start = n % 3
            close(row[start : start + len(x)], x)
            assert not row[:start].any() and not row[start + len(x) :].any()
    else:
        close(list(gradient.unbind()), [x.transpose(0, 1) if make is strided else x for x in wanted])


def test_result_has_the_raggedness_of_the_queries():
    for make in (jagged, jagged_in_place):
        q, k, v = (make(x)[1] for x in SEQUENCES)
        out, lse = nested_attention(q, k, v, return_lse=True)
        assert out.shape == (*q.shape[:3], 5)
        assert lse.shape == q.shape[:3]
        for n, part in enumerate(lse.unbind()):
            one = (x[n][None] for x in SEQUENCES)
            close(part, tw.attention(*one, layout="bshd", return_lse=True)[1][0])


def test_residual_around_self_attention():
    """(B, S, H D) in, the same out, added to it: a layer of a model."""
    x = nested_tensor([normal(n, 8) for n in Q_LENGTHS], layout=torch.jagged, requires_grad=True)
    heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
    out = x + sdpa(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(-2)
    for part, given in zip(out.unbind(), x.unbind(), strict=True):
        h = given.unflatten(-1, (2, 4)).transpose(0, 1)[None]
        close(part, given + F.scaled_dot_product_attention(h, h, h, is_causal=True)[0].transpose(0, 1).flatten(1))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_three_axes_are_one_head(layout):
    q, k, v = (nested_tensor([x[:, 0] for x in kind], layout=layout) for kind in SEQUENCES)
    out = nested_attention(q, k, v, mask=tw.causal("end"))
    expected = looped([[x[:, :1] for x in kind] for kind in SEQUENCES], OPTIONS["causal"][1])
    close(list(out.unbind()), [x[:, 0] for x in expected])


def test_sequences_without_rows():
    q_lengths, k_lengths = [0, 3, 2], [4, 0, 5]
    kinds = parts(q_lengths, 2, 4, 1), parts(k_lengths, 2, 4, 2), parts(k_lengths, 2, 4, 3)
    out = nested_attention(*(jagged(x)[1] for x in kinds))
    assert [tuple(x.shape) for x in out.unbind()] == [(2, 0, 4), (2, 3, 4), (2, 2, 4)]
    assert not out.unbind()[1].any()


def test_plain_queries_of_nested_keys():
    """As many queries for every sequence: a learned pool."""
    pool = normal(4, HEADS, 3, 6)
    k, v = (jagged(x)[1] for x in SEQUENCES[1:])
    out = nested_attention(pool, k, v)
    assert not out.is_nested
    close(list(out.transpose(1, 2)), looped([list(pool.transpose(1, 2)), *SEQUENCES[1:]], lambda n, q, k: {}))


def test_other_holes_in_keys_than_in_values():
    q, k, v = jagged(SEQUENCES[0])[1], jagged_with_holes(SEQUENCES[1])[1], jagged(SEQUENCES[2])[1]
    close(rows(nested_attention(q, k, v)), looped(SEQUENCES, lambda n, q, k: {}))


def test_bits_are_those_of_the_sequence_alone():
    q, k, v = (nested_tensor([x.float() for x in kind], layout=torch.jagged).transpose(1, 2) for kind in SEQUENCES)
    out = nested_attention(q, k, v, mask=tw.causal("end"))
    for n, part in enumerate(out.unbind()):
        alone = tw.attention(*(x.unbind()[n][None] for x in (q, k, v)), mask=tw.causal("end"))
        assert torch.equal(part, alone[0])


class TestDropIn:
    """`scaled_dot_product_attention` of nested tensors."""

    @pytest.mark.parametrize("make", [jagged, strided])
    def test_as_torch_where_torch_can(self, make):
        q, k, v = (make([x[:, :1].expand(-1, 2, -1) for x in kind])[1] for kind in SEQUENCES)
        expected = F.scaled_dot_product_attention(q, k, v, scale=0.4)
        out = sdpa(q, k, v, scale=0.4)
        assert type(out) is type(expected) and out.layout == expected.layout
        close(rows(out), rows(expected))
        with in_place():
            close(rows(F.scaled_dot_product_attention(q, k, v, scale=0.4)), rows(expected))

    @pytest.mark.parametrize("make", KINDS)
    def test_causal_masks_and_biases_which_torch_refuses(self, make):
        q, k, v = (make(x)[1] for x in SEQUENCES)
        for arguments, of_one in (
            ({"is_causal": True}, lambda n, q, k: {"mask": tw.causal("start")}),
            ({"attn_mask": DENSE}, OPTIONS["dense"][1]),
            ({"attn_mask": DENSE[0, 0]}, lambda n, q, k: {"mask": DENSE[0, 0, :q, :k]}),
            ({"attn_mask": BIAS}, lambda n, q, k: {"bias": BIAS[:, :, :q, :k]}),
        ):
            out = sdpa(q, k, v, enable_gqa=True, **arguments)
            close(rows(out), looped(SEQUENCES, of_one))

    def test_lower_right_causal_bias_ends_with_each_sequence(self):
        from torch.nn.attention.bias import causal_lower_right

        q, k, v = (jagged(x)[1] for x in SEQUENCES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bias = causal_lower_right(7, 9)
        close(rows(sdpa(q, k, v, bias, enable_gqa=True)), looped(SEQUENCES, OPTIONS["causal"][1]))

    def test_gradient_of_a_float_mask(self):
        q, k, v = (jagged(x)[1] for x in SEQUENCES)
        masks = [normal(4, 1, MOST_Q, MOST_K).requires_grad_() for _ in range(2)]
        sum(x.square().sum() for x in rows(sdpa(q, k, v, masks[0], enable_gqa=True))).backward()
        expected = looped(SEQUENCES, lambda n, q, k: {"bias": masks[1][n : n + 1, :, :q, :k]})
        sum(x.square().sum() for x in expected).backward()
        close(masks[0].grad, masks[1].grad)

    def test_dropout_comes_from_the_generator(self):
        q, k, v = (jagged(x)[1] for x in SEQUENCES)

        def run(seed):
            torch.manual_seed(seed)
            return sdpa(q, k, v, dropout_p=0.5, enable_gqa=True).values()

        assert torch.equal(run(1), run(1))
        assert not torch.equal(run(1), run(2))

    def test_ragged_batches_of_plain_sequences(self):
        """(B, j, L, E): the ragged axis is one of the batch."""
        x = nested_tensor([normal(n, 5, 4, seed=n) for n in (2, 3)], layout=torch.jagged)
        out = sdpa(x, x, x, is_causal=True)
        close(out.values(), F.scaled_dot_product_attention(*(x.values(),) * 3, is_causal=True))
        (out + x).sum()

    def test_autocast(self):
        q, k, v = (nested_tensor([x.float() for x in kind], layout=torch.jagged).transpose(1, 2) for kind in SEQUENCES)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert sdpa(q, k, v, enable_gqa=True).dtype == torch.bfloat16

    def test_errors(self):
        q, k, v = (jagged(x)[1] for x in SEQUENCES)
        with pytest.raises(RuntimeError, match="^attn_mask: Explicit"):
            sdpa(q, k, v, DENSE, is_causal=True, enable_gqa=True)
        with pytest.raises(RuntimeError, match="^key: .*same dtype"):
            sdpa(q, k.float(), v)
        with pytest.raises(ValueError, match="^attn_mask: "):
            sdpa(q, k, v, q, enable_gqa=True)
        with pytest.raises(ValueError, match="^key: .*heads"):
            sdpa(q, k, v)


WRONG = {
    "q": lambda q, k, v: nested_attention(q.transpose(1, 2), k, v),
    "k axes": lambda q, k, v: nested_attention(
        q, nested_tensor([normal(n, 6) for n in K_LENGTHS], layout=torch.jagged), v
    ),
    "k count": lambda q, k, v: nested_attention(q, jagged(SEQUENCES[1][:3])[1], v),
    "v lengths": lambda q, k, v: nested_attention(q, k, q),
    "v widths": lambda q, k, v: nested_attention(
        q, k, nested_tensor([normal(h, n, 5) for h, n in zip((1, 2, 1, 2), K_LENGTHS, strict=True)])
    ),
    "mask": lambda q, k, v: nested_attention(q, k, v, mask=DENSE[:3]),
    "dropout": lambda q, k, v: nested_attention(q, k, v, dropout=0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name):
    with pytest.raises((ValueError, TypeError), match=f"^{name.split()[0]}: "):
        WRONG[name](*(jagged(x)[1] for x in SEQUENCES))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled(fullgraph):
    """As one graph where each query sees one run of keys; else with a break."""

    def model(x):
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        if fullgraph:
            return x + sdpa(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(-2)
        return x + nested_attention(heads, heads, heads, mask=DENSE[:, :1, :, :7]).transpose(1, 2).flatten(-2)

    compiled = torch.compile(model, fullgraph=fullgraph, backend="eager")
    for lengths in (Q_LENGTHS, [2, 7, 3, 6]):
        x = nested_tensor([normal(n, 8) for n in lengths], layout=torch.jagged)
        with torch.no_grad():
            close(compiled(x).values(), model(x).values())

"""Paged keys and values: the bits of the same keys in one piece, blindness, appending, the cache, errors."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from accuracy import assert_accurate  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise.torch import PagedKVCache, paged_attention, varlen_attention  # noqa: E402

close = torch.testing.assert_close
HEADS, KV, D, DV = 4, 2, 16, 8
LENGTHS = [5, 130, 0, 1]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def paged(lengths, size, dtype=torch.float32, spare=1, room=0, widths=(D, DV)):
    """Pages, NaN wherever no key stands; a table whose other entries are garbage; keys and values of each sequence."""
    needed = [-(-(length + room) // size) for length in lengths]
    order = iter(torch.randperm(sum(needed) + spare, generator=torch.Generator().manual_seed(size)).tolist())
    pages = [torch.full((sum(needed) + spare, size, KV, width), math.nan, dtype=dtype) for width in widths]
    table = torch.full((len(lengths), max(needed) + 1), 2**31 - 1, dtype=torch.int32)
    sequences = [[normal(n, KV, width, seed=n + width, dtype=dtype) for n in lengths] for width in widths]
    for n, entries in enumerate(needed):
        for entry in range(entries):
            table[n, entry] = page = next(order)
            for target, parts in zip(pages, sequences, strict=True):
                part = parts[n][entry * size : (entry + 1) * size]
                target[page, : len(part)] = part
    return *pages, table, *sequences


def one(q, k, v, **options):
    out, lse = tw.attention(q[None], k[None], v[None], layout="bshd", return_lse=True, **options)
    return out[0], lse[0]


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


MASKS = {"none": None, "causal": tw.causal("end"), "window": tw.window(40, 0, "end")}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("size", [1, 7, 16, 64, 200])
@pytest.mark.parametrize("queries", [1, 3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_bits_of_the_same_keys_in_one_piece(dtype, queries, size, mask):
    k_pages, v_pages, table, k, v = paged(LENGTHS, size, dtype)
    q = normal(len(LENGTHS), queries, HEADS, D, dtype=dtype)
    out, lse = paged_attention(
        q, k_pages, v_pages, block_table=table, lengths=torch.tensor(LENGTHS), mask=mask, return_lse=True
    )
    assert out.shape == (*q.shape[:3], DV) and lse.shape == (len(LENGTHS), HEADS, queries)
    for n in range(len(LENGTHS)):
        same((out[n], lse[n]), one(q[n], k[n], v[n], mask=mask))


@pytest.mark.parametrize("widths", [(64, 64), (96, 32), (40, 72)], ids=str)
@pytest.mark.parametrize("size", [16, 64, 200])
@pytest.mark.parametrize("heads", [2, 8, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_keys_are_decoded_where_they_lie(dtype, heads, size, widths):
    """Splits of keys, widths that fill tile registers and others, groups of one, four and ten heads."""
    lengths = [2500, 130, 1024, 3001]
    k_pages, v_pages, table, k, v = paged(lengths, size, dtype, widths=widths)
    q = normal(len(lengths), 1, heads, widths[0], dtype=dtype)
    out, lse = paged_attention(
        q, k_pages, v_pages, block_table=table, lengths=torch.tensor(lengths), mask=tw.causal("end"), return_lse=True
    )
    for n in range(len(lengths)):
        same((out[n], lse[n]), one(q[n], k[n], v[n], mask=tw.causal("end")))


@pytest.mark.parametrize("kernel", ["native", "portable", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy(dtype, kernel):
    k_pages, v_pages, table, k, v = paged(LENGTHS, 16, dtype)
    q = normal(len(LENGTHS), 6, HEADS, D, dtype=dtype)
    options = {"mask": tw.causal("end"), "softcap": 5.0, "sinks": 0.3, "scale": 0.2}
    out, lse = paged_attention(
        q, k_pages, v_pages, block_table=table, lengths=torch.tensor(LENGTHS), return_lse=True, kernel=kernel,
        allow_quadratic=True, **options,
    )  # fmt: skip
    for n in range(len(LENGTHS)):
        exact = one(q[n].double(), k[n].double(), v[n].double(), kernel="reference", allow_quadratic=True, **options)
        assert_accurate("out", out[n], exact[0].numpy())
        assert_accurate("lse", lse[n], exact[1].numpy())


FACTS = {  # all options, those of sequence n
    "alibi": (lambda: {"bias": tw.alibi(normal(HEADS), "end")}, lambda n: {"bias": tw.alibi(normal(HEADS), "end")}),
    "dense": (
        lambda: {"mask": normal(1, 1, 3, 130) < 0.3, "bias": normal(4, HEADS, 1, 130)},
        lambda n: {"mask": (normal(1, 1, 3, 130) < 0.3)[..., : LENGTHS[n]],
                   "bias": normal(4, HEADS, 1, 130)[n : n + 1, ..., : LENGTHS[n]]},
    ),
    "dropout": (
        lambda: {"dropout": tw.Dropout(0.3, 7, 2)}, lambda n: {"dropout": tw.Dropout(0.3, 7, 2 + n * 2**32)},
    ),
    "t5": (lambda: {"bias": tw.t5(normal(8, HEADS))}, lambda n: {"bias": tw.t5(normal(8, HEADS))}),
    "two intervals": (  # gathered: one call takes one interval per query
        lambda: {"mask": tw.prefix(2) | tw.window(3, 0, "end")},
        lambda n: {"mask": tw.prefix(2) | tw.window(3, 0, "end")},
    ),
    "offsets": (
        lambda: {"mask": tw.causal(offset=torch.tensor([2, 100, 0, 5]))},
        lambda n: {"mask": tw.causal(offset=[2, 100, 0, 5][n])},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("of_all", "of_one"), FACTS.values(), ids=FACTS)
def test_masks_and_biases_in_each_sequences_own_coordinates(of_all, of_one):
    k_pages, v_pages, table, k, v = paged(LENGTHS, 16)
    q = normal(len(LENGTHS), 3, HEADS, D)
    out, lse = paged_attention(
        q, k_pages, v_pages, block_table=table, lengths=torch.tensor(LENGTHS), return_lse=True, **of_all()
    )
    for n in range(len(LENGTHS)):
        same((out[n], lse[n]), one(q[n], k[n], v[n], **of_one(n)))


@pytest.mark.parametrize("size", [3, 16])
def test_append_and_attend(size):
    """Some tokens each, in place; then the same as if they had been there."""
    added = [2, 0, 4, 17]
    k_pages, v_pages, table, k, v = paged(LENGTHS, size, room=17)
    new_k, new_v = normal(sum(added), KV, D, seed=50), normal(sum(added), KV, DV, seed=51)
    q = normal(sum(added), HEADS, D, seed=52)
    cu = torch.tensor([0, *added]).cumsum(0)
    out, lse = paged_attention(
        q, k_pages, v_pages, block_table=table, lengths=torch.tensor(LENGTHS), k=new_k, v=new_v, cu_seqlens_q=cu,
        mask=tw.causal("end"), return_lse=True,
    )  # fmt: skip
    for n in range(len(LENGTHS)):
        rows = slice(int(cu[n]), int(cu[n + 1]))
        whole = [torch.cat([old[n], new[rows]]) for old, new in ((k, new_k), (v, new_v))]
        same((out[rows], lse[:, rows]), one(q[rows], *whole, mask=tw.causal("end")))
        for pages, expected in zip((k_pages, v_pages), whole, strict=True):
            held = pages[table[n, : -(-len(expected) // size)].long()].flatten(0, 1)
            assert torch.equal(held[: len(expected)], expected)
            assert held[len(expected) :].isnan().all()


def test_one_step_for_all():
    k_pages, v_pages, table, k, v = paged(LENGTHS, 16, room=1)
    q, new_k, new_v = (normal(4, 1, heads, width, seed=9) for heads, width in ((HEADS, D), (KV, D), (KV, DV)))
    out = paged_attention(
        q, k_pages, v_pages, block_table=table, lengths=torch.tensor(LENGTHS), k=new_k, v=new_v, mask=tw.causal("end")
    )
    for n in range(4):
        same([out[n]], one(q[n], torch.cat([k[n], new_k[n]]), torch.cat([v[n], new_v[n]]))[:1])


def test_varlen_attention_through_a_table():
    k_pages, v_pages, table, k, v = paged(LENGTHS, 16)
    counts = [3, 40, 0, 1]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0) for x in (counts, LENGTHS))
    q = normal(sum(counts), HEADS, D)
    found = varlen_attention(q, k_pages, v_pages, cu_q, cu_k, mask=tw.causal("end"), block_table=table, return_lse=True)
    same(found, varlen_attention(q, torch.cat(k), torch.cat(v), cu_q, cu_k, mask=tw.causal("end"), return_lse=True))
    used = torch.tensor([4, 100, 0, 0])
    found = varlen_attention(q, k_pages, v_pages, cu_q, cu_k, block_table=table, seqused_k=used)
    same([found], [varlen_attention(q, torch.cat(k), torch.cat(v), cu_q, cu_k, seqused_k=used)])


def test_gradients_through_a_table():
    k_pages, v_pages, table, k, v = paged(LENGTHS, 16)
    k_pages, v_pages = k_pages.nan_to_num().requires_grad_(), v_pages.nan_to_num().requires_grad_()
    cu = torch.tensor([0, *LENGTHS]).cumsum(0)
    q = normal(sum(LENGTHS), HEADS, D)
    out = varlen_attention(q, k_pages, v_pages, cu, block_table=table, mask=tw.causal("end"))
    d_k, d_v = torch.autograd.grad(out.square().sum(), (k_pages, v_pages))
    rows = [torch.cat(x).requires_grad_() for x in (k, v)]
    expected = torch.autograd.grad(varlen_attention(q, *rows, cu, mask=tw.causal("end")).square().sum(), rows)
    for d_pages, want in ((d_k, expected[0]), (d_v, expected[1])):
        for n, first in enumerate(cu[:-1].tolist()):
            held = d_pages[table[n, : -(-LENGTHS[n] // 16)].long()].flatten(0, 1)
            assert torch.equal(held[: LENGTHS[n]], want[first : first + LENGTHS[n]])
            assert not held[LENGTHS[n] :].any()


def test_nothing_is_gathered_where_one_call_reads_the_pages(monkeypatch):
    k_pages, v_pages, table, *_ = paged(LENGTHS, 16)
    q, lengths = normal(4, 3, HEADS, D), torch.tensor(LENGTHS)
    expected = paged_attention(q, k_pages, v_pages, block_table=table, lengths=lengths, kernel="portable")

    def refuse(*_):
        raise AssertionError("tokens were gathered")

    monkeypatch.setattr("tilewise.torch.ragged.pages.gathered", refuse)
    close(paged_attention(q, k_pages, v_pages, block_table=table, lengths=lengths), expected)
    with pytest.raises(AssertionError, match="gathered"):
        paged_attention(q, k_pages, v_pages, block_table=table, lengths=lengths, kernel="portable")


def cache_of(page_size=4, **options):
    return PagedKVCache(kv_heads=KV, head_dim=D, value_dim=DV, page_size=page_size, pages=2, **options)


def tokens(n, seed):
    return normal(1, n, HEADS, D, seed=seed), normal(1, n, KV, D, seed=seed + 1), normal(1, n, KV, DV, seed=seed + 2)


def test_a_cache_that_shares_a_beginning_and_copies_on_write():
    cache, causal = cache_of(), tw.causal("end")
    first = cache.add()
    _, k, v = tokens(10, 0)
    cache.append_and_attend(tokens(10, 0)[0], k, v, [first], mask=causal)
    second, third = cache.add(like=first), cache.add(like=first, length=6)
    assert cache.length(second) == 10 and cache.length(third) == 6
    assert cache.block_table([first, second])[0].equal(cache.block_table([first, second])[1])
    held = {first: [k[0], v[0]], second: [k[0], v[0]], third: [k[0, :6], v[0, :6]]}
    for step in range(6):
        parts = [tokens(1 + step % 3, 100 * step + number) for number in held]
        q, k, v = (torch.cat(x) for x in zip(*parts, strict=True))
        out = cache.append_and_attend(q, k, v, list(held), mask=causal)
        for n, number in enumerate(held):
            held[number] = [torch.cat([old, new[n]]) for old, new in zip(held[number], (k, v), strict=True)]
            same([out[n]], one(q[n], *held[number], mask=causal)[:1])
    tables = cache.block_table(list(held))
    assert len({tuple(row[:1].tolist()) for row in tables}) == 1, "the first page is full, and still shared"
    assert len({int(row[2]) for row in tables}) == 3


def test_pages_are_given_back():
    cache = PagedKVCache(kv_heads=KV, head_dim=D, value_dim=DV, page_size=4, pages=6, fixed=True)
    one_, two = cache.add(), cache.add()
    q, k, v = tokens(9, 0)
    cache.append_and_attend(q, k, v, [one_])
    assert cache.free_pages == 3
    cache.append_and_attend(q, k, v, [two])
    with pytest.raises(ValueError, match=r"^k: needs 1 pages more than the 6"):
        cache.append_and_attend(q[:, :4], k[:, :4], v[:, :4], [two])
    assert cache.length(two) == 9
    cache.crop(two, 4)
    assert cache.free_pages == 2
    cache.free(one_)
    assert cache.free_pages == 5
    with pytest.raises(ValueError, match=r"^sequences: got 0"):
        cache.attend(q, [one_])
    shared = cache.add(like=two)
    cache.free(two)
    same([cache.attend(q, [shared])[0]], one(q[0], k[0, :4], v[0, :4])[:1])


def test_the_last_of_those_who_share_a_page_needs_no_copy():
    cache = PagedKVCache(pages=2, page_size=4, kv_heads=KV, head_dim=D, value_dim=DV, fixed=True)
    q, k, v = tokens(4, 0)
    first = cache.add()
    cache.append_and_attend(q[:, :2], k[:, :2], v[:, :2], [first])
    both = [first, cache.add(like=first)]
    q, k, v = (x[:, 2:].expand(2, -1, -1, -1) for x in (q, k, v))
    out, again = cache.append_and_attend(q, k, v, both)
    assert cache.free_pages == 0 and torch.equal(out, again)
    own = cache.k_pages[cache.block_table(both)[:, 0].long()]
    assert torch.equal(own[0], own[1])


def test_errors_of_the_cache_name_the_argument():
    made = {"kv_heads": KV, "head_dim": D}
    cache = PagedKVCache(**made)
    sequence = cache.add()
    for kind, name, call in (
        (TypeError, "dtype", lambda: PagedKVCache(**made, dtype=torch.int64)),
        (TypeError, "dtype", lambda: PagedKVCache(**made, dtype="float32")),
        (TypeError, "length", lambda: cache.add(like=sequence, length=0.0)),
        (TypeError, "length", lambda: cache.crop(sequence, 0.0)),
        (ValueError, "length", lambda: cache.crop(sequence, -1)),
        (ValueError, "sequence", lambda: cache.free(sequence + 1)),
        (ValueError, "sequence", lambda: cache.length(sequence + 1)),
    ):
        with pytest.raises(kind, match=f"^{name}: "):
            call()


def _call(**changed):
    k_pages, v_pages, table, *_ = paged(LENGTHS, 16)
    given = {"q": normal(4, 1, HEADS, D), "k_pages": k_pages, "v_pages": v_pages, "block_table": table}
    given["lengths"] = torch.tensor(LENGTHS)
    return paged_attention(**(given | changed))


def _table(row, entry, page):
    table = paged(LENGTHS, 16)[2]
    table[row, entry] = page
    return table


new_k, new_v = normal(4, 1, KV, D), normal(4, 1, KV, DV)
WRONG = {
    "q": (TypeError, {"q": [1]}),
    "q axes": (ValueError, {"q": normal(4, HEADS, D)}),
    "q dtype": (TypeError, {"q": normal(4, 1, HEADS, D, dtype=torch.float64)}),
    "q gradient": (ValueError, {"q": normal(4, 1, HEADS, D).requires_grad_()}),
    "k_pages": (ValueError, {"k_pages": normal(3, KV, D)}),
    "v_pages": (ValueError, {"v_pages": normal(3, 16, KV, DV)}),
    "block_table names no page": (ValueError, {"block_table": _table(1, 8, 999)}),
    "block_table negative": (ValueError, {"block_table": _table(1, 8, -1)}),
    "block_table short": (ValueError, {"block_table": paged(LENGTHS, 16)[2][:, :8]}),
    "block_table rows": (ValueError, {"block_table": paged(LENGTHS, 16)[2][:3]}),
    "block_table floats": (TypeError, {"block_table": paged(LENGTHS, 16)[2].float()}),
    "block_table without room": (ValueError, {"lengths": torch.tensor([5, 160, 0, 1]), "k": new_k, "v": new_v}),
    "lengths": (ValueError, {"lengths": torch.tensor([1, 2, 3])}),
    "lengths negative": (ValueError, {"lengths": torch.tensor([1, -2, 3, 4])}),
    "v": (ValueError, {"k": new_k}),
    "k": (ValueError, {"v": new_v}),
    "k shape": (ValueError, {"k": normal(4, 1, KV, D + 1), "v": new_v}),
    "v shape": (ValueError, {"k": new_k, "v": normal(4, 2, KV, DV)}),
    "k dtype": (TypeError, {"k": new_k.double(), "v": new_v}),
    "q width": (ValueError, {"q": normal(4, 1, HEADS, D + 1)}),
    "q heads": (ValueError, {"q": normal(4, 1, HEADS + 1, D)}),
    "mask": (ValueError, {"mask": torch.ones(4, 1, 1, 100, dtype=torch.bool)}),
    "bias": (ValueError, {"bias": normal(3, 1, 1, 130)}),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name):
    kind, changed = WRONG[name]
    with pytest.raises(kind, match=f"^{name.split()[0]}: "):
        _call(**changed)


def test_nothing_is_written_where_an_argument_is_wrong():
    k_pages, v_pages, table, *_ = paged(LENGTHS, 16, room=1)
    before = k_pages.clone(), v_pages.clone()
    with pytest.raises(ValueError, match=r"^block_table: got page 999 at \[3, 0\], expected 0 to "):
        table[3, 0] = 999
        paged_attention(normal(4, 1, HEADS, D), k_pages, v_pages, block_table=table, lengths=LENGTHS, k=new_k, v=new_v)
    for pages, old in zip((k_pages, v_pages), before, strict=True):
        assert torch.equal(pages.nan_to_num(9), old.nan_to_num(9))

"""The cache against attention computed anew from the whole history, row by row, in float64."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from accuracy import assert_accurate  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise.torch.cache import KVCache  # noqa: E402

HQ, HKV, D, DV = 4, 2, 6, 5
SLOPES = torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=torch.float64)


class History:
    """What was ever appended, per batch row, and attention to it as it is defined."""

    def __init__(self, batch, seed=0, **options):
        self.generator = torch.Generator().manual_seed(seed)
        self.cache, self.options = KVCache(**options), options
        self.rows = [(torch.zeros(HKV, 0, D).double(), torch.zeros(HKV, 0, DV).double()) for _ in range(batch)]

    def new(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def tokens(self, width):
        batch = len(self.rows)
        return self.new(batch, HQ, width, D), self.new(batch, HKV, width, D), self.new(batch, HKV, width, DV)

    def remember(self, k, v, counts):
        self.rows = [
            (torch.cat([keys, k[b, :, : counts[b]]], 1), torch.cat([values, v[b, :, : counts[b]]], 1))
            for b, (keys, values) in enumerate(self.rows)
        ]

    def step(self, width, lengths=None, **options):
        """Append and attend, and hold the result against the definition."""
        q, k, v = self.tokens(width)
        counts = [width] * len(self.rows) if lengths is None else lengths
        self.remember(k, v, counts)
        out, lse = self.cache.append_and_attend(q, k, v, lengths, return_lse=True, **options)
        assert self.cache.lengths.tolist() == [keys.shape[1] for keys, _ in self.rows]
        self.check(q, counts, out, lse, **options)

    def check(self, q, counts, out, lse, **options):
        for b, count in enumerate(counts):
            expected = self.attention(b, q[b, :, :count], **options)
            for got, exact in zip((out[b, :, :count], lse[b, :, :count]), expected, strict=True):
                torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)
            assert (out[b, :, count:] == 0).all() and (lse[b, :, count:] == -torch.inf).all()

    def attention(self, b, q, slopes=None, softcap=None, sinks=None, bias=None):
        keys, values = (torch.repeat_interleave(part, HQ // HKV, 0) for part in self.rows[b])
        j = torch.arange(keys.shape[1])
        p = keys.shape[1] - q.shape[1] + torch.arange(q.shape[1])
        distance = j - p[:, None]
        s = q @ keys.mT / D**0.5
        s = softcap * torch.tanh(s / softcap) if softcap else s
        if bias is not None:
            s = s - SLOPES[:, None, None] * distance.abs()
        window, kept = self.options.get("window"), self.options.get("keep_first", 0)
        seen = (distance <= 0) & ((distance > -window) | (j < kept) if window else True)
        s = s.masked_fill(~seen, -torch.inf)
        total = s.exp().sum(-1) + (0 if sinks is None else sinks.exp()[:, None])
        return s.exp() @ values / total[..., None], total.log()


OPTIONS = [{}, {"capacity": 3}, {"window": 5, "capacity": 4}, {"window": 4, "keep_first": 2, "capacity": 1}]
BIASES = {
    "none": {},
    "alibi": {"bias": tw.alibi(SLOPES)},
    "all": {"softcap": 2.0, "sinks": SLOPES, "bias": tw.alibi(SLOPES)},
}


@pytest.mark.parametrize("what", BIASES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prompt_chunks_and_decoding(options, what):
    history = History(2, **options)
    for width in (7, 1, 1, 3, 1, 11, *[1] * 14, 2, 0, 1):
        history.step(width, **BIASES[what])


@pytest.mark.parametrize("what", BIASES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ragged_rows(options, what):
    history = History(3, **options)
    for width, lengths in (
        (6, [6, 1, 4]), (1, None), (1, [1, 0, 1]), (3, [0, 3, 1]), (1, None), (5, [5, 2, 0]), *[(1, [1, 1, 0])] * 20,
        (2, [1, 2, 2]), (1, None),
    ):  # fmt: skip
        history.step(width, lengths, **BIASES[what])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_beams(options):
    history = History(2, **options)
    history.step(6, [6, 3])
    for index in ([1, 0, 1], [2, 2, 0], [0]):
        history.cache.reorder(torch.tensor(index))
        history.rows = [history.rows[n] for n in index]
        for _ in range(4):
            history.step(1)


@pytest.mark.parametrize(
    "options", [{}, {"window": 5, "rewind": 4}, {"window": 3, "keep_first": 2, "rewind": 4}], ids=str
)
def test_taking_guesses_back(options):
    history = History(2, capacity=2, **options)
    history.step(9)
    for back in ([3, 3], [0, 2], [4, 1], [1, 1]):
        history.step(4)
        length = history.cache.lengths - torch.tensor(back)
        history.cache.crop(length if back[0] != back[1] else -back[0])
        history.rows = [
            (k[:, : n - m], v[:, : n - m])
            for (k, v), n, m in zip(history.rows, [k.shape[1] for k, _ in history.rows], back, strict=True)
        ]
        history.step(1)


def test_a_window_is_bounded_and_keeps_positions():
    history = History(1, window=8, keep_first=1, capacity=4)
    history.step(200, bias=tw.alibi(SLOPES))
    capacities = []
    for _ in range(60):
        history.step(1, bias=tw.alibi(SLOPES))
        capacities.append(history.cache.capacity)
    assert max(capacities) <= 2 * (1 + 8 + 1) and len(set(capacities)) == 1
    assert history.cache.lengths.tolist() == [260]


def test_a_stalled_row_holds_nothing_back():
    history = History(2, window=4, capacity=2)
    history.step(5, [5, 2])
    for _ in range(40):
        history.step(1, [1, 0])
    assert history.cache.capacity <= 2 * (4 + 5)
    history.step(1)


def test_growth_copies_seldom(monkeypatch):
    from tilewise.torch.cache.slots import Slots

    moves, move = [], Slots.move
    monkeypatch.setattr(Slots, "move", lambda self, *args: (moves.append(args), move(self, *args)))
    history = History(1, capacity=2)
    for _ in range(100):
        history.step(1)
    assert len(moves) <= 12 and history.cache.capacity < 170


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"window": 6, "keep_first": 3}], ids=str)
def test_attending_to_what_was_appended_before(options):
    history = History(2, capacity=4, **options)
    q, k, v = history.tokens(17)
    for first, last in ((0, 5), (5, 9), (9, 12), (12, 17)):
        history.cache.append(k[:, :, first:last], v[:, :, first:last])
    history.remember(k, v, [17, 17])
    for queries in (1, 2, 5, *((17,) if not options else ())):
        for _ in range(2):
            history.check(q[:, :, -queries:], [queries] * 2, *history.cache.attend(q[:, :, -queries:], return_lse=True))


def test_attending_copies_nothing(monkeypatch):
    from tilewise.torch.cache import cache as module

    seen = []
    monkeypatch.setattr(
        module, "attention", lambda q, k, v, **options: seen.append(k) or tw.attention(q, k, v, **options)
    )
    k = torch.randn(1, 2, 40, 8)
    cache = KVCache(capacity=64)
    cache.append(k, k)
    cache.attend(torch.randn(1, 2, 1, 8))
    assert seen[0].shape == k.shape and seen[0].data_ptr() == cache._slots.buffers[0].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    q, k, v = (torch.randn(1, 4, 40, 16, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(3))
    cache, outs = KVCache(window=9, keep_first=2), []
    for first, last in ((0, 21), (21, 22), (22, 36), (36, 40)):
        outs.append(cache.append_and_attend(*(x[:, :, first:last] for x in (q, k, v))))
    mask = tw.causal() & (tw.window(8, 0) | tw.prefix(2))
    exact = tw.attention(q.double(), k.double(), v.double(), mask=mask)
    plain = tw.attention(q, k, v, mask=mask)
    assert torch.cat(outs, 2).dtype == dtype
    assert_accurate("out", torch.cat(outs, 2), exact, plain)


def test_prompts_have_the_bits_of_a_plain_call():
    q, k, v = (torch.randn(3, 4, 40, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    lengths = [40, 13, 29]
    padded = KVCache().append_and_attend(q, k, v, lengths)
    for b, n in enumerate(lengths):
        alone = tw.attention(*(x[b : b + 1, :, :n] for x in (q, k, v)), mask=tw.causal())
        assert torch.equal(padded[b : b + 1, :, :n], alone)


def test_layout():
    q, k, v = History(2).tokens(5)
    plain, other = KVCache(), KVCache(layout="bshd")
    expected = plain.append_and_attend(q, k, v)
    got = other.append_and_attend(*(x.transpose(1, 2).contiguous() for x in (q, k, v)))
    torch.testing.assert_close(got.transpose(1, 2), expected, rtol=0, atol=1e-13)


def test_cross_attention():
    history = History(2)
    q, k, v = history.tokens(7)
    cache = KVCache(capacity=2)
    cache.append(k, v, [7, 3])
    for queries in (q, q[:, :, :1]):
        torch.testing.assert_close(
            cache.attend(queries, causal=False), tw.attention(queries, k, v, mask=tw.lengths(k=np.array([7, 3])))
        )


def test_t5_and_functions_of_distance():
    weight = torch.randn(8, HQ, generator=torch.Generator().manual_seed(3)).double()
    q, k, v = History(1).tokens(12)
    bias = tw.t5(weight, bidirectional=False, max_distance=9)
    expected = tw.attention(q, k, v, mask=tw.causal(), bias=bias)
    for given in (bias, lambda distance: weight[_buckets(distance)].mT):
        cache = KVCache()
        outs = [cache.append_and_attend(*(x[:, :, n : n + 3] for x in (q, k, v)), bias=given) for n in range(0, 12, 3)]
        torch.testing.assert_close(torch.cat(outs, 2), expected)


def _buckets(distance):
    from tilewise.masks.biases import t5_buckets

    return torch.from_numpy(t5_buckets(distance.numpy(), 8, False, 9))


def test_within_and_without_inference_mode():
    history = History(2, capacity=2)
    with torch.inference_mode():
        history.step(3)
        history.cache.reorder([1, 0])
        history.rows.reverse()
    with torch.no_grad():
        history.step(4)
    history.step(1)


@pytest.mark.parametrize(
    ("options", "chunks"),
    [
        ({"window": 512, "keep_first": 300}, [100, 160, 5]),  # the first buffer has less room than is kept in the end
        ({"window": 65, "keep_first": 20, "capacity": 7}, [7, 1, 40, 70]),
        ({"window": 1, "keep_first": 20, "capacity": 1}, [17, 1, 9]),
    ],
    ids=str,
)
def test_more_tokens_are_kept_than_the_first_memory_holds(options, chunks):
    cache = KVCache(**options)
    k, v = torch.randn(2, 1, 2, sum(chunks), 8)
    at = 0
    for chunk in chunks:
        cache.append(k[:, :, at : at + chunk], v[:, :, at : at + chunk])
        at += chunk
        q = torch.randn(1, 2, 1, 8)
        seen = (torch.arange(at) < options["keep_first"]) | (torch.arange(at) >= at - options["window"])
        torch.testing.assert_close(
            cache.attend(q), tw.attention(q, k[:, :, :at], v[:, :, :at], mask=seen.expand(1, 1, 1, at))
        )
    cache.reset()
    cache.append(k[:, :, :1], v[:, :, :1])
    torch.testing.assert_close(cache.attend(q), v[:, :, :1])


def test_reset():
    history = History(2, window=3, capacity=2)
    for _ in range(9):
        history.step(2)
    history.cache.reset()
    history.rows = History(2).rows
    history.step(4)


def test_full_cache_leaves_things_as_they_were():
    history = History(1, capacity=6, fixed=True)
    history.step(4)
    _, k, v = history.tokens(3)
    with pytest.raises(ValueError, match="^k: needs room for 7 tokens"):
        history.cache.append(k, v)
    history.step(2)
    assert history.cache.capacity == 6 and history.cache.nbytes == 6 * HKV * (D + DV) * 8
    ring = History(1, capacity=6, fixed=True, window=4)
    for _ in range(20):
        ring.step(2)
    assert ring.cache.capacity == 6


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("^window", {"window": 0}),
        ("^window", {"keep_first": 2}),
        ("^keep_first", {"window": 3, "keep_first": -1}),
        ("^capacity", {"capacity": 0}),
        ("^layout", {"layout": "thd"}),
    ],
)
def test_errors_when_made(message, options):
    with pytest.raises(ValueError, match=message):
        KVCache(**options)


def test_errors():
    history = History(2, window=3, capacity=2)
    q, k, v = history.tokens(2)
    for call, name in ((history.cache.attend, "q"), (history.cache.reorder, "index"), (history.cache.crop, "length")):
        with pytest.raises(ValueError, match=f"^{name}: the cache is empty"):
            call(q)
    history.step(2)
    for _ in range(6):
        history.step(1)
    cache = history.cache
    for message, call in (
        ("^k: has shape", lambda: cache.append(k[:, :1], v[:, :1])),
        ("^k: has shape", lambda: cache.append(k.float(), v.float())),
        ("^v: has shape", lambda: cache.append(k, v[:, :, :1])),
        ("^k: requires a gradient", lambda: cache.append(k.clone().requires_grad_(), v)),
        ("^lengths", lambda: cache.append(k, v, [1, 3])),
        ("^lengths", lambda: cache.append(k, v, [1])),
        ("^q: has 1 as batch size", lambda: cache.attend(q[:1])),
        ("^q: has 8 queries, the first", lambda: cache.attend(q.repeat(1, 1, 4, 1))),
        ("^q: has 20 queries, expected", lambda: cache.attend(q.repeat(1, 1, 10, 1))),
        ("^causal", lambda: cache.attend(q, causal=False)),
        ("^index", lambda: cache.reorder([0, 2])),
        ("^length: .*dropped", lambda: cache.crop(2)),
        ("^length: .*at most", lambda: cache.crop(9)),
        ("^length", lambda: cache.crop([1, 2, 3])),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for message, call in (
        ("^k: got dtype torch.int64", lambda: KVCache().append(k.long(), v.long())),
        ("^index: got dtype", lambda: cache.reorder([0.5, 1.0])),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    for kind, sinks in ((ValueError, torch.ones(q.shape[1] + 1)), (ValueError, np.nan), (TypeError, "x")):
        with pytest.raises(kind, match="^sinks: "):
            cache.attend(q[:, :, :1], sinks=sinks)
    for bias in (3.0, tw.relative(torch.zeros(8))):
        with pytest.raises(TypeError, match="^bias"):
            cache.attend(q[:, :, :1], bias=bias)
    history.step(1)

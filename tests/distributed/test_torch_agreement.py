"""The catalogue over ranks: one device's results and gradients, as accurate as any kernel must be."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from accuracy import assert_accurate  # noqa: E402
from support.conformance import check_forward, check_gradients  # noqa: E402
from support.parallel_cases import Case, joined, on_this_rank, one_device, whole_of  # noqa: E402
from support.ranks import Ranks  # noqa: E402

from tilewise.distributed.schedule import head_shares  # noqa: E402
from tilewise.kernels.reference import dense as reference  # noqa: E402
from tilewise.plan.catalog import PRESETS  # noqa: E402

_oracles: dict[tuple[str, str], reference.Dense] = {}


def _check(ranks: Ranks, case: Case) -> None:
    answers = ranks(on_this_rank, case)
    texts = [answer for answer in answers if isinstance(answer, str)]
    assert not texts, texts
    whole, plan = whole_of(case.preset, case.dtype), whole_of(case.preset, case.dtype).plan
    key = case.preset, case.dtype
    if key not in _oracles:
        _oracles[key] = reference.attention(plan.problem, whole.operands)
    out, lse, found = joined(case, answers)
    check_forward(plan, whole.operands, _oracles[key], out, lse)
    check_gradients(plan, whole.operands, _oracles[key], found, whole.d_out, whole.d_lse)


def _able(preset: str, most: int) -> int:
    """The largest number of ranks up to `most` over which heads can be spread."""
    shape = PRESETS[preset].small

    def fits(n: int) -> bool:
        try:
            head_shares(shape.q_heads, shape.kv_heads, n)
        except ValueError:
            return False
        return True

    return max(n for n in range(1, most + 1) if fits(n))


@pytest.mark.parametrize("name", PRESETS)
def test_a_zigzag_ring(ranks, name):
    _check(ranks, Case(name, "ring", "zigzag"))


# Which of the others a preset meets in the quick suite; all meet all in the sweep below.
_OTHERS = [
    ("ring", "contiguous", 4),
    ("ring", "stripe", 4),
    ("all_gather", "contiguous", 4),
    ("all_gather", "zigzag", 4),
    ("all_gather", "stripe", 4),
    ("ring", "contiguous", 2),
    ("auto", "zigzag", 2),
]


@pytest.mark.parametrize("name", PRESETS)
def test_another_way_for_each_preset(ranks, name):
    _check(ranks, Case(name, *_OTHERS[list(PRESETS).index(name) % len(_OTHERS)]))


@pytest.mark.slow
@pytest.mark.parametrize("way", _OTHERS, ids="-".join(["%s"] * 3).__mod__)
@pytest.mark.parametrize("name", PRESETS)
def test_every_way_for_each_preset(ranks, name, way):
    _check(ranks, Case(name, *way))


@pytest.mark.parametrize("name", PRESETS)
def test_heads_give_the_bits_of_one_device(ranks, name):
    sharding = ("contiguous", "zigzag", "stripe")[list(PRESETS).index(name) % 3]
    case = Case(name, "ulysses", sharding, ranks=_able(name, 4))
    answers = ranks(on_this_rank, case)
    assert not [answer for answer in answers if isinstance(answer, str)], answers
    out, lse, found = joined(case, answers)
    exact_out, exact_lse, exact = one_device(case)
    assert torch.equal(out, exact_out) and torch.equal(lse, exact_lse)
    shape = PRESETS[name].small
    assert torch.equal(found.q, exact[0])
    if shape.kv_heads % case.ranks == 0:
        assert torch.equal(found.k, exact[1]) and torch.equal(found.v, exact[2])
    _check(ranks, case)


@pytest.mark.parametrize("name", ["llama3-8b", "gpt-oss-20b-local", "mistral-7b", "gemma2-9b-global"])
@pytest.mark.parametrize("sharding", ["contiguous", "zigzag"])
def test_a_grid(ranks, name, sharding):
    _check(ranks, Case(name, "grid", sharding))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "strategy", "sharding"),
    [
        ("gpt-oss-20b-local", "ring", "zigzag"),
        ("mpt-7b", "ring", "stripe"),
        ("alphafold-row", "all_gather", "contiguous"),
        ("gemma2-9b-local", "grid", "contiguous"),
        ("gpt-oss-20b-global", "ulysses", "contiguous"),
    ],
)
def test_dtypes(ranks, name, strategy, sharding, dtype):
    _check(ranks, Case(name, strategy, sharding, dtype=dtype, ranks=4 if strategy != "ulysses" else _able(name, 4)))


@pytest.mark.parametrize("name", ["alphafold-row", "dense-mask", "rows-that-see-nothing"])
@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
@pytest.mark.parametrize("sharding", ["contiguous", "zigzag", "stripe"])
def test_arrays_given_as_own_rows(ranks, name, strategy, sharding):
    case = Case(name, strategy, sharding, own=True)
    if name != "alphafold-row":
        _check(ranks, case)
        return
    answers = ranks(on_this_rank, case)
    pair = np.concatenate([answer[5] for answer in answers], 2)  # this rank's rows of the bias: joined, not added up
    whole = joined(Case(name, strategy, sharding), ranks(on_this_rank, Case(name, strategy, sharding)))[2].dense[0]
    from tilewise.distributed.layout import Layout

    order = np.argsort(Layout(sharding, whole.shape[2], 4).order())
    np.testing.assert_array_equal(pair[:, :, order], whole.numpy())


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses", "grid"])
def test_uneven_and_empty_shards(ranks, strategy):
    _check(ranks, Case("llama3-8b", strategy, lengths=((30, 0, 5, 35), (1, 40, 0, 29))))


@pytest.mark.parametrize("kernel", ["portable", "native"])
def test_a_kernel_by_name(ranks, kernel):
    _check(ranks, Case("streaming-llm", "ring", "zigzag", kernel=kernel))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_error_does_not_grow_with_the_ranks(ranks, dtype):
    """Partial results are kept in float32, so merges lose no more than one rounding of that."""
    plan, whole = whole_of("llama3-8b", dtype).plan, whole_of("llama3-8b", dtype)
    oracle = reference.attention(plan.problem, whole.operands)
    errors = {}
    for count in (1, 2, 4):
        case = Case("llama3-8b", "ring", "zigzag", ranks=count, dtype=dtype)
        out, _, _ = joined(case, ranks(on_this_rank, case))
        assert_accurate("out", out, oracle.out)
        errors[count] = float(np.sqrt(np.mean((out.double().numpy() - oracle.out) ** 2)))
    # Each merge rounds in float32, which is seen where one rank's error is no larger.
    merging = 2**-24 * float(np.sqrt(np.mean(oracle.out**2)))
    assert max(errors[2], errors[4]) < 1.1 * errors[1] + merging, errors

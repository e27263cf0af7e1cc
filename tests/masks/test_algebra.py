"""Masks as values: equality, hashing, structure, operands, how they combine and how they are written."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.mask_strategies import masks, sizes

import tilewise as tw
from tilewise.masks.algebra import And, Not, Or
from tilewise.masks.site import Site


@given(st.data())
def test_operands_can_be_taken_out_and_put_back(data):
    size = data.draw(sizes(5))
    mask = data.draw(masks(size))
    operands = mask.operands()
    taken = iter(operands)
    again = mask.replace_operands(lambda: next(taken))
    assert next(taken, None) is None, "fewer operands were asked for than there are"
    assert again == mask and hash(again) == hash(mask) and str(again) == str(mask)
    assert again.structure() == mask.structure() and hash(again.structure()) == hash(mask.structure())


@given(st.data())
def test_placeholders_may_stand_where_arrays_belong(data):
    # As jax does with trees whose leaves it maps to something else.
    mask = data.draw(masks(data.draw(sizes(4))))
    empty = mask.replace_operands(object)
    assert len(list(empty.primitives())) == len(list(mask.primitives()))


def test_masks_without_operands_are_equal_when_written_alike():
    assert tw.causal() & tw.window(3, 0) == tw.causal() & tw.window(3, 0)
    assert hash(~tw.prefix(3)) == hash(~tw.prefix(3))
    assert tw.causal() != tw.causal("end")
    assert tw.prefix(3) != tw.prefix(4) != tw.lengths(k=4)
    assert tw.causal() & tw.prefix(1) != tw.causal() | tw.prefix(1)
    assert tw.causal() != "causal()"


def test_masks_with_operands_are_equal_when_the_arrays_are_the_same_objects():
    array = np.ones((3, 3), bool)
    assert tw.dense(array) == tw.dense(array)
    assert tw.dense(array) != tw.dense(array.copy())
    assert tw.dense(array).structure() == tw.dense(array.copy()).structure()
    assert tw.dense(array).structure() != tw.dense(array[:2]).structure()


def test_combinations_are_flat_and_brackets_are_written_where_they_matter():
    causal, prefix, window = tw.causal(), tw.prefix(2), tw.window(1, 1)
    assert isinstance(causal & prefix & window, And) and len((causal & prefix & window).parts) == 3
    assert isinstance(causal | (prefix | window), Or) and len((causal | (prefix | window)).parts) == 3
    assert isinstance(~causal, Not)
    assert str((causal | prefix) & ~window) == "(causal() | prefix(2)) & ~window(1, 1)"
    assert str(~(causal & prefix)) == "~(causal() & prefix(2))"
    assert str(tw.window(4, None, "end")) == 'window(4, None, "end")'


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax.numpy"])
def test_a_boolean_array_combines_from_either_side(framework):
    xp = pytest.importorskip(framework)
    array = (
        xp.asarray([[True, False], [True, True]]) if framework != "torch" else xp.tensor([[True, False], [True, True]])
    )
    for mask in (array & tw.causal(), tw.causal() & array, array | tw.causal(), tw.causal() | array):
        assert isinstance(mask, And | Or)
    site_mask = np.asarray(array) & np.tri(2, dtype=bool)
    np.testing.assert_array_equal(tw.materialize(array & tw.causal(), 2, 2)[0, 0], site_mask)


def test_a_mask_has_no_truth_value():
    with pytest.raises(TypeError, match="^mask: .*&"):
        bool(tw.causal())
    with pytest.raises(TypeError, match="^mask: "):
        _ = tw.causal() and tw.prefix(3)


@pytest.mark.parametrize("other", [3, 1.5, "causal", None, [True]])
def test_only_masks_and_boolean_arrays_combine(other):
    for combine in (lambda a, b: a & b, lambda a, b: a | b, lambda a, b: b & a, lambda a, b: b | a):
        with pytest.raises(TypeError, match="^mask: got "):
            combine(tw.causal(), other)


def test_a_mask_cannot_be_changed():
    with pytest.raises(AttributeError):
        tw.prefix(3).n = 4


CONSTRUCTION = {
    "align": [(ValueError, lambda: tw.causal("middle")), (ValueError, lambda: tw.window(1, 1, "left"))],
    "offset": [
        (TypeError, lambda: tw.causal(offset=1.5)),
        (TypeError, lambda: tw.causal(offset=np.array([1.5]))),
        (TypeError, lambda: tw.causal(offset=True)),
        (ValueError, lambda: tw.causal("end", offset=3)),
        (ValueError, lambda: tw.window(1, 1, "end", offset=3)),
    ],
    "left": [
        (ValueError, lambda: tw.window(-1)),
        (TypeError, lambda: tw.window(1.0)),
        (TypeError, lambda: tw.window(True)),
    ],
    "right": [(ValueError, lambda: tw.window(1, -1)), (TypeError, lambda: tw.window(1, "2"))],
    "n": [
        (ValueError, lambda: tw.prefix(-1)),
        (TypeError, lambda: tw.prefix(2.0)),
        (TypeError, lambda: tw.prefix(None)),
    ],
    "q": [
        (ValueError, lambda: tw.lengths()),
        (ValueError, lambda: tw.lengths(q=-1)),
        (TypeError, lambda: tw.lengths(q="3")),
    ],
    "k": [(ValueError, lambda: tw.lengths(k=-1)), (TypeError, lambda: tw.lengths(k=np.ones(2)))],
    "q_ids": [(TypeError, lambda: tw.documents(3)), (TypeError, lambda: tw.documents(np.ones(3)))],
    "k_ids": [
        (TypeError, lambda: tw.documents(np.arange(3), np.ones(3))),
        (TypeError, lambda: tw.documents([1], True)),
    ],
    "starts": [
        (TypeError, lambda: tw.intervals(np.ones(3), np.arange(3))),
        (TypeError, lambda: tw.intervals("a", [1])),
    ],
    "stops": [
        (TypeError, lambda: tw.intervals(np.arange(3), np.ones(3))),
        (ValueError, lambda: tw.intervals(np.arange(3), np.arange(4))),
        (ValueError, lambda: tw.intervals(3, 4)),
    ],
    "mask": [
        (TypeError, lambda: tw.dense(np.ones(3))),
        (TypeError, lambda: tw.dense(None)),
        (TypeError, lambda: tw.dense("causal")),
        (TypeError, lambda: tw.dense([[0, 1]])),
    ],
    "map": [(TypeError, lambda: tw.blocks(np.ones((2, 2)), 4)), (TypeError, lambda: tw.blocks(None, 4))],
    "size": [
        (ValueError, lambda: tw.blocks(np.ones((2, 2), bool), 0)),
        (ValueError, lambda: tw.blocks(np.ones((2, 2), bool), (2, 2, 2))),
        (ValueError, lambda: tw.blocks(np.ones((2, 2), bool), (2, 1.5))),
        (TypeError, lambda: tw.blocks(np.ones((2, 2), bool), None)),
        (TypeError, lambda: tw.blocks(np.ones((2, 2), bool), 2.0)),
    ],
    "function": [(TypeError, lambda: tw.predicate(3))],
}


@pytest.mark.parametrize(
    ("argument", "number"), [(name, n) for name, rows in CONSTRUCTION.items() for n in range(len(rows))]
)
def test_a_wrong_argument_is_named_first(argument, number):
    kind, build = CONSTRUCTION[argument][number]
    with pytest.raises(kind, match=rf"^{argument}: .*(got|expected)"):
        build()


# Masks that do not fit B = 2, H = 3, Sq = 4, Sk = 5.
MISFITS = [
    tw.causal(), tw.window(1, 1), tw.causal(offset=np.zeros(3, int)), tw.prefix(np.zeros(4, int)),
    tw.lengths(q=np.zeros(5, int)), tw.lengths(k=np.zeros((2, 1), int)), tw.documents(np.zeros(5, int)),
    tw.documents(np.zeros(4, int)), tw.documents(np.zeros((3, 4), int), np.zeros(5, int)),
    tw.intervals(np.zeros(5, int), np.ones(5, int)), tw.intervals(np.zeros((3, 4, 1), int), np.zeros((3, 4, 1), int)),
    tw.intervals(np.zeros((2, 2, 4, 1), int), np.zeros((2, 2, 4, 1), int)),
    tw.intervals(*[np.zeros((1,) * 4 + (4,), int)] * 2),
    tw.dense(np.ones((4, 4), bool)), tw.dense(np.ones((3, 1, 1, 1), bool)), tw.dense(np.ones((1,) * 5, bool)),
    tw.blocks(np.ones((2, 2), bool), 2), tw.blocks(np.ones((3, 2, 3), bool), (2, 1)),
    tw.blocks(np.ones((2, 3, 3), bool), 2),
    tw.blocks(np.ones(3, bool), 2), tw.causal("end") & ~(tw.prefix(3) | tw.dense(np.ones((4, 4), bool))),
]  # fmt: skip


@pytest.mark.parametrize("mask", MISFITS, ids=lambda mask: str(mask))
def test_a_mask_that_does_not_fit_says_so_before_anything_else(mask):
    with pytest.raises(ValueError, match="^mask: "):
        mask.check(Site(2, 3, 4, 5))
    with pytest.raises(ValueError, match="^mask: "):
        tw.materialize(mask, 4, 5, batch=2, heads=3)


@pytest.mark.parametrize("answer", [1, 0.5, np.ones((4, 5)), np.arange(5)])
def test_a_predicate_must_answer_booleans(answer):
    with pytest.raises(TypeError, match="^mask: the predicate returned dtype"):
        tw.materialize(tw.predicate(lambda b, h, i, j: answer), 4, 5)


def test_a_predicate_must_answer_for_the_positions_it_is_asked():
    with pytest.raises(ValueError, match="^mask: the predicate returned shape"):
        tw.materialize(tw.predicate(lambda b, h, i, j: np.ones((3, 5), bool)), 4, 5)


@given(st.data())
def test_extent_is_the_number_of_batch_rows_and_heads_told_apart(data):
    size = data.draw(sizes(4))
    mask = data.draw(masks(size, lazy=False))
    batches, heads = mask.extent()
    assert batches in (1, size[0]) and heads in (1, size[1])
    mask.check(Site(batches, heads, size[2], size[3]))

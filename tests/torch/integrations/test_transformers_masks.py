"""Every mask function of transformers, translated, against transformers' own evaluation of it."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("transformers.masking_utils")

from tilewise import causal  # noqa: E402
from tilewise.masks.lower import lower  # noqa: E402
from tilewise.masks.materialize import picture  # noqa: E402
from tilewise.masks.site import Site  # noqa: E402
from tilewise.torch.integrations.transformers import masks  # noqa: E402
from tilewise.torch.integrations.transformers import translate as translation  # noqa: E402
from tilewise.torch.integrations.transformers.masks import attention_mask  # noqa: E402
from tilewise.torch.integrations.transformers.symbolic import SymbolicMask  # noqa: E402
from tilewise.torch.integrations.transformers.translate import NotUnderstood, Place, translate  # noqa: E402

BATCH, LENGTH = 3, 24
GROUPS = torch.tensor([[-1] * 4 + [0] * 6 + [-1] * 3 + [1] * 5 + [-1] * 6, [0] * 24, [-1] * 24])
POSITIONS = torch.tensor([[*range(9), *range(15)], [*range(24)], [*range(1), *range(20), *range(3)]])
SEQUENCES = theirs.find_packed_sequence_indices(POSITIONS)

FUNCTIONS = {
    "causal": theirs.causal_mask_function,
    "bidirectional": theirs.bidirectional_mask_function,
    "sliding": theirs.sliding_window_causal_mask_function(5),
    "sliding of one": theirs.sliding_window_causal_mask_function(1),
    "sliding of none": theirs.sliding_window_causal_mask_function(0),
    "sliding both ways": theirs.sliding_window_bidirectional_mask_function(4),
    "chunked": theirs.chunked_causal_mask_function(7, torch.tensor([0, 2, 5])),
    "blocks in a causal mask": theirs.or_masks(theirs.causal_mask_function, theirs.blockwise_overlay(GROUPS)),
    "blocks in a sliding mask": theirs.or_masks(
        theirs.sliding_window_causal_mask_function(5), theirs.blockwise_overlay(GROUPS)
    ),
    "padding as a function": theirs.and_masks(
        theirs.causal_mask_function, theirs.padding_mask_function(torch.ones(BATCH, LENGTH, dtype=torch.bool).tril(5))
    ),
}
PACKED = {
    "packed": theirs.packed_sequence_compatibility_function(theirs.causal_mask_function, POSITIONS, SEQUENCES),
    "packed, sliding": theirs.packed_sequence_compatibility_function(
        theirs.sliding_window_causal_mask_function(4), POSITIONS, SEQUENCES
    ),
}
# (Sq, Sk, q_offset, kv_offset): whole, a decode step, a chunk on a cache, a sliding cache, a static cache half full.
PLACES = [(24, 24, 0, 0), (1, 24, 23, 0), (7, 19, 12, 0), (5, 12, 17, 10), (6, 24, 4, 0), (0, 8, 8, 0)]


def paddings() -> dict[str, torch.Tensor | None]:
    whole = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    right, left, middle, empty = (whole.clone() for _ in range(4))
    right[0, 20:] = right[2, 3:] = False
    left[0, :4] = left[1, :21] = False
    middle[0, 6:9] = middle[1, 0] = middle[2, 22] = False
    empty[1] = False
    both_sides = left & right
    return {
        "none": None, "whole": whole, "right": right, "left": left, "gaps": middle, "both sides": both_sides,
        "an empty row": empty, "shorter than the keys": right[:, :15],
    }  # fmt: skip


def asked(function, place, padding, **options) -> torch.Tensor:
    q_len, k_len, q_offset, kv_offset = place
    return attention_mask(
        batch_size=BATCH, q_length=q_len, kv_length=k_len, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=function, attention_mask=padding, dtype=torch.float32, config=None, **options,
    )  # fmt: skip


def expected(function, place, padding, **options) -> torch.Tensor:
    return theirs.sdpa_mask(BATCH, *place, function, padding, allow_is_causal_skip=False, **options)


def lowered(mask: SymbolicMask) -> np.ndarray:
    batch, heads, q_len, k_len = mask.shape
    return picture(lower(mask.mask, Site(batch, heads, q_len, k_len, family="torch")))


@pytest.mark.parametrize("padding", paddings())
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_translation_equals_evaluation(name, place, padding):
    function, real = FUNCTIONS[name], paddings()[padding]
    mask = asked(function, place, real)
    assert type(mask) is SymbolicMask
    assert mask.shape == (BATCH, 1, place[0], place[1])
    assert torch.equal(mask.dense(), expected(function, place, real))
    assert np.array_equal(lowered(mask), mask.dense().numpy())


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(name):
    mask = asked(PACKED[name], PLACES[0], None)
    assert type(mask) is SymbolicMask
    assert torch.equal(mask.dense(), expected(PACKED[name], PLACES[0], None))


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, q, k: (q + k) % 3 == 0,
        theirs.and_masks(theirs.causal_mask_function, lambda b, h, q, k: k != 4),
        # Chunks counted from the start of each packed sequence: no distance, so transformers evaluates it itself.
        theirs.packed_sequence_compatibility_function(
            theirs.chunked_causal_mask_function(4, torch.zeros(BATCH, dtype=torch.int64)), POSITIONS, SEQUENCES
        ),
    ],
    ids=["a stranger", "a stranger within", "chunks within sequences"],
)
def test_what_is_not_understood_is_evaluated(function):
    with pytest.raises(NotUnderstood):
        translate(function, Place(BATCH, LENGTH, LENGTH))
    real = paddings()["left"]
    mask = asked(function, PLACES[0], real)
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, expected(function, PLACES[0], real))


def test_a_name_that_came_to_mean_something_else_is_evaluated(monkeypatch):
    monkeypatch.setitem(translation._RULES, "causal_mask_function", lambda place: causal(offset=place.offset - 1))
    masks._trusted.cache_clear()
    try:
        mask = asked(FUNCTIONS["causal"], PLACES[2], None)
    finally:
        masks._trusted.cache_clear()
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, expected(FUNCTIONS["causal"], PLACES[2], None))


def test_a_function_of_scalars_is_evaluated_with_vmap():
    def nearer_than_three(b, h, q, k):
        return torch.abs(q - k).reshape(()) < 3

    mask = asked(nearer_than_three, PLACES[2], None, use_vmap=True)
    assert torch.equal(mask, expected(nearer_than_three, PLACES[2], None, use_vmap=True))


def test_an_offset_in_a_tensor():
    mask = asked(theirs.causal_mask_function, (2, 9, torch.tensor(4), 0), None)
    assert torch.equal(mask.dense(), expected(theirs.causal_mask_function, (2, 9, 4, 0), None))


def test_a_million_tokens_cost_nothing():
    real = torch.ones(1, 1_000_000, dtype=torch.bool)
    real[:, :3] = False
    mask = attention_mask(1, 1_000_000, 1_000_000, attention_mask=real)
    assert mask.shape == (1, 1, 1_000_000, 1_000_000)
    assert mask.dtype == torch.bool


class TestForModelsThatAddMasks:
    """A model that knows nothing of torch's attention gets what it would add to its scores."""

    config = pytest.importorskip("transformers").GitConfig()

    @pytest.mark.parametrize("name", ["causal", "of a user"])
    def test_floats(self, name):
        function = FUNCTIONS.get(name, lambda b, h, i, j: (i + j) % 3 != 1)
        place, real = PLACES[2], paddings()["left"]
        found = attention_mask(BATCH, *place, function, real, dtype=torch.bfloat16, config=self.config)
        stock = theirs.eager_mask(BATCH, *place, function, real, dtype=torch.bfloat16)
        assert isinstance(found, SymbolicMask) == (name in FUNCTIONS)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found + 0, stock)
        assert found.detach().dtype == found.to("meta").dtype == torch.bfloat16

    def test_attention_takes_the_mask_itself(self):
        from tilewise.torch.integrations.transformers import attention_forward

        x = torch.randn(BATCH, 2, 24, 8)
        masks_ = [attention_mask(BATCH, *PLACES[0], config=config) for config in (self.config, None)]
        found = [attention_forward(torch.nn.Module(), x, x, x, mask)[0] for mask in masks_]
        assert [mask.dtype for mask in masks_] == [torch.float32, torch.bool]
        assert torch.equal(*found)


class TestSymbolicMask:
    """It is a tensor to whoever looks, and becomes elements for whoever computes."""

    mask = asked(FUNCTIONS["causal"], PLACES[0], paddings()["left"])
    elements = expected(FUNCTIONS["causal"], PLACES[0], paddings()["left"])

    def test_looks_like_a_tensor(self):
        assert isinstance(self.mask, torch.Tensor)
        assert (self.mask.ndim, self.mask.dtype, self.mask.device.type) == (4, torch.bool, "cpu")
        assert len(self.mask.shape) == 4

    def test_stays_symbolic_where_nothing_is_computed(self):
        for same in (self.mask.detach(), self.mask.to("cpu"), self.mask.to(dtype=torch.bool), self.mask.to("meta")):
            assert type(same) is SymbolicMask
            assert same.mask is self.mask.mask
        assert self.mask.to("meta").device.type == "meta"

    def test_computing_gives_plain_tensors(self):
        for ours, plain in (
            (self.mask[:, :, :, :7], self.elements[:, :, :, :7]),
            (self.mask.to(torch.float32), self.elements.to(torch.float32)),
            (~self.mask, ~self.elements),
            (self.mask & (torch.arange(24) > 3), self.elements & (torch.arange(24) > 3)),
            (torch.where(self.mask, 0.0, -1.0), torch.where(self.elements, 0.0, -1.0)),
            (torch.cat([self.mask, self.mask], -1), torch.cat([self.elements] * 2, -1)),
            (self.mask.clone(), self.elements),
        ):
            assert type(ours) is torch.Tensor
            assert torch.equal(ours, plain)

    def test_prints_as_the_mask(self):
        assert "causal" in repr(self.mask)

    def test_everything_visible(self):
        mask = asked(FUNCTIONS["bidirectional"], PLACES[0], None)
        assert mask.mask is None
        assert mask.dense().all()

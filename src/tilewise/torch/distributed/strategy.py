"""Which strategy a call takes, and refusals of those it cannot."""

from __future__ import annotations

from ...distributed.layout import Layout
from ...masks.lower import LoweredMask


def resolve(
    strategy: str, ranks: int, heads: tuple[int, int], q: Layout, k: Layout, mask: LoweredMask, own_rows: bool
) -> tuple[str, int]:
    """The strategy, no longer "auto", and how many ranks exchange heads in it.

    Args:
        heads: Hq and Hkv; own_rows: whether a mask or a bias holds the rows of its rank alone.

    Raises:
        ValueError: beginning with "strategy:", it cannot run this call.
    """
    if strategy == "auto":
        return "ring", 1
    if strategy in ("ring", "all_gather") or ranks == 1:
        return strategy, 1
    if own_rows:
        raise ValueError(
            f"strategy: {strategy!r} has the rows of other ranks too, but a mask or bias holds this rank's alone; "
            f"expected them whole, or strategy 'ring' or 'all_gather'"
        )
    if strategy == "ulysses":
        if heads[0] % ranks:
            raise ValueError(
                f"strategy: 'ulysses' got {heads[0]} query heads, expected a multiple of the {ranks} ranks"
            )
        return strategy, ranks
    inner = grid_inner(ranks, heads[0])
    if inner == 1:
        raise ValueError(
            f"strategy: 'grid' got {heads[0]} query heads and {ranks} ranks, expected a common divisor that is less "
            f"than the ranks; 'ring' needs none"
        )
    return strategy, inner


def grid_inner(ranks: int, heads: int) -> int:
    """The largest number of ranks, but not all, that can share the heads and divide the ranks."""
    return max((n for n in range(1, ranks) if not ranks % n and not heads % n), default=1)

"""Pictures of masks, tile by tile: what a kernel skips, what it looks at pair by pair, what it runs unmasked.

A mask over a million queries and keys is drawn as quickly as a small one: there are only so many tiles in a picture,
ranges classify them in O(Sq), and where pairs must be looked at in a large mask, a few of each tile are.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from .algebra import Mask, as_mask
from .lower import LoweredMask, lower
from .site import Site
from .tiles import EMPTY, FULL, MIXED, classify

_SIGNS = {EMPTY: "·", MIXED: "▒", FULL: "█"}
_NAMES = {EMPTY: "empty", MIXED: "mixed", FULL: "full"}
_COLOURS = {EMPTY: "#f3f1ec", MIXED: "#e2a13c", FULL: "#2f5d8a"}

# Pairs beyond which not all are looked at where looking is the only way, and rows and keys then looked at in each tile.
_MOST_PAIRS = 1 << 24
_SAMPLES = 8

_PNG_TILES = 128


@dataclass(frozen=True, slots=True, eq=False)
class _Picture:
    """states: (nq, nk) of EMPTY, MIXED, FULL for tiles of q_tile x k_tile; sampled: whether not all pairs were seen."""

    text: str
    q_len: int
    k_len: int
    q_tile: int
    k_tile: int
    states: np.ndarray
    sampled: bool

    def share(self, state: int) -> str:
        return f"{(self.states == state).mean():.1%}" if self.states.size else "0.0%"

    def tile(self) -> str:
        one = "one pair each" if self.q_tile == self.k_tile == 1 else f"{self.q_tile} queries x {self.k_tile} keys"
        return one + (f", judged by {_SAMPLES} x {_SAMPLES} of their pairs" if self.sampled else "")


def draw(mask: Mask | Any, q_len: int, k_len: int, *, batch: int = 0, head: int = 0, width: int = 64) -> str:
    """The mask as text, a sign per tile: '·' no pair is visible, '▒' some are, '█' all are.

    Args:
        mask: a mask, or booleans that broadcast to (B, Hq, Sq, Sk).
        q_len, k_len: Sq and Sk, any size: at most `width` tiles across and half as many down are drawn.
        batch, head: the batch row and the head to draw, where the mask tells them apart.
        width: most signs in a line.

    Returns:
        Lines with the keys' positions above, the queries' positions to the left, and a legend with the share of each
        kind of tile below.

    Raises:
        ValueError, TypeError: a size, batch row or head out of range, or a mask that does not fit the sizes.
    """
    _check_int("width", width, 1)
    # A sign is about twice as tall as it is wide, so half as many lines as columns keep the diagonal at 45 degrees.
    picture = _picture(mask, q_len, k_len, batch, head, columns=width, lines=max(1, width // 2))
    margin = len(str(max(q_len - 1, 0))) + 1
    lines = [f"{picture.text}, {q_len} queries (down) x {k_len} keys (across)"]
    if picture.states.size:
        lines.append(" " * margin + _key_ticks(picture))
    for row, states in enumerate(picture.states if picture.states.size else ()):
        lines.append(f"{row * picture.q_tile:>{margin - 1}} " + "".join(_SIGNS[int(state)] for state in states))
    legend = "   ".join(f"{sign} {_NAMES[state]} {picture.share(state)}" for state, sign in _SIGNS.items())
    lines.append(f"{legend}   of tiles of {picture.tile()}")
    return "\n".join(lines)


def save_png(
    mask: Mask | Any, q_len: int, k_len: int, path: str | PathLike[str], *, batch: int = 0, head: int = 0
) -> None:
    """The mask as a PNG file: the tiles in three colours, at most 128 x 128 of them, and a legend with their shares.

    Args:
        mask: a mask, or booleans that broadcast to (B, Hq, Sq, Sk).
        q_len, k_len: Sq and Sk, any size.
        path: the file to write.
        batch, head: the batch row and the head to draw, where the mask tells them apart.

    Raises:
        ImportError: matplotlib is not installed. ValueError, TypeError: as `draw`.
    """
    picture = _picture(mask, q_len, k_len, batch, head, columns=_PNG_TILES, lines=_PNG_TILES)
    try:
        from matplotlib.colors import ListedColormap  # pictures are rare; nothing else should wait for matplotlib
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            "path: save_png() draws with matplotlib; install it with: pip install 'tilewise[cli]'"
        ) from error
    ratio = float(np.clip(q_len / max(k_len, 1), 0.25, 1.5))
    figure = Figure(figsize=(6.4, 5.6 * ratio + 1.4), layout="constrained")
    axes = figure.add_subplot()
    extent = (
        -0.5,
        picture.states.shape[1] * picture.k_tile - 0.5,
        picture.states.shape[0] * picture.q_tile - 0.5,
        -0.5,
    )
    if picture.states.size:
        colours = ListedColormap([_COLOURS[state] for state in (EMPTY, MIXED, FULL)])
        axes.imshow(
            picture.states, cmap=colours, vmin=EMPTY, vmax=FULL, extent=extent, interpolation="nearest", aspect="auto"
        )
        axes.set_xlim(-0.5, k_len - 0.5)
        axes.set_ylim(q_len - 0.5, -0.5)
    axes.set_box_aspect(ratio)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_title(f"{picture.text}\n{q_len} queries x {k_len} keys, tiles: {picture.tile()}", fontsize=9, wrap=True)
    patches = [
        Patch(facecolor=colour, edgecolor="#888888", linewidth=0.5, label=f"{_NAMES[state]} {picture.share(state)}")
        for state, colour in _COLOURS.items()
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="png", dpi=150)


def _picture(mask: Any, q_len: int, k_len: int, batch: int, head: int, columns: int, lines: int) -> _Picture:
    mask = as_mask(mask)
    for argument, value in (("q_len", q_len), ("k_len", k_len), ("batch", batch), ("head", head)):
        _check_int(argument, value, 0)
    batches, heads = mask.extent()
    for argument, value, size in (("batch", batch, batches), ("head", head, heads)):
        if size != 1 and value >= size:
            raise ValueError(
                f"{argument}: got {value}, expected less than {size}, the number that the mask tells apart"
            )
    site = Site(max(batches, batch + 1), max(heads, head + 1), q_len, k_len)
    lowered = lower(mask, site)
    q_tile, k_tile = max(1, -(-q_len // lines)), max(1, -(-k_len // columns))
    ranges_only = lowered.q_labels is None and lowered.dense is None and lowered.lazy is None
    sampled = not ranges_only and q_len * k_len > _MOST_PAIRS
    if sampled:
        states = _sampled(mask, site, batch, head, q_tile, k_tile)
    else:
        states = _exact(lowered, batch, head, q_tile, k_tile)
    return _Picture(str(mask), q_len, k_len, q_tile, k_tile, states, sampled)


def _exact(lowered: LoweredMask, batch: int, head: int, q_tile: int, k_tile: int) -> np.ndarray:
    return classify(lowered, q_tile, k_tile, slice(batch, batch + 1), slice(head, head + 1))[0, 0]


def _sampled(mask: Mask, site: Site, batch: int, head: int, q_tile: int, k_tile: int) -> np.ndarray:
    """States judged by a grid of pairs in each tile, its corners included: (nq, nk)."""
    i, j = _sample(site.q_len, q_tile), _sample(site.k_len, k_tile)  # (nq, samples), (nk, samples)
    b, h = (np.full((1, 1, 1, 1), place) for place in (batch, head))
    seen = mask.visible(site, b, h, i.reshape(1, 1, -1, 1), j.reshape(1, 1, 1, -1))
    seen = np.broadcast_to(seen, (1, 1, i.size, j.size)).reshape(*i.shape, *j.shape)
    return np.where(seen.all((1, 3)), FULL, np.where(seen.any((1, 3)), MIXED, EMPTY)).astype(np.int8)


def _sample(length: int, tile: int) -> np.ndarray:
    """Positions spread over each tile, from its first to its last: (tiles, samples)."""
    first = np.arange(0, length, tile)
    last = np.minimum(first + tile, length) - 1
    return first[:, None] + ((last - first)[:, None] * np.arange(_SAMPLES)) // (_SAMPLES - 1)


def _key_ticks(picture: _Picture) -> str:
    """Positions of some keys, each written from the column of its tile on."""
    line, columns = "", picture.states.shape[1]
    for column in range(0, columns, 16):
        label = str(column * picture.k_tile)
        if column + len(label) <= max(columns, len(label)):
            line = f"{line:<{column}}{label}"
    return line


def _check_int(argument: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{argument}: got {type(value).__name__}, expected an int")
    if value < least:
        raise ValueError(f"{argument}: got {value}, expected at least {least}")

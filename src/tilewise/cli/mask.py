"""`tilewise mask`: draw a mask, tile by tile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..masks.draw import draw, save_png
from .expression import parse
from .output import lines, reported


def mask(
    expression: Annotated[
        str, typer.Argument(help="The mask, such as 'causal & window(256)'; names, literals, &, | and ~.")
    ],
    seq: Annotated[int, typer.Option(help="Queries and keys.")] = 2048,
    q_len: Annotated[int | None, typer.Option(help="Queries, where they are not as many as the keys.")] = None,
    k_len: Annotated[int | None, typer.Option(help="Keys, where they are not as many as the queries.")] = None,
    batch: Annotated[int, typer.Option(help="Batch row, for masks that differ between them.")] = 0,
    head: Annotated[int, typer.Option(help="Head, for masks that differ between them.")] = 0,
    png: Annotated[Path | None, typer.Option(help="Write a picture to this file as well.")] = None,
) -> None:
    """Draw a mask, tile by tile.

    The picture shows which tiles a kernel skips, which it looks at pair by pair, and which it runs unmasked.
    """
    with reported():
        queries, keys = seq if q_len is None else q_len, seq if k_len is None else k_len
        value = parse(expression)
        lines(draw(value, queries, keys, batch=batch, head=head))
        if png is not None:
            save_png(value, queries, keys, png, batch=batch, head=head)
            lines(f"written to {png}")

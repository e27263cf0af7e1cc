"""The commands put together."""

from __future__ import annotations

from typing import Annotated

import typer

from ..version import __version__
from .bench import bench
from .doctor import doctor
from .explain import explain
from .mask import mask

app = typer.Typer(
    help="Exact attention for NumPy, PyTorch and JAX.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # help in plain lines, the same everywhere
    pretty_exceptions_enable=False,
)
app.command()(doctor)
app.command()(explain)
app.command()(mask)
app.command()(bench)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tilewise {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Exact attention for NumPy, PyTorch and JAX."""

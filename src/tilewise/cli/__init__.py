"""The command line, a file per command: `tilewise doctor`, `tilewise explain`, `tilewise mask`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; the entry point of the `tilewise` script and of `python -m tilewise`."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.exit(f"tilewise: the command line needs {package}, which is not installed: pip install 'tilewise[cli]'")
    app()

"""`tilewise explain`: plan a call that nobody makes, and print why it would run as it would."""

from __future__ import annotations

from typing import Annotated

import typer


def explain() -> None:
    pass

"""Tables on the terminal."""

import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 160  # where there is no terminal


def table(
    title: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Collection[int] = (),
    strong: Collection[int] = (),
) -> Table:
    """Cells of text; ``right`` columns are aligned to the right, ``strong`` rows are bold."""
    made = Table(title=title)
    for i, name in enumerate(head):
        made.add_column(Text(name), justify="right" if i in right else "left", overflow="fold")
    for i, row in enumerate(rows):
        made.add_row(*map(Text, row), style="bold" if i in strong else None)
    return made


def show(*parts: Any) -> None:
    """Print tables and lines."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(*parts, sep="\n", markup=False, highlight=False)

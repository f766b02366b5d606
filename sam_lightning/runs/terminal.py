"""Tables on the terminal, whose cells may hold any text."""

import sys
from typing import Any, TextIO

from rich import table
from rich.console import Console
from rich.text import Text

from sam_lightning.config.text import clean


class Table(table.Table):
    """A table of ``rich`` whose cells are shown as they are: no markup, nothing to command."""

    def add_row(self, *cells: object, **options: Any) -> None:
        """Add a row of texts, those of ``rich`` as they are; see ``rich.table.Table.add_row``."""
        texts = (c if isinstance(c, Text) else Text(clean(c, undecoded=True)) for c in cells)
        super().add_row(*texts, **options)


def show(*parts: Any, file: TextIO | None = None, width: int = 120) -> None:
    """Print tables and lines as wide as the terminal, or ``width`` where there is none."""
    console = Console(file=file, width=None if sys.stdout.isatty() else width)
    console.print(*parts, sep="\n", markup=False, highlight=False, emoji=False)

"""Tables of text: on the terminal, in Markdown and in LaTeX."""

import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

WIDTH = 160  # where there is no terminal
LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "\\": "\\textbackslash{}"},
    **{"<": "$<$", ">": "$>$", "±": "$\\pm$", "–": "--", "−": "$-$"},
}


@dataclass(frozen=True)
class Table:
    """Cells of text; ``left`` columns are words, the others numbers; ``strong`` cells are bold.

    Columns count from 0; a cell is (row, column).
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Collection[int]
    strong: Collection[tuple[int, int]] = ()

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        rule = ["---" if i in self.left else "---:" for i in range(len(self.head))]
        rows = self._rows(lambda cell: re.sub(r"([|*_`<\\])", r"\\\1", cell), "**{}**")
        return "\n".join(f"| {' | '.join(row)} |" for row in [self.head, rule, *rows])

    def latex(self, caption: str, label: str) -> str:
        """The table as an environment of LaTeX, no wider than a line.

        It needs the packages booktabs and graphicx.
        """
        cells = [map(latex, self.head), *self._rows(latex, "\\textbf{{{}}}")]
        alignment = "".join("l" if i in self.left else "r" for i in range(len(self.head)))
        head, *rows = (f"    {' & '.join(row)} \\\\" for row in cells)
        width = "\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi"
        return "\n".join(
            [
                f"\\begin{{table}}\n  \\centering\n  \\caption{{{latex(caption)}}}",
                f"  \\label{{{label}}}\n  \\medskip",
                f"  \\resizebox{{{width}}}{{!}}{{\\begin{{tabular}}{{{alignment}}}",
                *("    \\toprule", head, "    \\midrule", *rows, "    \\bottomrule"),
                "  \\end{tabular}}\n\\end{table}",
            ]
        )

    def terminal(self, caption: str | None = None) -> RichTable:
        """The table as ``rich`` prints it."""
        made = RichTable(title=caption)
        for i, name in enumerate(self.head):
            justify: Any = "left" if i in self.left else "right"
            made.add_column(Text(name), justify=justify, overflow="fold")
        for i, row in enumerate(self.rows):
            made.add_row(
                *(Text(c, "bold" if (i, j) in self.strong else "") for j, c in enumerate(row))
            )
        return made

    def _rows(self, escape: Callable[[str], str], bold: str) -> list[list[str]]:
        return [
            [
                (bold if (i, j) in self.strong else "{}").format(escape(cell))
                for j, cell in enumerate(row)
            ]
            for i, row in enumerate(self.rows)
        ]


def latex(text: str) -> str:
    """Text as LaTeX sets it, not as it reads it; the hyphen of a negative number is a minus."""
    text = re.sub(r"(?<![\w.])-(?=\d)", "−", text)
    return "".join(LATEX.get(c, c) for c in text)


def title(column: str, columns: Iterable[str]) -> str:
    """A column's name without its parents, unless another one ends the same way."""
    name = column.rpartition(".")[2]
    return name if [c.rpartition(".")[2] for c in columns].count(name) == 1 else column


def show(*parts: Any, width: int = WIDTH) -> None:
    """Print tables and lines, as wide as the terminal, or of ``width`` where there is none."""
    console = Console(width=None if sys.stdout.isatty() else width)
    console.print(*parts, sep="\n", markup=False, highlight=False)

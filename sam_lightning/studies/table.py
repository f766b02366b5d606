"""Tables of text: on the terminal, in Markdown and in LaTeX."""

import re
import sys
from collections.abc import Callable, Collection, Sequence
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
    """Cells of text; ``left`` columns are words, the others numbers, ``strong`` rows are bold."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int
    strong: Collection[int] = ()

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        rule = ["---" if i < self.left else "---:" for i in range(len(self.head))]
        rows = self._rows(lambda cell: re.sub(r"([|*_`<\\])", r"\\\1", cell), "**{}**")
        return "\n".join(f"| {' | '.join(row)} |" for row in [self.head, rule, *rows])

    def latex(self, caption: str, label: str) -> str:
        """The table as an environment of LaTeX with the package booktabs."""
        cells = [map(latex, self.head), *self._rows(latex, "\\textbf{{{}}}")]
        head, *rows = (f"    {' & '.join(row)} \\\\" for row in cells)
        return "\n".join(
            [
                f"\\begin{{table}}\n  \\centering\n  \\caption{{{latex(caption)}}}",
                f"  \\label{{{label}}}",
                f"  \\begin{{tabular}}{{{'l' * self.left}{'r' * (len(self.head) - self.left)}}}",
                *("    \\toprule", head, "    \\midrule", *rows, "    \\bottomrule"),
                "  \\end{tabular}\n\\end{table}",
            ]
        )

    def terminal(self, title: str) -> RichTable:
        """The table as ``rich`` prints it."""
        made = RichTable(title=title)
        for i, name in enumerate(self.head):
            justify: Any = "left" if i < self.left else "right"
            made.add_column(Text(name), justify=justify, overflow="fold")
        for i, row in enumerate(self.rows):
            made.add_row(*map(Text, row), style="bold" if i in self.strong else None)
        return made

    def _rows(self, escape: Callable[[str], str], bold: str) -> list[list[str]]:
        return [
            [(bold if i in self.strong else "{}").format(escape(cell)) for cell in row]
            for i, row in enumerate(self.rows)
        ]


def latex(text: str) -> str:
    """Text as LaTeX sets it, not as it reads it; the hyphen of a negative number is a minus."""
    text = re.sub(r"(?<![\w.])-(?=\d)", "−", text)
    return "".join(LATEX.get(c, c) for c in text)


def show(*parts: Any) -> None:
    """Print tables and lines."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(*parts, sep="\n", markup=False, highlight=False)

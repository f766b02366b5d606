"""Tables of text: on the terminal, in Markdown and in LaTeX."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sam_lightning.config.text import Form, clean
from sam_lightning.runs import terminal

WIDTH = 160  # where there is no terminal


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
        head, *rows = self._rows("markdown", "**{}**")
        return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])

    def latex(self, caption: str, label: str) -> str:
        """The table as an environment of LaTeX with the package booktabs."""
        cells = self._rows("latex", "\\textbf{{{}}}")
        head, *rows = (f"    {' & '.join(row)} \\\\" for row in cells)
        return "\n".join(
            [
                f"\\begin{{table}}\n  \\centering\n  \\caption{{{clean(caption, 'latex')}}}",
                f"  \\label{{{label}}}",
                f"  \\begin{{tabular}}{{{'l' * self.left}{'r' * (len(self.head) - self.left)}}}",
                *("    \\toprule", head, "    \\midrule", *rows, "    \\bottomrule"),
                "  \\end{tabular}\n\\end{table}",
            ]
        )

    def terminal(self, title: str) -> terminal.Table:
        """The table as ``rich`` prints it."""
        made = terminal.Table(title=clean(title))
        for i, name in enumerate(self.head):
            justify: Any = "left" if i < self.left else "right"
            made.add_column(clean(name), justify=justify, overflow="fold")
        for i, row in enumerate(self.rows):
            made.add_row(*row, style="bold" if i in self.strong else None)
        return made

    def _rows(self, form: Form, bold: str) -> list[list[str]]:
        """The head and the rows as ``form`` takes them."""
        return [
            [(bold if i in self.strong else "{}").format(clean(cell, form)) for cell in row]
            for i, row in enumerate([self.head, *self.rows], -1)
        ]


def show(*parts: Any) -> None:
    """Print tables and lines."""
    terminal.show(*parts, width=WIDTH)

"""Tables of text: on the terminal, in Markdown and in LaTeX."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from sam_lightning.config.text import Form, clean
from sam_lightning.runs import terminal

WIDTH = 160  # where there is no terminal


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
        head, *rows = self._rows("markdown", "**{}**")
        return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])

    def latex(self, caption: str, label: str) -> str:
        """The table as an environment of LaTeX, no wider than a line.

        It needs the packages booktabs and graphicx.
        """
        cells = self._rows("latex", "\\textbf{{{}}}")
        alignment = "".join("l" if i in self.left else "r" for i in range(len(self.head)))
        head, *rows = (f"    {' & '.join(row)} \\\\" for row in cells)
        width = "\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi"
        return "\n".join(
            [
                f"\\begin{{table}}\n  \\centering\n  \\caption{{{clean(caption, 'latex')}}}",
                f"  \\label{{{label}}}\n  \\medskip",
                f"  \\resizebox{{{width}}}{{!}}{{\\begin{{tabular}}{{{alignment}}}",
                *("    \\toprule", head, "    \\midrule", *rows, "    \\bottomrule"),
                "  \\end{tabular}}\n\\end{table}",
            ]
        )

    def terminal(self, caption: str | None = None) -> terminal.Table:
        """The table as ``rich`` prints it."""
        made = terminal.Table(title=None if caption is None else clean(caption))
        for i, name in enumerate(self.head):
            justify: Any = "left" if i in self.left else "right"
            made.add_column(clean(name), justify=justify, overflow="fold")
        for i, row in enumerate(self.rows):
            styles = ("bold" if (i, j) in self.strong else "" for j in range(len(row)))
            made.add_row(*(Text(clean(c), s) for c, s in zip(row, styles, strict=True)))
        return made

    def _rows(self, form: Form, bold: str) -> list[list[str]]:
        """The head and the rows as ``form`` takes them."""
        return [
            [
                (bold if (i, j) in self.strong else "{}").format(clean(cell, form))
                for j, cell in enumerate(row)
            ]
            for i, row in enumerate([self.head, *self.rows], -1)
        ]


def title(column: str, columns: Iterable[str]) -> str:
    """A column's name without its parents, unless another one ends the same way.

    Arguments of augmentations keep the entry's name: ``crop.padding``, ``flip.p``.
    """

    def short(name: str) -> str:
        own = name.removeprefix("augment.")
        return own if own != name else name.rpartition(".")[2]

    return name if [*map(short, columns)].count(name := short(column)) == 1 else column


def typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)

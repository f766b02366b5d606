"""Texts from files, made harmless for what they are written into.

A class, a folder or a stored setting may have any name, and the file may be a stranger's.
"""

import re
from typing import Literal

Form = Literal["terminal", "markdown", "latex", "csv"]

_JOINERS = "\u200c\u200d"  # invisible, but Persian, Hindi and emoji are spelled with them
_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "\\": "\\textbackslash{}"},
    **{"<": "$<$", ">": "$>$", "±": "$\\pm$", "–": "--", "−": "$-$"},
    **{c: f"{{{c}}}" for c in "[]*"},  # behind the end of a row they would be its options
}
# Inside a line; "_" but within a word; entities; links that GitHub makes by itself.
_MARKDOWN = re.compile(
    r"[\\`*\[\]<>|~$@]|(?<![^\W_])_|_(?![^\W_])|&(?=#|\w+;)|:(?=//)|(?<=\bwww)\.", re.IGNORECASE
)
_BLOCK = re.compile(r"[-+#=](?!\d)|(?<=\d)[.)](?= |$)")  # at the start of a line


def clean(text: object, form: Form = "terminal", *, undecoded: bool = False) -> str:
    """One line of text that a terminal, a document or a spreadsheet shows and does not obey.

    A space replaces each character that cannot be seen: line ends, controls such as ESC, marks
    that turn the direction of writing, halves of surrogate pairs. Then ``form`` decides:

    - ``terminal``: nothing more; rich has to be told ``markup=False``, or given a ``Text``.
    - ``markdown``: what would be a link, an image, HTML or a heading is escaped.
    - ``latex``: what TeX would read as a command is escaped; a minus is set as one.
    - ``csv``: a text that a spreadsheet would compute, such as ``=1+1``, begins with ``'``.
      A number stays one. Quotes and commas are left to the writer of the file.

    Args:
        text: what ``str`` makes a text of.
        form: what the text is written into.
        undecoded: keep bytes of a file's name that are not UTF-8, as ``os.fsdecode`` has them.
    """
    shown = "".join(c if _visible(c, undecoded) else " " for c in str(text))
    if form == "markdown":
        shown = _MARKDOWN.sub(r"\\\g<0>", shown.strip()).replace(r"\<", "&lt;")  # for any reader
        start = re.match(r"\d*", shown)
        if start and not _is_number(shown) and (found := _BLOCK.match(shown, start.end())):
            shown = f"{shown[: found.start()]}\\{shown[found.start() :]}"
    elif form == "latex":
        shown = re.sub(r"(?<![\w.])-(?=\d)", "−", shown)
        shown = "".join(_LATEX.get(c, c) for c in shown)
    elif form == "csv" and shown.lstrip()[:1] in tuple("=+-@＝＋－＠") and not _is_number(shown):
        shown = f"'{shown}"
    return shown


def _visible(c: str, undecoded: bool) -> bool:
    return c.isprintable() or c in _JOINERS or (undecoded and "\udc80" <= c <= "\udcff")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

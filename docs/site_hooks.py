"""What the site needs beside docs/: the README as its first page, pictures, reports.

The pages are written to be read in the repository too, so their links are relative to it. Here the
links get the places that the files have on the site.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("images/*.png", "results/*/*.png", "results/*/report.md")
TOP = ("CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as index.md, and the files that pages show or link to."""
    readme = (ROOT / "README.md").read_text()
    files.append(File.generated(config, "index.md", content=readme))
    for file in [*(ROOT / name for name in TOP), *(f for p in OUTSIDE for f in ROOT.glob(p))]:
        name = file.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that lead out of docs/, or from the README into it."""
    return re.sub(r"\]\((?:\.\./|docs/)", "](", markdown)

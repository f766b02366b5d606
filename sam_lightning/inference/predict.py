"""``python -m sam_lightning predict``: what a checkpoint sees in image files."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.table import Column

from sam_lightning.config.arguments import Keys, parse
from sam_lightning.config.errors import ConfigError, one_line
from sam_lightning.config.process import importing
from sam_lightning.config.progress import progress
from sam_lightning.config.text import clean
from sam_lightning.config.values import Count, Rule
from sam_lightning.inference import command
from sam_lightning.runs.files import checkpoint_file, replacing
from sam_lightning.runs.terminal import Table, show

if TYPE_CHECKING:
    from sam_lightning.inference.load import TrainedClassifier

ABOUT = """
Classify image files with a checkpoint.

python -m sam_lightning predict ckpt_path=RUN input=photo.jpg
python -m sam_lightning predict ckpt_path=RUN input=photos format=csv out=predictions.csv
python -m sam_lightning predict ckpt_path=RUN 'input=photos/**/*.png' top_k=1

Images are read as for training: upright, transparency on white, 16 bits scaled to 8; grey or RGB as
in the run. They are resized until they cover the size that the run was trained on, and
their centre is cropped; results are best for images like those.
A file that is no image is named, gets a row with the error, and makes the exit code 1.
"""

Format = Literal["table", "json", "csv"]
File = Annotated[str, Rule("a file, as in ./a.csv", bool)]
KEYS: Keys = {
    **command.CKPT_PATH,
    "input": ("???", Any, "an image, a folder with those below it, or a pattern such as ./*.png"),
    "top_k": (5, Count, "the most likely classes to name"),
    "format": ("table", Format, "table, json, or csv with a row for each file and class"),
    "out": (None, File | None, "the file to write to; null: the terminal"),
    "batch_size": (128, Count, "images at a time"),
    **command.DEVICE,
}


def predict(
    trained: TrainedClassifier, files: list[Path], top_k: int = 5, batch_size: int = 128
) -> Iterator[dict[str, Any]]:
    """Classify image files, of any size and format that Pillow reads, on the model's device.

    Yields:
        for each file, in their order, ``file`` and either ``predictions``, a list of ``class`` and
        ``probability`` of the ``top_k`` classes, most likely first, or ``error``, one line.
    """
    import torch

    from sam_lightning.data.pixels import open_image

    step = batch_size if trained.image_size else 1  # of one size, or one at a time
    for start in range(0, len(files), step):
        rows: list[dict[str, Any]] = [{"file": str(file)} for file in files[start : start + step]]
        images = []
        for row in rows:
            try:
                images.append(trained.preprocess(open_image(row["file"])))
            except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more
                row["error"] = one_line(error)
        if images:
            with torch.inference_mode():
                probabilities = trained(torch.cat(images)).softmax(1)
            likely = probabilities.topk(min(top_k, len(trained.classes)))
            found = zip(likely.values.tolist(), likely.indices.tolist(), strict=True)
            for row in rows:
                if "error" not in row:
                    row["predictions"] = [
                        {"class": trained.classes[i], "probability": p}
                        for p, i in zip(*next(found), strict=True)
                    ]
        yield from rows


def find(given: str) -> list[Path]:
    """The files that ``input`` names: a file, images in a folder, or all that match a pattern.

    Prints what is left out of a folder.

    Raises:
        ConfigError: there is none.
    """
    path = Path(os.path.expanduser(given))
    if path.is_dir():
        from sam_lightning.data.listing import images_below, told

        files, left_out = images_below(path)
        if files and left_out:
            print(f"input={clean(given)}{told(left_out)}", file=sys.stderr)
    else:
        found = [path] if path.is_file() else [*map(Path, glob.glob(str(path), recursive=True))]
        files = sorted(p for p in found if p.is_file())
    if not files:
        raise ConfigError(f"input={given}: is no file, no pattern of one, no folder of images")
    return files


def main(argv: list[str]) -> None:
    """Classify as the arguments say; exit with 1 if there was a file that is no image."""
    options = parse(KEYS, argv)
    checkpoint = checkpoint_file(str(options.ckpt_path))
    files = find(str(options.input))
    out = None if options.out is None else Path(os.path.expanduser(options.out))
    if out is not None and out.is_dir():
        raise ConfigError(f"out={out}: is a folder; name a file")

    with importing():
        from sam_lightning.inference.load import load

    trained = load(checkpoint, device=options.device)
    if trained.in_channels not in (1, 3):
        raise ConfigError(
            f"ckpt_path={checkpoint}: takes {trained.in_channels} channels, which no image has"
        )
    rows = []
    with progress("images", len(files)) as advance:
        for row in predict(trained, files, options.top_k, options.batch_size):
            rows.append(row)
            advance()
            if "error" in row:
                print(f"error: {clean(row['file'])}: {row['error']}", file=sys.stderr)
    text = _as_text(rows, options.format)
    # Names of files may be any bytes, which Python keeps as surrogates: they come out as they were.
    if out is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")
        sys.stdout.write(text)
    else:
        with replacing(out) as path:
            path.write_text(text, encoding="utf-8", errors="surrogateescape")
    if any("error" in row for row in rows):
        sys.exit(1)


def _as_text(rows: list[dict[str, Any]], form: str) -> str:
    if form == "json":
        return json.dumps(rows, indent=2) + "\n"
    written = io.StringIO()
    if form == "csv":
        columns = ["file", "rank", "class", "probability", "error"]
        writer = csv.DictWriter(written, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            file = clean(row["file"], "csv", undecoded=True)
            for rank, found in enumerate(row.get("predictions", []), 1):
                name = clean(found["class"], "csv")
                writer.writerow({**found, "file": file, "rank": rank, "class": name})
            if "error" in row:
                writer.writerow({"file": file, "error": clean(row["error"], "csv")})
        return written.getvalue()
    named = max(len(row.get("predictions", ["error"])) for row in rows)
    table = Table(Column("file", overflow="fold"), *(f"{i + 1}" for i in range(named)))
    for row in rows:
        cells = [f"{p['class']} {p['probability']:.1%}" for p in row.get("predictions", [])]
        table.add_row(row["file"], *(cells or [row["error"]]))
    show(table, file=written)
    return written.getvalue()

"""``python -m sam_lightning predict``: what a checkpoint sees in image files."""

from __future__ import annotations

import csv
import glob
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from sam_lightning.config.arguments import parse
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.schema import Rule, one_line
from sam_lightning.runs.files import checkpoint_file, replacing

if TYPE_CHECKING:
    from torch import Tensor

    from sam_lightning.inference.load import TrainedClassifier

ABOUT = """
Classify image files with a checkpoint.

python -m sam_lightning predict ckpt_path=RUN input=photo.jpg
python -m sam_lightning predict ckpt_path=RUN input=photos format=csv out=predictions.csv
python -m sam_lightning predict ckpt_path=RUN 'input=photos/**/*.png' top_k=1

Images become grey or RGB as those of the run were. They are resized until they cover the size
that the run was trained on, and their centre is cropped; results are best for images like those.
A file that is no image is named, gets a row with the error, and makes the exit code 1.

  ckpt_path      a checkpoint, or a run's folder for its checkpoints/last.ckpt
  input          an image, a folder (with those below it), or a pattern such as ./*.png
  top_k          the most likely classes to name
  format         table, json, or csv (a row for each file and class)
  out            the file to write to; null: the terminal
  batch_size     images at a time
  device         auto, cpu or cuda
"""

DEFAULTS = {
    "ckpt_path": "???",
    "input": "???",
    "top_k": 5,
    "format": "table",
    "out": None,
    "batch_size": 128,
    "device": "auto",
}

# Those of torchvision's image folders, which are what image_folder trains on.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

RULES: list[Rule] = [
    ("top_k", "a whole number >= 1"),
    ("format", "table, json, csv"),
    ("batch_size", "a whole number >= 1"),
    ("device", "auto, cpu, cuda"),
    ("out", "a file, as in ./a.csv, or null"),
]


def predict(
    trained: TrainedClassifier, files: list[Path], top_k: int = 5, batch_size: int = 128
) -> Iterator[dict[str, Any]]:
    """Classify image files.

    Args:
        trained: on the device to compute on.
        files: of any size and format that Pillow reads.
        top_k: how many classes to name; all, if there are fewer.
        batch_size: images at a time.

    Yields:
        for each file, in their order, ``file`` and either ``predictions``, a list of ``class`` and
        ``probability`` from the most likely class on, or ``error``, a line on why it has none.
    """
    step = batch_size if trained.image_size else 1  # of one size, or one at a time
    for start in range(0, len(files), step):
        batch = files[start : start + step]
        images = [_read(trained, file) for file in batch]
        found = iter(_classify(trained, [i for i in images if not isinstance(i, str)], top_k))
        for file, image in zip(batch, images, strict=True):
            if isinstance(image, str):
                yield {"file": str(file), "error": image}
            else:
                yield {"file": str(file), "predictions": next(found)}


def _classify(
    trained: TrainedClassifier, images: list[Tensor], top_k: int
) -> list[list[dict[str, Any]]]:
    """The most likely classes of each image, with their probabilities."""
    import torch

    if not images:
        return []
    with torch.inference_mode():
        probabilities = trained(torch.cat(images)).softmax(1)
    likely = probabilities.topk(min(top_k, len(trained.classes)))
    return [
        [{"class": trained.classes[i], "probability": p} for p, i in zip(*row, strict=True)]
        for row in zip(likely.values.tolist(), likely.indices.tolist(), strict=True)
    ]


def _read(trained: TrainedClassifier, file: Path) -> Tensor | str:
    """What the model takes, of one image, or why there is none."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return trained.preprocess(image)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more
        return one_line(error)


def find(given: str) -> list[Path]:
    """The files that ``input`` names: one, those of a folder, or those that match a pattern.

    Raises:
        ConfigError: there is none.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        inside = sorted(path.rglob("*"))
        files = [p for p in inside if p.suffix.lower() in SUFFIXES and p.is_file()]
    else:
        matching = [str(path)] if path.is_file() else glob.glob(str(path), recursive=True)
        files = sorted(p for p in map(Path, matching) if p.is_file())
    if not files:
        raise ConfigError(f"input={given}: is no file, no pattern of one, no folder of images")
    return files


def main(argv: list[str] | None = None) -> None:
    """Classify as the arguments say; exit with 1 if there was a file that is no image.

    Raises:
        ConfigError: an argument or the checkpoint is wrong.
    """
    options = parse(ABOUT, DEFAULTS, RULES, argv)
    checkpoint = checkpoint_file(str(options.ckpt_path))
    files = find(str(options.input))
    out = None if options.out is None else Path(options.out).expanduser()
    if out is not None and out.is_dir():
        raise ConfigError(f"out={out}: is a folder; name a file")

    from sam_lightning.inference.load import load, torch_device

    device = torch_device(options.device)
    trained = load(checkpoint).to(device)
    if trained.in_channels not in (1, 3):
        raise ConfigError(
            f"ckpt_path={checkpoint}: takes {trained.in_channels} channels, which no image has"
        )
    rows = []
    for row in predict(trained, files, options.top_k, options.batch_size):
        rows.append(row)
        if "error" in row:
            print(f"error: {row['file']}: {row['error']}", file=sys.stderr)
    text = FORMATS[options.format](rows)
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


def _as_table(rows: list[dict[str, Any]]) -> str:
    named = max(len(row.get("predictions", ["error"])) for row in rows)
    table = Table(Column("file", overflow="fold"), *(f"{i + 1}" for i in range(named)))
    for row in rows:
        cells = [f"{p['class']} {p['probability']:.1%}" for p in row.get("predictions", [])]
        table.add_row(*map(escape, [row["file"], *(cells or [row["error"]])]))
    written = io.StringIO()
    Console(file=written, width=None if sys.stdout.isatty() else 120).print(table)
    return written.getvalue()


def _as_json(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, indent=2) + "\n"


def _as_csv(rows: list[dict[str, Any]]) -> str:
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(["file", "rank", "class", "probability", "error"])
    for row in rows:
        for rank, found in enumerate(row.get("predictions", []), 1):
            writer.writerow([row["file"], rank, found["class"], found["probability"], ""])
        if "error" in row:
            writer.writerow([row["file"], "", "", "", row["error"]])
    return written.getvalue()


FORMATS = {"table": _as_table, "json": _as_json, "csv": _as_csv}

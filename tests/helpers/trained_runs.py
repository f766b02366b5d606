"""Two short runs that the tests of commands on checkpoints share, and checkpoints made of them."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from runs import run
from sam_lightning.data import digits

COLOURS = {"blue": (0, 0, 1), "red": (1, 0, 0), "yellow": (1, 1, 0)}
NOISY = ["data.subset=500", "data.val_size=200", "data.label_noise=0.2", "epochs=1"]


@cache
def digits_run(base: Path) -> Path:
    """A run in ``base`` on 500 digits, a fifth of their labels wrong; 200 more are held out."""
    folder = base / "digits"
    run(folder, *NOISY)
    return folder


@cache
def folder_run(base: Path) -> Path:
    """A run in ``base`` on coloured digits, files of 40 x 30 pixels in its folder ``photos``."""
    folder = base / "folder"
    images = iter(digits().train.images[:, 0])
    for split, count in (("train", 12), ("test", 5)):
        for name, colour in COLOURS.items():
            (folder / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                grey = next(images)
                pixels = torch.stack([grey * on for on in colour], dim=2)
                image = Image.fromarray(pixels.numpy()).resize((40, 30))
                image.save(folder / "photos" / split / name / f"{i}.png")
    options = ["data=image_folder", f"data.root={folder / 'photos'}", "data.image_size=24"]
    run(
        folder,
        *options,
        "data.subset=1.0",
        "batch_size=12",
        "epochs=8",
        f"data.cache_dir={folder / 'cache'}",
    )
    return folder


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def changed(path: Path, into: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a checkpoint whose content was changed."""
    checkpoint = copy.deepcopy(torch.load(path, weights_only=True))
    change(checkpoint)
    torch.save(checkpoint, into)
    return into


def targets(made: Path) -> list[dict[str, Any]]:
    """Descriptions of objects that would make a file if anything were called by its name."""
    return [
        {"_target_": "builtins.exec", "_args_": [_code(made)]},
        {"_target_": "os.mkdir", "path": str(made)},
        {"_target_": "sam_lightning.runs.record.os.mkdir", "path": str(made)},
    ]


def hostile(path: Path, folder: Path, made: Path) -> list[Path]:
    """Copies of a checkpoint that would make a file if they could run code."""

    class Run:
        def __reduce__(self) -> Any:
            return exec, (_code(made),)

    pickled = changed(path, folder / "pickled.ckpt", lambda c: c.update(extra=Run()))
    return [pickled] + [
        changed(
            path, folder / f"{i}.ckpt", lambda c, t=target: c["hyper_parameters"]["model"].update(t)
        )
        for i, target in enumerate(targets(made))
    ]


def _code(made: Path) -> str:
    return f"__import__('pathlib').Path({str(made)!r}).touch()"

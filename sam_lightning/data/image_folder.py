"""Folders of image files, one folder per class; decoded once and cached for the next run."""

import hashlib
import json
import os
import stat
import tempfile
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam_lightning.config.errors import ConfigError, one_line
from sam_lightning.config.progress import progress
from sam_lightning.data.source import ImageSource, Split

_FOLDERS = "train/<class>/* and test/<class>/* (val/<class>/* as well, or instead of test)"


def image_folder(
    root: str, image_size: int | None = None, cache_dir: str | None = None
) -> ImageSource:
    """Image files in ``root/train/<class>/``, ``root/test/<class>/`` and maybe ``root/val/...``.

    As for torchvision's ``ImageFolder``, classes are the sorted folder names and files are found
    by extension at any depth. Without ``test``, ``val`` is the test set. All images are decoded to
    RGB once and held in memory: 3 x H x W bytes each.

    Args:
        root: the folder that holds ``train`` and ``test``.
        image_size: side in pixels; the shorter side is resized to it and the centre is cropped, as
            torchvision's Resize and CenterCrop do. None: all images must have one size already.
        cache_dir: where the decoded images are kept for the next run, ``data/cache`` if None.
            Changed, added, renamed or removed files, or another ``image_size``, make a new entry.

    Raises:
        ConfigError: a folder is missing, a class is empty, the class names of the folders differ,
            a file is no image, or sizes differ without ``image_size``.
    """
    from torchvision.datasets import ImageFolder  # slow to import

    if image_size is not None and image_size < 1:
        raise ConfigError(f"data.image_size={image_size}: must be >= 1, or null")
    base = Path(root).expanduser()
    names = [name for name in ("train", "test", "val") if (base / name).is_dir()]
    for missing in {"train", "test"} - set(names):
        if missing == "train" or "val" not in names:
            raise ConfigError(f"data.root={root!r}: no folder {base / missing}; need {_FOLDERS}")
    folders = []
    for name in names:
        try:
            folders.append(ImageFolder(base / name))
        except FileNotFoundError as error:  # a class without an image
            raise ConfigError(f"data.root: folder {base / name}: {one_line(error)}") from error
    classes = folders[0].classes
    for name, folder in zip(names, folders, strict=True):
        for odd in sorted({*folder.classes} ^ {*classes}):
            raise ConfigError(
                f"data.root={root!r}: class {odd!r} is not in both {base / 'train'} and "
                f"{base / name}; they must have the same classes"
            )
    if len(classes) < 2:
        raise ConfigError(f"data.root={root!r}: needs two classes, {base / 'train'} has one")
    paths = [[Path(path) for path, _ in folder.samples] for folder in folders]
    images = decode_cached(base, paths, image_size, Path(cache_dir or "data/cache"))
    labels = [torch.tensor(folder.targets) for folder in folders]
    files = [[str(path.relative_to(base)) for path in split] for split in paths]
    splits = dict(zip(names, map(Split, images, labels, files), strict=True))
    test = splits["test"] if "test" in splits else splits.pop("val")
    return ImageSource(splits["train"], test, classes, splits.get("val"))


def decode_cached(
    base: Path, paths: list[list[Path]], image_size: int | None, cache_dir: Path
) -> list[Tensor]:
    """Read lists of image files, below ``base``, into one uint8 N x 3 x H x W tensor each."""
    file = cache_dir / f"images-{_key(base, paths, image_size)}.pt"
    if file.exists():
        try:
            with zipfile.ZipFile(file) as archive:  # torch.load compares no checksums
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} is not what was saved")
            images: list[Tensor] = torch.load(file, weights_only=True)
            if [len(split) for split in images] == [len(split) for split in paths]:
                return images
        except Exception as error:  # a damaged file fails in the ways of zip, pickle and torch
            warnings.warn(f"{file} is damaged and made anew: {one_line(error)}", stacklevel=2)
    images = _decode(paths, image_size)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
            torch.save(images, new := Path(folder, "images.pt"))
            os.replace(new, file)  # readers see all of it or nothing
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        warnings.warn(f"cannot keep decoded images in {cache_dir}: {error}", stacklevel=2)
    return images


def _key(base: Path, paths: list[list[Path]], image_size: int | None) -> str:
    """A hash of the names below ``base``, sizes and times of all files."""
    listing: list[Any] = [image_size]
    for path in chain(*paths):
        try:
            status = path.stat()
        except OSError as error:
            raise ConfigError(f"data.root: cannot read {path} ({one_line(error)})") from error
        if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for ever
            raise ConfigError(f"data.root: {path} is no ordinary file")
        listing.append([str(path.relative_to(base)), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:32]


def _decode(paths: list[list[Path]], image_size: int | None) -> list[Tensor]:
    first = paths[0][0]
    height, width = _read(first, image_size).shape[:2]
    try:
        images = [torch.empty(len(split), 3, height, width, dtype=torch.uint8) for split in paths]
    except RuntimeError as error:
        count = sum(map(len, paths))
        raise ConfigError(
            f"data.image_size={image_size or 'null'}: {count} images of {width} x {height} take "
            f"{3 * count * height * width / 1e9:.1f} GB, which are not there; set a smaller one"
        ) from error

    def fill(path: Path, out: np.ndarray) -> None:
        pixels = _read(path, image_size)
        if pixels.shape[:2] != (height, width):
            raise ConfigError(
                f"data.image_size=null: {path} has {pixels.shape[1]} x {pixels.shape[0]} pixels "
                f"and {first} has {width} x {height}; set data.image_size to bring them to one size"
            )
        out[:] = pixels.transpose(2, 0, 1)

    # Threads, as PIL decodes without the GIL and all can write to one tensor. On thumbnails they
    # would rather wait for the GIL: one thread reads files of 1 kB twice as fast as two do.
    with ThreadPoolExecutor() as pool, progress("decoding", sum(map(len, paths))) as advance:
        run = pool.map if first.stat().st_size > 8_000 else map
        for split, out in zip(paths, images, strict=True):
            for _ in run(fill, split, out.numpy()):
                advance()
    return images


def _read(path: Path, image_size: int | None) -> np.ndarray:
    from torchvision.datasets.folder import pil_loader
    from torchvision.transforms.functional import center_crop, resize

    try:
        image: Any = pil_loader(path)
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and more
        raise ConfigError(f"data.root: cannot decode {path} ({one_line(error)})") from error
    if image_size is not None:
        image = center_crop(resize(image, [image_size]), [image_size])
    return np.asarray(image)

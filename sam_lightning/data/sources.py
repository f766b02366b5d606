"""Bytes to tensors: every source of images is a function that returns an ``ImageSource``.

A source reads its files once into uint8 tensors in memory, so an epoch costs no decoding. A new
data set is one function here (or anywhere) and one YAML file in ``conf/data``.
"""

import hashlib
import json
import os
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam_lightning.errors import ConfigError

_FOLDERS = "train/<class>/* and test/<class>/* (val/<class>/* as well, or instead of test)"


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Attributes:
        images: uint8, N x C x H x W, contiguous.
        labels: int64, N, each in 0..number of classes - 1.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "Split":
        """A copy of the images at ``indices`` (int64, 1-D, on their device) with their labels."""
        # index_select copies image by image, indexing copies pixel by pixel: 8 times as slow.
        return Split(*(t.index_select(0, indices) for t in (self.images, self.labels)))

    def to(self, device: torch.device) -> "Split":
        """The same on ``device``: itself if it is there, or else a copy."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class ImageSource:
    """What a data set offers; ``val`` is None unless it has a validation set of its own."""

    train: Split
    test: Split
    classes: list[str]
    val: Split | None = None


def cifar10(root: str, download: bool = True) -> ImageSource:
    """CIFAR-10: 50,000 + 10,000 colour images of 32 x 32 in 10 classes (Krizhevsky 2009).

    Args:
        root: the folder that holds, or is to hold, ``cifar-10-batches-py``.
        download: fetch the archive if its files are missing or damaged.

    Raises:
        ConfigError: the files are missing or damaged and cannot be downloaded.
    """
    from torchvision.datasets import CIFAR10

    return _from_torchvision(CIFAR10, root, download)


def cifar100(root: str, download: bool = True) -> ImageSource:
    """CIFAR-100 with its 100 fine labels; else as ``cifar10``, in ``cifar-100-python``."""
    from torchvision.datasets import CIFAR100

    return _from_torchvision(CIFAR100, root, download)


def fashion_mnist(root: str, download: bool = True) -> ImageSource:
    """Fashion-MNIST: 60,000 + 10,000 grey images of 28 x 28 in 10 classes (Xiao et al. 2017).

    Arguments and errors are those of ``cifar10``; the files are in ``FashionMNIST/raw``.
    """
    from torchvision.datasets import FashionMNIST

    return _from_torchvision(FashionMNIST, root, download)


def _from_torchvision(dataset: Any, root: str, download: bool) -> ImageSource:
    root = os.path.expanduser(root)
    is_new = not os.path.exists(root)
    try:
        # The test set is opened first: it is quick to read and shows most problems.
        test = dataset(root, train=False, download=download)
        train = dataset(root, train=True, download=download)
    except Exception as error:  # URLError, pickle, tar and assertion errors: as many as causes
        if is_new and os.path.isdir(root) and not os.listdir(root):
            os.rmdir(root)  # torchvision makes it before it downloads
        advice = (
            "check the network, or put the original files there"
            if download
            else "set data.download=true, or put the original files there"
        )
        raise ConfigError(
            f"data.root={root!r}: cannot load {dataset.__name__} ({_one_line(error)}); {advice}"
        ) from error
    return ImageSource(_as_split(train), _as_split(test), list(train.classes))


def _as_split(dataset: Any) -> Split:
    images = torch.as_tensor(dataset.data)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return Split(images.contiguous(), torch.as_tensor(dataset.targets, dtype=torch.int64))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def digits() -> ImageSource:
    """scikit-learn's 1,797 handwritten digits, enlarged from 8 x 8 to 32 x 32, grey, 10 classes.

    They come with the package, so nothing is downloaded. 359 of them, stratified and always the
    same ones, are the test set.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "data=digits: needs scikit-learn; run 'pip install scikit-learn' or choose other data"
        ) from error
    bunch = load_digits()
    scans = torch.as_tensor(bunch.images, dtype=torch.float32).unsqueeze(1) * (255 / 16)
    images = torch.nn.functional.interpolate(scans, size=(32, 32), mode="bilinear")
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    everything = Split(images.round().to(torch.uint8), labels)
    test, train = stratified_split(labels, round(0.2 * len(labels)), seed=0)
    return ImageSource(
        everything.take(train), everything.take(test), [str(name) for name in bunch.target_names]
    )


def stratified_split(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw ``count`` of N examples so that every class keeps its share, rounded either way.

    Args:
        labels: int64, N.
        count: how many to draw, 0..N.
        seed: the draw depends on nothing else.

    Returns:
        int64 indices, sorted: those of the ``count`` drawn and those of the others.
    """
    sizes = torch.bincount(labels)
    shares = sizes * count  # in units of 1 / N, so the remainders below are exact
    quotas = shares // len(labels)
    order = torch.argsort(shares % len(labels), descending=True, stable=True)
    quotas[order[: count - int(quotas.sum())]] += 1
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for cls, quota in enumerate(quotas.tolist()):
        members = (labels == cls).nonzero().squeeze(1)
        drawn[members[torch.randperm(len(members), generator=generator)[:quota]]] = True
    return drawn.nonzero().squeeze(1), (~drawn).nonzero().squeeze(1)


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
    if image_size is not None and image_size < 1:
        raise ConfigError(f"data.image_size={image_size}: must be >= 1, or null")
    base = Path(root).expanduser()
    names = [name for name in ("train", "test", "val") if (base / name).is_dir()]
    for missing in {"train", "test"} - set(names):
        if missing == "train" or "val" not in names:
            raise ConfigError(f"data.root={root!r}: no folder {base / missing}; need {_FOLDERS}")
    classes, listed = [], []
    for name in names:
        found, samples = _list_images(base / name)
        classes.append(found)
        listed.append(samples)
        for odd in sorted(set(found) ^ set(classes[0])):
            raise ConfigError(
                f"data.root={root!r}: class {odd!r} is not in both {base / 'train'} and "
                f"{base / name}; they must have the same classes"
            )
    paths = [[Path(path) for path, _ in samples] for samples in listed]
    images = _cached(base, paths, image_size, Path(cache_dir or "data/cache"))
    labels = [torch.tensor([label for _, label in samples]) for samples in listed]
    splits = dict(zip(names, map(Split, images, labels), strict=True))
    test = splits["test"] if "test" in splits else splits.pop("val")
    return ImageSource(splits["train"], test, classes[0], splits.get("val"))


def _list_images(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    try:
        classes, class_to_idx = find_classes(folder)
        return classes, make_dataset(folder, class_to_idx, IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise ConfigError(f"data.root: folder {folder}: {_one_line(error)}") from error


def _cached(
    base: Path, paths: list[list[Path]], image_size: int | None, cache_dir: Path
) -> list[Tensor]:
    """``_decode``, or what it returned in an earlier run for files that are still the same."""
    listing: list[Any] = [image_size]
    for path in (path for split in paths for path in split):
        stat = path.stat()
        listing.append([str(path.relative_to(base)), stat.st_size, stat.st_mtime_ns])
    key = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:32]
    file = cache_dir / f"images-{key}.pt"
    if file.exists():
        try:
            images: list[Tensor] = torch.load(file, weights_only=True)
            if [len(split) for split in images] == [len(split) for split in paths]:
                return images
        except Exception as error:  # a damaged file fails in the ways of zip, pickle and torch
            warnings.warn(f"{file} is damaged and made anew: {_one_line(error)}", stacklevel=2)
    images = _decode(paths, image_size)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
            torch.save(images, Path(folder) / "images.pt")
            os.replace(Path(folder) / "images.pt", file)  # readers see all of it or nothing
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        warnings.warn(f"cannot keep decoded images in {cache_dir}: {error}", stacklevel=2)
    return images


def _decode(paths: list[list[Path]], image_size: int | None) -> list[Tensor]:
    """Read each list of files into one uint8 N x 3 x H x W tensor."""
    first = paths[0][0]
    height, width = _read(first, image_size).shape[:2]
    images = [torch.empty(len(split), 3, height, width, dtype=torch.uint8) for split in paths]

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
    with ThreadPoolExecutor() as pool:
        run = pool.map if first.stat().st_size > 8_000 else map
        for split, out in zip(paths, images, strict=True):
            for _ in run(fill, split, out.numpy()):
                pass
    return images


def _read(path: Path, image_size: int | None) -> np.ndarray:
    from torchvision.datasets.folder import pil_loader
    from torchvision.transforms.functional import center_crop, resize

    try:
        image: Any = pil_loader(path)
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and more
        raise ConfigError(f"data.root: cannot decode {path} ({_one_line(error)})") from error
    if image_size is not None:
        image = center_crop(resize(image, [image_size]), [image_size])
    return np.asarray(image)

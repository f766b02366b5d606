"""Bytes to tensors: every source of images is a function that returns an ``ImageSource``.

A source reads its files once into uint8 tensors in memory, so an epoch costs no decoding. A new
data set is one function and one YAML file in ``conf/data``; the function is here, or in a package
of your own.
"""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam_lightning.config.errors import ConfigError
from sam_lightning.config.schema import one_line
from sam_lightning.data.image_folder import decode_cached

# Arguments of torchvision's classes, in the order in which they are opened.
TEST_AND_TRAIN = ({"train": False}, {"train": True})
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
    """What a data set offers; ``val`` is None unless it has a validation set of its own.

    Raises:
        ConfigError: images and labels are not those of a ``Split`` of these classes.
    """

    train: Split
    test: Split
    classes: list[str]
    val: Split | None = None

    def __post_init__(self) -> None:
        for name in ("train", "test", "val"):
            split = getattr(self, name)
            if split is not None and (wrong := _misfit(split, len(self.classes))):
                raise ConfigError(f"data.source: {name} {wrong}")


def _misfit(split: Split, classes: int) -> str | None:
    images, labels = split.images, split.labels
    if images.dtype != torch.uint8 or images.ndim != 4:
        return f"images are {images.dtype} {tuple(images.shape)}, not uint8 N x C x H x W"
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or not len(labels):
        return f"labels are {labels.dtype} {tuple(labels.shape)} for {len(images)} images"
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        return f"labels reach from {labels.min()} to {labels.max()}, with {classes} classes"
    return None


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


def svhn(root: str, extra: bool = False, download: bool = True) -> ImageSource:
    """SVHN: 73,257 + 26,032 colour crops of house numbers, 32 x 32, 10 digits (Netzer et al. 2011).

    Args:
        root: the folder that holds, or is to hold, ``train_32x32.mat`` and ``test_32x32.mat``.
        extra: train on the 531,131 crops of ``extra_32x32.mat`` too, which are easier.
        download: fetch files that are missing or damaged.

    Raises:
        ConfigError: the files are missing or damaged and cannot be downloaded.
    """
    from torchvision.datasets import SVHN

    parts = [{"split": "test"}, {"split": "train"}, *([{"split": "extra"}] if extra else [])]
    return _from_torchvision(SVHN, root, download, parts)


def _from_torchvision(
    dataset: Any, root: str, download: bool, parts: Sequence[dict[str, Any]] = TEST_AND_TRAIN
) -> ImageSource:
    root = os.path.expanduser(root)
    is_new = not os.path.exists(root)
    try:
        splits, classes = [], [str(digit) for digit in range(10)]
        # The test set is opened first: it is quick to read and shows most problems.
        for part in parts:
            opened = dataset(root, download=download, **part)
            splits.append(_as_split(opened))
            classes = list(getattr(opened, "classes", classes))
        if _altered_contents(dataset, root):
            raise ValueError("unzipped files are damaged")
        test, *train = splits
        return ImageSource(train[0] if len(train) == 1 else _joined(train), test, classes)
    except Exception as error:  # URLError, pickle, tar and assertion errors: as many as causes
        if is_new and os.path.isdir(root) and not os.listdir(root):
            os.rmdir(root)  # torchvision makes it before it downloads
        advice = (
            "check the network, or put the original files there"
            if download
            else "set data.download=true, or put the original files there"
        )
        odd = [*_altered(dataset, root), *_altered_contents(dataset, root)]
        reasons = "; ".join([*odd, one_line(error)])
        raise ConfigError(
            f"data.root={root!r}: cannot load {dataset.__name__} ({reasons}); {advice}"
        ) from error


def _altered(dataset: Any, root: str) -> list[str]:
    """Every file that is there and is not the original one, with both checksums."""
    from torchvision.datasets.utils import calculate_md5

    if hasattr(dataset, "resources"):  # the family of MNIST
        folder = _raw_folder(dataset, root)
        sums = {folder / name: md5 for name, md5 in dataset.resources}
    elif hasattr(dataset, "split_list"):  # SVHN
        sums = {Path(root, name): md5 for _, name, md5 in dataset.split_list.values()}
    else:  # that of CIFAR
        folder = Path(root, dataset.base_folder)
        meta = (dataset.meta["filename"], dataset.meta["md5"])
        parts = [*dataset.train_list, *dataset.test_list, meta]
        sums = {folder / name: md5 for name, md5 in parts}
        sums[Path(root, dataset.filename)] = dataset.tgz_md5
    found = {file: calculate_md5(file) for file in sums if file.is_file()}
    return [
        f"{file} has MD5 {found[file]} and must have {sums[file]}"
        for file in found
        if found[file] != sums[file]
    ]


def _altered_contents(dataset: Any, root: str) -> list[str]:
    """Of MNIST's family, unzipped files that differ from their archives, which alone are checked.

    An archive ends with the CRC-32 of what was compressed, and its length (RFC 1952).
    """
    odd = []
    for name, _ in getattr(dataset, "resources", ()):
        archive = _raw_folder(dataset, root) / name
        file = archive.with_suffix("")
        if archive.is_file() and file.is_file():
            stored = archive.read_bytes()[-8:-4]
            if zlib.crc32(file.read_bytes()).to_bytes(4, "little") != stored:
                odd.append(f"{file} is not what {name} holds; delete it")
    return odd


def _raw_folder(dataset: Any, root: str) -> Path:
    return Path(root, dataset.__name__, "raw")


def _as_split(dataset: Any) -> Split:
    images = torch.as_tensor(dataset.data)
    if hasattr(dataset, "labels"):  # SVHN, N x C x H x W already
        return Split(images.contiguous(), torch.as_tensor(dataset.labels))
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return Split(images.contiguous(), torch.as_tensor(dataset.targets, dtype=torch.int64))


def _joined(splits: list[Split]) -> Split:
    return Split(
        torch.cat([split.images for split in splits]), torch.cat([split.labels for split in splits])
    )


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
    classes: list[list[str]] = []
    listed = []
    for name in names:
        found, samples = _list_images(base / name)
        classes.append(found)
        listed.append(samples)
        for odd in sorted(set(found) ^ set(classes[0])):
            raise ConfigError(
                f"data.root={root!r}: class {odd!r} is not in both {base / 'train'} and "
                f"{base / name}; they must have the same classes"
            )
    if len(classes[0]) < 2:
        raise ConfigError(f"data.root={root!r}: needs two classes, {base / 'train'} has one")
    paths = [[Path(path) for path, _ in samples] for samples in listed]
    images = decode_cached(base, paths, image_size, Path(cache_dir or "data/cache"))
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
        raise ConfigError(f"data.root: folder {folder}: {one_line(error)}") from error

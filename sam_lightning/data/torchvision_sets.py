"""Published data sets: CIFAR, Fashion-MNIST and SVHN by torchvision, digits by scikit-learn."""

import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sam_lightning.config.errors import ConfigError, one_line
from sam_lightning.data.source import ImageSource, Split, stratified_split


def cifar10(root: str, download: bool = True) -> ImageSource:
    """CIFAR-10: 50,000 + 10,000 colour images of 32 x 32 in 10 classes (Krizhevsky 2009).

    Args:
        root: the folder that holds, or is to hold, ``cifar-10-batches-py``.
        download: fetch the archive if its files are missing or damaged.

    Raises:
        ConfigError: the files are missing or damaged and cannot be downloaded.
    """
    return _from_torchvision("CIFAR10", root, download)


def cifar100(root: str, download: bool = True) -> ImageSource:
    """CIFAR-100 with its 100 fine labels: as ``cifar10``, in ``cifar-100-python``."""
    return _from_torchvision("CIFAR100", root, download)


def fashion_mnist(root: str, download: bool = True) -> ImageSource:
    """Fashion-MNIST: 60,000 + 10,000 grey images of 28 x 28 in 10 classes (Xiao et al. 2017).

    Arguments and errors are those of ``cifar10``; the files are in ``FashionMNIST/raw``.
    """
    return _from_torchvision("FashionMNIST", root, download)


def svhn(root: str, extra: bool = False, download: bool = True) -> ImageSource:
    """SVHN: 73,257 + 26,032 colour crops of house numbers, 32 x 32, 10 digits (Netzer et al. 2011).

    ``extra`` adds the 531,131 easier crops of ``extra_32x32.mat`` to the training set. Other
    arguments and errors are those of ``cifar10``; the files are ``train_32x32.mat`` and so on.
    """
    parts = [{"split": part} for part in ("test", "train", "extra")]
    return _from_torchvision("SVHN", root, download, parts if extra else parts[:2])


def _from_torchvision(
    name: str,
    root: str,
    download: bool,
    parts: Sequence[dict[str, Any]] = ({"train": False}, {"train": True}),
) -> ImageSource:
    from torchvision import datasets

    dataset = getattr(datasets, name)
    root = os.path.expanduser(root)
    new = [folder for folder in (Path(root), *Path(root).parents) if not folder.exists()]
    try:
        splits, classes = [], [str(digit) for digit in range(10)]
        # The test set is opened first: it is quick to read and shows most problems.
        for part in parts:
            opened = dataset(root, download=download, **part)
            splits.append(_as_split(opened))
            classes = list(getattr(opened, "classes", classes))
        if _altered_contents(dataset, root):
            raise ValueError("unzipped files are damaged")
        test, train, *extra = splits
        for more in extra:
            images = torch.cat([train.images, more.images])
            train = Split(images, torch.cat([train.labels, more.labels]))
        return ImageSource(train, test, classes)
    except Exception as error:  # URLError, pickle, tar and assertion errors: as many as causes
        for folder in new:  # torchvision makes them before it downloads
            with suppress(OSError):
                folder.rmdir()
        advice = "check the network" if download else "set data.download=true"
        odd = [*_altered(dataset, root), *_altered_contents(dataset, root), one_line(error)]
        raise ConfigError(
            f"data.root={root!r}: cannot load {name} ({'; '.join(odd)}); {advice}, or put the "
            "original files there"
        ) from error


def _altered(dataset: Any, root: str) -> list[str]:
    """Every file that is there and is not the original one, with both checksums."""
    from torchvision.datasets.utils import calculate_md5

    folder = Path(root)
    if hasattr(dataset, "resources"):  # Fashion-MNIST
        folder, sums = Path(root, dataset.__name__, "raw"), dataset.resources
    elif hasattr(dataset, "split_list"):  # SVHN
        sums = [(name, md5) for _, name, md5 in dataset.split_list.values()]
    else:  # CIFAR
        folder = folder / dataset.base_folder
        meta = (dataset.meta["filename"], dataset.meta["md5"])
        archive = (folder.parent / dataset.filename, dataset.tgz_md5)
        sums = [*dataset.train_list, *dataset.test_list, meta, archive]
    found = [(folder / name, md5) for name, md5 in sums if (folder / name).is_file()]
    return [
        f"{file} has MD5 {is_now} and must have {md5}"
        for file, md5 in found
        if (is_now := calculate_md5(file)) != md5
    ]


def _altered_contents(dataset: Any, root: str) -> list[str]:
    """Unzipped Fashion-MNIST files that differ from their archives; torchvision checks only those.

    An archive ends with the CRC-32 of what was compressed, and its length (RFC 1952).
    """
    odd = []
    for name, _ in getattr(dataset, "resources", ()):
        archive = Path(root, dataset.__name__, "raw", name)
        file = archive.with_suffix("")
        if archive.is_file() and file.is_file():
            stored = archive.read_bytes()[-8:-4]
            if zlib.crc32(file.read_bytes()).to_bytes(4, "little") != stored:
                odd.append(f"{file} is not what {name} holds; delete it")
    return odd


def _as_split(dataset: Any) -> Split:
    images = torch.as_tensor(dataset.data)
    if hasattr(dataset, "labels"):  # SVHN, N x C x H x W already
        return Split(images.contiguous(), torch.as_tensor(dataset.labels))
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return Split(images.contiguous(), torch.as_tensor(dataset.targets, dtype=torch.int64))


def digits() -> ImageSource:
    """scikit-learn's 1,797 handwritten digits, enlarged from 8 x 8 to 32 x 32, grey, 10 classes.

    They come with the package, so nothing is downloaded. 359 of them, stratified and always the
    same ones, are the test set.
    """
    from sklearn.datasets import load_digits  # slow to import

    bunch = load_digits()
    scans = torch.as_tensor(bunch.images, dtype=torch.float32).unsqueeze(1) * (255 / 16)
    images = torch.nn.functional.interpolate(scans, size=(32, 32), mode="bilinear")
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    everything = Split(images.round().to(torch.uint8), labels)
    test, train = stratified_split(labels, round(0.2 * len(labels)), seed=0)
    classes = [str(name) for name in bunch.target_names]
    return ImageSource(everything.take(train), everything.take(test), classes)

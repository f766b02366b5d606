"""ImageNet (ILSVRC 2012) as it is published: in archives, or its validation images in one folder.

All other layouts are those of ``list_images``.
"""

import csv
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sam_lightning.config.errors import ConfigError, named_errors
from sam_lightning.data.listing import WHOLE, Files, Listing, images_below, list_images, stamp_of
from sam_lightning.data.source import Names

KAGGLE = Path("ILSVRC", "Data", "CLS-LOC")  # where its download has train, val and test
LABELS = "LOC_val_solution.csv"  # Kaggle's
DEVKIT = "ILSVRC2012_devkit_t12"
UNPACK = "from torchvision.datasets import ImageNet as I; [I({!r}, s) for s in ('train', 'val')]"


def list_imagenet(root: str) -> Listing | None:
    """The images of ImageNet in a layout that only ImageNet has; None for any other.

    - ``train/<class>/*`` and ``val/*``, with ``LOC_val_solution.csv`` or the folder
      ``ILSVRC2012_devkit_t12`` in the same folder or up to three above it.
    - Kaggle's download, of which ``root`` may also be ``ILSVRC/Data/CLS-LOC``.

    Test images, of which no labels are published, are left out.

    Raises:
        ConfigError: there are archives that are not unpacked; the validation images have no labels,
            or other classes than the training images.
    """
    given = Path(os.path.expanduser(root))
    base = given / KAGGLE if (given / KAGGLE).is_dir() else given
    train, val, test = (base / name for name in ("train", "val", "test"))
    for folder in (train, val):
        archive = base / f"ILSVRC2012_img_{folder.name}.tar"
        if archive.is_file() and not folder.is_dir():
            raise ConfigError(
                f"data.root={root!r}: {archive.name} is not unpacked; with {DEVKIT}.tar.gz beside "
                f'it, this does so: python -c "{UNPACK.format(str(base))}"'
            )
    flat, unlabelled = (next(f.glob("ILSVRC2012_*"), None) is not None for f in (val, test))
    if not flat and not unlabelled:
        return None if base == given else list_images(str(base))
    parts = {"train": list_images(str(train), WHOLE)}
    parts["val"] = _in_one_folder(root, val) if flat else list_images(str(val), WHOLE)
    classes = parts["train"].classes
    if odd := sorted({*classes} ^ {*parts["val"].classes}):
        raise ConfigError(
            f"data.root={root!r}: class {odd[0]!r} is not in both {train} and {val}; they must "
            "have the same classes"
        )
    left_out: Counter[str] = Counter()
    for part in parts.values():
        left_out.update(part.left_out)
    if unlabelled:
        left_out["of test, without labels"] = sum(1 for _ in os.scandir(test))
    splits = {name: part.splits[WHOLE] for name, part in parts.items()}
    return Listing(splits, classes, dict(left_out.most_common()))


def _in_one_folder(root: str, val: Path) -> Listing:
    """Images whose class is in a file."""
    paths, left_out = images_below(val)
    known = _labels(val)
    wnids = [known.get(path.stem, "") for path in paths]
    if "" in wnids:
        advice = f"{paths[wnids.index('')].name} is not in them" if known else "there are none"
        raise ConfigError(
            f"data.root={root!r}: {val} has {len(paths):,} images in no folders of classes, so "
            f"their labels must be in {LABELS} or {DEVKIT} beside it or above it: {advice}"
        )
    classes = sorted({*wnids})
    found = [os.stat(path) for path in paths]
    files = Files(
        str(val),
        Names.of(path.relative_to(val).as_posix() for path in paths),
        torch.tensor([classes.index(wnid) for wnid in wnids]),
        np.array([stamp_of(status) for status in found], np.int64),
        float(np.mean([status.st_size for status in found])),
    )
    return Listing({WHOLE: files}, classes, left_out)


def _labels(val: Path) -> dict[str, str]:
    """The class of each validation image, by its name without suffix; nothing if it is unknown."""
    for folder in val.parents[:4]:
        csv_file, data = folder / LABELS, folder / DEVKIT / "data"
        if csv_file.is_file():
            with named_errors(f"data.root: {csv_file} cannot be read", Exception):
                _, *rows = csv.reader(csv_file.read_text().splitlines())
                return {name: boxes.split()[0] for name, boxes in rows}
        if data.is_dir():
            with named_errors(f"data.root: {data} cannot be read", Exception):
                from scipy.io import loadmat

                synsets: Any = loadmat(data / "meta.mat", squeeze_me=True)["synsets"]
                ids = synsets["ILSVRC2012_ID"].tolist()
                wnids = dict(zip(ids, synsets["WNID"].tolist(), strict=True))
                numbers = (data / "ILSVRC2012_validation_ground_truth.txt").read_text().split()
                return {
                    f"ILSVRC2012_val_{i:08}": wnids[int(number)]
                    for i, number in enumerate(numbers, 1)
                }
    return {}

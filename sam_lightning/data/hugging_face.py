"""Images in parquet files, local ones or those of a data set on the hub of Hugging Face.

The package datasets makes Arrow tables of them, once, which all processes map.
"""

import logging
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam_lightning.config.errors import ConfigError, one_line
from sam_lightning.data.listing import SPLITS, WHOLE, Files, Listing
from sam_lightning.data.source import Names
from sam_lightning.data.tars import find, split_of

HUB = "hub://"  # before the name of a data set, as in hub://user/name or hub://user/name/config


class Table(Files):
    """The images of a split in an Arrow table.

    Args:
        data: the split, with a column of images that are not decoded.
        image: the name of that column.
        labels: int64, N.
        names: of its rows.
        rows: which of them, in which order.
    """

    def __init__(self, data: Any, image: str, labels: Tensor, names: Names, rows: Tensor) -> None:
        self.data, self.image, self.rows = data, image, rows
        self.labels, self.names = labels[rows], names.take(rows)
        self.size = data.data.nbytes / len(data)
        self._all = labels, names

    def path(self, index: int) -> str:
        """The name of an image."""
        return self.names[index]

    def take(self, indices: Tensor) -> "Table":
        """The images at these indices."""
        return Table(self.data, self.image, *self._all, self.rows[indices])

    def content(self, index: int) -> bytes:
        """The bytes of an image, or of the file that the table names."""
        found = self.data.data.column(self.image)[int(self.rows[index])].as_py()
        return found["bytes"] or Path(found["path"]).read_bytes()

    def known(self) -> np.ndarray:
        """The hash of all data that the images are made of, and the numbers of their rows."""
        digest = np.frombuffer(bytes.fromhex(self.data._fingerprint)[:8], np.uint8)
        rows = self.rows.numpy().astype("<i8")[:, None].view(np.uint8)
        return np.concatenate([np.broadcast_to(digest, rows.shape), rows], 1)


def tables(root: str, split: Any, cache: Path, either: bool) -> Listing:
    """The images of parquet files, as ``shards.listed`` lists those of shards.

    Raises:
        ConfigError: the package datasets is not installed or cannot read them; there is no column
            of images or of labels, or no split for training.
    """
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            f"data.root={root!r}: parquet files are read by the package datasets: pip install "
            "'sam-lightning[hf]'"
        ) from error
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it says is said once more in an error
    try:
        if root.startswith(HUB):
            parts = root.removeprefix(HUB).split("/", 2)
            found = datasets.load_dataset("/".join(parts[:2]), *parts[2:])
        else:
            base, files = os.path.expanduser(root), dict[str, list[str]]()
            for file in find(base, ".parquet"):
                files.setdefault(split_of(base, file), []).append(os.path.join(base, file))
            place = str(cache / "tables")
            found = datasets.load_dataset("parquet", data_files=files, cache_dir=place)
    except ConfigError:
        raise
    except Exception as error:  # of the hub, of Arrow and of damaged files
        said = error.__cause__ or error  # the first says that something was wrong
        raise ConfigError(f"data.root={root!r}: cannot be read ({one_line(said)})") from error
    known = {name: key for key, names in SPLITS.items() for name in names} | {WHOLE: WHOLE}
    by_split = {known[name]: data for name, data in found.items() if name in known}
    if {*by_split} == {"train"} and split is not None:
        by_split = {WHOLE: by_split["train"]}
    if not by_split or (split is None and not either and "train" not in by_split):
        raise ConfigError(f"data.root={root!r}: no split train, only {', '.join(found)}")
    if split is not None and {*by_split} != {WHOLE}:
        raise ConfigError(f"data.split={split}: {root} has {', '.join(found)} already; set it null")
    first = by_split.get("train", next(iter(by_split.values())))
    image, label = _columns(root, first.features, datasets)
    classes = getattr(first.features[label], "names", None)
    if classes is None:
        classes = sorted({*map(str, first.unique(label))})
    numbers = {str(name): i for i, name in enumerate(classes)}
    splits: dict[str, Files] = {}
    for name in sorted(by_split, key=("train", "test", "val", WHOLE).index):
        data = by_split[name].cast_column(image, datasets.Image(decode=False))
        labels = data.data.column(label).to_pylist()
        if not hasattr(first.features[label], "names"):
            labels = [numbers.get(str(value), -1) for value in labels]
        rows = torch.arange(len(data))
        names = Names.of(f"{name}/{i:08}" for i in range(len(data)))
        splits[name] = Table(data, image, torch.tensor(labels, dtype=torch.int64), names, rows)
    return Listing(splits, [*map(str, classes)], {})


def _columns(root: str, features: Any, datasets: Any) -> tuple[str, str]:
    """The first column of images, and the first of classes or else the one called label."""
    images = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)
    ]
    labels = [name for name, of in features.items() if isinstance(of, datasets.ClassLabel)]
    labels += ["label"] * ("label" in features)
    if not images or not labels:
        what = "label" if images else "images"
        raise ConfigError(f"data.root={root!r}: no column of {what} among {', '.join(features)}")
    return images[0], labels[0]

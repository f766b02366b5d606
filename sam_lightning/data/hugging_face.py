"""Images in parquet files, local ones or those of a data set on the hub of Hugging Face.

The package datasets makes Arrow tables of them, once, which all processes map.
"""

import hashlib
import logging
import os
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam_lightning.config.errors import ConfigError, named_errors, one_line
from sam_lightning.data.listing import SPLITS, WHOLE, Files, Listing, content_of
from sam_lightning.data.source import Names
from sam_lightning.data.tars import classes_of, find, is_class, split_of, state_of

LABELS = ("label", "labels", "cls")  # columns that are taken where none says that it has classes
HUB = "hub://"  # before the name of a data set, as in hub://user/name or hub://user/name/config


class Table(Files):
    """The images of a split in an Arrow table.

    Args:
        data: the split, with a column of images that are not decoded.
        image: the name of that column.
        labels: int64, N.
        names: of its rows.
        rows: which of them, in which order.
        state: 8 bytes that differ when the data do.
    """

    portable = False  # the state has times of files

    def __init__(
        self, data: Any, image: str, labels: Tensor, names: Names, rows: Tensor, state: bytes
    ) -> None:
        self.data, self.image, self.rows, self.state = data, image, rows, state
        self.labels, self.names = labels[rows], names.take(rows)
        self.size = data.data.nbytes / len(data)
        self._all = labels, names

    def path(self, index: int) -> str:
        """The name of an image."""
        return self.names[index]

    def take(self, indices: Tensor) -> "Table":
        """The images at these indices."""
        return Table(self.data, self.image, *self._all, self.rows[indices], self.state)

    def content(self, index: int) -> bytes:
        """The bytes of an image, or of the file that the table names."""
        found = self.data.data.column(self.image)[int(self.rows[index])].as_py() or {}
        if not found.get("bytes") and not found.get("path"):
            raise OSError("its row has no image")
        return found["bytes"] or content_of(found["path"])[0]

    def known(self) -> np.ndarray:
        """The hash of all data that the images are made of, and the numbers of their rows."""
        digest = np.frombuffer(self.state, np.uint8)
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
    left_out: Counter[str] = Counter()
    try:
        state = ""
        if root.startswith(HUB):
            parts = root.removeprefix(HUB).split("/", 2)
            found = datasets.load_dataset("/".join(parts[:2]), *parts[2:])
        else:
            found, state = _local(datasets, root, cache, left_out)
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
        there = ", ".join(found)
        raise ConfigError(f"data.root={root!r}: no split train, only {there}; give data.split")
    if split is not None and {*by_split} != {WHOLE}:
        raise ConfigError(f"data.split={split}: {root} has {', '.join(found)} already; set it null")
    first = by_split.get("train", next(iter(by_split.values())))
    image, label = _columns(root, first.features, datasets)
    names = getattr(first.features[label], "names", None)
    encoded = {}
    for name, data in by_split.items():
        if image not in data.features or getattr(data.features.get(label), "names", names) != names:
            raise ConfigError(f"data.root={root!r}: {name} has other columns or classes than train")
        encoded[name] = _encoded(root, data, label)
    values = {value for _, of in encoded.values() for value in of}
    if names is None:
        classes, numbers = classes_of(root, {v for v in map(str, values) if is_class(v)})
    else:
        classes, numbers = [*map(str, names)], {str(i): i for i in range(len(names))}
    splits: dict[str, Files] = {}
    for name in sorted(by_split, key=("train", "test", "val", WHOLE).index):
        codes, of = encoded[name]
        turned = np.array([*(numbers.get(str(value), -1) for value in of), -1])
        labels = torch.from_numpy(turned[codes])
        rows = (labels >= 0).nonzero().squeeze(1)
        left_out["images without a label"] += len(labels) - len(rows)
        if len(rows):
            data = by_split[name].cast_column(image, datasets.Image(decode=False))
            listed = Names.of(f"{name}/{i:08}" for i in range(len(data)))
            mark = hashlib.blake2b(f"{data._fingerprint} {state}".encode(), digest_size=8).digest()
            splits[name] = Table(data, image, labels, listed, rows, mark)
        elif name in ("train", WHOLE):
            raise ConfigError(f"data.root={root!r}: no image of {name} has a label in {label!r}")
    return Listing(splits, classes, {k: count for k, count in left_out.most_common() if count})


def _local(datasets: Any, root: str, cache: Path, left_out: Counter[str]) -> tuple[Any, str]:
    """The parquet files of a folder by split, and a hash of what they are now."""
    from pyarrow import parquet

    base, by_split = os.path.expanduser(root), dict[str, list[str]]()
    names = find(base, ".parquet")
    for name in names:
        file = os.path.join(base, name)
        with named_errors(f"data.root: {file}: cannot be read", Exception):
            count = parquet.read_metadata(file).num_rows
        if count:
            by_split.setdefault(split_of(base, name), []).append(file)
        else:
            left_out["empty .parquet"] += 1
    state, found = state_of(base, names), {}
    for split, files in by_split.items():
        classes = []  # of each file, by column
        for file in files:
            features = datasets.Features.from_arrow_schema(parquet.read_schema(file))
            classes.append({key: of.names for key, of in features.items() if hasattr(of, "names")})
            if classes[-1] != classes[0]:
                raise ConfigError(f"data.root: {file}: has other classes than {files[0]}")
        place = str(cache / f"tables-{state}")
        given = {"data_files": {"train": files}, "split": "train", "cache_dir": place}
        # Rows at a time: else as many as are in the first group, which may be none.
        found[split] = datasets.load_dataset("parquet", batch_size=1000, **given)
    return found, state


def _encoded(root: str, data: Any, label: str) -> tuple[np.ndarray, list[Any]]:
    """The number of each row's label among the different ones, -1 without one; and these."""
    if label not in data.features:
        return np.full(len(data), -1), []
    column = data.data.column(label).combine_chunks()
    try:
        found = column if hasattr(column, "dictionary") else column.dictionary_encode()
    except NotImplementedError as error:
        raise ConfigError(
            f"data.root={root!r}: labels in {label!r} are of type {column.type}, neither texts nor "
            "numbers"
        ) from error
    return found.indices.fill_null(-1).to_numpy(), found.dictionary.to_pylist()


def _columns(root: str, features: Any, datasets: Any) -> tuple[str, str]:
    """The first column of images, and the first of classes or else one of ``LABELS``."""
    images = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Image)
        or (isinstance(feature, dict) and "bytes" in feature)
        or getattr(feature, "dtype", None) in ("binary", "large_binary")
    ]
    labels = [name for name, of in features.items() if isinstance(of, datasets.ClassLabel)]
    labels += [name for name in LABELS if name in features]
    if not images or not labels:
        what = f"labels ({', '.join(LABELS)})" if images else "images"
        raise ConfigError(f"data.root={root!r}: no column of {what} among {', '.join(features)}")
    return images[0], labels[0]

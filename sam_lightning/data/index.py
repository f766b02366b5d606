"""The index of tar shards: arrays in one file that all processes and workers map.

``shards.bin`` has the arrays, and ``shards.json`` says where in it each one is, and the shards with
their sizes and hashes. It is written last, and so is there only if the set is complete.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sam_lightning.config.errors import named_errors
from sam_lightning.data.source import Names, smallest

FILE, ARRAYS = "shards.json", "shards.bin"
VERSION = 1
BLOCK = 512  # bytes of tar, at whose multiples all begins

# Of an image: the number of its shard, where it is there and how long, and its CRC-32.
ROW = [("shard", np.int32), ("offset", np.int64), ("length", np.int64), ("crc", np.uint32)]

Arrays = Mapping[str, np.ndarray]
Places = dict[str, tuple[str, int, int]]


class Shard(NamedTuple):
    """A tar file: its name in the folder, its size in bytes and its SHA-256."""

    name: str
    size: int
    sha256: str


class Mapped(dict[str, np.ndarray]):
    """Arrays in a file, which all processes that have them map, and a worker that gets them too.

    Args:
        path: of the file.
        places: of each array its type, length and offset, as ``write_arrays`` returns them.
    """

    def __init__(self, path: Path, places: Places) -> None:
        self.path, self.places = path, places
        content = np.memmap(path, np.uint8, "c")  # torch warns of arrays that are only to be read
        super().__init__({key: np.frombuffer(content, *place) for key, place in places.items()})

    def __reduce__(self) -> Any:
        return Mapped, (self.path, self.places)


def write_arrays(path: Path, splits: Mapping[str, Arrays]) -> tuple[dict[str, Places], str]:
    """Write the arrays of splits to a new file; return the places of each, and its SHA-256."""
    places, digest = dict[str, Places](), hashlib.sha256()
    with path.open("wb") as file:
        for name, arrays in splits.items():
            places[name] = {}
            for key, array in arrays.items():
                places[name][key] = array.dtype.str, len(array), file.tell()
                for part in (array.data, bytes(-array.nbytes % 8)):
                    digest.update(part)
                    file.write(part)
    return places, digest.hexdigest()


@dataclass
class SplitIndex:
    """The shards of a split, the arrays of its images, and their sizes as ``Files`` has them.

    The arrays are those of ``Names`` and, for each image, ``block``, the number of its first block
    in all shards one behind the other, ``length``, ``crc`` and ``label``.
    """

    shards: list[Shard]
    arrays: Arrays
    sizes: dict[str, list[int]] | None = None

    @classmethod
    def of(
        cls, shards: list[Shard], names: Names, labels: Any, rows: np.ndarray, **options: Any
    ) -> "SplitIndex":
        """That of images with these names and labels, and ``rows`` that have what ``ROW`` says."""
        arrays = {
            "block": smallest(first_blocks(shards)[rows["shard"]] + rows["offset"] // BLOCK),
            "length": smallest(rows["length"]),
            "crc": rows["crc"].copy(),
            "label": smallest(labels),
        }
        return cls(shards, arrays | names.alone(), **options)


@dataclass
class Index:
    """What a folder of shards has: ``SplitIndex`` by split, classes, and what was left out."""

    splits: dict[str, SplitIndex]
    classes: list[str]
    left_out: dict[str, int]

    def write(self, folder: Path) -> None:
        """Write both files, whole."""
        with tempfile.TemporaryDirectory(dir=folder) as new:
            of_splits = {name: split.arrays for name, split in self.splits.items()}
            places, sha256 = write_arrays(Path(new, ARRAYS), of_splits)
            text = {
                "version": VERSION,
                "classes": self.classes,
                "left_out": self.left_out,
                "sha256": sha256,
                "splits": {
                    name: {"shards": split.shards, "arrays": places[name], "sizes": split.sizes}
                    for name, split in self.splits.items()
                },
            }
            Path(new, FILE).write_text(json.dumps(text, indent=1) + "\n")
            for file in (ARRAYS, FILE):
                with open(Path(new, file), "rb") as written:
                    os.fsync(written.fileno())
                os.replace(Path(new, file), folder / file)

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """Map the arrays of a folder.

        Raises:
            ConfigError: the files are damaged or of another version.
        """
        with named_errors(f"data.root: {folder / FILE} cannot be read", Exception):
            text = json.loads((folder / FILE).read_bytes())
            if text["version"] != VERSION:
                raise ValueError(f"is of version {text['version']}, not {VERSION}")
            content = np.memmap(folder / ARRAYS, np.uint8, "r")
            if hashlib.sha256(content.data).hexdigest() != text["sha256"]:
                raise ValueError(f"{ARRAYS} has changed: its SHA-256 differs")
            splits = {}
            for name, split in text["splits"].items():
                shards = [Shard(*shard) for shard in split["shards"]]
                arrays = Mapped(folder / ARRAYS, split["arrays"])
                splits[name] = SplitIndex(shards, arrays, split["sizes"])
            return cls(splits, text["classes"], text["left_out"])


def first_blocks(shards: Sequence[Shard]) -> np.ndarray:
    """The number of the first block of each shard, one behind the other, and of the end."""
    return np.cumsum([0, *(-(-shard.size // BLOCK) for shard in shards)])

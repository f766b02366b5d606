"""The index of tar shards: arrays in one file that all processes and workers map.

``shards.bin`` has the arrays, and ``shards.json`` says where in it each one is, and the shards with
their sizes and hashes. It is written last, and so is there only if the set is complete.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sam_lightning.config.errors import named_errors
from sam_lightning.data.source import Names, smallest

FILE, ARRAYS = "shards.json", "shards.bin"
VERSION = 1
BLOCK = 512  # bytes of tar, at whose multiples all begins

Arrays = Mapping[str, np.ndarray]


class Shard(NamedTuple):
    """A tar file: its name in the folder, its size in bytes and its SHA-256."""

    name: str
    size: int
    sha256: str


class Image(NamedTuple):
    """An image in a shard: name, label, number of the shard; where, how long, and its CRC-32."""

    name: str
    label: int
    shard: int
    offset: int
    length: int
    crc: int


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
    def of(cls, shards: list[Shard], images: Sequence[Image], **options: Any) -> "SplitIndex":
        """That of images, in their order."""
        names, label, shard, offset, length, crc = zip(*images, strict=True)
        arrays = {
            "block": smallest(first_blocks(shards)[np.array(shard)] + np.array(offset) // BLOCK),
            "length": smallest(length),
            "crc": np.array(crc, np.uint32),
            "label": smallest(label),
        }
        return cls(shards, arrays | Names.of(names).arrays, **options)


@dataclass
class Index:
    """What a folder of shards has: ``SplitIndex`` by split, classes, and what was left out."""

    splits: dict[str, SplitIndex]
    classes: list[str]
    left_out: dict[str, int]

    def write(self, folder: Path) -> None:
        """Write both files, whole."""
        content, place = bytearray(), {}
        for name, split in self.splits.items():
            place[name] = asdict(split)
            for key, array in split.arrays.items():
                place[name]["arrays"][key] = [array.dtype.str, len(array), len(content)]
                content += array.tobytes()
                content += bytes(-len(content) % 8)
        text = {
            "version": VERSION,
            "classes": self.classes,
            "left_out": self.left_out,
            "sha256": hashlib.sha256(content).hexdigest(),
            "splits": place,
        }
        with tempfile.TemporaryDirectory(dir=folder) as new:
            Path(new, ARRAYS).write_bytes(content)
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
                arrays = {
                    key: np.frombuffer(content, dtype, count, offset)
                    for key, (dtype, count, offset) in split["arrays"].items()
                }
                shards = [Shard(*shard) for shard in split["shards"]]
                splits[name] = SplitIndex(shards, arrays, split["sizes"])
            return cls(splits, text["classes"], text["left_out"])


def first_blocks(shards: Sequence[Shard]) -> np.ndarray:
    """The number of the first block of each shard, one behind the other, and of the end."""
    return np.cumsum([0, *(-(-shard.size // BLOCK) for shard in shards)])

"""Which image files a folder has: of which split and class each one is, and what is left out."""

import os
import re
import stat
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam_lightning.config.errors import ConfigError
from sam_lightning.data.pixels import suffixes
from sam_lightning.data.source import Names

# Names of the folders of splits, in any case.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
LAYOUT = (
    "train/<class>/* and test/<class>/* (or val, or both; or train alone with test=false), or "
    "<class>/* with data.split=[0.8,0.1,0.1]"
)
# What systems and editors put beside files, beside what begins with a dot.
OF_SYSTEMS = {"__macosx", "thumbs.db", "desktop.ini", "system volume information", "$recycle.bin"}
OF_SYSTEMS |= {"lost+found", "@eadir", "#recycle", "#snapshot"}  # the last ones network drives
HIDDEN = "hidden"
WHOLE = "all"  # the split of a folder that is to be divided


@dataclass(eq=False)
class Files:
    """The image files of a split.

    Attributes:
        base: the folder that the names are relative to.
        names: N names such as ``train/cat/1.jpg``, always with ``/``.
        labels: int64, N.
        stamps: int64, N, as ``stamp_of`` has them.
        size: mean of the files' bytes.
        sizes: as ``StoredImages`` has them, if it is known that all images can be decoded.
    """

    portable = True  # whether hashes of the contents are the same on any machine

    base: str
    names: Names
    labels: Tensor
    stamps: np.ndarray
    size: float
    sizes: dict[str, list[int]] | None = None

    def path(self, index: int) -> str:
        """Where a file is."""
        return os.path.join(self.base, self.names[index])

    def content(self, index: int) -> bytes | bytearray:
        """The bytes of a file; an OSError if there are none, a ConfigError if a shard is lost."""
        return content_of(self.path(index))[0]

    def known(self) -> np.ndarray | None:
        """Hashes of the contents as ``contents.hashes`` has them, if ``content`` checks them."""
        return None

    def take(self, indices: Tensor) -> "Files":
        """The files at these indices."""
        return Files(
            self.base,
            self.names.take(indices),
            self.labels[indices],
            self.stamps[indices.numpy()],
            self.size,
        )


@dataclass(eq=False)
class Listing:
    """Splits by name, the names of the classes, and files left out: their number by kind."""

    splits: dict[str, Files]
    classes: list[str]
    left_out: dict[str, int]


def list_images(root: str, split: Any = None, either: bool = False) -> Listing:
    """List a folder of images, whose layout ``image_folder`` describes.

    With ``split``, for ``splitting.divided``, all images are one split; with ``either`` they are if
    there is no folder of training images.

    Raises:
        ConfigError: as ``image_folder`` says.
        OSError: a folder cannot be read.
    """
    base = os.path.expanduser(root)
    left_out: Counter[str] = Counter()
    folders = _split_folders(root, base)
    if either and "train" not in folders:
        split = WHOLE
    if split is None:
        if "train" not in folders:
            raise ConfigError(f"data.root={root!r}: no folder {base}/train; need {LAYOUT}")
    elif "train" in folders and next(_subfolders(os.path.join(base, folders["train"])), None):
        raise ConfigError(
            f"data.split={split}: {base} has a folder {folders['train']} of classes already; set "
            "data.split=null, or data.root to one folder of classes"
        )
    else:
        folders = {WHOLE: ""}
    if split is None and (others := _others(base, folders)):
        left_out["other folders"] = others
    by_split = {
        name: _classes(root, os.path.join(base, folder)) for name, folder in folders.items()
    }
    first, *_ = by_split
    classes = sorted(by_split[first])
    for name, found in by_split.items():
        if odd := sorted({*found} ^ {*classes}):
            lower = [c.lower() for c in {*found, *classes}]
            case = "; upper and lower case count" if len({*lower}) < len(lower) else ""
            raise ConfigError(
                f"data.root={root!r}: class {odd[0]!r} is not in both {base}/{folders[first]} and "
                f"{base}/{folders[name]}; they must have the same classes{case}"
            )
    if len(classes) < 2:
        place = os.path.join(base, folders[first])
        count = "one" if classes else "none"
        raise ConfigError(
            f"data.root={root!r}: needs two classes, {place} has {count}; need {LAYOUT}"
        )
    splits = {}
    for name, found in by_split.items():
        folder = os.path.join(base, folders[name])
        splits[name] = _files(
            root, base, {c: os.path.join(folder, found[c]) for c in classes}, left_out
        )
        _count_beside(folder, left_out)
    return Listing(splits, classes, dict(left_out.most_common()))


def _files(root: str, base: str, folders: dict[str, str], left_out: Counter[str]) -> Files:
    """The images in the folders of classes, without objects for more than a class."""
    counts, stamps, total = list[int](), array("q"), 0

    def names() -> Iterator[str]:
        nonlocal total
        for cls, folder in folders.items():
            before, out_before = len(stamps), left_out.copy()
            for some, status in _walk(folder, base, left_out):
                stamps.extend(stamp for stamp, _ in status)
                total += sum(size for _, size in status)
                yield from some
            if len(stamps) == before:
                raise ConfigError(
                    f"data.root={root!r}: folder {folder}: no image of class {cls!r} in "
                    f"it{told(left_out - out_before)}"
                )
            counts.append(len(stamps) - before)

    listed = Names.of(names())
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return Files(base, listed, labels, np.array(stamps), total / len(stamps))


def told(left_out: dict[str, int]) -> str:
    """``; left out: 3 hidden, 2 .txt``, or nothing."""
    counts = ", ".join(f"{count:,} {kind}" for kind, count in left_out.items())
    advice = " (convert HEIC to JPEG)" if {".heic", ".heif"} & {*left_out} else ""
    return f"; left out: {counts}{advice}" if counts else ""


def images_below(folder: Path) -> tuple[list[Path], dict[str, int]]:
    """All image files of a folder and those below it, in order, and what is left out."""
    left_out: Counter[str] = Counter()
    files = [
        folder / name
        for names, status in _walk(str(folder), str(folder), left_out)
        for name, (stamp, _) in zip(names, status, strict=True)
        if stamp
    ]
    return sorted(files), dict(left_out.most_common())


def _split_folders(root: str, base: str) -> dict[str, str]:
    """The names of the folders of splits by split, in the order train, test, val."""
    present = [name for name, _ in _subfolders(base)]
    folders = {}
    for split in ("train", "test", "val"):
        found = [name for name in present if name.lower() in SPLITS[split]]
        if len(found) > 1:
            raise ConfigError(
                f"data.root={root!r}: {' and '.join(sorted(found))} are both there, and only one "
                f"can be the folder of {split}; rename the other"
            )
        if found:
            folders[split] = found[0]
    return folders


def _others(base: str, folders: dict[str, str]) -> int:
    return sum(name not in folders.values() for name, _ in _subfolders(base))


def _subfolders(folder: str) -> Iterator[tuple[str, str]]:
    """Names and paths of the folders in a folder that are not hidden."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_hidden(entry.name) and is_folder(entry):
                yield entry.name, entry.path


def _classes(root: str, folder: str) -> dict[str, str]:
    """The folders of a folder by the name of their class, which is in Unicode's form NFC."""
    found: dict[str, str] = {}
    for name, _ in _subfolders(folder):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"data.root={root!r}: the name of the class folder {os.fsencode(name)!r} in "
                f"{folder} is not UTF-8; rename it"
            ) from error
        cls = unicodedata.normalize("NFC", name)
        if cls in found:
            raise ConfigError(
                f"data.root={root!r}: two folders in {folder} are called {cls!r}, in two forms of "
                "Unicode that look the same; rename one or join them"
            )
        found[cls] = name
    return found


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or one that systems put beside others."""
    return name.startswith(".") or name.lower() in OF_SYSTEMS


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _kind(name: str) -> str:
    """What a file that is no image is counted as."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if re.fullmatch(r"\.\w{1,15}", suffix) else "without suffix"


def _walk(
    folder: str, base: str, left_out: Counter[str]
) -> Iterator[tuple[list[str], list[tuple[int, int]]]]:
    """The images of a folder and of each one below, in the order of torchvision's ImageFolder:
    names below ``base``, and stamps and sizes.
    """
    known, found = suffixes(), []
    pending = [folder]
    while pending:
        here = pending.pop()
        files = []
        with os.scandir(here) as entries:
            for entry in entries:
                name = entry.name
                if is_hidden(name):
                    left_out[HIDDEN] += 1
                elif is_folder(entry):
                    if not (entry.is_symlink() and _leads_up(entry.path)):
                        pending.append(entry.path)
                elif name[name.rfind(".") :].lower() in known:
                    files.append((name, _status(entry)))
                else:
                    left_out[_kind(name)] += 1
        found.append((here, files))
    start = len(base.rstrip(os.sep)) + 1
    for here, files in sorted(found):
        prefix = here[start:].replace(os.sep, "/")
        prefix += "/" if prefix else ""
        files.sort()
        yield [prefix + name for name, _ in files], [row for _, row in files]


def _leads_up(link: str) -> bool:
    """Whether a link leads to a folder that it is in, so that there is no end of it."""
    return f"{os.path.realpath(os.path.dirname(link))}/".startswith(f"{os.path.realpath(link)}/")


def _status(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        found = entry.stat()
    except OSError:  # a link to nowhere
        return 0, 0
    return stamp_of(found), found.st_size


def content_of(path: str) -> tuple[bytes, os.stat_result]:
    """The bytes of a file, and what it is; an OSError if there are none."""
    # A pipe would wait for somebody who writes to it.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("is no ordinary file")
        return file.read(), status


def stamp_of(found: os.stat_result) -> int:
    """A hash of what tells a file from others and from itself before a change.

    Of its device, inode, size and times of change of the content and of the inode; 0 if it is no
    ordinary file.
    """
    if not stat.S_ISREG(found.st_mode):  # to open a pipe would wait for ever
        return 0
    of = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return hash(of)  # of integers: the same in each process


def _count_beside(folder: str, left_out: Counter[str]) -> None:
    """Count what is in a split's folder and in none of its classes."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                left_out[HIDDEN] += 1
            elif not is_folder(entry):
                is_image = os.path.splitext(entry.name)[1].lower() in suffixes()
                left_out["beside the class folders" if is_image else _kind(entry.name)] += 1

"""Tar shards of other tools, in the layout of WebDataset: which there are, and what is in them."""

import hashlib
import os
import re
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sam_lightning.config.errors import ConfigError, one_line
from sam_lightning.config.progress import progress
from sam_lightning.data.contents import each
from sam_lightning.data.index import BLOCK, FILE, ROW, Index, Shard, SplitIndex
from sam_lightning.data.listing import HIDDEN, SPLITS, WHOLE, is_folder, is_hidden, stamp_of
from sam_lightning.data.mapped import alone
from sam_lightning.data.pixels import suffixes
from sam_lightning.data.source import Names

CHUNK = 2**20
CLASSES = "classnames.txt"  # a class a line, beside shards whose labels are numbers


class Member(NamedTuple):
    """A file in a tar file: its name, where its bytes begin, how many, and their CRC-32."""

    name: str
    offset: int
    length: int
    crc: int


def find(base: str, suffix: str) -> list[str]:
    """The names of the files of a kind in a folder, or in its folders of splits and no others.

    So an archive beside folders of classes, which it was unpacked to, is not taken for a shard. A
    copy of a repository of Hugging Face has a folder ``data``.
    """
    names = {"data", *SPLITS["train"], *SPLITS["val"], *SPLITS["test"]}
    found, pending = [], [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(os.path.join(base, prefix)) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if not is_folder(entry):
                    found += [prefix + entry.name] * entry.name.lower().endswith(suffix)
                elif prefix or entry.name.lower() not in names:
                    return []
                else:
                    pending.append(f"{entry.name}/")
    return sorted(found)


def indexed(base: str, names: list[str], cache: Path) -> Index:
    """The index of tar files, made when they are first read and kept in ``cache``.

    Samples are files of one name up to its first dot: an image, and ``.cls`` with the number or the
    name of its class. All others are left out.

    Raises:
        ConfigError: a file is no tar file or was cut short, a sample has no label or two images, or
            it cannot be told which split a file is of.
    """
    folder = cache / f"shards-{state_of(base, names)}"
    with alone(folder / "index"):
        if not (folder / FILE).is_file():
            _index(base, names).write(folder)
        return Index.read(folder)


def state_of(base: str, names: list[str]) -> str:
    """A hash of which files these are, which differs when one has changed."""
    key = hashlib.blake2b(repr(os.path.realpath(base)).encode(), digest_size=16)
    for name in names:
        stamp = stamp_of(os.stat(os.path.join(base, name)))
        key.update(os.fsencode(f"{name}\0{stamp}\0"))
    return key.hexdigest()


def _index(base: str, names: list[str]) -> Index:
    left_out: Counter[str] = Counter()
    by_split: dict[str, list[str]] = {}
    for name in names:
        by_split.setdefault(split_of(base, name), []).append(name)
    if len(by_split) > 1 and WHOLE in by_split:
        odd = by_split[WHOLE][0]
        raise ConfigError(f"data.root={base!r}: {odd} is not named for a split, and others are")
    texts: dict[str, int] = {}  # the labels, and the turn in which each was found
    found = {}
    with progress("indexing", len(names)) as advance:
        for split, mine in by_split.items():
            found[split] = _read_split(base, mine, left_out, texts, advance)
    classes, numbers = classes_of(base, {*texts})
    turned = np.array([numbers[text] for text in texts])
    splits = {
        split: SplitIndex.of(shards, listed, turned[labels], rows)
        for split, (shards, listed, labels, rows) in found.items()
    }
    return Index(splits, classes, dict(left_out.most_common()))


def _read_split(
    base: str,
    names: list[str],
    left_out: Counter[str],
    texts: dict[str, int],
    advance: Callable[[], None],
) -> tuple[list[Shard], Names, np.ndarray, np.ndarray]:
    """The shards of a split; names, labels by their turn, and ``ROW`` of its images."""
    shards, labels, rows = list[Shard](), array("q"), list[np.ndarray]()
    paths = [os.path.join(base, name) for name in names]

    def images() -> Iterator[str]:
        read = each(lambda i: read_tar(paths[i], names[i]), range(len(names)), CHUNK)
        for path, (shard, members) in zip(paths, read, strict=True):
            samples = [*_samples(path, members, left_out)]
            labels.extend(texts.setdefault(label, len(texts)) for _, label in samples)
            rows.append(np.array([(len(shards), *image[1:]) for image, _ in samples], ROW))
            shards.append(shard)
            advance()
            yield from (f"{shard.name}/{image.name}" for image, _ in samples)

    listed = Names.of(images())
    if not len(listed):
        raise ConfigError(f"data.root: {paths[0]}: no image in it, nor in others of its split")
    return shards, listed, np.array(labels), np.concatenate(rows)


def read_tar(path: str, name: str) -> tuple[Shard, list[tuple[Member, bytes]]]:
    """A tar file as a shard, and its members with the content of small ones."""
    members, digest = [], hashlib.sha256()
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg():
                    content = os.pread(file.fileno(), member.size, member.offset_data)
                    where = (member.offset_data, member.size, zlib.crc32(content))
                    small = content if member.size <= BLOCK else b""
                    members.append((Member(member.name, *where), small))
            file.seek(0)
            size, last = 0, b""
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size, last = size + len(chunk), chunk
            if last[-BLOCK:].strip(b"\0"):
                raise tarfile.ReadError("it was cut short")
    except (OSError, tarfile.TarError) as error:
        raise ConfigError(f"data.root: {path}: is no whole tar file ({one_line(error)})") from error
    return Shard(name, size, digest.hexdigest()), members


def _samples(
    path: str, members: list[tuple[Member, bytes]], left_out: Counter[str]
) -> Iterator[tuple[Member, str]]:
    images: dict[str, Member] = {}
    labels: dict[str, str] = {}
    for member, content in members:
        folder, slash, file = member.name.removeprefix("./").rpartition("/")
        key, _, kind = file.partition(".")
        sample, suffix = folder + slash + key, os.path.splitext(f"-.{kind}")[1].lower()
        if any(map(is_hidden, member.name.removeprefix("./").split("/"))):
            left_out[HIDDEN] += 1
        elif kind.lower() == "cls":
            labels[sample] = content.decode("utf-8", "backslashreplace").strip()
            if not is_class(labels[sample]):
                raise ConfigError(f"data.root: {path}: no class in {member.name}: {content!r}")
        elif suffix in suffixes():
            if sample in images:
                raise ConfigError(f"data.root: {path}: sample {sample} has two images")
            images[sample] = member
        else:
            left_out[suffix or "without suffix"] += 1
    if odd := sorted({*images} ^ {*labels}):
        what = ".cls with its class" if odd[0] in images else "image"
        raise ConfigError(f"data.root: {path}: sample {odd[0]} has no {what}")
    yield from ((images[sample], labels[sample]) for sample in images)


def is_class(label: str) -> bool:
    """Whether a label is the number or the name of a class, and not -1 or nothing."""
    return label.isprintable() and re.fullmatch(r"|-\d+", label) is None


def classes_of(base: str, labels: set[str]) -> tuple[list[str], dict[str, int]]:
    """The names of the classes, and the number of the class of each label."""
    if not all(re.fullmatch(r"\d{1,6}", label) for label in labels):
        names = sorted(labels)
        return names, {label: i for i, label in enumerate(names)}
    numbers = {label: int(label) for label in labels}
    count, file = max(numbers.values(), default=-1) + 1, Path(base, CLASSES)
    names = [str(i) for i in range(count)]
    if file.is_file():
        names = file.read_text(encoding="utf-8").splitlines()
        if len(names) < count or len({*names}) < len(names):
            raise ConfigError(f"data.root: {file}: must have {count} names, each once")
    return names, numbers


def split_of(base: str, name: str) -> str:
    """The split that the name of a file has among its words, or ``WHOLE``."""
    words = re.findall("[a-z]+", name.lower())
    found = [split for split, known in SPLITS.items() if not {*known}.isdisjoint(words)]
    if len(found) > 1:
        raise ConfigError(f"data.root={base!r}: {name} may be of {' or '.join(found)}; rename it")
    return found[0] if found else WHOLE

"""Decoded images, kept for the next run in one file that all processes of a machine share.

``images-KEY.u8`` has the bytes of the images, N x 3 x H x W, and ``images-KEY.json`` what there is
to say of them. The key is a hash of the content of the files and of the size. To read all files
again at each start would be slow, so ``contents-KEY.npy`` has the hashes of files by inode, size
and times; no program can set the time at which an inode changed.
"""

import errno
import fcntl
import hashlib
import json
import os
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam_lightning.config.errors import ConfigError
from sam_lightning.config.progress import log, progress
from sam_lightning.config.schema import one_line
from sam_lightning.data.listing import Files, status_of
from sam_lightning.data.pixels import cover, open_image

VERSION = 1  # of what a file becomes; another one makes all entries anew
DIGEST = 16  # bytes of the hash of a file; zeros for one that cannot be read
CHUNK = 2**25  # bytes decoded before they are written
SMALL = 8_000  # bytes of a file that is decoded without threads, which would wait for the GIL
SETTLED = 2 * 10**9  # ns after which a file that changes has another time
NAMED = 10  # broken files that an error names
_CONTENT = np.dtype([("status", np.int64, 5), ("digest", np.uint8, DIGEST)])


class StoredImages:
    """Image files as ``Unread`` images: decoded when they are needed, and kept.

    Args:
        files: of one split.
        image_size: side to bring all images to; None: they must have one size.
        cache_dir: where to keep them. If that does not work, they are held in memory.
        skip_broken: leave out files that cannot be decoded.
        like: images whose size these must have without ``image_size``; None: those of the first.

    Attributes:
        broken: the names of files that were left out, and why; from ``load`` on.
        sizes: of the images in their files, (least, median, largest) by "width" and "height"; from
            ``load`` on.
    """

    def __init__(
        self,
        files: Files,
        image_size: int | None,
        cache_dir: Path,
        skip_broken: bool = False,
        like: "StoredImages | None" = None,
    ) -> None:
        self.files = files
        self.image_size = image_size
        self.cache_dir = cache_dir
        self.skip_broken = skip_broken
        self.like = like
        self.broken: dict[str, str] = {}
        self.sizes: dict[str, list[int]] = {}

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N x 3 x H x W."""
        return len(self.files.names), 3, *self._first[0]

    @cached_property
    def _first(self) -> tuple[tuple[int, int], str]:
        """Height and width, and without ``image_size`` a file that has them."""
        if self.image_size is not None:
            return (self.image_size, self.image_size), ""
        if self.like is not None:
            return self.like._first
        reasons = []
        for i in range(len(self.files.names)):
            decoded = _decode(path := self.files.path(i), None, None)
            if not isinstance(decoded, str):
                return decoded[0].shape[:2], path
            reasons.append((path, decoded))
            if len(reasons) == NAMED:
                break
        raise ConfigError(_refusal(reasons, len(self.files.names)))

    def load(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Read these images, decoded before or now.

        Raises:
            ConfigError: files are broken, sizes differ without ``image_size``, all images are of
                one colour, or there is no memory for them.
        """
        files = self.files.take(indices)
        digests = self._digests(files)
        key = hashlib.blake2b(digests.tobytes(), digest_size=16)
        key.update(repr((VERSION, self.image_size)).encode())
        path = self.cache_dir / f"images-{key.hexdigest()}.u8"
        found = _opened(path)
        if found is None:
            with self._alone(path) as writable:
                found = _opened(path) or self._decoded(files, digests, path if writable else None)
        images, notes = found
        broken = [(int(i), reason) for i, reason in notes["broken"]]
        if broken and not self.skip_broken:
            named = [(files.path(i), reason) for i, reason in broken]
            raise ConfigError(_refusal(named, len(indices)))
        if notes["colour"] is not None:
            raise ConfigError(
                f"data.root: all {notes['shape'][0]:,} images, such as {files.path(0)}, are of one "
                f"colour, {notes['colour']} in RGB: nothing can be learned from them"
            )
        self.broken = {files.names[i]: reason for i, reason in broken}
        self.sizes = notes["sizes"]
        good = torch.ones(len(indices), dtype=torch.bool)
        good[[i for i, _ in broken]] = False
        return images, good.nonzero().squeeze(1)

    def _digests(self, files: Files) -> np.ndarray:
        """Hashes of the contents of files, uint8 N x ``DIGEST``."""
        place = hashlib.blake2b(os.path.realpath(files.base).encode("utf-8", "replace"))
        index = self.cache_dir / f"contents-{place.hexdigest()[:32]}.npy"
        known = _contents(index)
        where = {row: i for i, row in enumerate(_rows(known["status"]))}
        places = np.array([where.get(row, -1) for row in _rows(files.status)])
        digests = np.zeros((len(places), DIGEST), np.uint8)
        digests[places >= 0] = known["digest"][places[places >= 0]]
        unknown = np.flatnonzero(places < 0).tolist()
        if not unknown:
            return digests
        now = time.time_ns()
        settled = np.zeros(len(digests), bool)

        def read(i: int) -> None:
            try:
                content, status = _content(files.path(i))
            except OSError:
                return  # it stays zero, and is read again to say why
            digests[i] = np.frombuffer(_digest(content), np.uint8)
            settled[i] = status == (*files.status[i],) and status[4] < now - SETTLED

        _each(read, unknown, _is_large(files, unknown), "reading")
        if settled.any():
            new = np.zeros(len(digests), _CONTENT)
            new["status"], new["digest"] = files.status, digests
            _keep_contents(index, np.concatenate([known, new[settled]]))
        return digests

    @contextmanager
    def _alone(self, path: Path) -> Iterator[bool]:
        """Let one process at a time decode for ``path``; yields whether the folder can be used."""
        made = [p for p in (self.cache_dir, *self.cache_dir.parents) if not p.exists()]
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            lock = (self.cache_dir / f"{path.stem}.lock").open("w")
        except OSError as error:
            _warn_unkept(self.cache_dir, error)
            yield False
            return
        try:
            with lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    log.info("another process decodes these images; waiting for it")
                    fcntl.flock(lock, fcntl.LOCK_EX)
                except OSError:
                    pass  # a file system without locks: two may do the same work
                yield True
        finally:
            with suppress(OSError):
                Path(lock.name).unlink()
                for folder in made:  # a refused run leaves nothing
                    folder.rmdir()

    def _decoded(
        self, files: Files, digests: np.ndarray, path: Path | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Decode all files, to a new file at ``path``, or else to memory."""
        if path is not None:
            try:
                with tempfile.TemporaryDirectory(dir=self.cache_dir) as folder:
                    new = Path(folder, path.name)
                    notes = self._decode_to(new, files, digests)
                    if (notes["broken"] and not self.skip_broken) or notes["colour"] is not None:
                        return torch.empty(0), notes
                    _check_written(new, notes)
                    os.replace(new, path)  # readers see all of it or nothing
                    _note(path, notes)
                if (found := _opened(path)) is not None:
                    return found
            except OSError as error:
                _warn_unkept(self.cache_dir, error)
        memory: list[Tensor] = []
        notes = self._decode_to(memory, files, digests)
        return memory[0], notes

    def _decode_to(
        self, target: Path | list[Tensor], files: Files, digests: np.ndarray
    ) -> dict[str, Any]:
        """Decode files, write the good ones in order, and tell about them."""
        height, width = self.shape[2:]
        count = len(files.names)
        size = None if self.image_size is None else (height, width)
        rows = max(1, min(count, CHUNK // (3 * height * width)))
        chunk = np.empty((rows, 3, height, width), np.uint8)
        sizes = np.zeros((count, 2), np.int32)
        broken: list[tuple[int, str]] = []
        lowest, highest = np.full(3, 255), np.zeros(3, int)
        checksum = 0

        def fill(i: int) -> str | None:
            decoded = _decode(files.path(i), size, digests[i])
            if isinstance(decoded, str):
                return decoded
            pixels, sizes[i] = decoded
            if pixels.shape[:2] != (height, width):
                raise ConfigError(
                    f"data.image_size=null: {files.path(i)} has {pixels.shape[1]} x "
                    f"{pixels.shape[0]} pixels and {self._first[1]} has {width} x {height}; "
                    "set data.image_size to bring them to one size"
                )
            chunk[i % rows] = pixels.transpose(2, 0, 1)
            return None

        large = _is_large(files, range(count))
        with (
            _writer(target, (count, 3, height, width), self.image_size) as write,
            progress("decoding", count) as advance,
            ThreadPoolExecutor(_threads()) as pool,
        ):
            for start in range(0, count, rows):
                these = range(start, min(start + rows, count))
                good = []
                for i, reason in zip(these, (pool.map if large else map)(fill, these), strict=True):
                    advance()
                    if reason is None:
                        good.append(i % rows)
                    else:
                        broken.append((i, reason))
                written = chunk[: len(these)] if len(good) == len(these) else chunk[good]
                if len(written):
                    lowest = np.minimum(lowest, written.min((0, 2, 3)))
                    highest = np.maximum(highest, written.max((0, 2, 3)))
                    checksum = zlib.crc32(written.data, checksum)
                    write(written)
        seen = sizes[sizes[:, 0] > 0]
        named = zip(("width", "height"), seen.T, strict=True)
        return {
            "shape": [count - len(broken), 3, height, width],
            "crc": checksum,
            "broken": broken,
            "sizes": {k: [int(f(v)) for f in (np.min, np.median, np.max)] for k, v in named}
            if len(seen)
            else {},
            "colour": lowest.tolist() if len(seen) and (lowest == highest).all() else None,
        }


def _opened(path: Path) -> tuple[Tensor, dict[str, Any]] | None:
    """The images of a file and what is known of them; None if there is none that is whole."""
    try:
        notes = json.loads(path.with_suffix(".json").read_bytes())
        images = _mapped(path, notes["shape"])
        if notes["status"] != _status(path):  # a copy, or something has written to it
            if _checksum(images) != notes["crc"]:
                raise ValueError("its checksum is not that of what was written")
            _note(path, notes)
        return torch.from_numpy(images), notes
    except FileNotFoundError:
        return None
    except MemoryError as error:
        raise _too_large(notes["shape"], None) from error
    except Exception as error:  # a damaged file can be wrong in many ways
        warnings.warn(f"{path} is damaged and made anew: {one_line(error)}", stacklevel=2)
        return None


def _mapped(path: Path, shape: list[int]) -> np.ndarray:
    """A file's bytes as an array: one copy for all processes; what is written stays private."""
    if path.stat().st_size != int(np.prod(shape)):
        raise ValueError(f"{path.stat().st_size} bytes are not {shape}")
    try:
        return np.memmap(path, np.uint8, "c", shape=tuple(shape))
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError from error


def _status(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _note(path: Path, notes: dict[str, Any]) -> None:
    """Write what there is to say of a file, whose checksum was compared just now."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            new = Path(folder, "notes.json")
            new.write_text(json.dumps({**notes, "status": _status(path)}))
            os.replace(new, path.with_suffix(".json"))
    except OSError:
        pass  # a folder that may only be read: the checksum is compared each time


def _checksum(images: np.ndarray) -> int:
    checksum = 0
    for part in np.array_split(images.reshape(-1), max(1, images.size // CHUNK)):
        checksum = zlib.crc32(part.data, checksum)
    return checksum


def _check_written(path: Path, notes: dict[str, Any]) -> None:
    if notes["shape"][0] and _checksum(_mapped(path, notes["shape"])) != notes["crc"]:
        raise OSError(f"{path.name}: what was read back is not what was written")


@contextmanager
def _writer(
    target: Path | list[Tensor], shape: tuple[int, ...], image_size: int | None
) -> Iterator[Callable[[np.ndarray], object]]:
    """What to call with the images in turn, of which there are at most ``shape[0]``."""
    if isinstance(target, Path):
        with target.open("wb") as file:
            _reserve(file.fileno(), int(np.prod(shape)))
            yield lambda images: file.write(images.data)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        return
    try:
        memory = torch.empty(shape, dtype=torch.uint8)
    except RuntimeError as error:
        raise _too_large(shape, image_size) from error
    done = 0

    def write(images: np.ndarray) -> None:
        nonlocal done
        memory[done : done + len(images)] = torch.from_numpy(images)
        done += len(images)

    yield write
    target.append(memory[:done])


def _reserve(descriptor: int, size: int) -> None:
    """Take the room on the disk, so that a full one is noticed now and not after hours."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise  # else there is no such call here


def _too_large(shape: Any, image_size: int | None) -> ConfigError:
    count, _, height, width = shape
    return ConfigError(
        f"data.image_size={image_size or 'null'}: {count} images of {width} x {height} take "
        f"{3 * count * height * width / 1e9:.1f} GB, which are not there; set a smaller one"
    )


def _decode(
    path: str, size: tuple[int, int] | None, digest: np.ndarray | None
) -> tuple[np.ndarray, tuple[int, int]] | str:
    """Pixels, H x W x 3, and width and height before ``size``; or why there are none."""
    try:
        content, _ = _content(path)
        if digest is not None and _digest(content) != digest.tobytes():
            return "it changed while it was read"
        image = open_image(content)
        before = image.size
        return np.asarray(image if size is None else cover(image, size)), before
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more
        return one_line(error)


def _content(path: str) -> tuple[bytes, tuple[int, ...]]:
    """The bytes of a file, and what ``Files.status`` says of it."""
    # A pipe would wait for who writes to it.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = status_of(os.fstat(file.fileno()))
        if not any(status):
            raise OSError("is no ordinary file")
        return file.read(), status


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST).digest()


def _refusal(broken: list[tuple[str, str]], total: int) -> str:
    named = ", ".join(f"{path} ({reason})" for path, reason in broken[:NAMED])
    more = f" and {len(broken) - NAMED:,} more" if len(broken) > NAMED else ""
    return (
        f"data.root: {len(broken):,} of {total:,} images cannot be decoded: {named}{more}; "
        "data.skip_broken=true leaves them out"
    )


def _is_large(files: Files, indices: Any) -> bool:
    """Whether threads make work on these files faster: they do where a file is not tiny."""
    return bool(np.median(files.status[indices[0] : indices[-1] + 1, 2]) > SMALL)


def _threads() -> int:
    has = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has else os.cpu_count() or 1


def _each(call: Callable[[int], None], items: list[int], threads: bool, name: str) -> None:
    with ThreadPoolExecutor(_threads()) as pool, progress(name, len(items)) as advance:
        for _ in (pool.map if threads else map)(call, items):
            advance()


def _contents(index: Path) -> np.ndarray:
    """Status and hash of files whose content is known, as ``_CONTENT``; none if it is damaged."""
    try:
        found: np.ndarray = np.load(index, allow_pickle=False)
        if found.dtype == _CONTENT and found.ndim == 1:
            return found
    except (OSError, ValueError, EOFError):
        pass
    return np.zeros(0, _CONTENT)


def _rows(status: np.ndarray) -> list[bytes]:
    """Each row of an array as what a dictionary can have for a key."""
    rows: list[bytes] = np.ascontiguousarray(status).view(f"V{status.itemsize * 5}")[:, 0].tolist()
    return rows


def _keep_contents(index: Path, contents: np.ndarray) -> None:
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=index.parent) as folder:
            np.save(file := Path(folder, "contents.npy"), contents)
            os.replace(file, index)
    except OSError:
        pass  # they are computed again next time


def _warn_unkept(folder: Path, error: Exception) -> None:
    warnings.warn(f"cannot keep decoded images in {folder}: {one_line(error)}", stacklevel=2)

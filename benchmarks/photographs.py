"""Image files and tar shards: CPU seconds to list and to decode them, memory of two processes."""

import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import ImageFolder
from torchvision.io import decode_jpeg, read_file

from benchmarks.loaders import datasets_loader, installed, webdataset_loader
from benchmarks.timing import Measurement, interleave, ratio, summary
from sam_lightning.data import image_folder
from sam_lightning.data.image_data import ImageData
from sam_lightning.data.index import ARRAYS, BLOCK, ROW, Index, Shard, SplitIndex
from sam_lightning.data.listing import list_images
from sam_lightning.data.packing import Packing, pack

CLASSES = 100
PROCESSES = 2
SHARDS = {
    "shards of the files": Packing(),
    "256-pixel shards": Packing(side=256, format="jpeg"),
    "raw 256-pixel shards": Packing(side=256, format="raw"),
}
# Opens a set, looks at all of it, and says how many kB of memory its images or its index take,
# divided by the processes that share them.
READER = """
import re, sys
from sam_lightning.data import image_folder, share
_, root, side, cache, what = sys.argv
share.SMALL = 0
split = image_folder(root, int(side), cache_dir=cache, view="resize").train
if what == "images":
    split.images.sum()
    start = split.images.data_ptr()
else:
    files = split.stored.files
    arrays = files.arrays if what == "listing" else files.split.arrays
    sum(int(array.sum()) for array in arrays.values())
    start = arrays["text"].ctypes.data
print("ready", flush=True)
sys.stdin.readline()
for part in re.split("^(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read(), flags=re.M)[1:]:
    first, last = (int(address, 16) for address in part.split()[0].split("-"))
    if first <= start < last:
        print(re.search("^Pss: *([0-9]+) kB", part, re.M)[1], flush=True)
sys.stdin.readline()
"""


def measure(quick: bool) -> list[Measurement]:
    """Listing and hashing of small files; memory of processes that read one set."""
    files, images, side, rounds = (2_000, 100, 64, 2) if quick else (100_000, 500, 224, 5)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "listed")
        make(root, files, lambda i: b"%d" % i)
        cases = {"ours": lambda: cpu(listed, root), "os.scandir + stat": lambda: cpu(scanned, root)}
        seconds = interleave(cases, rounds)
        what = f"{files:,} files"
        shards = Path(folder, "shards")
        write_index(shards, root)
        size = (shards / ARRAYS).stat().st_size
        opening = interleave({"shards": lambda: cpu(listed, shards)}, rounds)
        rows = [
            summary("photographs", f"ours: opening shards of {what}", opening["shards"], "CPU s"),
            summary("photographs", f"index of shards of {what}", [size / files], "bytes an image"),
            ratio("photographs", f"listing {what}, ours / os.scandir + stat", *seconds.values()),
            *(
                summary("photographs", f"{n}: listing {what}", s, "CPU s")
                for n, s in seconds.items()
            ),
        ]
        if Path("/proc/self/smaps").exists():
            cache = Path(folder, "cache")
            found = memory(root, side, cache, "listing")
            (file,) = cache.glob("listing-*.bin")
            what = f"{PROCESSES} processes: listing in memory, {files:,} files"
            rows.append(summary("photographs", what, [sum(found) / file.stat().st_size], "copies"))
            root = Path(folder, "images")
            noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            file = Path(folder, "noise.png")
            Pillow.fromarray(noise).save(file)
            make(root, images, lambda i: file.read_bytes())
            image_folder(str(root), side, cache_dir=str(cache)).train.images.sum()
            copies = sum(memory(root, side, cache, "images")) / (images * 3 * side**2)
            what = f"{PROCESSES} processes: images in memory, {images} of {side} x {side}"
            rows.append(summary("photographs", what, [copies], "copies"))
            copies = sum(memory(shards, side, cache, "index")) / size
            what = f"{PROCESSES} processes: index of shards in memory, {files:,} images"
            rows.append(summary("photographs", what, [copies], "copies"))
        return rows + decoding(Path(folder, "photographs"), 4 if quick else 128, 2 * rounds)


def decoding(root: Path, count: int, rounds: int) -> list[Measurement]:
    """Random resized crops of JPEGs to 224 pixels, by ours and by torchvision's pipeline."""
    write_photographs(root, count)
    listing = list_images(str(root))
    for kind, how in SHARDS.items():
        pack(listing, root.parent / kind, how)
    view = T.Compose([T.RandomResizedCrop(224), T.PILToTensor()])
    theirs = DataLoader(ImageFolder(str(root / "train"), view), count)
    files = [path for path, _ in ImageFolder(str(root / "train")).samples]

    def decode_only() -> None:
        for file in files:
            decode_jpeg(read_file(file))

    cases: dict[str, Callable[[], object]] = {
        "ours": partial(list, loader(root, count)),
        **{kind: partial(list, loader(root.parent / kind, count)) for kind in SHARDS},
        "PIL + torchvision": lambda: [*theirs],
        "libjpeg-turbo alone": decode_only,
    }
    others: dict[str, Callable[[], object]] = {}  # by the name of ours that reads the same files
    if (package := installed("webdataset")) is not None:
        for kind in SHARDS:
            folder = root.parent / kind
            others[f"{kind} / webdataset"] = partial(
                list, webdataset_loader(package, folder, view, count)
            )
    if (package := installed("datasets")) is not None:
        for kind in ("shards of the files", "256-pixel shards"):
            unpacked = extracted(root.parent / kind)
            others[f"{kind} / datasets"] = partial(
                list, datasets_loader(package, unpacked, view, count)
            )
    seconds = interleave(cases | others, rounds, clock=time.process_time)
    speeds = {name: [count / s for s in values] for name, values in seconds.items()}
    ours = speeds.pop("ours")
    what = "random resized crops of JPEGs of 500 x 375 to 224"
    beside = {name: speeds.pop(name) for name in others}
    packed = {kind: speeds.pop(kind) for kind in SHARDS}
    peer = "PIL + torchvision"
    return [
        *(
            ratio("photographs", f"{n} / {peer} (images/CPU s): {what}", v, speeds[peer])
            for n, v in packed.items()
        ),
        *(
            ratio("photographs", f"{n} (images/CPU s): {what}", packed[n.partition(" / ")[0]], v)
            for n, v in beside.items()
        ),
        *(
            ratio("photographs", f"ours / {n} (images/CPU s): {what}", ours, v)
            for n, v in speeds.items()
        ),
        summary("photographs", f"ours: {what}", ours, "images/CPU s"),
    ]


def loader(root: Path, batch_size: int) -> Iterable[object]:
    """Ours, of random crops, without augmentation."""
    source = partial(image_folder, str(root), 224, str(root / "cache"), view="random_resized_crop")
    options: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3, "augment": {}, "num_workers": 0}
    data = ImageData(source, batch_size, pixels_of=["train"], **options)
    data.read()
    return data.train_loader()


def extracted(shards: Path) -> list[Path]:
    """The image files that are in the shards of a folder, unpacked."""
    for file in shards.glob("train-*.tar"):
        with tarfile.open(file) as tar:
            tar.extractall(shards / "files", filter="data")
    return sorted((shards / "files").glob("*.jpg"))


def write_index(folder: Path, root: Path) -> None:
    """The index of a folder of images as if it was packed, with empty shards of the right size."""
    folder.mkdir()
    listing, splits = list_images(str(root)), {}
    for name, files in listing.splits.items():
        shard = Shard(f"{name}-000000.tar", 4 * BLOCK * len(files.names), "00" * 32)
        with (folder / shard.name).open("wb") as file:
            file.truncate(shard.size)
        rows = np.zeros(len(files.names), ROW)
        rows["crc"] = np.arange(len(rows))
        rows["offset"], rows["length"] = 4 * BLOCK * rows["crc"].astype(np.int64), BLOCK
        splits[name] = SplitIndex.of([shard], files.names, files.labels, rows)
    Index(splits, listing.classes, {}).write(folder)


def write_photographs(root: Path, count: int) -> None:
    """Parts of scikit-learn's two photographs, one class for each."""
    random = np.random.default_rng(0)
    for cls, image in enumerate(load_sample_images().images):
        for i in range(count // 2):
            top, left = (
                random.integers(size - part + 1)
                for size, part in zip(image.shape, (375, 500), strict=False)
            )
            for split in ("train", "test")[: 2 if i == 0 else 1]:
                file = root / split / str(cls) / f"{i}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                part = image[top : top + 375, left : left + 500]
                Pillow.fromarray(part).save(file, quality=90)


def make(root: Path, files: int, content: Callable[[int], bytes]) -> None:
    """Write files in ``train`` and one of each class in ``test``."""
    for cls in range(CLASSES):
        for split, count in (("train", files // CLASSES), ("test", 1)):
            folder = root / split / f"class_{cls:03}"
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"photograph_{i:06}.jpg").write_bytes(content(i))


def cpu(call: Callable[[Path], object], root: Path) -> float:
    """CPU seconds of this process."""
    started = time.process_time()
    call(root)
    return time.process_time() - started


def listed(root: Path) -> int:
    """Names, labels and states of all files, by ours."""
    return len(image_folder(str(root), 224, str(root.parent / "cache")).train)


def scanned(root: Path) -> int:
    """The least that it takes to know all files and whether they changed."""
    pending, count = [str(root)], 0
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    pending.append(entry.path)
                else:
                    count += entry.stat().st_size > 0
    return count


def memory(root: Path, side: int, cache: Path, what: str) -> list[int]:
    """Bytes that images or index take in each of the processes, shared ones divided among them."""
    command = [sys.executable, "-c", READER, str(root), str(side), str(cache), what]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(PROCESSES)
    ]
    for process in running:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("a process could not read the images")
    found = []
    for process in running:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        found.append(1024 * int(process.stdout.readline()))
    for process in running:
        process.communicate("\n")
    return found

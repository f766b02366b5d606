"""ImageNet in small, in every layout that people have, and in full size without its pixels."""

import csv
import hashlib
import io
import os
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from sam_lightning.data.index import Index, Shard, SplitIndex, first_blocks, smallest
from sam_lightning.data.source import Names

WNIDS = ["n01440764", "n02105855", "n04067472"]
DEVKIT = "ILSVRC2012_devkit_t12"
FULL = {"train": 1_281_167, "val": 50_000}


def arranged(root, train=4, val=3, side=(40, 60)):
    """The layout of pytorch/examples; the classes of the validation images take turns."""
    rng = np.random.default_rng(0)

    def write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (*rng.integers(*side, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, "JPEG")

    for wnid in WNIDS:
        for i in range(train):
            write(root / "train" / wnid / f"{wnid}_{i}.JPEG")
    for i in range(val * len(WNIDS)):
        write(root / "val" / WNIDS[2 - i % 3] / f"ILSVRC2012_val_{i + 1:08}.JPEG")
    return root


def flattened(root, out):
    """The same with its validation images in one folder, and their classes in their order."""
    out.mkdir(parents=True)
    shutil.copytree(root / "train", out / "train")
    (out / "val").mkdir()
    files = sorted((root / "val").rglob("*.JPEG"), key=lambda path: path.name)
    for path in files:
        shutil.copy(path, out / "val")
    return [path.parent.name for path in files]


def kaggle(root, out):
    """Kaggle's download, with its test images."""
    inner = out / "ILSVRC" / "Data" / "CLS-LOC"
    wnids = flattened(root, inner)
    rows = [(f"ILSVRC2012_val_{i:08}", f"{w} 1 2 3 4 {w} 5 6 7 8 ") for i, w in enumerate(wnids, 1)]
    with (out / "LOC_val_solution.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerows([("ImageId", "PredictionString"), *reversed(rows)])
    (inner / "test").mkdir()
    shutil.copy(next((inner / "val").iterdir()), inner / "test" / "ILSVRC2012_test_1.JPEG")
    return out


def devkit(folder, wnids):
    """The folder of the devkit: its classes have another order than their names."""
    data = folder / DEVKIT / "data"
    data.mkdir(parents=True)
    order = [WNIDS[1], WNIDS[2], WNIDS[0], "n00001740"]  # the last one has the others below it
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("gloss", object)]
    synsets = np.zeros((4, 1), [*fields, ("num_children", object)])
    for i, wnid in enumerate(order):
        synsets[i, 0] = (i + 1, wnid, f"{wnid} a, b", "a thing", 3 if i == 3 else 0)
    savemat(data / "meta.mat", {"synsets": synsets})
    numbers = "".join(f"{order.index(wnid) + 1}\n" for wnid in wnids)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(numbers)
    return folder / DEVKIT


def archives(root, out, monkeypatch):
    """The three archives as they are downloaded, with their sums told to torchvision."""
    from torchvision.datasets import imagenet

    out.mkdir()
    wnids = flattened(root, out / "files")
    with tarfile.open(out / "ILSVRC2012_img_train.tar", "w") as tar:
        for folder in sorted((root / "train").iterdir()):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for path in folder.iterdir():
                    inner.add(path, path.name)
            member = tarfile.TarInfo(f"{folder.name}.tar")
            member.size = len(content.getvalue())
            tar.addfile(member, io.BytesIO(content.getvalue()))
    with tarfile.open(out / "ILSVRC2012_img_val.tar", "w") as tar:
        for path in (out / "files" / "val").iterdir():
            tar.add(path, path.name)
    with tarfile.open(out / f"{DEVKIT}.tar.gz", "w:gz") as tar:
        tar.add(devkit(out / "files", wnids), DEVKIT)
    shutil.rmtree(out / "files")
    for key, (name, _) in imagenet.ARCHIVE_META.items():
        md5 = hashlib.md5((out / name).read_bytes()).hexdigest()
        monkeypatch.setitem(imagenet.ARCHIVE_META, key, (name, md5))
    return out


def full_size(out, counts=FULL, classes=1000):
    """The index of a packed set of the size of ImageNet, whose rows share ten images.

    The shards of a split are one file.
    """
    out.mkdir()
    rng = np.random.default_rng(0)
    splits = {}
    for name, count in counts.items():
        first, members = out / f"{name}-000000.tar", []
        with tarfile.open(first, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(10):
                small = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
                content = io.BytesIO()
                small.resize((500, 375)).save(content, "JPEG")
                member = tarfile.TarInfo(f"{i:06}.jpg")
                member.size = len(content.getvalue())
                members.append((tar.offset + 512, member.size, zlib.crc32(content.getvalue())))
                tar.addfile(member, io.BytesIO(content.getvalue()))
        sha256 = hashlib.sha256(first.read_bytes()).hexdigest()
        shards = [
            Shard(f"{name}-{i:06}.tar", first.stat().st_size, sha256)
            for i in range(-(-count // 2300))  # images in 256 MB
        ]
        for shard in shards[1:]:
            os.link(first, out / shard.name)
        label = np.arange(count) * classes // count
        offset, length, crc = np.array(members)[np.arange(count) % len(members)].T
        shard_of = rng.permutation(np.arange(count) % len(shards))
        arrays = {
            "block": smallest(first_blocks(shards)[shard_of] + offset // 512),
            "length": smallest(length),
            "crc": crc.astype(np.uint32),
            "label": smallest(label),
        }
        names = (f"{name}/n{c:08}/n{c:08}_{i}.JPEG" for i, c in enumerate(label.tolist()))
        sizes = {"width": [500] * 3, "height": [375] * 3}
        splits[name] = SplitIndex(shards, arrays | Names.of(names).arrays, sizes)
    Index(splits, [f"n{c:08}" for c in range(classes)], {}).write(Path(out))
    return out

"""Data sets as files in their original layout."""

import gzip
import hashlib
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

from sam_lightning.config.errors import ConfigError

NOWHERE = "http://127.0.0.1:9/"


def one_line_error(function, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root, monkeypatch, dataset, label_key):
    """Random files in the layout of the archive; tells ``dataset`` only their md5 sums."""
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    written = {}
    for files in ("train_list", "test_list"):
        sums = []
        for name, _ in getattr(dataset, files):
            data = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
            labels = rng.integers(0, 10, 4).tolist()
            (folder / name).write_bytes(pickle.dumps({"data": data, label_key: labels}, protocol=2))
            written.setdefault(files, []).append((data, labels))
            sums.append([name, md5(folder / name)])
        monkeypatch.setattr(dataset, files, sums)
    meta = folder / dataset.meta["filename"]
    meta.write_bytes(pickle.dumps({dataset.meta["key"]: [f"class{i}" for i in range(10)]}))
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": md5(meta)})
    monkeypatch.setattr(dataset, "url", NOWHERE)
    return folder, written


def write_fashion_mnist(root, monkeypatch, zipped):
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    written, sums = {}, []
    for name, _ in datasets.FashionMNIST.resources:
        n = 6 if name.startswith("train") else 3
        shape = (n, 28, 28) if "images" in name else (n,)
        values = rng.integers(0, 10 if len(shape) == 1 else 256, shape, dtype=np.uint8)
        magic = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
        content = magic + values.tobytes()
        written[name.split("-ubyte")[0]] = values
        file = raw / (name if zipped else name.removesuffix(".gz"))
        file.write_bytes(gzip.compress(content) if zipped else content)
        sums.append((name, md5(file)))
    monkeypatch.setattr(datasets.FashionMNIST, "resources", sums)
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [NOWHERE])
    return raw, written


def write_images(root, side=12, splits=("train", "test"), seed=0):
    """Noise as PNG files of many kinds, some a folder deeper, with files that are no images."""
    rng = np.random.default_rng(seed)
    modes = ["RGB", "L", "RGBA", "P"]
    for split in splits:
        for cls in ("zebra", "ant", "Bee"):
            folder = root / split / cls / "deeper"
            folder.mkdir(parents=True)
            (folder / "notes.txt").write_text("no image")
            for i in range(4):
                pixels = rng.integers(0, 256, (side, side + 3, 3), dtype=np.uint8)
                name = f"{i}.PNG" if i % 2 else f"{i}.png"
                where = folder if i == 3 else folder.parent
                Image.fromarray(pixels).convert(modes[i]).save(where / name, format="PNG")
    return root


def assert_equals_torchvision(split, folder, transform=None):
    steps = [transform, transforms.PILToTensor()] if transform else [transforms.PILToTensor()]
    reference = datasets.ImageFolder(folder, transforms.Compose(steps))
    assert split.images.is_contiguous()
    assert split.images.dtype == torch.uint8
    assert torch.equal(split.images, torch.stack([image for image, _ in reference]))
    assert split.labels.dtype == torch.int64
    assert split.labels.tolist() == reference.targets

"""Every source on files in its original layout; torchvision's own readers are the reference."""

import json
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

from image_files import (
    assert_equals_torchvision,
    one_line_error,
    write_cifar,
    write_fashion_mnist,
    write_images,
)
from sam_lightning.data import cache as cache_module
from sam_lightning.data import cifar10, cifar100, digits, fashion_mnist, image_folder
from sam_lightning.data.source import stratified_split

CIFAR = [(cifar10, datasets.CIFAR10, "labels"), (cifar100, datasets.CIFAR100, "fine_labels")]


@pytest.mark.parametrize(("source", "dataset", "key"), CIFAR)
def test_cifar(tmp_path, monkeypatch, source, dataset, key):
    _, written = write_cifar(tmp_path, monkeypatch, dataset, key)
    read = source(str(tmp_path))
    assert read.classes == [f"class{i}" for i in range(10)]
    assert read.val is None
    for split, name in ((read.train, "train_list"), (read.test, "test_list")):
        data = np.concatenate([d for d, _ in written[name]])
        assert split.images.dtype == torch.uint8
        assert split.images.is_contiguous()
        assert split.images.shape == (len(data), 3, 32, 32)
        for n, channel, y, x in [(0, 0, 0, 0), (1, 2, 31, 30), (3, 1, 7, 0), (2, 0, 0, 9)]:
            # a row holds 1024 red, 1024 green and 1024 blue values, each image line by line
            assert split.images[n, channel, y, x] == data[n, channel * 1024 + y * 32 + x]
        assert split.labels.dtype == torch.int64
        assert split.labels.tolist() == [x for _, labels in written[name] for x in labels]
        assert len(split) == len(data)


@pytest.mark.parametrize(("source", "dataset", "key"), CIFAR)
@pytest.mark.parametrize("download", [False, True])
def test_damaged_or_missing_cifar_files(tmp_path, monkeypatch, source, dataset, key, download):
    folder, _ = write_cifar(tmp_path, monkeypatch, dataset, key)
    advice = "check the network" if download else "data.download=true"
    file = folder / dataset.train_list[0][0]
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    message = one_line_error(source, str(tmp_path), download=download)
    assert f"data.root={str(tmp_path)!r}" in message
    assert advice in message
    file.unlink()
    assert advice in one_line_error(source, str(tmp_path), download=download)
    assert advice in one_line_error(source, str(tmp_path / "new"), download=download)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("zipped", [False, True])
def test_fashion_mnist(tmp_path, monkeypatch, zipped):
    _, written = write_fashion_mnist(tmp_path, monkeypatch, zipped)
    read = fashion_mnist(str(tmp_path), download=zipped)
    assert len(read.classes) == 10
    for split, name in ((read.train, "train"), (read.test, "t10k")):
        assert split.images.dtype == torch.uint8
        assert np.array_equal(split.images.numpy(), written[f"{name}-images-idx3"][:, None])
        assert split.labels.dtype == torch.int64
        assert split.labels.tolist() == written[f"{name}-labels-idx1"].tolist()


def test_damaged_fashion_mnist_files(tmp_path, monkeypatch):
    raw, _ = write_fashion_mnist(tmp_path / "zipped", monkeypatch, zipped=True)
    file = raw / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    message = one_line_error(fashion_mnist, str(tmp_path / "zipped"))
    assert "data.root=" in message
    assert "check the network" in message
    raw, _ = write_fashion_mnist(tmp_path / "plain", monkeypatch, zipped=False)
    file = raw / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    assert "data.root=" in one_line_error(fashion_mnist, str(tmp_path / "plain"))


def enlarge(scan):
    """Bilinear interpolation from 8 x 8 to 32 x 32, pixel centres at half integers."""
    position = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    low = np.minimum(position.astype(int), 6)
    weight = np.zeros((32, 8))
    weight[np.arange(32), low] = 1 - (position - low)
    weight[np.arange(32), low + 1] = position - low
    return weight @ scan @ weight.T


def test_digits():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    read = digits()
    assert read.classes == [str(i) for i in range(10)]
    images = torch.cat([read.train.images, read.test.images])
    labels = torch.cat([read.train.labels, read.test.labels])
    assert images.shape == (1797, 1, 32, 32)
    assert images.dtype == torch.uint8
    for cls in range(10):
        scans = bunch.images[bunch.target == cls] * 255 / 16
        expected = torch.tensor(np.stack([enlarge(scan) for scan in scans])).flatten(1).float()
        ours = images[labels == cls].flatten(1).float()
        same = torch.cdist(expected, ours, p=torch.inf) <= 0.501  # rounding
        assert same.shape == (len(scans), len(scans))
        assert same.any(0).all()
        assert same.any(1).all()
        assert abs((read.test.labels == cls).sum().item() - 0.2 * len(scans)) < 1
    assert len(read.test) == 359
    again = digits()
    assert torch.equal(again.test.images, read.test.images)


@pytest.mark.parametrize("count", [0, 1, 7, 50, 99, 100])
def test_stratified_split_gives_every_class_its_share(count):
    labels = [0] * 61 + [1] * 30 + [3] * 8 + [4]  # none of class 2
    random.Random(0).shuffle(labels)
    labels = torch.tensor(labels)
    drawn, rest = stratified_split(labels, count, seed=3)
    assert len(drawn) == count
    assert sorted(drawn.tolist() + rest.tolist()) == list(range(100))
    assert drawn.tolist() == sorted(drawn.tolist())
    assert rest.tolist() == sorted(rest.tolist())
    for cls, size in enumerate([61, 30, 0, 8, 1]):
        assert abs((labels[drawn] == cls).sum().item() - size * count / 100) < 1
    if 1 < count < 99:
        assert drawn.tolist() == stratified_split(labels, count, seed=3)[0].tolist()
        assert drawn.tolist() != stratified_split(labels, count, seed=4)[0].tolist()


def test_stratified_split_draws_every_example_equally_often():
    labels = torch.tensor([0] * 12 + [1] * 6)
    hits = torch.zeros(18)
    for seed in range(3000):
        hits[stratified_split(labels, 6, seed)[0]] += 1
    assert (hits / 3000 - 1 / 3).abs().max() < 0.04  # 4.6 standard deviations


@pytest.mark.parametrize("side", [12, 80])  # files of less and of more than 8 kB
@pytest.mark.parametrize("image_size", [None, 9])
def test_image_folder_is_torchvisions(tmp_path, side, image_size):
    root = write_images(tmp_path / "photos", side, ("train", "val", "test"))
    read = image_folder(str(root), image_size, cache_dir=str(tmp_path / "cache"))
    assert read.classes == ["Bee", "ant", "zebra"]
    transform = image_size and transforms.Compose(
        [transforms.Resize(image_size), transforms.CenterCrop(image_size)]
    )
    for name in ("train", "val", "test"):
        assert_equals_torchvision(getattr(read, name), root / name, transform)


def test_val_is_the_test_set_where_there_is_no_test(tmp_path):
    root = write_images(tmp_path / "photos", splits=("train", "val"))
    read = image_folder(str(root), cache_dir=str(tmp_path / "cache"))
    assert read.val is None
    assert_equals_torchvision(read.test, root / "val")


def test_image_folder_decodes_once_and_notices_changes(tmp_path, monkeypatch):
    root, cache = write_images(tmp_path / "photos"), tmp_path / "deep" / "cache"
    opened = []
    original = cache_module.open_image
    monkeypatch.setattr(cache_module, "open_image", lambda c: opened.append(c) or original(c))

    def read(image_size=None):
        opened.clear()
        source = image_folder(str(root), image_size, cache_dir=str(cache))
        assert source.train.names[0] == "train/Bee/0.png"
        assert not opened  # by now
        assert len(source.train.images) == len(source.test.images) == 12
        return source

    first = read()
    assert len({*opened}) == len([p for p in root.rglob("*") if p.suffix.lower() == ".png"])
    second = read()
    assert not opened
    assert torch.equal(second.train.images, first.train.images)
    assert torch.equal(second.test.labels, first.test.labels)
    kept = sorted(file.suffix for file in cache.iterdir())
    assert kept == [".json", ".json", ".u8", ".u8"]  # and nothing temporary

    assert read(image_size=8).train.images.shape[2:] == (8, 8)
    assert opened

    changed = root / "train" / "ant" / "0.png"
    stat = changed.stat()
    Image.fromarray(np.zeros((12, 15, 3), dtype=np.uint8)).save(changed)
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert_equals_torchvision(read().train, root / "train")
    assert opened
    (root / "train" / "ant" / "0.png").rename(root / "train" / "ant" / "9.png")
    assert_equals_torchvision(read().train, root / "train")


def test_the_default_cache_is_in_the_current_folder(tmp_path, monkeypatch):
    root = write_images(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    assert len(image_folder(str(root)).train.images) == 12
    assert len(list((tmp_path / "data" / "cache").glob("*.u8"))) == 1


@pytest.mark.parametrize("damage", ["truncated", "text", "other"])
def test_a_damaged_cache_is_made_anew(tmp_path, damage):
    root, cache = write_images(tmp_path / "photos"), tmp_path / "cache"
    right = image_folder(str(root), cache_dir=str(cache)).train.images.clone()
    (file,) = cache.glob("*.u8")
    notes = file.with_suffix(".json")
    if damage == "other":
        notes.write_text(json.dumps({"shape": [12, 3, 12]}))
    else:
        file.write_bytes(file.read_bytes()[:500] if damage == "truncated" else b"hello")
    with pytest.warns(UserWarning, match="damaged"):
        read = image_folder(str(root), cache_dir=str(cache)).train.images
    assert torch.equal(read, right)
    assert file.read_bytes() == right.numpy().tobytes()
    notes.unlink()  # as if the process had ended before it wrote them
    file.write_bytes(b"hello")
    assert torch.equal(image_folder(str(root), cache_dir=str(cache)).train.images, right)


def test_an_unwritable_cache_only_warns(tmp_path):
    root = write_images(tmp_path / "photos")
    (tmp_path / "file").write_text("not a folder")
    read = image_folder(str(root), cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="cannot keep decoded images"):
        assert len(read.test.images) == 12
    assert_equals_torchvision(read.test, root / "test")


def break_image_folder(root, how):
    """Returns what the error has to name."""
    odd = root / "train" / "ant" / "1.PNG"
    if how == "not an image":
        odd.write_text("not an image")
        return odd
    if how == "truncated":
        odd.write_bytes(odd.read_bytes()[:60])
        return odd
    if how == "size":
        Image.new("RGB", (5, 4)).save(odd)
        return odd
    if how == "test size":
        Image.new("RGB", (5, 4)).save(root / "test" / "zebra" / "0.png")
        return root / "test" / "zebra" / "0.png"
    if how == "empty class":
        (root / "test" / "cat").mkdir()
        return "cat"
    if how == "extra class":
        (root / "test" / "ant").rename(root / "test" / "cat")
        return "'ant'"
    os.rename(root / how, root.parent / how)
    return root / how


def read_folder(*args, **options):
    source = image_folder(*args, **options)
    return [split.images for split in (source.train, source.test, source.val) if split]


BROKEN = ["not an image", "truncated", "size", "test size", "empty class", "extra class"]


@pytest.mark.parametrize("how", [*BROKEN, "train"])
def test_image_folder_names_what_is_wrong(tmp_path, how):
    root = write_images(tmp_path / "photos")
    named = break_image_folder(root, how)
    message = one_line_error(read_folder, str(root), cache_dir=str(tmp_path / "cache"))
    assert str(named) in message
    assert ("set data.image_size" if "size" in how else "data.root") in message
    assert how == "test size" or not (tmp_path / "cache").exists()


def test_image_size_must_be_positive(tmp_path):
    assert "data.image_size=0" in one_line_error(image_folder, str(tmp_path), image_size=0)

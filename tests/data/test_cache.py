"""The copy of decoded images: known by content, decoded once, one in memory for all processes."""

import csv
import errno
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from image_files import assert_equals_torchvision, one_line_error, write_images
from runs import command, configuration, run, summary
from sam_lightning.config.conf import CONF
from sam_lightning.config.errors import ConfigError
from sam_lightning.data import cache, contents, image_folder, listing
from sam_lightning.data.image_data import ImageData, build_data
from sam_lightning.data.source import read_splits
from sam_lightning.inference.load import data_of, load


@pytest.fixture
def decoded(monkeypatch):
    """The contents that were decoded."""
    seen = []
    original = cache.open_image
    monkeypatch.setattr(cache, "open_image", lambda c: seen.append(c) or original(c))
    return seen


@pytest.fixture
def read(monkeypatch):
    """The files that were read."""
    seen = []
    original = listing.content_of
    for module in (listing, contents):
        monkeypatch.setattr(module, "content_of", lambda p: seen.append(p) or original(p))
    return seen


def photos(tmp_path, **options):
    options = {"cache_dir": str(tmp_path / "cache"), **options}
    return image_folder(str(tmp_path / "photos"), **options)


def test_sets_of_the_same_names_sizes_and_times_are_told_apart(tmp_path):
    """As those that are unpacked from archives with times of 0 are."""
    for seed in (0, 1):
        root = tmp_path / f"{seed}" / "photos"
        rng = np.random.default_rng(seed)
        for name in ("train/a", "train/b", "test/a", "test/b"):
            (root / name).mkdir(parents=True)
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / "0.bmp")
            os.utime(root / name / "0.bmp", (0, 0))
        source = image_folder(str(root), cache_dir=str(tmp_path / "cache"))
        assert_equals_torchvision(source.train, root / "train")


def test_unchanged_files_are_read_once_and_changed_ones_are_noticed(
    tmp_path, read, decoded, monkeypatch
):
    monkeypatch.setattr(contents, "SETTLED", 0)  # these files are new
    root = write_images(tmp_path / "photos")
    first = photos(tmp_path).train.images.clone()
    assert len(read) == 2 * len(first) + 1  # to hash and to decode, and the first for its size
    read.clear()
    assert torch.equal(photos(tmp_path).train.images, first)
    assert read == []
    file = root / "train" / "ant" / "0.png"
    before = file.stat()
    content = bytearray(file.read_bytes())
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file, compress_level=0)
    new = file.read_bytes()
    for size in {len(content)} if len(new) <= len(content) else set():
        file.write_bytes(new + bytes(size - len(new)))  # as long as before
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # and as old
    assert_equals_torchvision(photos(tmp_path).train, root / "train")
    assert [p for p in read if p == str(file)]
    index = next((tmp_path / "cache").glob("contents-*.npy"))
    index.write_bytes(b"damaged")
    read.clear()
    decoded.clear()
    assert len(photos(tmp_path).train.images) == 12
    assert len(read) == len(first)
    assert decoded == []


def test_only_images_that_are_used_are_decoded(tmp_path, decoded):
    write_images(tmp_path / "photos", splits=("train", "test", "val"))
    options = ["data=image_folder", f"data.root={tmp_path}/photos"]
    options += [f"data.cache_dir={tmp_path}/cache", "data.mean=[0,0,0]", "data.std=[1,1,1]"]
    cfg = configuration(*options, "data.subset=5", "test=false")
    data = build_data(cfg, ImageData)
    data.read()
    assert (len(data.train), len(data.val), len(data.test)) == (5, 12, 12)
    assert len(decoded) == 5 + 12 + 1  # and the first, for its size
    decoded.clear()
    cfg = configuration(*options, "data.subset=5", "test=true")
    data = build_data(cfg, ImageData)
    data.read()
    assert len(decoded) == 12  # the size is that of the training images, which are kept


def test_val_size_and_subset_are_no_copies(tmp_path):
    write_images(tmp_path / "photos")
    options = [f"data.root={tmp_path}/photos", f"data.cache_dir={tmp_path}/cache"]
    data = build_data(configuration("data=image_folder", *options, "data.val_size=4"), ImageData)
    data.read()
    assert isinstance(data.train.stored, torch.Tensor)
    assert data.train.stored.data_ptr() == data.val.stored.data_ptr()
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), rel=1e-12)
    batch = next(iter(data.train_loader()))[0]
    assert sorted(map(hash, (i.numpy().tobytes() for i in batch))) == sorted(
        map(hash, (i.numpy().tobytes() for i in data.train.images))
    )


READER = """
import re, sys
from sam_lightning.data import image_folder
images = image_folder(sys.argv[1], 256, cache_dir=sys.argv[2]).train.images
images.sum()
print("ready", flush=True)
sys.stdin.readline()
maps = re.split("^(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read(), flags=re.M)
(mine,) = [part for part in maps if ".u8" in part.partition("\\n")[0]]
keys = ("Rss", "Pss", "Private_Dirty")
print(*(re.search(f"^{key}: *([0-9]+) kB", mine, re.M)[1] for key in keys), flush=True)
sys.stdin.readline()
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what is shared")
def test_two_processes_hold_one_copy(tmp_path):
    write_images(tmp_path / "photos", 40)
    arguments = [sys.executable, "-c", READER, tmp_path / "photos"]
    arguments.append(tmp_path / "cache")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(arguments, **pipes) for _ in range(2)]  # which decode at once
    for process in both:
        assert process.stdout.readline() == "ready\n"
    found = []
    for process in both:  # while the other lives
        process.stdin.write("\n")
        process.stdin.flush()
        found.append([*map(int, process.stdout.readline().split())])
    for process in both:
        process.communicate("\n")
        assert process.returncode == 0
    size = 12 * 3 * 256 * 256 / 1024
    assert len([*(tmp_path / "cache").glob("*.u8")]) == 1
    for resident, _, private in found:
        assert resident >= size
        assert private == 0
    assert found[0][1] <= 0.55 * size + 8  # half of one copy each


def test_processes_that_start_at_once_decode_once(tmp_path):
    write_images(tmp_path / "photos", 60)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        counts = pool.map(_count_decoded, [tmp_path] * 4, chunksize=1)
    assert sorted(count > 1 for count in counts) == [False, False, False, True]
    assert {p.suffix for p in (tmp_path / "cache").iterdir()} == {".json", ".u8"}


def _count_decoded(tmp_path):
    torch.set_num_threads(1)
    seen = []
    original = cache.open_image
    cache.open_image = lambda content: seen.append(content) or original(content)
    assert_equals_torchvision(photos(tmp_path).train, tmp_path / "photos" / "train")
    return len(seen)


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync", "replace"])
def test_a_full_disk_only_warns(tmp_path, monkeypatch, call):
    root = write_images(tmp_path / "photos")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.warns(UserWarning, match="cannot keep decoded images in .*No space left"):
        images = photos(tmp_path).train.images
    monkeypatch.undo()
    assert not (tmp_path / "cache").exists()
    assert torch.equal(images, photos(tmp_path).train.images)
    assert_equals_torchvision(photos(tmp_path).train, root / "train")


def test_a_cache_that_was_copied_is_compared_with_its_checksum(tmp_path, decoded):
    write_images(tmp_path / "photos")
    right = photos(tmp_path).train.images.clone()
    (tmp_path / "cache").rename(tmp_path / "old")
    (tmp_path / "cache").mkdir()
    for file in (tmp_path / "old").iterdir():
        (tmp_path / "cache" / file.name).write_bytes(file.read_bytes())
    decoded.clear()
    assert torch.equal(photos(tmp_path).train.images, right)
    assert decoded == []


# ------------------------------------------------------------------------------------ broken files


def break_some(root):
    (root / "train" / "ant" / "0.png").write_bytes(b"no image")
    (root / "train" / "ant" / "8.jpg").symlink_to("nowhere")
    for i in range(11):
        (root / "train" / "zebra" / f"9{i}.png").write_bytes(b"")
    return {"train/ant/0.png", "train/ant/8.jpg", *(f"train/zebra/9{i}.png" for i in range(11))}


def test_all_broken_files_are_said_at_once(tmp_path):
    root = write_images(tmp_path / "photos")
    break_some(root)
    said = one_line_error(lambda: photos(tmp_path).train.images)
    assert said.startswith("data.root: 13 of 24 images cannot be decoded: ")
    assert said.count("cannot identify image file") == 9
    assert f"{root}/train/ant/8.jpg ([Errno 2] No such file or directory" in said
    assert said.endswith(" and 3 more; data.skip_broken=true leaves them out")
    assert not (tmp_path / "cache").exists()


def test_broken_files_can_be_left_out(tmp_path, decoded):
    broken = break_some(write_images(tmp_path / "photos"))
    for _ in range(2):
        source = photos(tmp_path, skip_broken=True)
        train, _ = read_splits(source.train, source.test)
        assert len(train) == len(train.images) == 11
        assert not broken & {*train.names}
        assert source.train.stored.broken.keys() == broken
        names = [*train.names]
        decoded.clear()
    one_line_error(lambda: photos(tmp_path).train.images)
    assert decoded == []
    for name in broken:
        (tmp_path / "photos" / name).unlink()
    assert [*photos(tmp_path).train.names] == names
    assert torch.equal(photos(tmp_path).train.images, train.images)


def test_images_of_one_colour_are_refused(tmp_path):
    for i, name in enumerate(("train/a", "train/b")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for j in range(3):
            Image.new("RGBA", (8, 8), (i, j, 0, 0)).save(tmp_path / "photos" / name / f"{j}.png")
    said = one_line_error(lambda: photos(tmp_path).train.images)
    assert re.search(r"all 6 images, such as .*, are of one colour, \[255, 255, 255\]", said)


def test_a_run_records_what_it_left_out_and_how_it_divided(tmp_path, capsys):
    root = tmp_path / "photos"
    write_images(tmp_path / "made")
    (tmp_path / "made" / "train").rename(root)
    (root / "ant" / "7.png").write_bytes(b"no image")
    options = ["data=image_folder", f"data.root={root}", f"data.cache_dir={tmp_path}/cache"]
    options += ["data.subset=5", "data.split=0.25", "data.val_size=3", "data.skip_broken=true"]
    options += ["data.label_noise=0.5", "epochs=1", "batch_size=4", "augment=none"]
    run(tmp_path / "run", *options)
    assert "unused  files: 3 .txt, 1 broken (ant/7.png)" in capsys.readouterr().out
    record = summary(tmp_path / "run")
    assert record["left_out"] == {".txt": 3, "broken": 1}
    assert record["broken"] == {"ant/7.png": "cannot identify image file"}
    stored = json.loads((tmp_path / "run" / "split.json").read_text())
    total = {name: sum(of.values()) for name, of in record["images"].items()}
    assert total == {name: len(names) for name, names in stored.items()}
    assert total == {"train": 4, "val": 3, "test": 3}  # of 5, one is broken
    config = load(tmp_path / "run" / "checkpoints" / "last.ckpt").config
    for i in range(9):
        Image.new("RGB", (15, 12), (i, 0, 0)).save(root / "zebra" / f"new{i}.png")
    data = data_of(config, run=tmp_path / "run")
    for name in total:
        split = getattr(data, name)
        assert [*split.names] == stored[name]
        found = torch.bincount(split.labels, minlength=3).tolist()
        assert found == [*record["images"][name].values()]


@pytest.mark.long
@pytest.mark.slow
def test_a_run_in_folders_of_odd_names_is_trained_continued_and_evaluated(tmp_path):
    """Also after images were added: those of ``split.json`` are tested."""
    root = tmp_path / "photos (1), bob's"
    write_images(tmp_path / "made", 16)
    (tmp_path / "made" / "train").rename(root)
    options = ["data=image_folder", f"data.root={root.name}", "data.split=0.25", "model.width=8"]
    options += ["trainer=cpu", "batch_size=3", "augment=none", "hydra.run.dir=run #1"]
    done = command(tmp_path, *options, "epochs=1")
    assert done.returncode == 0, done.stderr
    done = command(tmp_path, "ckpt_path=run #1", "epochs=2", f"data.root={root.name}")
    assert done.returncode == 0, done.stderr
    assert "epoch 2/2" in done.stdout
    for i in range(20):
        Image.new("RGB", (19, 16), (i, 0, 0)).save(root / "ant" / f"new{i}.png")
    root.rename(tmp_path / "#2")
    words = ["-m", "sam_lightning", "evaluate", "ckpt_path=run #1", "data.root=#2"]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(CONF.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    run_folder = tmp_path / "run #1"
    with (run_folder / "predictions.csv").open() as file:
        tested = [line["file"] for line in csv.DictReader(file)]
    assert tested == json.loads((run_folder / "split.json").read_text())["test"]
    evaluated = json.loads((run_folder / "evaluation.json").read_text())
    assert evaluated["metrics"]["test/acc"] == summary(run_folder)["metrics"]["test/acc"]


def test_a_run_without_a_test_set_needs_test_false(tmp_path):
    root = write_images(tmp_path / "photos", splits=("train",))
    options = ["data=image_folder", f"data.root={root}", f"data.cache_dir={tmp_path}/cache"]
    options += ["data.subset=1.0", "epochs=1", "batch_size=4"]
    with pytest.raises(ConfigError, match=r"^test=true: the data have no test set; set test=false"):
        run(tmp_path / "run", *options)
    assert "train/acc" in run(tmp_path / "run", *options, "test=false")


def test_what_does_not_fit_is_decoded_each_time_to_the_same_pixels(tmp_path):
    root, cached = write_images(tmp_path / "photos"), tmp_path / "cache"
    options = {"image_size": 10, "crop_fraction": 0.8, "cache_dir": str(cached)}
    (held,) = read_splits(image_folder(str(root), **options).train)
    size = 3 * 10 * 10 * len(held)
    for most, in_memory in ((size, True), (size - 1, False)):
        shutil.rmtree(cached)
        split = image_folder(str(root), memory_gb=most / 1e9, **options).train
        (read,) = read_splits(split)
        assert isinstance(read.stored, torch.Tensor) == in_memory
        for part in (read, read.take(torch.tensor([3, 1, 1]))):
            index = torch.arange(len(held)) if part is read else torch.tensor([3, 1, 1])
            assert torch.equal(part.seen(), held.images[index])
    # Broken files are found before, and a file that breaks later is named.
    file = root / read.names[2]
    file.write_bytes(b"no image")
    broken = image_folder(str(root), memory_gb=0, skip_broken=True, **options).train
    (left,) = read_splits(broken)
    assert [*left.names] == [name for name in read.names if name != read.names[2]]
    with pytest.raises(ConfigError, match=r"1 of \d+ images cannot be decoded: .*" + file.name):
        read_splits(image_folder(str(root), memory_gb=0, **options).train)
    with pytest.raises(ConfigError, match=rf"data.root: {file}: cannot identify"):
        read.seen()


def data_in(root, **options):
    """A folder's data as a run reads it, with broken files left out."""
    source = partial(
        image_folder, str(root), cache_dir=f"{root}-cache", skip_broken=True, **options
    )
    data = ImageData(source, batch_size=4)
    data.read()
    return data


@pytest.mark.parametrize("view", ["resize", "random_resized_crop"])
def test_all_broken_files_are_named_where_a_part_is_for_validation(tmp_path, view):
    root = write_images(tmp_path / "photos")
    broken = {f"train/{cls}/0.png" for cls in ("zebra", "ant", "Bee")}
    for name in broken:
        (root / name).write_bytes(b"no image")
    source = partial(image_folder, str(root), 10, f"{root}-cache", skip_broken=True, view=view)
    data = ImageData(source, batch_size=4, val_size=0.5)
    data.read()
    assert {*data.broken} == broken
    assert data.left_out["broken"] == 3
    # The test set alone is read without looking at a training image, the first of which is broken.
    alone = ImageData(source, mean=[0.5] * 3, std=[0.5] * 3, pixels_of=["test"])
    alone.read()
    assert torch.equal(alone.test.images, data.test.images)


def test_a_class_of_broken_files_is_refused(tmp_path):
    root = write_images(tmp_path / "photos")
    for file in (root / "train" / "ant").rglob("*.[pP]*"):
        file.write_bytes(b"no image")
    said = one_line_error(data_in, root, image_size=10)
    assert said == "data.skip_broken=true: no training image of class 'ant' can be decoded"


@pytest.mark.parametrize("most", [8, 0])
def test_a_cache_hides_no_image_of_another_size(tmp_path, most):
    root = write_images(tmp_path / "photos")
    data_in(root, memory_gb=8)
    shutil.rmtree(root / "train")
    write_images(tmp_path / "other", side=20)
    (tmp_path / "other" / "train").rename(root / "train")
    said = one_line_error(data_in, root, memory_gb=most)
    assert said.startswith("data.image_size=null: ")
    file = root / "train" / "ant" / "1.PNG"
    shutil.copy(root / "test" / "ant" / "1.PNG", file)
    shutil.rmtree(root / "test")
    shutil.copytree(root / "train", root / "test")
    said = one_line_error(data_in, root, memory_gb=most)
    assert said.startswith("data.image_size=null: ")

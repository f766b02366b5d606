"""Files and folders that are damaged, missing, closed or taken: one line, and nothing is lost."""

import json
import math
import multiprocessing
import os
import resource
import stat
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from commands import assert_refused, serve
from image_files import (
    assert_equals_torchvision,
    md5,
    one_line_error,
    write_cifar,
    write_fashion_mnist,
    write_images,
)
from runs import run
from sam_lightning.config.errors import ConfigError, TrainingError
from sam_lightning.data import ImageSource, Split, cifar10, fashion_mnist, image_folder
from sam_lightning.data.source import read_splits
from sam_lightning.runs.files import write_json

# ------------------------------------------------------------------------------ archives and files


def test_every_altered_file_is_named_with_both_checksums(tmp_path, monkeypatch):
    folder, _ = write_cifar(tmp_path, monkeypatch, datasets.CIFAR10, "labels")
    expected = {}
    for name, original in [datasets.CIFAR10.train_list[1], datasets.CIFAR10.test_list[0]]:
        (folder / name).write_bytes((folder / name).read_bytes()[:-5])
        expected[folder / name] = original
    message = one_line_error(cifar10, str(tmp_path), download=False)
    for file, original in expected.items():
        assert f"{file} has MD5 {md5(file)} and must have {original}" in message
    assert message.count(" has MD5 ") == 2


@pytest.mark.parametrize("damage", ["truncated", "a bit", "other"])
def test_an_unzipped_file_that_is_not_the_archives_is_named(tmp_path, monkeypatch, damage):
    raw, _ = write_fashion_mnist(tmp_path, monkeypatch, zipped=True)
    fashion_mnist(str(tmp_path))  # unzips
    file = raw / "train-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    damaged = {"truncated": content[:-1], "a bit": content, "other": b"no images"}[damage]
    file.write_bytes(damaged)
    message = one_line_error(fashion_mnist, str(tmp_path))
    assert f"{file} is not what {file.name}.gz holds; delete it" in message
    file.unlink()
    assert len(fashion_mnist(str(tmp_path)).train) == 6


def test_an_altered_archive_is_named(tmp_path, monkeypatch):
    raw, _ = write_fashion_mnist(tmp_path, monkeypatch, zipped=True)
    archive = raw / "t10k-labels-idx1-ubyte.gz"
    original = md5(archive)
    archive.write_bytes(archive.read_bytes()[:-1])
    message = one_line_error(fashion_mnist, str(tmp_path))
    assert f"{archive} has MD5 {md5(archive)} and must have {original}" in message


IMAGES, LABELS = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (IMAGES.float(), LABELS, "images are torch.float32 (4, 1, 2, 2), not uint8 N x C x H x W"),
        (IMAGES[:, 0], LABELS, "images are torch.uint8 (4, 2, 2), not uint8 N x C x H x W"),
        (IMAGES, LABELS[:3], "labels are torch.int64 (3,) for 4 images"),
        (IMAGES, LABELS.int(), "labels are torch.int32 (4,) for 4 images"),
        (IMAGES, LABELS + 1, "labels reach from 1 to 2, with 2 classes"),
        (IMAGES, LABELS - 1, "labels reach from -1 to 0, with 2 classes"),
        (IMAGES[:0], LABELS[:0], "labels are torch.int64 (0,) for 0 images"),
    ],
)
def test_a_source_that_returns_what_is_no_data(images, labels, said):
    good = Split(IMAGES, LABELS)
    ImageSource(good, good, ["a", "b"])
    message = one_line_error(ImageSource, good, Split(images, labels), ["a", "b"])
    assert message == f"data.source: test {said}"


# ------------------------------------------------------------------------------------- image files


def read(root: Path, image_size: int | None = None, **options):
    source = image_folder(str(root), image_size, cache_dir=str(root.parent / "cache"), **options)
    return ImageSource(*read_splits(source.train, source.test), source.classes)


def bomb(file: Path) -> None:
    """A PNG of a few bytes that says it has 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def truncated_jpeg(file: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, format="JPEG")
    file.write_bytes(file.read_bytes()[:-100])


FAULTS = {
    "bomb": (bomb, "exceeds limit"),
    "truncated jpeg": (truncated_jpeg, "image file is truncated"),
    "no bytes": (lambda file: file.write_bytes(b""), "cannot identify image file"),
    "dangling link": (lambda file: file.symlink_to("nowhere"), "No such file"),
    "link to itself": (lambda file: file.symlink_to(file), "symbolic links"),
    "pipe": (os.mkfifo, "is no ordinary file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_cannot_be_decoded_is_named(tmp_path, fault):
    root = write_images(tmp_path / "photos")
    make, said = FAULTS[fault]
    make(root / "train" / "ant" / "9.jpg")
    message = one_line_error(read, root)
    assert "data.root: " in message
    assert f"{root}/train/ant/9.jpg" in message
    assert said in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    root = write_images(tmp_path / "photos")
    file = root / "train" / "ant" / "0.png"
    file.chmod(0)
    assert f"{file} ([Errno 13] Permission denied" in one_line_error(read, root)


def test_one_class_alone_is_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "photos" / split / "cat").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "photos" / split / "cat" / "0.png")
    assert "needs two classes" in one_line_error(read, tmp_path / "photos")


@pytest.mark.long
@pytest.mark.slow
def test_images_that_memory_cannot_hold_are_counted(tmp_path):
    root = tmp_path / "photos"
    for split in ("train", "test"):
        for i, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            Image.new("1", (2000, 3000), i).save(root / split / name / "0.png")
    for i in range(1, 60):
        os.link(root / "train" / "ant" / "0.png", root / "train" / "ant" / f"{i}.png")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000, limits[1]))
    try:
        message = one_line_error(read, root)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert message == (
        "data.image_size: 61 images of 2000 x 3000 take 1.1 GB, which are not there; set a "
        "smaller one"
    )


def test_a_bit_of_the_cache_that_flipped_is_noticed(tmp_path):
    root = write_images(tmp_path / "photos", 40)
    read(root)
    files = [*(tmp_path / "cache").glob("*.u8")]
    assert len(files) == 2
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged and made anew"):
        images = read(root)
    assert_equals_torchvision(images.train, root / "train")
    assert_equals_torchvision(images.test, root / "test")


def test_a_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    write_images(tmp_path / "photos")
    monkeypatch.setenv("HOME", str(tmp_path))
    metrics = run(
        tmp_path / "run",
        "data=image_folder",
        "data.root='~/photos'",
        f"data.cache_dir={tmp_path}/cache",
        "data.subset=1.0",
        "epochs=1",
        "batch_size=4",
    )
    assert "test/acc" in metrics


# ------------------------------------------------------------------------------------- run folders


@pytest.fixture(scope="module")
def light():
    yield from serve("sam_lightning.cli")


def taken(folder: Path, status: str) -> dict[Path, bytes]:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("- rho=0.1\n")
    (folder / "metrics.json").write_text(json.dumps({"status": status}))
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("status", ["completed", "interrupted"])
def test_the_folder_of_another_run_is_not_overwritten(light, tmp_path, status):
    before = taken(tmp_path / "run", status)
    result = light(tmp_path, "data=digits", f"hydra.run.dir={tmp_path}/run")
    assert_refused(result, f"hydra.run.dir={tmp_path}/run: has a run already; continue it with ")
    assert not result.torch
    assert {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()} == before


def test_resuming_goes_on_in_the_folder_of_the_run(light, tmp_path):
    taken(tmp_path / "run", "interrupted")
    result = light(tmp_path, "epochs=0", f"hydra.run.dir={tmp_path}/run", "ckpt_path=last")
    assert_refused(result, "epochs=0: allowed is a whole number >= 1")  # and not the folder
    assert (tmp_path / "run" / ".hydra" / "overrides.yaml").read_text() == "- rho=0.1\n"


def test_stored_overrides_that_are_no_text_are_named(light, tmp_path):
    taken(tmp_path / "run", "interrupted")
    stored = tmp_path / "run" / ".hydra" / "overrides.yaml"
    stored.write_bytes(b"- task_name=caf\xe9\n")
    result = light(tmp_path, f"ckpt_path={tmp_path}/run")
    assert_refused(result, f"{stored}: not a list of overrides ('utf-8' codec can't decode byte ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(light, tmp_path):
    (tmp_path / "closed").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    result = light(tmp_path, "data=digits", f"hydra.run.dir={tmp_path}/closed/run")
    assert_refused(
        result, f"hydra.run.dir={tmp_path}/closed/run: cannot be made (Permission denied"
    )


def test_of_runs_that_start_at_once_in_one_folder_one_goes_on(tmp_path):
    with multiprocessing.get_context("fork").Pool(8) as pool:
        codes = pool.map(start_in, [tmp_path / "run"] * 8, chunksize=1)
    assert sorted(codes) == [0] + [2] * 7


def start_in(folder: Path) -> int:
    from omegaconf import OmegaConf

    from sam_lightning.runs.folder import RunFolder

    hydra = {"output_subdir": ".hydra", "run": {"dir": str(folder)}, "job": {"name": "train"}}
    cfg = {"task_name": "train", "hydra": hydra}
    try:
        RunFolder().on_run_start(OmegaConf.create(cfg))
    except SystemExit as end:
        return int(str(end.code))
    return 0


# ------------------------------------------------------------------------------------ metrics.json


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    content = {"a": [1.5, float("nan"), (float("inf"), 2)], "b": {"c": -float("inf"), "d": None}}
    write_json(tmp_path / "new" / "a.json", content)
    text = (tmp_path / "new" / "a.json").read_text()
    plain = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert plain == {"a": [1.5, None, [None, 2]], "b": {"c": None, "d": None}}


def test_a_loss_that_is_not_finite_is_null(tmp_path):
    metrics = run(tmp_path, "lr=1e30")
    assert math.isnan(metrics["test/loss"])
    found = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert found["metrics"]["test/loss"] is None
    assert found["metrics"]["test/acc"] == metrics["test/acc"]


def test_results_that_cannot_be_written_are_said_so(tmp_path):
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(ConfigError, match=r"output_dir=.*metrics\.json: cannot be written \("):
        run(tmp_path, "epochs=1", "test=false")
    with pytest.raises(TrainingError, match="had a gradient that is not finite"):  # said first
        run(tmp_path, "lr=1e30", "max_skipped_steps=1")


# ------------------------------------------------------------------------------------------- clock


@pytest.mark.slow
def test_a_clock_that_goes_backwards(tmp_path, monkeypatch):
    now = [time.time()]

    def backwards() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    run(tmp_path, "data.val_size=100")
    summary = json.loads((tmp_path / "metrics.json").read_text())
    assert 0 < summary["train_seconds"] < summary["seconds"] < 100
    assert summary["images_per_second"] > 0
    assert {"last.ckpt", "best.ckpt"} == {p.name for p in (tmp_path / "checkpoints").iterdir()}

"""ImageNet: every layout that people have, odd files, the full size, the recipe and its page."""

import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from imagenet_files import (
    DEVKIT,
    FULL,
    WNIDS,
    archives,
    arranged,
    devkit,
    flattened,
    full_size,
    kaggle,
)
from PIL import Image
from shard_files import packed

from image_files import one_line_error
from runs import column, command, configuration, summary
from sam_lightning.config.conf import CONF, top_level
from sam_lightning.config.instantiate import build
from sam_lightning.config.schema import check
from sam_lightning.data.source import read_splits
from sam_lightning.data.views import CenterCrop, RandomResizedCrop
from sam_lightning.studies import cost

PAGE = (CONF.parent / "docs" / "imagenet.md").read_text()
RECIPE = (CONF / "experiment" / "imagenet_resnet50.yaml").read_text()


def imagenet(root, *overrides):
    """The source as a run builds it, which knows all arguments."""
    cache = f"data.cache_dir={Path(root).parent / 'cache'}"
    options = ["data=imagenet", f"data.root={root}", "data.image_size=16", cache, *overrides]
    return build(configuration(*options), "data.source")


def pixels(source):
    """Classes, labels and pixels of both splits in an order that layouts have in common."""
    seen = []
    for split in (source.train, source.test):
        order = sorted(range(len(split)), key=lambda i: Path(split.names[i]).name)
        images = split.stored.read(torch.tensor(order), [7 * i for i in range(len(order))])
        seen += [split.labels[order].tolist(), images.tolist()]
    return [source.classes, *seen]


# ----------------------------------------------------------------------------------------- layouts


@pytest.mark.slow
def test_every_layout_has_the_same_images_and_labels(tmp_path):
    root = arranged(tmp_path / "arranged")
    expected = imagenet(root)
    assert (expected.classes, len(expected.train), len(expected.test)) == (WNIDS, 12, 9)
    assert expected.val is None
    of_kaggle = kaggle(root, tmp_path / "kaggle")
    beside = tmp_path / "beside"
    devkit(beside, flattened(root, beside))
    inner = of_kaggle / "ILSVRC" / "Data" / "CLS-LOC"
    shards = [packed(of_kaggle, tmp_path / "packed"), packed(root, tmp_path / "plain")]
    for layout in (of_kaggle, inner, beside, *shards):
        source = imagenet(layout)
        assert pixels(source) == pixels(expected)
        assert source.left_out == (
            {} if layout in (beside, shards[1]) else {"of test, without labels": 1}
        )
    shutil.rmtree(inner / "val")
    shutil.copytree(root / "val", inner / "val")  # arranged since, and the test images still there
    assert pixels(imagenet(of_kaggle)) == pixels(expected)
    shutil.rmtree(inner / "test")
    assert pixels(imagenet(of_kaggle)) == pixels(expected)


def test_archives_are_unpacked_by_the_command_that_the_error_and_the_page_have(
    tmp_path, monkeypatch
):
    root = arranged(tmp_path / "arranged")
    given = archives(root, tmp_path / "imagenet", monkeypatch)
    monkeypatch.chdir(tmp_path)
    said = one_line_error(imagenet, "imagenet")
    assert said.startswith("data.root='imagenet': ILSVRC2012_img_train.tar is not unpacked")
    line = said[said.index("python -c") :]
    assert line in PAGE
    _, _, code = shlex.split(line)
    exec(code, {})
    assert pixels(imagenet(given)) == pixels(imagenet(root))
    shutil.rmtree(given / "val")
    assert "ILSVRC2012_img_val.tar is not unpacked" in one_line_error(imagenet, given)


def test_validation_images_in_one_folder_are_never_guessed(tmp_path):
    root = arranged(tmp_path / "arranged")
    flat = tmp_path / "flat"
    wnids = flattened(root, flat)
    said = one_line_error(imagenet, flat)
    assert f"{flat}/val has 9 images in no folders of classes" in said
    assert said.endswith(f"LOC_val_solution.csv or {DEVKIT} beside it or above it: there are none")
    shutil.rmtree(devkit(flat, wnids[:-1]).parent / DEVKIT)
    devkit(flat, wnids[:-1])
    assert one_line_error(imagenet, flat).endswith("ILSVRC2012_val_00000009.JPEG is not in them")
    for file in (flat / DEVKIT / "data").iterdir():
        file.write_bytes(b"1\nx")
    assert f"{flat / DEVKIT / 'data'} cannot be read" in one_line_error(imagenet, flat)
    shutil.rmtree(flat / DEVKIT)
    devkit(flat, wnids)
    shutil.rmtree(flat / "train" / WNIDS[1])
    assert f"class '{WNIDS[1]}' is not in both" in one_line_error(imagenet, flat)


def test_a_part_is_named_in_a_warning_and_works(tmp_path, caplog):
    root = arranged(tmp_path / "imagenette")
    source = imagenet(root)
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert line == (
        f"data.root={str(root)!r}: is not the whole set: classes 3 (of 1,000), "
        "train 12 (of 1,281,167), test 9 (of 50,000)"
    )
    caplog.clear()
    imagenet(root, "data.source.expected={classes: 3, train: 12, test: 9}")
    imagenet(root, "data.source.expected=null")
    assert caplog.records == []
    assert len(source.test) == 9


def test_validation_is_kept_decoded_or_decoded_each_time_as_one_chooses(tmp_path):
    root = arranged(tmp_path / "imagenet")
    (kept,) = read_splits(imagenet(root).test)
    (file,) = (tmp_path / "cache").glob("images-*.u8")
    assert file.stat().st_size == 9 * 3 * 16**2
    file.unlink()
    (unread,) = read_splits(imagenet(root, "data.memory_gb=0").test)
    assert not isinstance(unread.stored, torch.Tensor)
    assert torch.equal(kept.stored, unread.stored.read(torch.arange(9)))


# --------------------------------------------------------------------------------------- odd files


def test_odd_files_have_the_pixels_of_pillow(tmp_path):
    """About 20 are CMYK, of Adobe's kind and inverted; n02105855_2933.JPEG is a PNG."""
    root = arranged(tmp_path / "imagenet")
    rng = np.random.default_rng(1)
    odd = root / "train" / WNIDS[1]
    noise = [rng.integers(0, 256, (30, 50, c), dtype=np.uint8) for c in (4, 3)]
    Image.fromarray(noise[0], "CMYK").save(odd / "n02105855_0.JPEG", "JPEG", quality=95)
    assert b"Adobe" in (odd / "n02105855_0.JPEG").read_bytes()
    Image.fromarray(noise[1]).save(odd / "n02105855_2933.JPEG", "PNG")
    Image.fromarray(noise[1]).convert("L").save(odd / "n02105855_1.JPEG", "JPEG")
    shutil.copy(odd / "n02105855_0.JPEG", root / "val" / WNIDS[1])
    view, centre = RandomResizedCrop(16), CenterCrop((16, 16), 0.875)
    for where in (root, packed(root, tmp_path / "packed")):
        source = imagenet(where)
        for split in (source.train, source.test):
            names = [f"{root}/{name}" for name in split.names]
            plain = [Image.open(name).convert("RGB") for name in names]
            if split is source.train:
                seeds = [*range(len(names))]
                arrays = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in plain]
                expected = [view(image, seed) for image, seed in zip(arrays, seeds, strict=True)]
            else:
                seeds = None
                expected = [
                    torch.from_numpy(np.array(centre(image))).permute(2, 0, 1) for image in plain
                ]
            found = split.stored.read(torch.arange(len(names)), seeds)
            assert torch.equal(found, torch.stack(expected))


# ------------------------------------------------------------------------------ recipe, page, size


def commands(text):
    """The arguments of each command of ``train.py`` in the head of the recipe or on the page."""
    text = re.sub(r"\\\n#? *", "", text)
    return [shlex.split(line) for line in re.findall(r"^#?\s*python train.py (.*)", text, re.M)]


@pytest.mark.slow
@pytest.mark.parametrize("text", [RECIPE, PAGE])
def test_every_command_trains_as_the_paper(text):
    found = 0
    for arguments in commands(text):
        found += 1
        arguments = [a.split(",")[0] for a in arguments if a not in ("-m", "sweep=seeds")]
        cfg = configuration(*(a for a in arguments if "data.root" not in a), "data.root=.")
        cfg.output_dir = "run"
        check(cfg, top_level())
        devices, accumulated = cfg.trainer.devices, cfg.trainer.accumulate_grad_batches
        assert cfg.batch_size * accumulated == 4096
        assert cfg.batch_size // devices == 128  # that share a perturbation
        assert cfg.method.ascent_per_micro_batch
        optimizer, data = cfg.optimizer, cfg.data
        assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (1, 0.9, 1e-4)
        assert (cfg.label_smoothing, data.image_size) == (0.1, 224)
        assert data.view == "random_resized_crop"
        assert cfg.method.rho == (0 if cfg.method.name == "sgd" else 0.05)
        assert cfg.scheduler._target_.endswith("cosine")
        # The validation images fit into what is kept decoded.
        assert FULL["val"] * 3 * 224**2 <= data.memory_gb * 1e9
    assert found >= 3


def test_recipe_and_page_have_the_figures_of_the_paper(tmp_path):
    published = {
        "100": "22.5 ± 0.1, 6.28 ± 0.08, 22.9 ± 0.1, 6.62 ± 0.11",
        "200": "21.4 ± 0.1, 5.82 ± 0.03, 22.3 ± 0.1, 6.37 ± 0.04",
        "400": "20.9 ± 0.1, 5.51 ± 0.03, 22.3 ± 0.1, 6.40 ± 0.06",
    }
    for epochs, figures in published.items():
        (row,) = re.findall(rf"^#   {epochs} epochs +(.*)", RECIPE, re.M)
        assert re.sub(r" {2,}", ", ", row) == figures
        (row,) = re.findall(rf"^\| {epochs} \| (.*) \| [\d.]+ \|$", PAGE, re.M)
        assert row.replace(" | ", ", ") == figures
    root = full_size(tmp_path / "imagenet", {"train": 1000, "val": 1000})
    options = ["experiment=imagenet_resnet50", f"data.root={root}", "data.drop_last=false"]
    forward = cost.estimate(cost.configuration(options)).forward
    for epochs, hours in re.findall(r"^\| (\d+) \| 2.* \| ([\d.]+) \|$", PAGE, re.M):
        flops = forward * 3 * 2 * FULL["train"] * int(epochs)
        assert f"{flops / 2e13 / 3600:.1f}" == hours


START = """
import json, re, sys, time
from pathlib import Path
import torchvision.io
from sam_lightning.config.conf import CONF, DEFAULTS
from sam_lightning.data.datamodule import ImageDataModule
from sam_lightning.data.image_data import build_data
from hydra import compose, initialize_config_dir

def private():
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Anonymous: +([0-9]+)", rollup)[1]) / 1e3

with initialize_config_dir(str(CONF), **DEFAULTS):
    cfg = compose("train", sys.argv[1:])
before, start = private(), time.process_time()
data = build_data(cfg, ImageDataModule)
data.setup()
seconds, memory = time.process_time() - start, private() - before
images, labels, _ = next(iter(data.train_dataloader()))
found = [images.shape, len(data.train), len(data.test), data.num_classes]
print(json.dumps([seconds, memory, *found]))
"""


@pytest.mark.long
@pytest.mark.slow
def test_full_size_starts_in_seconds_and_trains(tmp_path):
    """1,281,167 + 50,000 images in 1,000 classes, by their index; two steps of the recipe."""
    root = full_size(tmp_path / "imagenet")
    size = (root / "shards.bin").stat().st_size
    assert size <= 40 * sum(FULL.values())
    options = ["experiment=imagenet_resnet50", f"data.root={root}", "data.num_workers=0"]
    options += ["batch_size=2", "data.memory_gb=0", f"data.cache_dir={tmp_path / 'cache'}"]
    done = subprocess.run(
        [sys.executable, "-c", START, *options], capture_output=True, text=True, check=True
    )
    seconds, memory, *found = json.loads(done.stdout)
    assert found == [[2, 3, 224, 224], *FULL.values(), 1000]
    assert seconds <= 3  # 0.5 without other work on the machine
    assert memory <= 3 * size / 1e6  # 70 MB: labels and an order of 8 bytes an image
    small = ["trainer=cpu", "trainer.accumulate_grad_batches=2", "+trainer.max_steps=2"]
    small += ["data.eval_batch_size=2", "+trainer.limit_test_batches=1", "hydra.run.dir=run"]
    done = command(tmp_path, *options, *small)
    assert done.returncode == 0, done.stderr
    assert "train   1,281,167 images, 1,281 to 1,282 in each of 1,000 classes" in done.stdout
    assert "test    50,000 images, 50 in each of 1,000 classes; decoded each time" in done.stdout
    assert "SAMResNet50, 25,557,032 parameters" in done.stdout
    assert "is not the whole set" not in done.stderr + done.stdout
    found = summary(tmp_path / "run")
    assert (found["status"], found["updates"]) == ("completed", 2)
    assert column(tmp_path / "run", "train/skipped_steps") == [0]


@pytest.mark.long
def test_the_page_from_packing_to_the_table(tmp_path):
    """Its commands as they stand, on a stand-in of the set and with a smaller model."""
    arranged(tmp_path / "imagenet", train=12)
    smaller = (
        "trainer=cpu trainer.devices=1 trainer.precision=32-true model.width=8 epochs=1 seed=0"
    )
    smaller += (
        " data.image_size=32 batch_size=8 trainer.accumulate_grad_batches=2 data.num_workers=0"
    )
    shown = "".join(re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S)).replace("\\\n", " ")
    lines = [line for line in shown.splitlines() if not line.startswith("python -c")]
    trained = 0
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        assert program == "python"
        if arguments[0] == "train.py":
            trained += 1
            changed = {word.partition("=")[0] for word in smaller.split()}
            kept = [a for a in arguments[1:] if a.partition("=")[0] not in changed]
            kept = [a for a in kept if a not in ("-m", "sweep=seeds")]
            arguments = [str(CONF.parent / "train.py"), *kept, *smaller.split()]
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, (line, done.stderr)
    assert trained >= 3
    runs = [json.loads(file.read_text()) for file in tmp_path.glob("logs/*/runs/*/metrics.json")]
    assert [run["status"] for run in runs] == ["completed"] * trained
    assert "SAM" in (tmp_path / "logs/imagenet_resnet50/report/report.md").read_text()

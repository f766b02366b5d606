"""Real runs by any number of processes, killed and continued: the same images in every batch.

This file is also the module with the callback of those runs.
"""

import json
import os
import signal
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from PIL import Image

from inject import forked
from sam_lightning.data.listing import list_images
from sam_lightning.data.packing import Packing, pack

# Of 61 images, 4 of each of 10 classes, each twice: 80, in 6 batches of 12 and one of 8.
RUN = ["data.subset=61", "data.sampler=balanced", "data.repeats=2"]
RUN += ["data.image_size=16", "data.view=random_resized_crop", "batch_size=12"]
RUN += ["augment=trivialaugment", "augment.color_jitter.brightness=0.4", "augment.erasing.p=0.5"]
RUN += ["augment.mixup.alpha=0.4", "augment.cutmix.alpha=1.0", "model.width=2", "trainer=cpu"]
RUN += ["epochs=2", "test=false", "trainer.log_every_n_steps=1", "checkpoint_every_n_steps=1"]
TWO = ["trainer=ddp_cpu", "trainer.devices=2"]
RUN += ["+callbacks.seen._target_=test_same_images.Seen", "data.eval_batch_size=1000"]


class Seen(L.Callback):
    """Writes what each batch consists of; may kill the run at a batch."""

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        import hashlib

        images, labels = batch
        parts = zip(images.numpy(), labels.labels, labels.other, labels.share, strict=True)
        rows = [
            [hashlib.blake2b(i.tobytes(), digest_size=8).hexdigest(), *map(float, others)]
            for i, *others in parts
        ]
        file = Path(os.environ["SEEN"]) / f"{trainer.world_size}_{trainer.global_rank}.jsonl"
        with file.open("a") as out:
            out.write(json.dumps([trainer.current_epoch, batch_idx, rows]) + "\n")
        if os.environ.get("KILLED_AT") == f"{trainer.current_epoch}.{batch_idx}":
            os.killpg(0, signal.SIGKILL)


def photographs(folder: Path) -> Path:
    """Ten classes of eight noisy JPEGs of different sizes, and a test set."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 1)):
        for name in (f"{split}/{cls}/{i}.jpg" for cls in range(10) for i in range(count)):
            size = (*generator.integers(20, 40, 2), 3)
            pixels = generator.integers(0, 256, size, dtype=np.uint8)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name)
    return folder


def photographs_and_shards(folder: Path) -> tuple[list[str], list[str]]:
    """Both of the same images, as settings."""
    listing = list_images(str(photographs(folder / "photos")))
    pack(listing, folder / "shards", Packing(shard_mb=0.04))
    places = {"image_folder": "photos", "shards": "shards"}
    first, second = ([f"data={k}", f"data.root={folder / v}"] for k, v in places.items())
    return first, second


def train(folder: Path, *arguments: str, at: str = "") -> None:
    folder.mkdir(exist_ok=True)
    here = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    variables = {"SEEN": str(folder), "KILLED_AT": at, "PYTHONPATH": here}
    into = f"hydra.run.dir={folder / 'run'}"
    done = forked(folder, *RUN, into, *arguments, **variables)
    assert done.returncode == (-signal.SIGKILL if at else 0), done.stderr


def global_batches(folder: Path) -> dict[tuple[int, int], list[Any]]:
    """The rows of each batch, over all ranks, which take turns."""
    ranks = []
    for file in sorted(folder.glob("*.jsonl")):
        lines = map(json.loads, file.read_text().splitlines())
        ranks.append({(epoch, batch): rows for epoch, batch, rows in lines})
    return {
        key: [row for rows in zip_longest(*(rank[key] for rank in ranks)) for row in rows if row]
        for key in ranks[0]
    }


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_global_batches_are_the_same_however_a_run_is_run(tmp_path):
    photos, shards = photographs_and_shards(tmp_path)
    train(tmp_path / "plain", *photos)
    expected = global_batches(tmp_path / "plain")
    assert [len(rows) for rows in expected.values()] == 2 * [12, 12, 12, 12, 12, 12, 8]
    assert len({row[0] for rows in expected.values() for row in rows}) > 150  # of 160
    runs = {  # workers 3, 0 and 2 on one rank, the last ones with shards; then 2 and 3 on two ranks
        "killed": [
            ([*photos, "data.num_workers=3"], "0.4"),
            ([*photos, "ckpt_path=last", "data.num_workers=0"], "1.2"),
            ([*shards, "ckpt_path=last", "data.num_workers=2"], ""),
        ],
        "ranks": [
            ([*photos, *TWO, "data.num_workers=2"], "1.1"),
            ([*photos, *TWO, "ckpt_path=last", "data.num_workers=3"], ""),
        ],
    }
    for name, parts in runs.items():
        for arguments, at in parts:
            train(tmp_path / name, *arguments, at=at)
        assert global_batches(tmp_path / name) == expected, name


@pytest.mark.long
@pytest.mark.timeout(900)
def test_windows_of_shards_are_the_same_after_a_kill(tmp_path):
    _, shards = photographs_and_shards(tmp_path)
    window = [*shards, "data.window=2"]
    train(tmp_path / "plain", *window, "data.num_workers=0")
    expected = global_batches(tmp_path / "plain")
    train(tmp_path / "ranks", *window, *TWO, "data.num_workers=2", at="0.3")
    train(tmp_path / "ranks", *window, *TWO, "data.num_workers=0", "ckpt_path=last")
    assert global_batches(tmp_path / "ranks") == expected
    train(tmp_path / "full", *shards, "+trainer.max_steps=1")
    assert global_batches(tmp_path / "full")[0, 0] != expected[0, 0]

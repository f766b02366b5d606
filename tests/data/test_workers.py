"""How many loading processes there are where nobody says it."""

import multiprocessing
import os
from functools import partial
from types import SimpleNamespace

import joblib
import pytest

from image_files import write_images
from sam_lightning.data import image_folder
from sam_lightning.data.image_data import ImageData

# Of torch, for this machine has fewer processors than are said here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def data(tmp_path):
    write_images(tmp_path / "photos")

    def make(view="random_resized_crop", **options):
        source = partial(
            image_folder, str(tmp_path / "photos"), 8, str(tmp_path / "cache"), view=view
        )
        data = ImageData(source, batch_size=8, **options)
        data.read()
        return data

    return make


def loading(data, split="train"):
    """The loading processes of a split, as its loader has them."""
    split = getattr(data, split)
    loader = data.train_loader() if split is data.train else data.eval_loader(split)
    assert loader.num_workers == data.workers(split)
    return loader.num_workers


@pytest.mark.parametrize(
    ("processors", "environment", "expected"),
    [
        (1, {}, 1),
        (2, {}, 1),
        (12, {}, 11),
        (64, {}, 16),
        (64, {"LOCAL_WORLD_SIZE": "8"}, 7),
        # SLURM gives each of its tasks processors of its own, or says how many are meant for it.
        (6, {"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_PER_TASK": "6"}, 5),
        (96, {"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_PER_TASK": "6"}, 5),
        # A task that has started two processes.
        (
            96,
            {"LOCAL_WORLD_SIZE": "2", "SLURM_CPUS_PER_TASK": "6", "TORCHELASTIC_RUN_ID": "a"},
            2,
        ),
    ],
)
def test_random_crops_get_a_share_of_the_processors(
    data, monkeypatch, processors, environment, expected
):
    monkeypatch.setattr(joblib, "cpu_count", lambda: processors)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    made = data()
    assert loading(made) == expected
    assert loading(made, "test") == 0  # it is in memory
    assert loading(data(num_workers=3)) == 3


def test_there_are_none_where_a_batch_takes_no_time(data):
    assert loading(data("resize")) == 0
    own = {"own": lambda image: image}
    assert loading(data("resize", augment=own)) >= 1
    assert loading(data("resize", augment=own, device="cpu")) == 0  # others cannot load from there


def test_batches_fit_into_shared_memory(data, monkeypatch):
    """Containers have 64 MB of it, and a worker that needs more is killed."""
    batch = 8 * 3 * 8 * 8
    found = [SimpleNamespace(f_bavail=2 * 3 * batch * n, f_frsize=1) for n in (0, 3, 1000)]
    monkeypatch.setattr(joblib, "cpu_count", lambda: 12)
    made, counts = data(), []
    for one in found:
        monkeypatch.setattr(os, "statvfs", lambda path, one=one: one)
        counts.append(loading(made))
    assert counts == [0, 3, 11]


def _in_a_daemon(made, queue):
    queue.put([len(batch[0]) for batch in made.train_loader()])


def test_a_process_that_may_start_none_loads_by_itself(data):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_in_a_daemon, args=(data(), queue), daemon=True)
    process.start()
    assert queue.get(timeout=60) == [8, 4]
    process.join()

"""ImageDataModule alone, as any rank of several, and under a real Trainer."""

import itertools
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.stats import chisquare
from torch.utils.data import DistributedSampler

from sam_lightning.data import ImageSource, Split
from sam_lightning.data.augment import (
    BatchAugment,
    CutMix,
    Cutout,
    Mixup,
    RandAugment,
    RandomCrop,
    RandomErasing,
    TrivialAugment,
    crop_flip,
)
from sam_lightning.data.datamodule import ImageDataModule
from sam_lightning.data.loading import SplitDataset

SIZES = [60, 30, 20, 10]


def numbered_split(sizes, first=0):
    """Images of 1 x 8 x 8 that hold their number in two pixels, in mixed order of classes."""
    labels = torch.cat([torch.full((n,), cls) for cls, n in enumerate(sizes)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    numbers = torch.arange(first, first + len(labels))
    images = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 3, 3], images[:, 0, 3, 4] = numbers // 256, numbers % 256
    images[:, 0, 0] = torch.arange(8, dtype=torch.uint8) * 9  # so that crops and flips show
    return Split(images, labels)


def numbers(images):
    return (images[:, 0, 3, 3].long() * 256 + images[:, 0, 3, 4].long()).tolist()


def source(val=False, scale=1):
    return ImageSource(
        train=numbered_split([n * scale for n in SIZES]),
        test=numbered_split([11, 7, 3, 2], first=20_000),
        classes=["a", "b", "c", "d"],
        val=numbered_split([5, 5, 5, 5], first=30_000) if val else None,
    )


def make(read=source, **options):
    return ImageDataModule(read, **{"batch_size": 16, **options})


def ready(read=source, **options):
    datamodule = make(read, **options)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def as_rank(datamodule, rank, world_size, epoch=0, step=0, device="cpu"):
    """Attach what the data module reads of a trainer."""
    progress = SimpleNamespace(processed=epoch, ready=step)
    datamodule.trainer = SimpleNamespace(
        world_size=world_size,
        global_rank=rank,
        overfit_batches=0.0,
        training=True,
        strategy=SimpleNamespace(root_device=torch.device(device)),
        fit_loop=SimpleNamespace(
            epoch_progress=SimpleNamespace(current=progress),
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=progress)),
        ),
    )
    return datamodule


# ---- splits


@pytest.mark.parametrize(("val_size", "count"), [(12, 12), (0.2, 24), (0.33, 40), (119, 119)])
def test_val_is_stratified_and_disjoint(val_size, count):
    datamodule = ready(val_size=val_size)
    train, val = numbers(datamodule.train.images), numbers(datamodule.val.images)
    assert len(val) == count
    assert sorted(train + val) == list(range(120))
    for cls, size in enumerate(SIZES):
        assert abs((datamodule.val.labels == cls).sum().item() - size * count / 120) < 1
    whole = source().train
    for split, picked in ((datamodule.train, train), (datamodule.val, val)):
        assert torch.equal(split.labels, whole.labels[picked])
        assert torch.equal(split.images, whole.images[picked])


def test_splits_follow_split_seed_and_nothing_else():
    options = {"val_size": 0.25, "subset": 0.5}
    one = ready(**options, seed=1)
    two = ready(**options, seed=2, label_noise=0.3, batch_size=4)
    other = ready(**options, seed=1, split_seed=1)
    for name in ("train", "val"):
        assert torch.equal(getattr(one, name).images, getattr(two, name).images)
        assert not torch.equal(getattr(one, name).images, getattr(other, name).images)


@pytest.mark.parametrize(("subset", "count"), [(0.5, 48), (30, 30), (96, 96), (1.0, 96), (1, 96)])
def test_subset_is_a_stratified_part_of_what_val_left(subset, count):
    whole, datamodule = ready(val_size=24), ready(val_size=24, subset=subset)
    assert torch.equal(datamodule.val.images, whole.val.images)
    kept = numbers(datamodule.train.images)
    assert len(set(kept)) == len(kept) == count
    assert set(kept) <= set(numbers(whole.train.images))
    for cls, size in enumerate(whole.train.labels.bincount().tolist()):
        assert abs((datamodule.train.labels == cls).sum().item() - size * count / 96) < 1


def test_a_sources_own_val_is_used():
    datamodule = ready(lambda: source(val=True), val_size=0.5)
    assert numbers(datamodule.val.images) == list(range(30_000, 30_020))
    assert len(datamodule.train) == 120


def test_without_val_there_is_none():
    datamodule = ready()
    assert datamodule.val is None
    assert datamodule.val_dataloader() == []


@pytest.mark.parametrize(("label_noise", "subset"), [(0.2, 1.0), (0.33, 0.9), (1.0, 1.0)])
def test_label_noise_is_exact_and_only_in_train(label_noise, subset):
    options = {"val_size": 12, "subset": subset}
    clean, noisy = ready(**options), ready(**options, label_noise=label_noise)
    changed = clean.train.labels != noisy.train.labels
    assert changed.sum() == round(label_noise * len(clean.train))
    assert torch.equal(clean.train.images, noisy.train.images)
    assert torch.equal(clean.val.labels, noisy.val.labels)
    assert torch.equal(clean.test.labels, noisy.test.labels)
    again = ready(**options, label_noise=label_noise)
    assert torch.equal(again.train.labels, noisy.train.labels)
    other = ready(**options, label_noise=label_noise, seed=1)
    assert not torch.equal(other.train.labels, noisy.train.labels)


def test_noisy_labels_are_uniform_over_the_other_classes_and_over_the_images():
    one = source(scale=100)
    datamodule = ready(lambda: one, label_noise=0.4)
    old, new = one.train.labels, datamodule.train.labels
    assert torch.equal(one.train.labels, source(scale=100).train.labels)  # the source is untouched
    changed = old != new
    for cls in range(4):
        became = torch.bincount(new[changed & (old == cls)], minlength=4).tolist()
        assert became.pop(cls) == 0
        assert chisquare(became).pvalue > 1e-3
    hit = torch.bincount(old[changed], minlength=4)
    assert chisquare(hit, torch.tensor(SIZES) * 40.0).pvalue > 1e-3
    tenths = changed.view(10, -1).sum(1)
    assert chisquare(tenths).pvalue > 1e-3


def test_statistics_are_those_of_the_final_training_images_or_given():
    datamodule = ready(val_size=60, subset=20)
    pixels = datamodule.train.images.double() / 255
    assert datamodule.mean == pytest.approx([pixels.mean().item()])
    assert datamodule.std == pytest.approx([pixels.std(correction=0).item()])
    datamodule = ready(mean=[0.25], std=[0.5])
    assert (datamodule.mean, datamodule.std) == ((0.25,), (0.5,))
    images, labels = datamodule.on_after_batch_transfer(next(iter(datamodule.test_dataloader())), 0)
    expected = (datamodule.test.images / 255 - 0.25) / 0.5
    torch.testing.assert_close(images, expected)
    assert torch.equal(labels, datamodule.test.labels)


def test_the_source_is_read_once():
    reads = []
    datamodule = make(lambda: reads.append(1) or source())
    for _ in range(2):
        datamodule.prepare_data()
        datamodule.setup("fit")
        datamodule.setup("test")
    assert len(reads) == 1
    assert datamodule.classes == ["a", "b", "c", "d"]
    assert (datamodule.num_classes, datamodule.in_channels) == (4, 1)
    rank_1 = make(lambda: reads.append(1) or source())  # which does not prepare
    as_rank(rank_1, 1, 2).setup("fit")
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"eval_batch_size": 0}, "eval_batch_size=0"),
        ({"val_size": -1}, "val_size=-1"),
        ({"val_size": 120}, "val_size=120"),
        ({"val_size": 0.999}, "val_size=0.999"),
        ({"val_size": 0.001}, "val_size=0.001"),
        ({"val_size": 10.5}, "val_size=10.5"),
        ({"subset": 0}, "subset=0"),
        ({"subset": 121}, "subset=121"),
        ({"subset": 101, "val_size": 20}, "subset=101"),
        ({"label_noise": 1.1}, "label_noise=1.1"),
        ({"label_noise": -0.1}, "label_noise=-0.1"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"batch_size": 121, "drop_last": True}, "batch_size=121"),
        ({"repeats": 0}, "repeats=0"),
        ({"sampler": "even"}, "sampler='even'"),
        ({"augment": {"crop": RandomCrop(9)}}, "augment.crop.padding=9"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"device": "cpu", "num_workers": 2}, "num_workers=2"),
        ({"mean": [0.1, 0.2], "std": [1, 1]}, "mean=[0.1, 0.2]"),
        ({"std": [1, 1]}, "std=[1.0, 1.0]"),
    ],
)
def test_wrong_options_are_named_in_one_line(options, key):
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}") as caught:
        ready(**options)
    assert "\n" not in str(caught.value)


def test_the_batch_must_divide_over_the_processes():
    with pytest.raises(ValueError, match=r"batch_size=16: .* 3 processes"):
        as_rank(make(), 0, 3).setup("fit")


# ---- loaders


def test_a_batch_is_one_gather(monkeypatch):
    datamodule = ready()
    requests = []
    original = SplitDataset.load
    monkeypatch.setattr(
        SplitDataset, "load", lambda self, i, s=None: requests.append(i) or original(self, i, s)
    )
    batches = list(datamodule.train_dataloader())
    assert [len(request) for request in requests] == [16] * 7 + [8]
    for images, labels, key in batches:
        assert images.dtype == torch.uint8
        assert torch.equal(images, datamodule.train.images[key.indices])
        assert torch.equal(labels, datamodule.train.labels[key.indices])
    image, label = SplitDataset(datamodule.train)[5]
    assert torch.equal(image, datamodule.train.images[5])
    assert label == datamodule.train.labels[5]


@pytest.mark.parametrize(("drop_last", "steps"), [(False, 8), (True, 7)])
def test_steps_per_epoch(drop_last, steps):
    datamodule = ready(drop_last=drop_last)
    assert datamodule.steps_per_epoch == steps == len(list(datamodule.train_dataloader()))
    as_rank(datamodule, 1, 4)
    assert datamodule.steps_per_epoch == steps  # a quarter of the images in quarters of a batch
    assert next(iter(datamodule.train_dataloader()))[0].shape == (4, 1, 8, 8)


def order(datamodule):
    return [n for images, *_ in datamodule.train_dataloader() for n in numbers(images)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_train_shards_are_disjoint_and_make_up_the_epoch(world_size):
    orders = [order(as_rank(ready(), rank, world_size, epoch=1)) for rank in range(world_size)]
    assert sorted(itertools.chain(*orders)) == list(range(120))
    assert {len(shard) for shard in orders} == {120 // world_size}


def test_the_order_follows_seed_and_epoch():
    orders = {
        (seed, epoch): order(as_rank(ready(seed=seed), 0, 1, epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert all(sorted(o) == list(range(120)) for o in orders.values())
    assert len({tuple(o) for o in orders.values()}) == 9
    torch.manual_seed(5)
    assert order(as_rank(ready(seed=1, label_noise=0.5, split_seed=3), 0, 1, 2)) == orders[1, 2]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", ["val", "test"])
def test_eval_shards_cover_each_image_once_and_in_order(world_size, name):
    seen = []
    for rank in range(world_size):
        datamodule = as_rank(ready(lambda: source(val=True), eval_batch_size=4), rank, world_size)
        loader = getattr(datamodule, f"{name}_dataloader")()
        batches = [numbers(images) for images, _ in loader]
        assert len(loader) == len(batches)
        assert max(map(len, batches)) == 4
        shard = list(itertools.chain(*batches))
        assert shard == sorted(shard)
        seen += shard
        assert isinstance(loader.sampler, DistributedSampler)  # or Lightning would shard it again
    assert sorted(seen) == numbers(getattr(source(val=True), name).images)


# ---- augmentation


EVERYTHING = {
    **crop_flip(),
    "policy": TrivialAugment(),
    "erasing": RandomErasing(0.5),
    "cutout": Cutout(2),
    "mixup": Mixup(0.4),
    "cutmix": CutMix(1.0),
}


def epoch_of(datamodule, rank=0, world_size=1, epoch=0, first=0):
    """Its batches as they are trained on, with the indices of their images."""
    loader = as_rank(datamodule, rank, world_size, epoch).train_dataloader()
    loader.load_state_dict({"batches": first})
    batches = []
    for images, labels, key in loader:
        done, labels = datamodule.on_after_batch_transfer([images, labels, key], 0)
        indices = torch.from_numpy(key.indices)[: len(done)]
        kept = (
            (labels.labels, labels.other, labels.share) if key.partners is not None else (labels,)
        )
        batches.append((done, indices, *kept))
    return batches


@pytest.mark.parametrize("more", [{}, {"sampler": "balanced", "repeats": 2}])
@pytest.mark.parametrize("entries", [EVERYTHING, {"mixup": Mixup(0.4)}, crop_flip()])
def test_images_depend_on_seed_epoch_and_index_alone(entries, more):
    """Every global batch is the same over ranks, workers and positions to start from."""
    options = {"augment": entries, "batch_size": 12, "val_size": 20, **more}  # 8 full, one of 4
    expected = epoch_of(ready(**options), epoch=1)
    assert not torch.equal(expected[0][0], epoch_of(ready(**options), epoch=2)[0][0])
    for world_size, workers, first in [(1, 2, 0), (2, 0, 0), (3, 0, 2), (2, 2, 5), (4, 0, 0)]:
        ranks = [
            epoch_of(ready(num_workers=workers, **options), rank, world_size, 1, first)
            for rank in range(world_size)
        ]
        together = [  # ranks take turns
            [torch.stack(parts, 1).flatten(0, 1) for parts in zip(*batches, strict=True)]
            for batches in zip(*ranks, strict=True)
        ]
        whole = len(expected) - (100 % world_size > 0)  # else ranks repeat some images
        for batch, other in zip(expected[first:whole], together, strict=False):
            assert all(map(torch.equal, batch, other))


def test_no_image_is_its_own_partner_and_each_is_a_partner_once():
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            datamodule = ready(augment={"mixup": Mixup(1.0)}, batch_size=12)
            for _, indices, labels, other, _ in epoch_of(datamodule, rank, world_size):
                train = datamodule.train.labels
                assert torch.equal(labels, train[indices])
                assert len(labels) == len(other)
    datamodule = ready(augment={"mixup": Mixup(1.0)}, batch_size=12)
    for images, labels, key in as_rank(datamodule, 0, 1).train_dataloader():
        assert sorted(key.partners.tolist()) == [*range(len(labels))]
        assert all(place != i for i, place in enumerate(key.partners))
        assert len(images) == len(labels)  # nothing is loaded twice


def test_a_balanced_epoch_has_each_class_equally_often():
    datamodule = ready(sampler="balanced", batch_size=16)
    seen = {}
    for epoch in range(3):
        batches = epoch_of(datamodule, epoch=epoch)
        indices = torch.cat([batch[1] for batch in batches])
        assert datamodule.train.labels[indices].bincount().tolist() == [30] * 4
        for cls, size in enumerate(SIZES):  # a class takes turns through its images
            counts = indices[datamodule.train.labels[indices] == cls].bincount(minlength=120)
            counts = counts[datamodule.train.labels == cls]
            assert (counts.min(), counts.max()) == (30 // size, -(-30 // size))
        seen[epoch] = indices.tolist()
    assert len({tuple(order) for order in seen.values()}) == 3
    assert datamodule.steps_per_epoch == 8
    rows = {  # an image that comes several times is augmented differently
        tuple(image.flatten().tolist()) for images, *_ in batches for image in images
    }
    assert len(rows) > 100


def test_repeated_images_are_in_one_batch_and_augmented_differently():
    datamodule = ready(repeats=4, batch_size=16)
    batches = epoch_of(datamodule)
    assert [len(labels) for _, _, labels in batches] == [16] * 7 + [8]
    indices = torch.cat([batch[1] for batch in batches]).view(-1, 4)
    assert (indices == indices[:, :1]).all()
    assert len(indices[:, 0].unique()) == 30
    images = torch.cat([batch[0] for batch in batches]).view(30, -1)
    assert len(images.view(120, -1).unique(dim=0)) > 85  # 30 without
    others = torch.cat([batch[1] for batch in epoch_of(datamodule, epoch=1)]).view(-1, 4)
    assert others.unique().tolist() != indices.unique().tolist()


def test_repeated_images_are_balanced_too():
    batches = epoch_of(ready(sampler="balanced", repeats=3, batch_size=16))
    labels = torch.cat([batch[2] for batch in batches])
    assert labels.bincount().tolist() == [30] * 4
    indices = torch.cat([batch[1] for batch in batches]).view(-1, 3)
    assert (indices == indices[:, :1]).all()


def test_augmentation_arrives_and_single_images_are_for_the_loader():
    image = torch.full((200, 1, 8, 8), 200, dtype=torch.uint8)
    whole = replace(source(), train=Split(image, torch.zeros(200).long()))

    def batches(**entries):
        options = {"mean": [0.0], "std": [1 / 255], "batch_size": 200, "augment": entries}
        datamodule = as_rank(ready(lambda: whole, **options), 0, 1)
        loaded = next(iter(datamodule.train_dataloader()))
        return loaded[0], datamodule.on_after_batch_transfer(loaded, 0)[0].round()

    assert (batches()[1] == 200).all()
    loaded, finished = batches(cutout=Cutout(2))
    assert (loaded == 200).all()
    assert (finished[:, 0] == 0).sum((1, 2)).max() == 4
    loaded, finished = batches(crop=RandomCrop(1), policy=lambda image: image + 1)
    assert set(loaded.unique().tolist()) == {1, 201}
    assert torch.equal(loaded, finished.byte())
    loaded, finished = batches(policy=lambda image: image + 1, crop=RandomCrop(1))
    assert set(loaded.unique().tolist()) == {201}
    assert set(finished.unique().tolist()) == {0, 201}


class Recorder(LightningModule):
    """Keeps every batch that arrives, keyed by stage, epoch and step."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 4)
        self.batches = {}

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.batches["train", self.current_epoch, batch_idx] = images.clone(), labels.clone()
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch, batch_idx):
        self.batches["val", batch_idx] = [t.clone() for t in batch]

    def test_step(self, batch, batch_idx):
        self.batches["test", batch_idx] = [t.clone() for t in batch]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(**options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**quiet, "accelerator": "cpu", "max_epochs": 3, **options})


def run(datamodule, ckpt_path=None, **options):
    module = Recorder()
    trainer(**options).fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    return module.batches


def assert_same(one, two):
    assert one.keys() == two.keys()
    for key in one:
        assert all(torch.equal(a, b) for a, b in zip(one[key], two[key], strict=True)), key


def training(batches):
    return {key: batch for key, batch in batches.items() if key[0] == "train"}


CUT = {**crop_flip(), "cutout": Cutout(2)}


@pytest.fixture(scope="module")
def uninterrupted():
    return run(make(val_size=24, augment=CUT))


def test_a_run_repeats_bit_for_bit(uninterrupted):
    torch.manual_seed(9)
    assert_same(run(make(val_size=24, augment=CUT)), uninterrupted)
    assert len(training(uninterrupted)) == 3 * 6


@pytest.mark.parametrize(
    ("data_options", "trainer_options"),
    [
        ({"num_workers": 1}, {}),
        ({"device": "cpu"}, {}),
        ({}, {"use_distributed_sampler": False}),
        ({}, {"val_check_interval": 2, "num_sanity_val_steps": 0}),
        ({}, {"accumulate_grad_batches": 4, "reload_dataloaders_every_n_epochs": 1}),
        ({}, {"max_epochs": -1, "max_steps": 18}),
    ],
)
def test_batches_do_not_depend_on_how_they_are_run(uninterrupted, data_options, trainer_options):
    batches = run(make(val_size=24, augment=CUT, **data_options), **trainer_options)
    assert_same(training(batches), training(uninterrupted))


def test_overfitting_repeats_the_first_batches_of_the_first_epoch(uninterrupted):
    found = training(run(make(val_size=24, augment=CUT), overfit_batches=2))
    assert len(found) == 3 * 2
    for (_, _, batch), images_and_labels in found.items():
        first = uninterrupted["train", 0, batch]
        assert all(map(torch.equal, images_and_labels, first))


def test_overfitting_ranks_have_images_of_their_own(monkeypatch):
    """Lightning would give all ranks the same."""
    loops = []
    for rank in range(2):
        datamodule = make(val_size=24, augment={})
        monkeypatch.setattr(datamodule, "_world", lambda rank=rank: (2, rank))
        loops.append(run(datamodule, overfit_batches=2, max_epochs=1))
    for stage in (("train", 0, 0), ("train", 0, 1), ("val", 0)):
        one, two = (batches[stage][0] for batches in loops)
        assert one.shape == two.shape
        assert not any((a == b).all() for a in one for b in two)


def test_every_epoch_and_step_draws_anew():
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    split = Split(image.expand(48, 1, 8, 8).contiguous(), torch.arange(48) % 4)
    same = replace(source(), train=split)
    batches = [images for images, _ in run(make(lambda: same)).values()]
    assert len(batches) == 9
    for one, two in itertools.combinations(batches, 2):
        assert not torch.equal(one, two)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("at_train_end", [False, True])
def test_a_resumed_run_goes_on_with_the_same_batches(
    uninterrupted, tmp_path, num_workers, at_train_end
):
    saver = ModelCheckpoint(
        tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=at_train_end
    )
    options = {"val_size": 24, "augment": CUT, "num_workers": num_workers}
    run(make(**options), max_epochs=1, enable_checkpointing=True, callbacks=[saver])
    resumed = run(make(**options), ckpt_path=tmp_path / "epoch=0.ckpt")
    later = {k: v for k, v in training(uninterrupted).items() if k[1] >= 1}
    assert_same(training(resumed), later)


def test_a_policy_draws_the_same_in_any_number_of_workers_and_after_a_resume(tmp_path):
    options = {"val_size": 24, "augment": {**CUT, "policy": RandAugment()}}
    expected = run(make(**options))
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    saved = {"enable_checkpointing": True, "callbacks": [saver]}
    torch.manual_seed(9)
    assert_same(run(make(**options, num_workers=2), **saved), expected)
    later = {k: v for k, v in training(expected).items() if k[1] >= 1}
    for num_workers in (0, 1):
        datamodule = make(**options, num_workers=num_workers)
        assert_same(training(run(datamodule, ckpt_path=tmp_path / "epoch=0.ckpt")), later)


def test_evaluation_batches_are_normalised_only():
    datamodule = make(val_size=24, eval_batch_size=10, augment=CUT)
    module = Recorder()
    runner = trainer(max_epochs=1)
    runner.fit(module, datamodule=datamodule)
    runner.test(module, datamodule=datamodule, verbose=False)
    plain = BatchAugment(datamodule.mean, datamodule.std)
    for stage, sizes in (("val", [10, 10, 4]), ("test", [10, 10, 3])):
        split = getattr(datamodule, stage)
        batches = [module.batches[stage, i] for i in range(3)]
        assert [len(labels) for _, labels in batches] == sizes
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(images, plain.normalize(split.images))
        assert torch.equal(labels, split.labels)


def test_a_run_without_val_trains_and_skips_validation():
    assert {key[0] for key in run(make(), max_epochs=1)} == {"train"}


# ---- devices


@pytest.mark.parametrize(
    ("options", "accelerator", "pinned"),
    [
        ({}, CPUAccelerator, False),
        ({}, CUDAAccelerator, True),
        ({"device": "cpu"}, CUDAAccelerator, False),
        ({"pin_memory": True}, CPUAccelerator, True),
        ({"pin_memory": False}, CUDAAccelerator, False),
    ],
)
def test_memory_is_pinned_as_asked_or_for_cuda_only(options, accelerator, pinned):
    datamodule = as_rank(ready(**options), 0, 1)
    datamodule.trainer.accelerator = accelerator()
    assert datamodule.train_dataloader().pin_memory is pinned
    assert datamodule.test_dataloader().pin_memory is pinned


def test_images_move_to_the_training_device_and_batches_are_gathered_there(monkeypatch):
    asked = []
    take = Split.take
    monkeypatch.setattr(Split, "take", lambda self, i: asked.append(i) or take(self, i))
    datamodule = make(lambda: source(val=True))
    datamodule.device = "meta"  # stands for a GPU: it has shapes, and no data of the host's
    datamodule.setup("fit")  # for a look at the data: nothing is known of a device yet
    assert datamodule.train.images.device.type == "cpu"
    for _ in range(2):
        as_rank(datamodule, 0, 1, device="meta").setup("fit")
    for split in (datamodule.train, datamodule.val, datamodule.test):
        images, labels = SplitDataset(split).__getitems__([3, 1])
        assert images.device.type == labels.device.type == split.images.device.type == "meta"
        assert (images.shape, labels.shape) == ((2, 1, 8, 8), (2,))
        assert asked.pop().device.type == "meta"


def test_a_device_that_is_not_there_or_not_the_trainers_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^device=cuda: there is no CUDA device here"):
        make(device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"^device=cuda: the trainer trains on cpu"):
        as_rank(make(device="cuda"), 0, 1).setup("fit")
    with pytest.raises(ValueError, match=r"^device=cpu: the trainer trains on cuda"):
        as_rank(make(device="cpu"), 0, 1, device="cuda:1").setup("fit")


@pytest.mark.gpu
@pytest.mark.parametrize("entries", [CUT, {"policy": TrivialAugment()}])
def test_batches_from_the_gpu_are_those_from_the_host(entries):
    options = {"val_size": 24, "augment": entries}
    batches = {}
    for device in ("cuda", None):
        datamodule = make(**options, device=device)
        batches[device] = run(datamodule, accelerator="cuda", devices=1)
        assert (datamodule.train.images.device.type == "cuda") is (device == "cuda")
    for key, (images, labels) in batches[None].items():
        assert torch.equal(labels, batches["cuda"][key][1])
        assert "policy" in entries or torch.equal(images, batches["cuda"][key][0])

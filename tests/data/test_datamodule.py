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
from sam_lightning.data.augment import BatchAugment
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
        ({"cutout": -1}, "cutout=-1"),
        ({"policy": "none"}, "policy='none'"),
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
    original = SplitDataset.__getitems__
    monkeypatch.setattr(
        SplitDataset, "__getitems__", lambda self, i: requests.append(i) or original(self, i)
    )
    batches = list(datamodule.train_dataloader())
    assert [len(request) for request in requests] == [16] * 7 + [8]
    for request, (images, labels) in zip(requests, batches, strict=True):
        assert images.dtype == torch.uint8
        assert torch.equal(images, datamodule.train.images[request])
        assert torch.equal(labels, datamodule.train.labels[request])
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
    return [n for images, _ in datamodule.train_dataloader() for n in numbers(images)]


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


def test_augmentation_differs_between_seeds_epochs_steps_and_ranks():
    same = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(16, 1, 8, 8)
    labels = torch.arange(16)
    outputs = {}
    for seed, epoch, step, rank in itertools.product(range(2), repeat=4):
        datamodule = as_rank(ready(seed=seed), rank, 2, epoch, step)
        images, kept = datamodule.on_after_batch_transfer([same, labels], 0)
        again, _ = datamodule.on_after_batch_transfer([same, labels], 0)
        assert torch.equal(images, again)
        assert torch.equal(kept, labels)
        outputs[seed, epoch, step, rank] = images
    for one, two in itertools.combinations(outputs.values(), 2):
        assert not torch.equal(one, two)


def test_augmentation_options_arrive():
    image = torch.full((200, 1, 8, 8), 200, dtype=torch.uint8)
    options = {"mean": [0.0], "std": [1 / 255]}

    def augmented(**more):
        datamodule = as_rank(ready(**options, **more), 0, 1)
        return datamodule.on_after_batch_transfer((image, torch.zeros(200)), 0)[0].round()

    still = {"crop_padding": 0, "flip": False}
    assert (augmented(**still) == 200).all()
    assert (augmented(**still, cutout=2)[:, 0] == 0).sum((1, 2)).max() == 4
    assert (augmented(flip=False, crop_padding=1)[:, 0, 1:-1, 1:-1] == 200).all()
    assert (augmented(crop_padding=1)[:, 0, 0] == 0).any()


def test_crop_flip_and_policy_are_done_in_the_loader_if_there_is_a_policy():
    def batches(**options):
        datamodule = as_rank(ready(batch_size=120, **options), 0, 1)
        images, _ = batch = next(iter(datamodule.train_dataloader()))
        return datamodule, images, datamodule.on_after_batch_transfer(batch, 0)[0]

    still = {"crop_padding": 0, "flip": False}
    _, plain, _ = batches(**still)
    _, policy, _ = batches(**still, policy="trivialaugment")
    assert policy.dtype == torch.uint8
    assert 30 < (policy != plain).any(3).any(2).any(1).sum() < 120  # Identity is one of 14
    datamodule, images, finished = batches(policy="trivialaugment")
    assert (images[:, 0, 0] != policy[:, 0, 0]).any()  # cropped
    assert torch.equal(finished, BatchAugment(datamodule.mean, datamodule.std).normalize(images))
    _, images, finished = batches(policy="trivialaugment", mean=[0.0], cutout=6)
    holes = (finished == 0) & (images > 0)
    assert holes.any()


def test_a_policy_draws_anew_for_seeds_epochs_ranks_and_batches():
    ramp = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8) * 3

    def loaded(count, batch_size, seed, epoch, rank):
        split = Split(ramp.expand(count, 1, 8, 8).contiguous(), torch.zeros(count).long())
        same = replace(source(), train=split)
        datamodule = ready(lambda: same, seed=seed, batch_size=batch_size, policy="randaugment")
        loader = as_rank(datamodule, rank, 2, epoch).train_dataloader()
        batches, again = ([images for images, _ in loader] for _ in range(2))
        assert all(map(torch.equal, batches, again))
        return batches

    # A single image, so that the order of the images does not tell these batches from each other.
    keys = itertools.product(range(3), range(3), range(2))
    seen = [loaded(1, 2, *key)[0] for key in keys]
    seen += loaded(64, 8, 0, 0, 0)
    assert len(seen) == 18 + 8
    for one, two in itertools.combinations(seen, 2):
        assert not torch.equal(one, two)


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


@pytest.fixture(scope="module")
def uninterrupted():
    return run(make(val_size=24, cutout=2))


def test_a_run_repeats_bit_for_bit(uninterrupted):
    torch.manual_seed(9)
    assert_same(run(make(val_size=24, cutout=2)), uninterrupted)
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
    batches = run(make(val_size=24, cutout=2, **data_options), **trainer_options)
    assert_same(training(batches), training(uninterrupted))


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
    options = {"val_size": 24, "cutout": 2, "num_workers": num_workers}
    run(make(**options), max_epochs=1, enable_checkpointing=True, callbacks=[saver])
    resumed = run(make(**options), ckpt_path=tmp_path / "epoch=0.ckpt")
    later = {k: v for k, v in training(uninterrupted).items() if k[1] >= 1}
    assert_same(training(resumed), later)


def test_a_policy_draws_the_same_in_any_number_of_workers_and_after_a_resume(tmp_path):
    options = {"val_size": 24, "cutout": 2, "policy": "trivialaugment"}
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
    datamodule = make(val_size=24, eval_batch_size=10, cutout=3)
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
@pytest.mark.parametrize("policy", [None, "trivialaugment"])
def test_batches_from_the_gpu_are_those_from_the_host(policy):
    options = {"val_size": 24, "policy": policy, "crop_padding": 0, "flip": False}
    batches = {}
    for device in ("cuda", None):
        datamodule = make(**options, device=device)
        batches[device] = run(datamodule, accelerator="cuda", devices=1)
        assert (datamodule.train.images.device.type == "cuda") is (device == "cuda")
    for key, (images, labels) in batches[None].items():
        assert torch.equal(labels, batches["cuda"][key][1])
        assert policy or torch.equal(images, batches["cuda"][key][0])

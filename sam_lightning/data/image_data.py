"""An ``ImageSource`` as a run uses it: splits, label noise, order, shards, augmentation, loaders.

Every random choice has its own stream, a hash of the seed and of what is drawn, so runs that share
a seed see the same batches bit for bit, whatever else they do with random numbers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from sam_lightning.config.cluster import number
from sam_lightning.config.errors import ConfigError, argument_errors, one_line
from sam_lightning.config.instantiate import build_all, check_names, factory
from sam_lightning.data.augment import BatchAugment, MixedLabels, crop_flip
from sam_lightning.data.augment.pipeline import BatchKey
from sam_lightning.data.loading import (
    AUTO,
    SAMPLERS,
    EpochOrder,
    EvalShard,
    SplitDataset,
    TrainDataset,
    TrainLoader,
    TrainSampler,
    suggested_workers,
)
from sam_lightning.data.seeding import draw_seed
from sam_lightning.data.source import ImageSource, Split, read_splits, stratified_split

SAMPLE = 2000  # images that mean and std are computed from where not all are in memory
DEVICES = (None, "cpu", "cuda")  # where images are kept
# Keys of the data configuration that belong to its source; the rest are fields of ImageData.
SOURCE_KEYS = {"source", "root", "download", "image_size", "cache_dir", "split", "skip_broken"}
SOURCE_KEYS |= {"view", "crop_scale", "crop_ratio", "crop_fraction", "crop_mode", "interpolation"}
SOURCE_KEYS.add("memory_gb")

# The first part of each stream's seed after the user's own.
_SHUFFLE, _NOISE, _AUGMENT, _VAL, _SUBSET = range(5)


@dataclass(eq=False, repr=False)
class ImageData:
    """Serves an image source; batches are augmented after they are on the training device.

    What the augmentation does to single images, and what comes before, the loading processes do.

    Args:
        source: reads the data, for instance ``partial(cifar10, root="data")``.
        batch_size: training images per step, over all processes together.
        eval_batch_size: images per evaluation batch and process.
        val_size: images held out of the training set, stratified: their number, or a fraction < 1.
            Unused if the source has a validation set.
        subset: training images to keep of those left, stratified: a fraction up to 1, or a number.
        label_noise: fraction of the labels of these images that are replaced by another class,
            uniformly drawn: symmetric noise as in Foret et al. 2021, section 3.3.
        seed: of the order, the augmentation and the label noise.
        split_seed: of ``val_size`` and ``subset``, so that runs of different ``seed`` share them.
        mean: per channel, of pixels in 0..1; None: computed from the training images.
        std: likewise.
        augment: the entries of a ``BatchAugment`` by name; crop and flip by default.
        sampler, repeats, window: of the order, as ``EpochOrder`` takes them.
        num_workers: loading processes; "auto": none, or ``suggested_workers`` where images are
            decoded each time or single images are augmented. The batches are the same.
        drop_last: leave out the last training batch of an epoch if it is not full.
        pin_memory: None: if the batches go to a CUDA device and the images are not there yet.
        device: "cuda" keeps all images, as bytes, on the device that a CUDA trainer trains on, and
            takes batches from there, in the training process; "cpu" and None: in host memory.
        pixels_of: the splits whose images are read: "train", which is with val, and "test".

    Attributes, from ``read`` on:
        classes (list of names), num_classes, in_channels, mean and std (tuples of floats),
        train (``Split``), val, test (``Split`` or None);
        left_out (files that are not used: their number by kind), broken (names of files that
        cannot be decoded and were left out, and why), sizes (least, median and largest width and
        height of the files, by split).

    Raises:
        ValueError: an argument is out of its range; by ``read``, out of the range of the data.
    """

    source: Callable[[], ImageSource]
    batch_size: int = 128
    eval_batch_size: int = 512
    val_size: int | float = 0
    subset: int | float = 1.0
    label_noise: float = 0.0
    seed: int = 0
    split_seed: int = 0
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    augment: Mapping[str, Any] = field(default_factory=crop_flip)
    sampler: str = "shuffled"
    repeats: int = 1
    window: int | None = None
    num_workers: int | str = AUTO
    drop_last: bool = False
    pin_memory: bool | None = None
    device: str | None = None
    pixels_of: Sequence[str] = ("train", "test")

    def __post_init__(self) -> None:
        super().__init__()
        workers = 0 if self.num_workers == AUTO else self.num_workers
        for key, ok, allowed in [
            ("batch_size", self.batch_size >= 1, "an integer >= 1"),
            ("eval_batch_size", self.eval_batch_size >= 1, "an integer >= 1"),
            ("val_size", self.val_size >= 0, "a number of images, or a fraction in [0, 1)"),
            ("subset", self.subset > 0, "a fraction in (0, 1], or a number of images"),
            ("label_noise", 0 <= self.label_noise <= 1, "a fraction in [0, 1]"),
            ("num_workers", isinstance(workers, int) and workers >= 0, "an integer >= 0, or auto"),
            ("repeats", self.repeats >= 1, "an integer >= 1"),
        ]:
            if not ok:
                raise ValueError(f"{key}={getattr(self, key)}: must be {allowed}")
        if self.device not in DEVICES:
            raise ValueError(f"device={self.device!r}: must be null or one of {[*DEVICES[1:]]}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler={self.sampler!r}: must be one of {[*SAMPLERS]}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda: there is no CUDA device here; set it to null")
        if self.device is not None and self.num_workers not in (0, AUTO):
            raise ValueError(
                f"num_workers={self.num_workers}: must be 0 with device={self.device}, as other "
                "processes cannot load from there"
            )
        self._augment: BatchAugment | None = None
        self.classes: list[str]
        self.train: Split
        self.val: Split | None
        self.test: Split | None
        self.left_out: dict[str, int] = {}
        self.broken: dict[str, str] = {}
        self.sizes: dict[str, dict[str, list[int]]] = {}

    def read(self) -> None:
        """Read the source and split it."""
        source = self.source()
        self.classes, self.drawn = source.classes, source.drawn
        train, val = self._split_train(source)
        self.train, self.val = self._pixels("train", train, val)
        (self.test,) = self._pixels("test", source.test)
        for gone in {*train.labels.unique().tolist()} - {*self.train.labels.unique().tolist()}:
            raise ConfigError(
                f"data.skip_broken=true: no training image of class {self.classes[gone]!r} can be "
                "decoded"
            )
        if self.val is not None and not len(self.val):
            raise ConfigError("data.skip_broken=true: no validation image can be decoded")
        self.left_out = {**source.left_out} | ({"broken": len(self.broken)} if self.broken else {})
        self._add_label_noise()
        mean, std = self.mean, self.std
        if mean is None or std is None:
            found = self._seen_by_statistics().statistics()
            mean, std = found[0] if mean is None else mean, found[1] if std is None else std
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        if len(self.mean) != self.in_channels:
            raise ValueError(f"mean={list(self.mean)}: must be {self.in_channels} numbers")
        self._prepare_training()

    def _seen_by_statistics(self) -> Split:
        """The training images, or if they are decoded when needed, some thousands of them."""
        if isinstance(self.train.stored, Tensor):
            return self.train
        some = torch.linspace(0, len(self.train) - 1, min(len(self.train), SAMPLE)).long()
        (found,) = read_splits(self.train.take(some))
        assert found is not None
        return found

    def _prepare_training(self) -> None:
        """The order of the training images and their augmentation, tried on one of them."""
        assert self.mean is not None
        assert self.std is not None
        augment = BatchAugment(self.mean, self.std, self.augment, draw_seed(self.seed, _AUGMENT))
        seed = draw_seed(self.seed, _SHUFFLE)
        self._order = EpochOrder(self.train, seed, self.sampler, self.repeats, self.window)
        if self.drop_last and len(self._order) < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size}: must be <= {len(self._order)}, the number of "
                "training images, with drop_last=true"
            )
        # To evaluate the test set, no training image is read: the first one may be broken.
        tried = self.train.take(torch.tensor([0])).seen() if "train" in self.pixels_of else None
        for name, check in () if tried is None else augment.check(tried):
            try:
                with argument_errors(f"augment.{name}"):
                    check()
            except ConfigError:
                raise
            except Exception as error:  # whatever a user's own raises
                raise ConfigError(f"augment.{name}: {one_line(error)}") from error
        self._augment = augment

    def _pixels(self, name: str, *splits: Split | None) -> list[Any]:
        """The splits, with their images read if that is asked for."""
        if name not in self.pixels_of:
            return [*splits]
        first = splits[0]
        changing = name == "train" and getattr(first and first.stored, "random", None) is not None
        done: list[Any] = []
        for part in (splits[:1], splits[1:]) if changing else (splits,):
            its = iter((name, "val")[len(done) :])
            done += read_splits(*part, training=changing and not done)
            for split in part:  # now: who reads the next part forgets what was found
                key = next(its)
                self.broken |= getattr(split and split.stored, "broken", {})
                if found := getattr(split and split.stored, "sizes", None):
                    self.sizes[key] = found
        return done

    def _split_train(self, source: ImageSource) -> tuple[Split, Split | None]:
        train, val = source.train, source.val
        if val is None and self.val_size:
            held_out, kept = self._drawn("val_size", train, len(train) - 1, _VAL)
            train, val = train.take(kept), train.take(held_out)
        if self.subset != 1.0:
            kept, _ = self._drawn("subset", train, len(train), _SUBSET)
            train = train.take(kept)
        return train, val

    def _drawn(self, key: str, train: Split, most: int, stream: int) -> tuple[Tensor, Tensor]:
        size, total = getattr(self, key), len(train)
        count = round(size * total) if size < 1 else int(size)
        if not 1 <= count <= most or (size >= 1 and count != size):
            raise ValueError(f"{key}={size}: must come to 1..{most} of the {total} training images")
        return stratified_split(train.labels, count, draw_seed(self.split_seed, stream))

    def _add_label_noise(self) -> None:
        noisy = round(self.label_noise * len(self.train))
        if noisy == 0:
            return
        generator = torch.Generator().manual_seed(draw_seed(self.seed, _NOISE))
        chosen = torch.randperm(len(self.train), generator=generator)[:noisy]
        # A step of 1..K-1 around the circle of K classes reaches every other class, equally often.
        steps = torch.randint(1, self.num_classes, (noisy,), generator=generator)
        labels = self.train.labels.clone()
        labels[chosen] = (labels[chosen] + steps) % self.num_classes
        self.train = replace(self.train, labels=labels)

    @property
    def num_classes(self) -> int:
        """Number of classes; the labels are 0..num_classes - 1."""
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        """Channels of an image: 3 for colour, 1 for grey."""
        return self.train.shape[0]

    @property
    def splits(self) -> dict[str, Split]:
        """Those that there are of ``train``, ``val`` and ``test``, by name."""
        found = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in found.items() if split is not None}

    def class_counts(self) -> dict[str, list[int]]:
        """Images of each class, by split; training labels as they are trained on."""
        return {
            name: split.labels.bincount(minlength=self.num_classes).tolist()
            for name, split in self.splits.items()
        }

    def train_loader(
        self,
        world_size: int = 1,
        rank: int = 0,
        epoch: int = 0,
        pin_memory: bool = False,
        first_epoch_only: bool = False,
    ) -> TrainLoader:
        """One process's share of the training set, in an order that (seed, epoch) fixes."""
        assert self._augment is not None
        dataset = TrainDataset(self.train, self._order, self._augment, self.batch_size, world_size)
        sampler = TrainSampler(dataset, world_size, rank, drop_last=self.drop_last)
        sampler.first_epoch_only = first_epoch_only
        sampler.set_epoch(epoch)
        batch = self.batch_size // world_size
        options = self._loader_options(self.train, sampler, batch, pin_memory)
        return TrainLoader(dataset, drop_last=self.drop_last, **options)

    def eval_loader(
        self, split: Split, world_size: int = 1, rank: int = 0, pin_memory: bool = False
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        """One process's share of a split, in order."""
        dataset = SplitDataset(split)
        sampler = EvalShard(dataset, world_size, rank)
        options = self._loader_options(split, sampler, self.eval_batch_size, pin_memory)
        return DataLoader(dataset, **options)

    def _loader_options(
        self, split: Split, sampler: DistributedSampler[Any], batch_size: int, pin_memory: bool
    ) -> dict[str, Any]:
        workers = self.workers(split)
        return {
            "batch_size": batch_size,
            "sampler": sampler,
            "num_workers": workers,
            "collate_fn": tuple,  # the dataset returns whole batches
            "pin_memory": pin_memory if self.pin_memory is None else self.pin_memory,
            "persistent_workers": workers > 0,
        }

    def workers(self, split: Split) -> int:
        """The number of processes that load a split, for each process that trains."""
        if isinstance(self.num_workers, int):
            return self.num_workers
        assert self._augment is not None
        training = split is self.train
        if isinstance(split.stored, Tensor) and not (training and self._augment.loads):
            return 0  # a batch takes no time
        if self.device is not None:  # where other processes cannot load from
            return 0
        processes = self._processes()
        images = self.batch_size if training else self.eval_batch_size * processes
        return suggested_workers(processes, images * math.prod(split.shape))

    def _processes(self) -> int:
        """How many processes of a run are on this machine."""
        return number("LOCAL_WORLD_SIZE", 1)

    def finish(
        self, images: Tensor, labels: Tensor, key: BatchKey
    ) -> tuple[Tensor, Tensor | MixedLabels]:
        """Augment and normalise a training batch, as far as its loader has not done so."""
        assert self._augment is not None
        return self._augment(images, labels, key)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise uint8 images, as evaluation does."""
        assert self._augment is not None
        return self._augment.normalize(images)


Kind = TypeVar("Kind", bound=ImageData)


def build_data(cfg: DictConfig, kind: type[Kind]) -> Kind:
    """The data that ``data``, ``augment``, ``batch_size`` and ``seed`` describe, not read yet.

    Raises:
        ConfigError: a key does not exist, or its value is out of its range.
    """
    options = {str(k): v for k, v in cfg.data.items() if k not in SOURCE_KEYS | {"flip"}}
    if not cfg.get("test", True):
        options.setdefault("pixels_of", ["train"])
    own: dict[str, Any] = {"source": factory(cfg, "data.source")}
    own |= {"batch_size": cfg.batch_size, "seed": cfg.seed, "augment": build_all(cfg, "augment")}
    check_names("data", options, kind, own)
    with argument_errors("data"):
        return kind(**own, **options)

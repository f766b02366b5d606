"""Augmented training images a second: batches at once, or torchvision's one image at a time."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from benchmarks.synthetic import BATCH_SIZE, data_module, noise
from benchmarks.timing import Measurement, interleave, ratio, summary
from sam_lightning.data.augment import BatchAugment, draw_seed
from sam_lightning.data.sources import Split

CUTOUT = 16
WORKERS = (0, 2)


class PILImages(Dataset[tuple[Any, int]]):
    """As torchvision's CIFAR10: an array in memory, made a PIL image and transformed one by one."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor]) -> None:
        self.data = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def measure(quick: bool) -> list[Measurement]:
    """Crop and flip; the same with Cutout; the same with TrivialAugment."""
    images, rounds = (1_000, 2) if quick else (10_000, 5)
    few, few_rounds = (500, 2) if quick else (3_000, 3)
    # torchvision has no Cutout; RandomErasing of a square of the same area is nearest.
    side = (CUTOUT / 32) ** 2
    erase = T.RandomErasing(p=1.0, scale=(side, side), ratio=(1.0, 1.0))
    return [
        *compare("crop + flip", images, rounds),
        *compare(f"crop + flip + cutout {CUTOUT}", images, few_rounds, [], [erase], cutout=CUTOUT),
        *compare(
            "crop + flip + trivialaugment",
            few,
            few_rounds,
            [T.TrivialAugmentWide()],
            policy="trivialaugment",
        ),
        *cost_of_cutout(images, 3 * rounds),
    ]


def compare(
    what: str,
    images: int,
    rounds: int,
    policy_of_peer: Sequence[Any] = (),
    erasing_of_peer: Sequence[Any] = (),
    **options: Any,
) -> list[Measurement]:
    """Epochs over the images, ours and those of torchvision's loaders."""
    cases: dict[str, Callable[[], Any]] = {}
    for workers in WORKERS:
        cases[f"ours, {workers} workers"] = batched_epochs(images, workers, **options)
        transform = torchvision_pipeline(policy_of_peer, erasing_of_peer)
        loader = DataLoader(
            PILImages(noise(images), transform),
            BATCH_SIZE,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        cases[f"torchvision, {workers} workers"] = partial(exhaust, loader)
    speeds = images_per_second(cases, images, rounds)
    ratios = [
        (f"ours, {n} workers", f"torchvision, {m} workers")
        for n, m in itertools.product(WORKERS, WORKERS)
        if n <= m
    ]
    return [
        *(ratio("input", f"{a} / {b} (images/s): {what}", speeds[a], speeds[b]) for a, b in ratios),
        *(summary("input", f"{name}: {what}", speeds[name], "images/s") for name in cases),
    ]


def cost_of_cutout(images: int, rounds: int) -> list[Measurement]:
    """Ours with Cutout and without, in turns."""
    cases = {str(size): batched_epochs(images, cutout=size) for size in (CUTOUT, 0)}
    speeds = images_per_second(cases, images, rounds)
    what = f"ours, with cutout {CUTOUT} / without (images/s): crop + flip"
    return [ratio("input", what, *speeds.values())]


def images_per_second(
    cases: Mapping[str, Callable[[], Any]], images: int, rounds: int
) -> dict[str, list[float]]:
    """Time epochs in turns."""
    seconds = interleave(cases, rounds)
    return {name: [images / s for s in values] for name, values in seconds.items()}


def batched_epochs(images: int, workers: int = 0, **options: Any) -> Callable[[], float]:
    """The data module's training loader and what it does to a batch after the transfer."""
    data = data_module(images, num_workers=workers, **options)
    assert data.mean is not None
    assert data.std is not None
    augment = BatchAugment(data.mean, data.std, **options)
    after_transfer = augment if augment.policy is None else augment.finish
    loader = data.train_dataloader()
    # An epoch without a policy is over in a moment, which is too short to time.
    epochs = 5 if augment.policy is None else 1

    def run() -> float:
        started = time.perf_counter()
        for epoch in range(epochs):
            for step, (raw, _) in enumerate(loader):
                seed = draw_seed(0, epoch, step)
                after_transfer(raw, torch.Generator().manual_seed(seed))
        return (time.perf_counter() - started) / epochs

    return run


def torchvision_pipeline(policy: Sequence[Any], erasing: Sequence[Any]) -> Any:
    """The transforms of most CIFAR training scripts."""
    statistics = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return T.Compose(
        [
            T.RandomCrop(32, padding=4),
            T.RandomHorizontalFlip(),
            *policy,
            T.ToTensor(),
            T.Normalize(*statistics),
            *erasing,
        ]
    )


def exhaust(loader: DataLoader[Any]) -> None:
    """Take every batch of an epoch."""
    for _ in loader:
        pass

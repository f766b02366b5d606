"""Augmented training images a second: batches at once, or torchvision's one image at a time."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from benchmarks.loop import quieten
from benchmarks.synthetic import BATCH_SIZE, data_module, noise
from benchmarks.timing import Measurement, clock_of, interleave, ratio, summary
from sam_lightning.data import Split
from sam_lightning.data.augment import (
    AutoAugment,
    ColorJitter,
    CutMix,
    Cutout,
    Mixup,
    RandAugment,
    RandomErasing,
    TrivialAugment,
    crop_flip,
)

CUTOUT = 16
WORKERS = (0, 2)
GPU_WORKERS = (0, 8)


class PILImages(Dataset[tuple[Any, int]]):
    """Like torchvision's CIFAR10: an array in memory; each image becomes a PIL image alone."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor]) -> None:
        self.data = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def measure(quick: bool, device: torch.device) -> list[Measurement]:
    """Crop and flip; on a CPU also with Cutout, and with TrivialAugment."""
    images, rounds = (1_000, 2) if quick else (10_000, 5)
    quieten()
    if device.type == "cuda":
        return compare("crop + flip", images // 2, 3, device)
    few, few_rounds = (500, 2) if quick else (3_000, 3)
    # torchvision has no Cutout; RandomErasing of a square of the same area is nearest.
    side = (CUTOUT / 32) ** 2
    erase = T.RandomErasing(p=1.0, scale=(side, side), ratio=(1.0, 1.0))
    return [
        *compare("crop + flip", images, rounds, device),
        *compare(
            f"crop + flip + cutout {CUTOUT}",
            images,
            few_rounds,
            device,
            [],
            [erase],
            augment={**crop_flip(), "cutout": Cutout(CUTOUT)},
        ),
        *compare(
            "crop + flip + trivialaugment",
            few,
            few_rounds,
            device,
            [T.TrivialAugmentWide()],
            augment={**crop_flip(), "policy": TrivialAugment()},
        ),
        *cost_of_each(images, rounds, device),
    ]


def compare(
    what: str,
    images: int,
    rounds: int,
    device: torch.device,
    policy_of_peer: Sequence[Any] = (),
    erasing_of_peer: Sequence[Any] = (),
    **options: Any,
) -> list[Measurement]:
    """Epochs over the images, by our loader and by torchvision's."""
    cases: dict[str, Callable[[], Any]] = {}
    on_gpu = device.type == "cuda"
    if on_gpu:
        cases["ours, data.device=cuda"] = batched_epochs(images, device, device="cuda")
    for workers in GPU_WORKERS if on_gpu else WORKERS:
        cases[f"ours, {workers} workers"] = batched_epochs(
            images, device, num_workers=workers, **options
        )
        transform = torchvision_pipeline(policy_of_peer, erasing_of_peer)
        loader = DataLoader(
            PILImages(noise(images), transform),
            BATCH_SIZE,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=on_gpu,
        )
        cases[f"torchvision, {workers} workers"] = partial(exhaust, loader, device)
    speeds = images_per_second(cases, images, rounds)
    # With at most as many workers as theirs.
    ratios = [
        (ours, theirs)
        for (i, ours), (j, theirs) in itertools.product(enumerate(cases), repeat=2)
        if i < j and ours.startswith("ours") and theirs.startswith("torchvision")
    ]
    return [
        *(ratio("input", f"{a} / {b} (images/s): {what}", speeds[a], speeds[b]) for a, b in ratios),
        *(summary("input", f"{name}: {what}", speeds[name], "images/s") for name in cases),
    ]


def cost_of_each(images: int, rounds: int, device: torch.device) -> list[Measurement]:
    """Ours with an augmentation and without, in turns."""
    batched: dict[str, Any] = {
        f"cutout {CUTOUT}": Cutout(CUTOUT),
        "erasing": RandomErasing(0.25),
        "color_jitter": ColorJitter(0.4, 0.4, 0.4, 0.1),
        "mixup": Mixup(0.2),
        "cutmix": CutMix(1.0),
    }
    policies = {p.__name__: p() for p in (AutoAugment, RandAugment, TrivialAugment)}
    return [
        *_costs("added", batched, images, rounds, device),
        *_costs("policy", policies, images // 5, 3, device),
    ]


def _costs(
    key: str, added: Mapping[str, Any], images: int, rounds: int, device: torch.device
) -> list[Measurement]:
    # CPU seconds do not count other processes.
    clock = time.process_time if device.type == "cpu" else clock_of(device)
    cases = {
        name: batched_epochs(images, device, clock, augment={**crop_flip(), key: entry})
        for name, entry in {"": ColorJitter(0, 0, 0), **added}.items()
    }
    speeds = images_per_second(cases, images, rounds)
    without = speeds.pop("")
    unit = "images/CPU s" if device.type == "cpu" else "images/s"
    return [
        ratio("input", f"ours, with {name} / without ({unit}): crop + flip", speed, without)
        for name, speed in speeds.items()
    ]


def images_per_second(
    cases: Mapping[str, Callable[[], Any]], images: int, rounds: int
) -> dict[str, list[float]]:
    """Time epochs in turns."""
    seconds = interleave(cases, rounds)
    return {name: [images / s for s in values] for name, values in seconds.items()}


def batched_epochs(
    images: int, on: torch.device, clock: Callable[[], float] | None = None, **options: Any
) -> Callable[[], float]:
    """The data module's training loader and what it does to a batch after the transfer."""
    trainer = L.Trainer(accelerator=on.type, devices=1, logger=False, enable_checkpointing=False)
    data = data_module(images, trainer=trainer, **{"num_workers": 0, **options})
    clock = clock or clock_of(on)
    loader = data.train_dataloader()
    # An epoch without a policy is too short to time.
    epochs = 1 if "policy" in options.get("augment", {}) else 5

    def run() -> float:
        started = clock()
        for _ in range(epochs):
            for raw, labels, key in loader:
                data.finish(raw.to(on, non_blocking=True), labels, key)
        return (clock() - started) / epochs

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


def exhaust(loader: DataLoader[Any], device: torch.device) -> float:
    """Seconds to take every batch of an epoch to the device."""
    clock = clock_of(device)
    started = clock()
    for images, _ in loader:
        images.to(device, non_blocking=True)
    return clock() - started

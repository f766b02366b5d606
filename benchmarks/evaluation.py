"""Lightning's ``validate`` compared with a bare evaluation loop."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from torch.nn.functional import cross_entropy

from benchmarks.loop import Setting, quieten, sam_module
from benchmarks.step import resnet18
from benchmarks.synthetic import data_module
from benchmarks.timing import Measurement, clock_of, interleave, ratio, summary
from sam_lightning.data.augment import BatchAugment
from sam_lightning.data.datamodule import ImageDataModule


class Stopwatch(L.Callback):
    """Seconds of the last validation epoch, metrics and log included."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds = 0.0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start."""
        self.started = self.clock()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop."""
        self.seconds = self.clock() - self.started


def measure(quick: bool, device: torch.device) -> list[Measurement]:
    """A validation epoch, in time over the bare loop's and in images a second."""
    images, rounds = (512, 2) if quick else (10_000, 7)
    on_gpu = device.type == "cuda"
    quieten()
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            "validate": lightning_validation(data_module(128, images), Path(folder), device),
            "bare": bare_evaluation(data_module(128, images, pin_memory=on_gpu), device),
        }
        seconds = interleave(cases, rounds, clock=clock_of(device))
    model = f"ResNet-18 width {Setting(device).width}, {images:,} images in batches of 512"
    speeds = [images / s for s in seconds["validate"]]
    return [
        ratio(
            "evaluation",
            f"Lightning validate / bare loop, {model}",
            seconds["validate"],
            seconds["bare"],
        ),
        summary("evaluation", f"Lightning validate, {model}", speeds, "images/s"),
    ]


def lightning_validation(
    data: ImageDataModule, folder: Path, device: torch.device
) -> Callable[[], float]:
    """Each call validates once, and times the epoch."""
    stopwatch = Stopwatch(clock_of(device))
    trainer = L.Trainer(
        accelerator=device.type,
        devices=1,
        default_root_dir=folder,
        logger=False,
        callbacks=[stopwatch],
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    module = sam_module(Setting(device).width)

    def run() -> float:
        trainer.validate(module, datamodule=data, verbose=False)
        return stopwatch.seconds

    return run


def bare_evaluation(data: ImageDataModule, device: torch.device) -> Callable[[], None]:
    """Loss, top-1 and top-5 accuracy, by hand."""
    model = resnet18(Setting(device).width, device)
    assert data.mean is not None
    assert data.std is not None
    normalize = BatchAugment(data.mean, data.std).normalize
    loader = data.val_dataloader()

    @torch.inference_mode()
    def run() -> None:
        model.eval()
        sums, count = torch.zeros(3, device=device), 0
        for raw, answers in loader:
            labels = answers.to(device, non_blocking=True)
            logits = model(normalize(raw.to(device, non_blocking=True)))
            hits = logits.topk(5).indices == labels[:, None]
            loss = cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
            count += len(labels)
        (sums / count).tolist()

    return run

"""Lightning's ``fit`` compared with a bare training loop that does the same work."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from benchmarks.peers import BASE, RHO
from benchmarks.step import resnet18
from benchmarks.synthetic import BATCH_SIZE, data_module
from benchmarks.timing import Measurement, clock_of, ratio, summary
from sam_lightning.data.datamodule import ImageDataModule
from sam_lightning.optim.methods.esam import RandomSubsetAscent
from sam_lightning.optim.methods.gsam import SurrogateGap
from sam_lightning.optim.methods.looksam import LookSAM
from sam_lightning.optim.methods.msam import MomentumAscent
from sam_lightning.optim.sam import SAM
from sam_lightning.training.module import SAMModule

WIDTH, GPU_WIDTH = 8, 64
LOG_EVERY = 50
GPU_BATCHES = 25  # in a turn of each loop, because the host runs ahead of a GPU
CHEAPER: dict[str, dict[str, Any]] = {
    "method=sam": {},
    "method.ascent_fraction=0.25": {"ascent_fraction": 0.25},
    "method.every=2": {"every": 2},
    "method.every=5": {"every": 5},
    "method=gsam": {"gradient_transform": SurrogateGap()},
    "method=looksam": {"gradient_transform": LookSAM(), "every": 5},
    "method=esam": {"perturbation": RandomSubsetAscent(), "descent_fraction": 0.5},
    "method=msam": {"perturbation": MomentumAscent()},
}


class TakeTurns(L.Callback):
    """After each turn of the fit the bare loop takes one, so both see the same machine.

    A turn's time is all that ``fit`` does for its batches: fetching, augmentation, both passes, the
    hooks, and the log of the batch before.
    """

    def __init__(self, bare: Iterator[None], batches: int, clock: Callable[[], float]) -> None:
        self.bare = bare
        self.batches = batches
        self.clock = clock
        self.seconds: dict[str, list[float]] = {"fit": [], "bare": []}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.resumed = self.clock()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After the last batch of a turn, note the time and let the bare loop take its turn."""
        if (batch_idx + 1) % self.batches:
            return
        paused = self.clock()
        for _ in range(self.batches):
            next(self.bare)
        self.seconds["fit"].append(paused - self.resumed)
        self.resumed = self.clock()
        self.seconds["bare"].append(self.resumed - paused)


@dataclass(frozen=True)
class Setting:
    """Where both loops train, and how wide a model."""

    device: torch.device
    bf16: bool = False

    @property
    def width(self) -> int:
        """That of ResNet-18."""
        return GPU_WIDTH if self.device.type == "cuda" else WIDTH

    @property
    def batches(self) -> int:
        """Of a turn."""
        return GPU_BATCHES if self.device.type == "cuda" else 1

    def __str__(self) -> str:
        dtype = f", {'bf16' if self.bf16 else 'float32'}" if self.device.type == "cuda" else ""
        return f"ResNet-18 width {self.width}, batch {BATCH_SIZE}{dtype}"


def measure(quick: bool, device: torch.device) -> list[Measurement]:
    """The same work in both loops, then the cheaper methods' cost in passes of SGD."""
    on_gpu = device.type == "cuda"
    rounds, turns = (1, 1) if quick else (3, 2) if on_gpu else (12, 8)  # turns of a round
    quieten()
    results = []
    settings = [Setting(device), Setting(device, bf16=True)] if on_gpu else [Setting(device)]
    for setting in settings:
        # A step of SGD takes half the time, so the same seconds weigh twice as much.
        for method, options, more in (("SAM", {"rho": RHO}, 1), ("SGD", {"rho": 0.0}, 2)):
            fit, bare = by_round(setting, options, options["rho"], rounds * more, turns)
            what = f"Lightning fit / bare loop, {method}, {setting}"
            results.append(ratio("loop", what, fit, bare))
            if on_gpu:
                speeds = [turns * setting.batches * BATCH_SIZE / seconds for seconds in fit]
                results.append(summary("loop", f"fit, {method}, {setting}", speeds, "images/s"))
    setting = settings[-1]
    for name, changes in CHEAPER.items():
        fit, bare = by_round(setting, changes, 0.0, 1 if on_gpu else max(1, rounds // 6), turns)
        results.append(ratio("loop", f"fit with {name} / bare loop of SGD, {setting}", fit, bare))
    return results


def by_round(
    setting: Setting, options: dict[str, Any], bare_rho: float, rounds: int, turns: int
) -> tuple[list[float], list[float]]:
    """Seconds of ``turns`` turns of ``fit`` and of the bare loop, for each round.

    Each round has its own weights, because their place in memory changes the time of a convolution
    by some per cent, for all batches alike.
    """
    seconds = [
        turns_of(setting, sam_module(setting.width, **options), bare_rho, turns)
        for _ in range(rounds)
    ]
    return [sum(s["fit"]) for s in seconds], [sum(s["bare"]) for s in seconds]


def turns_of(
    setting: Setting, module: SAMModule, bare_rho: float, count: int
) -> dict[str, list[float]]:
    """Seconds of ``count`` turns of each loop, after one that does not count."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(Path(folder), setting, max_epochs=1)
        data = data_module((count + 1) * setting.batches * BATCH_SIZE, trainer=trainer)
        bare = bare_batches(data, setting, bare_rho)
        turns = TakeTurns(bare, setting.batches, clock_of(setting.device))
        trainer.callbacks.append(turns)  # type: ignore[attr-defined]
        trainer.fit(module, datamodule=data)
    return {name: values[1:] for name, values in turns.seconds.items()}


def quieten() -> None:
    """Leave out what Lightning says about every trainer and every fit."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def trainer_of(folder: Path, setting: Setting, max_epochs: int) -> L.Trainer:
    """A trainer as ``train.py`` makes it, without checkpoints."""
    return L.Trainer(
        max_epochs=max_epochs,
        accelerator=setting.device.type,
        devices=1,
        precision="bf16-mixed" if setting.bf16 else "32-true",
        logger=[TensorBoardLogger(folder, "tensorboard"), CSVLogger(folder, "csv")],
        log_every_n_steps=LOG_EVERY,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )


def sam_module(width: int, rho: float = RHO, **options: Any) -> SAMModule:
    """The module of a run, around the same weights each time."""
    return SAMModule(resnet18(width), 10, partial(SGD, **BASE), rho, **options)


def bare_batches(data: ImageDataModule, setting: Setting, rho: float) -> Iterator[None]:
    """The loop that people write without Lightning: the same work, stopping after each batch.

    It has no check for non-finite gradients and logs no gradient norm. The module does both, so
    Lightning's side includes their cost.
    """
    device = setting.device
    model = resnet18(setting.width, device)
    sam = SAM(model.parameters(), SGD, rho, **BASE)
    schedule = torch.optim.lr_scheduler.LambdaLR(sam, lambda step: 1.0)
    loader = data.train_dataloader()
    log: list[list[float]] = []

    def gradient(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=setting.bf16):
            logits = model(images)
            loss = cross_entropy(logits, labels)
        loss.backward()
        with torch.no_grad():
            accuracy = (logits.argmax(1) == labels).float().mean()
            return torch.stack([loss.detach(), accuracy])

    model.train()
    sums = torch.zeros(3, device=device)
    for step, (raw, answers, key) in enumerate(loader):
        labels = answers.to(device, non_blocking=True)
        images, _ = data.finish(raw.to(device, non_blocking=True), labels, key)
        sam.zero_grad()
        first = second = gradient(images, labels)
        if rho > 0:
            with sam.perturbed(model):
                second = gradient(images, labels)
        sam.step()
        schedule.step()
        sums += torch.cat([first, second[:1] - first[:1]])
        if (step + 1) % LOG_EVERY == 0:
            log.append((sums / LOG_EVERY).tolist())
            sums.zero_()
        yield

"""What Lightning's ``fit`` costs above a bare training loop that does the same work."""

import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
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
from benchmarks.timing import Measurement, ratio
from sam_lightning.data.augment import BatchAugment, draw_seed
from sam_lightning.data.datamodule import ImageDataModule
from sam_lightning.methods.esam import RandomSubsetAscent
from sam_lightning.methods.gsam import SurrogateGap
from sam_lightning.methods.looksam import Reuse
from sam_lightning.methods.msam import MomentumAscent
from sam_lightning.models.running_stats import frozen_running_stats
from sam_lightning.module import SAMModule
from sam_lightning.sam import SAM

WIDTH = 8
LOG_EVERY = 50
CHEAPER: dict[str, dict[str, Any]] = {
    "method=sam": {},
    "method.ascent_fraction=0.25": {"ascent_fraction": 0.25},
    "method.every=2": {"every": 2},
    "method.every=5": {"every": 5},
    "method=gsam": {"descent": SurrogateGap()},
    "method=looksam": {"descent": Reuse(), "every": 5},
    "method=esam": {"perturbation": RandomSubsetAscent(), "descent_fraction": 0.5},
    "method=msam": {"perturbation": MomentumAscent()},
}


class TakeTurns(L.Callback):
    """After each batch of the fit the bare loop does one too, so both see the same machine.

    What ``fit`` does from one call to the next is its time for a batch: fetching, augmentation,
    both passes, the hooks, and what is logged of the batch before.
    """

    def __init__(self, bare: Iterator[None]) -> None:
        self.bare = bare
        self.seconds: dict[str, list[float]] = {"fit": [], "bare": []}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.resumed = time.perf_counter()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time, and give the bare loop its turn."""
        paused = time.perf_counter()
        next(self.bare)
        self.seconds["fit"].append(paused - self.resumed)
        self.resumed = time.perf_counter()
        self.seconds["bare"].append(self.resumed - paused)


def measure(quick: bool) -> list[Measurement]:
    """The same work in both loops, then what the ways to do less work cost in passes of SGD."""
    rounds, batches = (1, 1) if quick else (12, 8)  # batches of a round
    quieten()
    of = f"ResNet-18 width {WIDTH}, batch {BATCH_SIZE}"
    results = []
    # An update of SGD takes half the time, so the same seconds weigh twice as much.
    for method, options, more in (("SAM", {"rho": RHO}, 1), ("SGD", {"rho": 0.0}, 2)):
        fit, bare = by_round(options, options["rho"], rounds * more, batches)
        results.append(ratio("loop", f"Lightning fit / bare loop, {method}, {of}", fit, bare))
    for setting, changes in CHEAPER.items():
        fit, bare = by_round(changes, 0.0, max(1, rounds // 6), batches)
        results.append(ratio("loop", f"fit with {setting} / bare loop of SGD, {of}", fit, bare))
    return results


def by_round(
    options: dict[str, Any], bare_rho: float, rounds: int, batches: int
) -> tuple[list[float], list[float]]:
    """Seconds of ``batches`` batches of ``fit`` and of the bare loop, for each round.

    Each round has weights of its own, for where memory happens to lie changes what a convolution
    takes by some per cent, and does so for all batches alike.
    """
    seconds = [turns_of_batches(sam_module(**options), bare_rho, batches) for _ in range(rounds)]
    return [sum(s["fit"]) for s in seconds], [sum(s["bare"]) for s in seconds]


def turns_of_batches(module: SAMModule, bare_rho: float, count: int) -> dict[str, list[float]]:
    """Seconds of ``count`` batches of each loop, in turns, after one that does not count."""
    data = data_module((count + 1) * BATCH_SIZE)
    turns = TakeTurns(bare_batches(data, bare_rho))
    with tempfile.TemporaryDirectory() as folder:
        one_epoch_trainer(Path(folder), [turns]).fit(module, datamodule=data)
    return {name: values[1:] for name, values in turns.seconds.items()}


def quieten() -> None:
    """Leave out what Lightning says about every trainer and every fit."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def one_epoch_trainer(folder: Path, callbacks: list[L.Callback]) -> L.Trainer:
    """A trainer as ``train.py`` makes it, without checkpoints."""
    return L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=[TensorBoardLogger(folder, "tensorboard"), CSVLogger(folder, "csv")],
        log_every_n_steps=LOG_EVERY,
        callbacks=callbacks,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )


def sam_module(rho: float = RHO, **options: Any) -> SAMModule:
    """The module of a run, around the same weights each time."""
    return SAMModule(resnet18(WIDTH), 10, partial(SGD, **BASE), rho, **options)


def bare_batches(data: ImageDataModule, rho: float) -> Iterator[None]:
    """The loop one writes without Lightning: the same work, stopping after each batch.

    It lacks what the module guards against and adds for the log (non-finite gradients, the
    gradient's norm), so what these cost is counted against Lightning's side.
    """
    model = resnet18(WIDTH)
    sam = SAM(model.parameters(), SGD, rho, **BASE)
    schedule = torch.optim.lr_scheduler.LambdaLR(sam, lambda step: 1.0)
    assert data.mean is not None
    assert data.std is not None
    augment = BatchAugment(data.mean, data.std)
    loader = data.train_dataloader()
    log: list[list[float]] = []

    def gradient(images: Tensor, labels: Tensor) -> Tensor:
        logits = model(images)
        loss = cross_entropy(logits, labels)
        loss.backward()
        with torch.no_grad():
            accuracy = (logits.argmax(1) == labels).float().mean()
            return torch.stack([loss.detach(), accuracy])

    model.train()
    sums = torch.zeros(3)
    for step, (raw, labels) in enumerate(loader):
        generator = torch.Generator().manual_seed(draw_seed(0, step))
        images = augment(raw, generator)
        sam.zero_grad()
        first = second = gradient(images, labels)
        if rho > 0:
            with sam.perturbed(), frozen_running_stats(model):
                second = gradient(images, labels)
        sam.step()
        schedule.step()
        sums += torch.cat([first, second[:1] - first[:1]])
        if (step + 1) % LOG_EVERY == 0:
            log.append((sums / LOG_EVERY).tolist())
            sums.zero_()
        yield

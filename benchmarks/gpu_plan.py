"""What the parts of benchmarks.gpu measure, and how they report it."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Loops and (model, batch size), in the order in which they are timed. A plain loop is SAM per
# tensor, as in the well-known gists; all have the same images, augmented on the device.
LOOPS = {
    "speed": (
        *("plain loop", "plain loop, channels_last", "pytorch-optimizer"),
        *("this project", "this project, graphs", "this project, graphs, cudnn.benchmark"),
    ),
    "compiled": (
        *("plain loop, compiled", "this project, compiled"),
        "this project, compiled, graphs",
    ),
}
CASES = (("resnet18", 512), ("resnet18", 128), ("wrn28_10", 256), ("vit_s16", 256))
NAMES = {"resnet18": "ResNet-18", "wrn28_10": "WRN-28-10", "vit_s16": "ViT-S/16 at 224 pixels"}

# The keys of a run of SAM or SGD, and what makes it small on a CPU.
RECIPE = ["experiment=cifar10_fast", "cuda_graph=auto"]
SMALL_RECIPE = [
    *("data=digits", "trainer=cpu", "trainer.precision=bf16-mixed", "model.width=2", "epochs=1"),
    *("data.subset=64", "batch_size=32", "data.val_size=0"),
]
METHODS = ("sam", "sgd")
SEEDS = range(5)


@dataclass(frozen=True)
class Task:
    """A part to run: where, in which time, on which images, and the file for its rows."""

    part: str
    device: str
    rows: Path
    seconds: float
    images: Path | None

    @property
    def small(self) -> bool:
        """Whether to be done in a moment, to try the script."""
        return self.device == "cpu"

    def say(self, **row: Any) -> None:
        """Report a row; it is whole in the file at once."""
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")


def run(parts: dict[str, Callable[[Task], None]], argv: Sequence[str] | None = None) -> None:
    """Run the part that ``benchmarks.gpu`` asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=list(parts))
    parser.add_argument("--device", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--images", type=Path)
    task = Task(**vars(parser.parse_args(argv)))
    parts[task.part](task)

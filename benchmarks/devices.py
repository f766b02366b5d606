"""What more processes gain: images a second of real runs, one thread for each process."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.timing import Measurement, ratio, summary, turns

TRAIN = Path(__file__).parent.parent / "train.py"
RUN = ["data=digits", "model.width=8", "batch_size=128", "trainer=cpu", "test=false"]
CASES = {
    "1 process": [],
    "2 processes, each perturbs by itself": ["trainer.devices=2"],
    "2 processes, sync_perturbation": ["trainer.devices=2", "method.sync_perturbation=true"],
}


def measure(quick: bool) -> list[Measurement]:
    """SAM on digits by 1 and by 2 processes, and what averaging the ascent gradient costs."""
    rounds, options = (1, ["epochs=1", "data.subset=0.2"]) if quick else (2, ["epochs=3"])
    cases = list(CASES)[:2] if quick else list(CASES)  # starting processes takes most of their time
    speed: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(rounds):
        for name in turns(cases, index):
            speed[name].append(images_per_second([*RUN, *CASES[name], *options]))
    first = "1 process"
    of = "SAM, ResNet-18 width 8, batch 128 over all"
    results = [summary("devices", f"{first}: {of}", speed[first], "images/s")]
    for name in [name for name in cases if name != first]:
        results.append(
            ratio("devices", f"{name} / {first} (images/s): {of}", speed[name], speed[first])
        )
    return results


def images_per_second(arguments: list[str]) -> float:
    """A run's own images a second, without its start-up."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(TRAIN), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        (found,) = Path(folder).glob("logs/train/runs/*/metrics.json")
        return float(json.loads(found.read_text())["images_per_second"])

"""Seconds and memory of the command line: help, configuration, a typing error, one step."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.timing import Measurement, interleave, ratio, summary
from sam_lightning.config.conf import DEFAULTS

ROOT = Path(__file__).parent.parent
TRAIN = [sys.executable, str(ROOT / "train.py")]
EMPTY_APP = f"""\
import hydra

@hydra.main(config_path=None, **{DEFAULTS})
def main(cfg):
    pass

main()
"""
LIGHT = {"--help": 0, "--cfg job": 0, "rhoo=1": 2}  # arguments and the exit code they give
ONE_STEP = ["experiment=quickstart", "+trainer.max_steps=1", "test=false"]
IMPORTS = "import lightning, torchvision, torchmetrics"


def measure(quick: bool) -> list[Measurement]:
    """Commands without torch over an empty Hydra app, and one that trains over its imports."""
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder) / "empty_app.py"
        app.write_text(EMPTY_APP)
        light = {"empty Hydra app": Command([sys.executable, str(app)], folder)}
        for arguments, code in LIGHT.items():
            light[f"train.py {arguments}"] = Command([*TRAIN, *arguments.split()], folder, code)
        heavy = {
            IMPORTS: Command([sys.executable, "-c", IMPORTS], folder),
            "train.py, a run of one step on digits": Command([*TRAIN, *ONE_STEP], folder),
        }
        return [
            *compare(light, 2 if quick else 7),
            *compare(heavy, 1 if quick else 4, warmup=0 if quick else 1),
        ]


class Command:
    """A process to run in a folder; keeps its largest resident size of each call.

    Raises:
        RuntimeError: on a call, if the exit code is not ``code``.
    """

    def __init__(self, arguments: Sequence[str], folder: str, code: int = 0) -> None:
        self.arguments = list(arguments)
        self.folder = folder
        self.code = code
        self.megabytes: list[float] = []

    def __call__(self) -> float:
        """Run, and return the seconds from start to end."""
        done = subprocess.run(
            [sys.executable, "-S", str(ROOT / "benchmarks" / "child.py"), *self.arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=True,
        )
        usage = json.loads(done.stdout)
        if usage["code"] != self.code:
            raise RuntimeError(f"{self.arguments}: exit {usage['code']}\n{done.stderr}")
        self.megabytes.append(usage["megabytes"])
        return float(usage["seconds"])


def compare(commands: dict[str, Command], rounds: int, warmup: int = 1) -> list[Measurement]:
    """Seconds and megabytes of each command, and their ratios to the first command's."""
    cases: dict[str, Callable[[], float]] = dict(commands)
    seconds = interleave(cases, rounds, warmup=warmup)
    memory = {name: command.megabytes[-rounds:] for name, command in commands.items()}
    first = next(iter(commands))
    results = []
    for name in commands:
        if name != first:
            results.append(ratio("startup", f"{name} / {first}", seconds[name], seconds[first]))
            what = f"{name} / {first}, peak memory"
            results.append(ratio("startup", what, memory[name], memory[first]))
    for name in commands:
        results.append(summary("startup", name, seconds[name], "s"))
        results.append(summary("startup", f"{name}, peak memory", memory[name], "MB"))
    return results

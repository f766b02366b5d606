"""The parts of benchmarks.gpu that are commands: the tests of a GPU, and whole runs."""

import json
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu_plan import METHODS, RECIPE, SEEDS, SMALL_RECIPE, Task, run

ROOT = Path(__file__).parent.parent


def tests(task: Task) -> None:
    """Run the tests that are marked ``gpu``, and count them."""
    files = [f for f in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in f.read_text()]
    result = task.rows.with_suffix(".xml")
    processes = "0" if task.small else "4"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", processes, "--dist", "load"]
    subprocess.run([*command, f"--junitxml={result}", *map(str, files)], cwd=ROOT, check=False)
    (suite,) = ElementTree.parse(result).getroot().iter("testsuite")
    failed = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "skipped")}
    task.say(**counts, failed=failed)


def train(task: Task) -> None:
    """Pairs of runs of SAM and of SGD, a seed after the other, as long as a pair fits."""
    if task.images is None and not task.small:
        raise SystemExit("there are no photographs to train on: --images FOLDER")
    ends, longest = time.monotonic() + task.seconds, 0.0
    folder = task.rows.with_suffix("")
    recipe = SMALL_RECIPE if task.small else RECIPE
    if task.images is not None:
        recipe = [*recipe, "data=image_folder", f"data.root={task.images}"]
        recipe = [key for key in recipe if key != "data=digits"]
    for seed in SEEDS[:1] if task.small else SEEDS:
        began = time.monotonic()
        if ends - began < longest:
            break
        for method in METHODS:
            place = folder / f"{method},seed={seed}"
            arguments = [*recipe, f"method={method}", f"seed={seed}", f"hydra.run.dir='{place}'"]
            arguments += [f"data.cache_dir='{folder / 'cache'}'"] if task.images else []
            subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], check=True)
            found = json.loads((place / "metrics.json").read_text())
            task.say(
                **{"method": method, "seed": seed, "accuracy": found["metrics"]["test/acc"]},
                **{key: found[key] for key in ("seconds", "train_seconds", "images_per_second")},
            )
        longest = max(longest, time.monotonic() - began)


if __name__ == "__main__":
    run({"tests": tests, "train": train})

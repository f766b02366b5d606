"""Compare this project with its peers: python -m benchmarks [PART ...] [--quick] [--json FILE].

Prints a Markdown table of medians and quartiles, and writes the same figures as JSON.
"""

import argparse
import dataclasses
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.timing import Measurement

PARTS = {
    "step": "a SAM step over two passes and the base step, ours and the peers'",
    "loop": "Lightning's fit over a bare training loop of the same work",
    "levers": "a SAM step in channels_last, and compiled, over the plain one",
    "devices": "images a second of a run by one and by two processes",
    "input": "augmented training images a second, against torchvision's pipeline",
    "photographs": "CPU seconds to list 100,000 files, to decode JPEGs; memory of two processes",
    "evaluation": "Lightning's validate over a bare evaluation loop",
    "startup": "seconds and memory from the command line to help, an error, the first step",
    "memory": "bytes of a SAM step above one of SGD, in multiples of the weights",
}
# The parts that depend on the device.
ON_DEVICE = ("step", "loop", "levers", "input", "evaluation", "memory")
BUSY = (
    "warning: other processes use this machine. Threads that wait for one another then take many "
    "times as long: --threads 1 gives steadier ratios."
)
PACKAGES = (
    *("torch", "torchvision", "lightning", "hydra-core"),
    *("pytorch-optimizer", "webdataset", "datasets"),
)


def environment(device: str) -> dict[str, Any]:
    """The machine, its threads and its load, and the versions that were measured."""
    import torch

    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {
        **gpu,
        "cpu": _cpu(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "load average at start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def table(measurements: Sequence[Measurement]) -> str:
    """The rows of a Markdown table."""
    return "\n".join(
        f"| {m.part} | {m.what} | {_figure(m.median)} {m.unit} | "
        f"{_figure(m.lower)} .. {_figure(m.upper)} | {m.rounds} |"
        for m in measurements
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the chosen parts, all of them by default."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare this project with its peers. Parts:\n"
        + "\n".join(f"  {name:11} {what}" for name, what in PARTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="all of them by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small models, few rounds: 2 minutes")
    parser.add_argument("--threads", type=int, help="torch's threads; default: as torch chooses")
    parser.add_argument("--json", type=Path, default=Path("logs/benchmarks/benchmarks.json"))
    options = parser.parse_args(argv)
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"{name}: no such part; there are {', '.join(PARTS)}")
    import torch

    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: there is no CUDA GPU here")
        for name in {*options.parts} - {*ON_DEVICE}:
            parser.error(f"--device cuda: not for {name}, only for {', '.join(ON_DEVICE)}")
    if options.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes started
        torch.set_num_threads(options.threads)

    where = environment(options.device)
    print("\n".join(f"- {key}: {value}" for key, value in where.items()))
    if where["threads"] > 1 and where["load average at start"] > 0.5:
        print(BUSY, file=sys.stderr)
    print("\n| part | what | median | quartiles | rounds |\n| --- | --- | ---: | ---: | ---: |")
    measurements: list[Measurement] = []
    seconds: dict[str, float] = {}
    for name in options.parts or (ON_DEVICE if options.device == "cuda" else PARTS):
        started = time.perf_counter()
        module = importlib.import_module(f"benchmarks.{'inputs' if name == 'input' else name}")
        device = [torch.device(options.device)] if name in ON_DEVICE else []
        new = module.measure(options.quick, *device)
        seconds[name] = round(time.perf_counter() - started, 1)
        print(table(new), flush=True)
        measurements += new
        report = {  # after each part, because a later one may fail
            "environment": where,
            "quick": options.quick,
            "seconds": seconds,
            "measurements": [dataclasses.asdict(m) for m in measurements],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print("\nseconds: " + ", ".join(f"{name} {value}" for name, value in seconds.items()))
    print(f"written to {options.json}", file=sys.stderr)


if __name__ == "__main__":
    main()

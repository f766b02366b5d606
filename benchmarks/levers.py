"""What a memory layout, bfloat16 and compiling are worth in a SAM step.

The table of docs/speed.md: python -m benchmarks.levers 8x32 8x128 16x128 64x32 64x128
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from itertools import product

import torch
from torch.optim import SGD

from benchmarks.__main__ import table
from benchmarks.peers import BASE, RHO
from benchmarks.step import Step, gradient, repeated, resnet18
from benchmarks.timing import Measurement, clock_of, interleave, ratio, summary
from sam_lightning.optim.sam import SAM
from sam_lightning.training.model import compile_training

# width, batch size, rounds, and whether under bf16 autocast
MODELS = [(8, 128, 8, False)]
QUICK_MODELS = [(8, 32, 4, False)]
GPU_MODELS = [(64, 128, 5, False), (64, 128, 5, True)]
PLAIN = "contiguous"


def measure(quick: bool, device: torch.device) -> list[Measurement]:
    """SAM steps in channels_last, and compiled, over those of the plain model."""
    on_gpu = device.type == "cuda"
    models = QUICK_MODELS if quick else GPU_MODELS if on_gpu else MODELS
    results = []
    for width, batch_size, rounds, bf16 in models:
        # Compiling takes longer than all the rest.
        names = [PLAIN, "channels_last", *([] if quick else ["channels_last, compiled"])]
        if bf16:
            names = [f"{name}, bf16" for name in names]
        results += ratios(width, batch_size, rounds, names, device)
    return results


def ratios(
    width: int, batch_size: int, rounds: int, names: list[str], device: torch.device
) -> list[Measurement]:
    """How long a step takes with each lever, over the first of ``names``; then compiling, in s."""
    torch.compiler.reset()
    on_gpu = device.type == "cuda"
    of = f"ResNet-18 width {width}, batch {batch_size}"
    steps: dict[str, Callable[[], None]] = {}
    compiling = []
    for name in names:
        step = step_of(name, width, batch_size, device)
        started = sum(os.times()[:4])
        step()
        if "compiled" in name:
            spent = sum(os.times()[:4]) - started
            compiling.append(summary("levers", f"compiling {name}, {of}", [spent], "CPU s"))
        steps[name] = repeated(step) if on_gpu else step
    clock = clock_of(device) if on_gpu else time.process_time
    seconds = interleave(steps, rounds, warmup=2, clock=clock)
    return [
        ratio("levers", f"{name} / {names[0]}, SAM step, {of}", seconds[name], seconds[names[0]])
        for name in names[1:]
    ] + compiling


def step_of(name: str, width: int, batch_size: int, device: torch.device) -> Step:
    """A SAM step of ResNet-18 with the levers that its name has."""
    last, bf16 = "channels_last" in name, "bf16" in name
    layout = torch.channels_last if last else torch.contiguous_format
    torch.manual_seed(0)
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    batch = images.to(device, memory_format=layout), labels.to(device)
    model = resnet18(width, device).to(memory_format=layout)
    if "compiled" in name:
        compile_training(model, {batch_size}, "channels_last" if last else PLAIN)
    optimizer = SAM(model.parameters(), SGD, RHO, **BASE)

    def run(step: Step) -> None:
        model.zero_grad()
        gradient(model, batch, bf16)
        with optimizer.perturbed(model):
            gradient(model, batch, bf16)
        optimizer.step()

    return Step(run)


def main() -> None:
    """Print the table of the models given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.levers")
    parser.add_argument("models", nargs="+", metavar="WIDTHxBATCH")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layouts, precisions, compiled = (PLAIN, "channels_last"), ("", ", bf16"), ("", ", compiled")
    names = ["".join(parts) for parts in product(layouts, precisions, compiled)]
    print("| part | what | median | quartiles | rounds |\n| --- | --- | ---: | ---: | ---: |")
    for model in options.models:
        width, batch_size = map(int, model.split("x"))
        measured = ratios(width, batch_size, options.rounds, names, torch.device("cpu"))
        print(table(measured), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # or compiling would only look there
        main()

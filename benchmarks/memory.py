"""The bytes that SAM needs above SGD, in multiples of the bytes of the weights.

On a CPU torch reports every allocation (``torch.profiler`` with ``profile_memory``), so temporaries
inside an operator count too. On CUDA the allocator counts; its blocks may be up to 1 MB larger than
asked for. The counts do not vary, so one round is enough.
"""

import gc
import json
import os
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile

from benchmarks.peers import BASE, TwoStep, implementations
from benchmarks.step import both_steps, resnet18, sam_step
from benchmarks.timing import Measurement, summary

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # nothing of the profiler's own on stderr
BATCH_SIZE = 8  # small, so that the activations do not hide what the optimizer holds


def measure(quick: bool, device: torch.device) -> list[Measurement]:
    """Peak of a whole step, peak of the optimizer alone, and what is left after a step."""
    width = 8 if quick else 32
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # they change no count, and on a busy machine they wait
    try:
        return _measure(width, device)
    finally:
        torch.set_num_threads(threads)


def _measure(width: int, device: torch.device) -> list[Measurement]:
    steps, alone, kept = {}, {}, {}
    makers: dict[str, Callable[[nn.Module], TwoStep]] = {"SGD": OnePass, **implementations()}
    for name, make in makers.items():
        steps[name], alone[name], kept[name] = peaks(make, width, device)
    weights = sum(p.numel() * p.element_size() for p in resnet18(width).parameters())
    unit = "x weights"
    model_name = f"ResNet-18 width {width}"
    return [
        summary("memory", f"{name}: {what}", [(figures[name] - figures["SGD"]) / weights], unit)
        for what, figures in (
            (f"peak of a step above SGD's, {model_name}, batch {BATCH_SIZE}", steps),
            (f"peak of perturb + restore + SGD step above the SGD step's, {model_name}", alone),
            (f"kept between steps above SGD, {model_name}", kept),
        )
        for name in makers
        if name != "SGD"
    ]


def peaks(
    make: Callable[[nn.Module], TwoStep], width: int, device: torch.device
) -> tuple[int, int, int]:
    """Bytes beside the weights: peak of a step, peak of the optimizer alone, kept between steps."""
    images, labels = torch.randn(BATCH_SIZE, 3, 32, 32), torch.randint(10, (BATCH_SIZE,))
    batch = images.to(device), labels.to(device)
    model = resnet18(width, device)
    sam_step(model, make(model), batch)()  # what the kernels keep for their next call
    model = resnet18(width, device)
    optimizers: list[TwoStep] = []

    def first_steps() -> None:
        optimizers.append(make(model))
        step = sam_step(model, optimizers[0], batch)
        step()
        step()

    kept = allocations(first_steps, device)[-1]
    step = kept + max(allocations(sam_step(model, optimizers[0], batch), device))
    alone = kept + max(allocations(both_steps(optimizers[0], model), device))
    return step, alone, kept


class OnePass:
    """Plain SGD in place of SAM: its first step moves nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.base = SGD(model.parameters(), **BASE)

    def first_step(self, zero_grad: bool = False) -> None:
        """Clear the gradients, as the others do."""
        if zero_grad:
            self.base.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """Step."""
        self.base.step()


def allocations(call: Callable[[], object], device: torch.device) -> list[int]:
    """Bytes alive during a call, from 0 before it: at each change; on CUDA at peak and end."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        peak, end = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        return [0, peak - before, end - before]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    return list(accumulate((nbytes for _, nbytes in sorted(changes)), initial=0))

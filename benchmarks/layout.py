"""Which memory layout is fastest, and what compiling the model gains."""

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import SGD

from benchmarks.peers import BASE, RHO
from benchmarks.step import Step, repeated, resnet18, sam_step
from benchmarks.timing import Measurement, clock_of, interleave, ratio
from sam_lightning.optim.sam import SAM

# width, batch size, rounds, and whether under bf16 autocast
MODELS = [(8, 128, 8, False)]
QUICK_MODELS = [(8, 32, 4, False)]
GPU_MODELS = [(64, 128, 5, False), (64, 128, 5, True)]


def measure(quick: bool, device: torch.device) -> list[Measurement]:
    """SAM steps in channels_last, and compiled, over those of the plain model."""
    on_gpu = device.type == "cuda"
    models = QUICK_MODELS if quick else GPU_MODELS if on_gpu else MODELS
    results = []
    for width, batch_size, rounds, bf16 in models:
        # Compiling takes longer than all the rest. A GPU gets its default layout compiled.
        cases = {"contiguous": False, "channels_last": False}
        if not quick:
            cases["channels_last, compiled" if on_gpu else "compiled"] = True
        steps: dict[str, Callable[[], None]] = {}
        for name, compiled in cases.items():
            last = "channels_last" in name
            step = sam_step_of(width, batch_size, device, last, compiled, bf16)
            steps[name] = repeated(step) if on_gpu else step
        seconds = interleave(steps, rounds, warmup=2, clock=clock_of(device))
        what = f"contiguous SAM step, ResNet-18 width {width}, batch {batch_size}"
        what += f", {'bf16' if bf16 else 'float32'}" if on_gpu else ""
        results += [
            ratio("layout", f"{name} / {what}", seconds[name], seconds["contiguous"])
            for name in cases
            if name != "contiguous"
        ]
    return results


def sam_step_of(
    width: int,
    batch_size: int,
    device: torch.device,
    channels_last: bool,
    compiled: bool,
    bf16: bool,
) -> Step:
    """A step of ResNet-18 in that layout."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    batch = images.to(device, memory_format=layout), labels.to(device)
    model = resnet18(width, device).to(memory_format=layout)
    if compiled:
        model.compile()
    return sam_step(model, sam(model), batch, bf16)


def sam(model: nn.Module) -> SAM:
    """The optimizer of every case."""
    return SAM(model.parameters(), SGD, RHO, **BASE)

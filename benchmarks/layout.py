"""Which memory layout is fastest here, and what compiling the model gains."""

import torch
from torch import nn
from torch.optim import SGD

from benchmarks.peers import BASE, RHO
from benchmarks.step import resnet18, sam_step
from benchmarks.timing import Measurement, interleave, ratio
from sam_lightning.sam import SAM

# width, batch size, rounds
MODELS = [(8, 128, 8)]
QUICK_MODELS = [(8, 32, 4)]


def measure(quick: bool) -> list[Measurement]:
    """SAM steps in channels_last, and compiled, over those of the plain model."""
    results = []
    for width, batch_size, rounds in QUICK_MODELS if quick else MODELS:
        torch.manual_seed(0)
        images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
        last = images.to(memory_format=torch.channels_last)
        plain, channels_last = resnet18(width), resnet18(width)
        channels_last.to(memory_format=torch.channels_last)
        cases = {
            "contiguous": sam_step(plain, sam(plain), (images, labels)),
            "channels_last": sam_step(channels_last, sam(channels_last), (last, labels)),
        }
        if not quick:  # compiling takes longer than all the rest
            compiled = resnet18(width)
            compiled.compile()
            cases["compiled"] = sam_step(compiled, sam(compiled), (images, labels))
        seconds = interleave(cases, rounds, warmup=2)
        what = f"contiguous SAM step, ResNet-18 width {width}, batch {batch_size}"
        results += [
            ratio("layout", f"{name} / {what}", seconds[name], seconds["contiguous"])
            for name in cases
            if name != "contiguous"
        ]
    return results


def sam(model: nn.Module) -> SAM:
    """The optimizer of every case."""
    return SAM(model.parameters(), SGD, RHO, **BASE)

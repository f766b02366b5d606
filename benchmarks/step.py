"""A SAM step compared with two forward and backward passes and one step of SGD."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from benchmarks.peers import BASE, TwoStep, implementations
from benchmarks.timing import Measurement, clock_of, interleave, ratio, summary
from sam_lightning.models import SAMResNet18

# width, batch size, rounds: fewer where a round is slow
MODELS = [(8, 32, 20), (8, 128, 10), (16, 32, 20), (16, 128, 8), (64, 32, 3)]
QUICK_MODELS = [(8, 32, 4)]
# On a GPU, where a round is several steps and every model is also timed with bf16 autocast.
GPU_MODELS = [(16, 128, 8), (64, 128, 8), (64, 512, 8)]
# number and size of the tensors of a model of which only the optimizer is timed, rounds
TENSORS = [(1000, 256, 20), (8, 1_000_000, 20)]
QUICK_TENSORS = [(200, 256, 10), (4, 250_000, 10)]
# A call of the optimizer alone is short, and so is a step on a GPU: several are timed as one.
CALLS = 5


def measure(quick: bool, device: torch.device) -> list[Measurement]:
    """Whole steps of ResNet-18, then the optimizer alone by number of tensors."""
    results = []
    if device.type == "cuda":
        for width, batch_size, rounds in QUICK_MODELS if quick else GPU_MODELS:
            for bf16 in (False, True):
                results += steps_on_gpu(width, batch_size, rounds, device, bf16)
    else:
        for width, batch_size, rounds in QUICK_MODELS if quick else MODELS:
            results += whole_steps(width, batch_size, rounds)
    for count, size, rounds in QUICK_TENSORS if quick else TENSORS:
        results += optimizer_alone(count, size, rounds, device)
    return results


def whole_steps(width: int, batch_size: int, rounds: int) -> list[Measurement]:
    """Ratios of a SAM or ASAM step to what its two passes and its base step cost.

    Each has two rows: one of whole steps, and one with the base's passes on both sides, so only the
    seconds in the optimizer differ. The second row is free of the passes' noise, which is many
    times as large as the cost of perturbing and restoring.
    """
    steps = steps_by_name(width, batch_size, torch.device("cpu"), bf16=False)
    seconds = interleave(steps, rounds)
    of = f"ResNet-18 width {width}, batch {batch_size}"
    results = []
    for name in [name for name in steps if name != "base"]:
        base, own, base_own = seconds["base"], *(steps[n].own[-rounds:] for n in (name, "base"))
        what = f"{name}: step / (2 passes + SGD step), {of}"
        results.append(ratio("step", what, seconds[name], base))
        optimizer_only = [b - c + a for a, b, c in zip(own, base, base_own, strict=True)]
        results.append(ratio("step", f"{what}, passes of equal length", optimizer_only, base))
    return results


def steps_on_gpu(
    width: int, batch_size: int, rounds: int, device: torch.device, bf16: bool
) -> list[Measurement]:
    """The same ratios of whole steps, several as one, because the host runs ahead of the GPU."""
    steps = {
        name: repeated(step)
        for name, step in steps_by_name(width, batch_size, device, bf16).items()
    }
    seconds = interleave(steps, rounds, clock=clock_of(device))
    of = f"ResNet-18 width {width}, batch {batch_size}, {'bf16' if bf16 else 'float32'}"
    return [
        ratio("step", f"{name}: step / (2 passes + SGD step), {of}", seconds[name], seconds["base"])
        for name in steps
        if name != "base"
    ] + [
        summary(
            "step",
            f"2 passes + SGD step, {of}",
            [1000 * s / CALLS for s in seconds["base"]],
            "ms",
        )
    ]


def steps_by_name(
    width: int, batch_size: int, device: torch.device, bf16: bool
) -> dict[str, "Step"]:
    """The base's two passes, and the steps of every implementation of SAM and ASAM."""
    torch.manual_seed(0)
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    batch = images.to(device), labels.to(device)
    steps = {"base": two_passes(resnet18(width, device), batch, bf16)}
    for method, adaptive in (("SAM", False), ("ASAM", True)):
        for name, make in implementations(adaptive).items():
            model = resnet18(width, device)
            steps[f"{method}, {name}"] = sam_step(model, make(model), batch, bf16)
    return steps


def resnet18(width: int, device: torch.device | None = None) -> nn.Module:
    """The same weights each time, so that every case does the same arithmetic."""
    torch.manual_seed(0)
    return SAMResNet18(width=width).to(device)


class Step:
    """A training step that notes how many seconds of each call it spent in the optimizer."""

    def __init__(self, step: Callable[["Step"], None]) -> None:
        self.step = step
        self.own: list[float] = []

    def __call__(self) -> None:
        """Do one step."""
        self.own.append(0.0)
        self.step(self)

    def timed(self, part: Callable[[], object]) -> None:
        """Call a part of the optimizer and count its seconds."""
        started = time.perf_counter()
        part()
        self.own[-1] += time.perf_counter() - started


def gradient(model: nn.Module, batch: tuple[Tensor, Tensor], bf16: bool) -> None:
    """One pass."""
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=bf16):
        loss = cross_entropy(model(batch[0]), batch[1])
    loss.backward()


def two_passes(model: nn.Module, batch: tuple[Tensor, Tensor], bf16: bool = False) -> Step:
    """Two gradients and a step with the second: the least that SAM needs."""
    optimizer = SGD(model.parameters(), **BASE)

    def run(step: Step) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            gradient(model, batch, bf16)
        step.timed(optimizer.step)

    return Step(run)


def sam_step(
    model: nn.Module, optimizer: TwoStep, batch: tuple[Tensor, Tensor], bf16: bool = False
) -> Step:
    """One step of an implementation of SAM, as its documentation shows it."""

    def run(step: Step) -> None:
        model.zero_grad()
        gradient(model, batch, bf16)
        step.timed(lambda: optimizer.first_step(zero_grad=True))
        gradient(model, batch, bf16)
        step.timed(optimizer.second_step)

    return Step(run)


def optimizer_alone(count: int, size: int, rounds: int, device: torch.device) -> list[Measurement]:
    """Perturb, restore and step ``count`` tensors of ``size`` weights, over the step alone."""
    base = SGD(tensors(count, size, device).parameters(), **BASE)
    cases: dict[str, Callable[[], None]] = {"base": base.step}
    for method, adaptive in (("SAM", False), ("ASAM", True)):
        for name, make in implementations(adaptive).items():
            model = tensors(count, size, device)
            cases[f"{method}, {name}"] = both_steps(make(model), model)
    repeatedly = {name: repeated(case) for name, case in cases.items()}
    seconds = interleave(repeatedly, rounds, warmup=3, clock=clock_of(device))
    what = f"perturb + restore + SGD step / SGD step, {count:,} tensors of {size:,}"
    return [
        ratio("step", f"{name}: {what}", seconds[name], seconds["base"])
        for name in cases
        if name != "base"
    ]


def tensors(count: int, size: int, device: torch.device) -> nn.ParameterList:
    """Parameters that have gradients already."""
    torch.manual_seed(0)
    model = nn.ParameterList(nn.Parameter(torch.randn(size, device=device)) for _ in range(count))
    for p in model:
        p.grad = torch.randn(size, device=device)
    return model


def both_steps(optimizer: TwoStep, model: nn.Module) -> Callable[[], None]:
    """SAM without the passes: the old gradients count as new ones."""
    first = next(p.grad for p in model.parameters() if p.grad is not None)

    def run() -> None:
        torch.autograd.graph.increment_version(first)  # as a backward pass that adds to it does
        optimizer.first_step()
        optimizer.second_step()

    return run


def repeated(case: Callable[[], object]) -> Callable[[], None]:
    """Several calls as one."""

    def run() -> None:
        for _ in range(CALLS):
            case()

    return run

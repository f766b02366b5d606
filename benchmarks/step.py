"""What a SAM step costs above two forward and backward passes and one step of SGD."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from benchmarks.peers import BASE, TwoStep, implementations
from benchmarks.timing import Measurement, interleave, ratio
from sam_lightning.models import SAMResNet18

# width, batch size, rounds: fewer where a round is slow
MODELS = [(8, 32, 20), (8, 128, 10), (16, 32, 20), (16, 128, 8), (64, 32, 3)]
QUICK_MODELS = [(8, 32, 4)]
# number and size of the tensors of a model of which only the optimizer is timed, rounds
TENSORS = [(1000, 256, 20), (8, 1_000_000, 20)]
QUICK_TENSORS = [(200, 256, 10), (4, 250_000, 10)]
# A call of the optimizer alone is short: several are timed as one.
CALLS = 5


def measure(quick: bool) -> list[Measurement]:
    """Whole steps of ResNet-18, then the optimizer alone by number of tensors."""
    results = []
    for width, batch_size, rounds in QUICK_MODELS if quick else MODELS:
        results += whole_steps(width, batch_size, rounds)
    for count, size, rounds in QUICK_TENSORS if quick else TENSORS:
        results += optimizer_alone(count, size, rounds)
    return results


def whole_steps(width: int, batch_size: int, rounds: int) -> list[Measurement]:
    """Ratios of a SAM or ASAM step to what its two passes and its base step cost.

    Two rows for each: of whole steps, and with the passes of the base in both, so that only the
    seconds in the optimizer differ. The second is free of the noise of the passes, which is many
    times as large as what perturbing and restoring take.
    """
    torch.manual_seed(0)
    batch = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    steps = {"base": two_passes(resnet18(width), batch)}
    for method, adaptive in (("SAM", False), ("ASAM", True)):
        for name, make in implementations(adaptive).items():
            model = resnet18(width)
            steps[f"{method}, {name}"] = sam_step(model, make(model), batch)
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


def resnet18(width: int) -> nn.Module:
    """The same weights each time, so that every case does the same arithmetic."""
    torch.manual_seed(0)
    return SAMResNet18(width=width)


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


def two_passes(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Step:
    """Two gradients, of which the second is stepped with: all that SAM cannot do without."""
    optimizer = SGD(model.parameters(), **BASE)

    def run(step: Step) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            cross_entropy(model(batch[0]), batch[1]).backward()
        step.timed(optimizer.step)

    return Step(run)


def sam_step(model: nn.Module, optimizer: TwoStep, batch: tuple[Tensor, Tensor]) -> Step:
    """One step of an implementation of SAM, as its readers are told to write it."""

    def run(step: Step) -> None:
        model.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        step.timed(lambda: optimizer.first_step(zero_grad=True))
        cross_entropy(model(batch[0]), batch[1]).backward()
        step.timed(optimizer.second_step)

    return Step(run)


def optimizer_alone(count: int, size: int, rounds: int) -> list[Measurement]:
    """Perturb, restore and step ``count`` tensors of ``size`` weights, over the step alone."""
    base = SGD(tensors(count, size).parameters(), **BASE)
    cases: dict[str, Callable[[], None]] = {"base": base.step}
    for method, adaptive in (("SAM", False), ("ASAM", True)):
        for name, make in implementations(adaptive).items():
            cases[f"{method}, {name}"] = both_steps(make(tensors(count, size)))
    seconds = interleave({name: repeated(case) for name, case in cases.items()}, rounds, warmup=3)
    what = f"perturb + restore + SGD step / SGD step, {count:,} tensors of {size:,}"
    return [
        ratio("step", f"{name}: {what}", seconds[name], seconds["base"])
        for name in cases
        if name != "base"
    ]


def tensors(count: int, size: int) -> nn.ParameterList:
    """Parameters that have gradients already."""
    torch.manual_seed(0)
    model = nn.ParameterList(nn.Parameter(torch.randn(size)) for _ in range(count))
    for p in model:
        p.grad = torch.randn(size)
    return model


def both_steps(optimizer: TwoStep) -> Callable[[], None]:
    """All of SAM but the passes: the gradients stay what they are."""

    def run() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return run


def repeated(case: Callable[[], object]) -> Callable[[], None]:
    """Several calls as one."""

    def run() -> None:
        for _ in range(CALLS):
            case()

    return run

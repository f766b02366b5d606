"""Map where oneDNN's gradients of strided 1x1 convolutions are wrong on this CPU.

    python -m benchmarks.onednn [--isa ISA ...] [--threads N ...] [--widths N ...] [--case CASE ...]

Compares gradients in channels_last with float64, of a single layer and of SAMResNet18, which
``sam_lightning.models.onednn`` keeps away from the broken kernel. Every combination has its own
process, because a broken one crashes or never ends. Prints a Markdown table: the widths (input
channels of the layer) with wrong gradients, and how they are wrong.
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sam_lightning.models import SAMResNet18

ISAS = ("SSE41", "AVX", "AVX2", "AVX512_CORE")  # what ONEDNN_MAX_CPU_ISA can limit oneDNN to
TOLERANCE = 1e-3  # relative 2-norm of the difference; 1e-4 at most is usual, 8e-2 or more is wrong


def layer(width: int) -> tuple[nn.Module, tuple[int, ...]]:
    """The broken layer alone, and the shape of its images."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(width, 10, 1, stride=2), *head), (8, width, 112, 112)


def model(width: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A model of this project without kinks, where rounding would flip units."""
    network = SAMResNet18(width=width)
    for module in [m for m in network.modules() if hasattr(m, "relu")]:
        module.relu = nn.SiLU()
    return network, (4, 3, 64, 64)


CASES: dict[str, Callable[[int], tuple[nn.Module, tuple[int, ...]]]] = {
    "layer": layer,
    "model": model,
}


def error(case: str, width: int) -> float:
    """The largest relative error of a parameter's gradient in channels_last, float32.

    A gradient that is nearly zero, as BatchNorm makes some, is compared with the others' size.
    """
    torch.manual_seed(0)
    network, shape = CASES[case](width)
    exact, _ = CASES[case](width)
    exact.load_state_dict(network.state_dict())
    images, labels = torch.randn(shape), torch.randint(10, (shape[0],))
    reference = _gradients(exact.double(), images.double(), labels)
    rest = 1e-3 * float(torch.cat([g.flatten() for g in reference]).norm())
    network.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    errors = [
        (ours - expected).norm() / (expected.norm() + rest)
        for _ in range(3)  # what is written past the memory need not show at once
        for ours, expected in zip(_gradients(network, images, labels), reference, strict=True)
    ]
    return float(torch.stack(errors).max())  # NaN if one is


def _gradients(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(cross_entropy(network(images), labels), list(network.parameters()))


def outcome(isa: str, threads: int, case: str, width: int, limit: float) -> str:
    """Measure in a new process, ``limit`` seconds at most: ``right``, or how it is wrong."""
    context = multiprocessing.get_context("fork")  # torch is imported once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, isa, threads, case, width))
    process.start()
    sender.close()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return "no end"
    code = process.exitcode or 0
    if code:
        return f"signal {-code}" if code < 0 else f"exit code {code}"
    found: float = receiver.recv()
    return "right" if found < TOLERANCE else "wrong"


def _measure(sender: Connection, isa: str, threads: int, case: str, width: int) -> None:
    os.environ["ONEDNN_MAX_CPU_ISA"] = isa  # read when oneDNN is first used
    torch.set_num_threads(threads)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a crashing allocator says
    sender.send(error(case, width))


def summary(outcomes: dict[int, str]) -> str:
    """The widths that are wrong, and in which ways."""
    broken = [width for width, found in outcomes.items() if found != "right"]
    if not broken:
        return "none"
    ways = sorted({outcomes[width] for width in broken})
    return f"{', '.join(map(str, broken))} ({', '.join(ways)})"


def main(argv: Iterable[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.onednn", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--isa", nargs="+", choices=ISAS, default=ISAS)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--widths", nargs="+", type=int, default=range(1, 18))
    parser.add_argument("--case", nargs="+", choices=CASES, default=tuple(CASES))
    parser.add_argument("--limit", type=float, default=20.0, help="seconds of one combination")
    options = parser.parse_args(None if argv is None else list(argv))
    print("| instruction set | threads | case | wrong widths |\n| --- | ---: | --- | --- |")
    for isa in options.isa:
        if isa == "AVX512_CORE" and torch.backends.cpu.get_cpu_capability() != "AVX512":
            print(f"| {isa} | | | not on this CPU |")
            continue
        for threads in options.threads:
            for case in options.case:
                found = {w: outcome(isa, threads, case, w, options.limit) for w in options.widths}
                print(f"| {isa} | {threads} | {case} | {summary(found)} |", flush=True)


if __name__ == "__main__":
    main()

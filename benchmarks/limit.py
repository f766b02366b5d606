"""The least time of an update of SAM, as in docs/speed.md: python -m benchmarks.limit.

Operations, bytes and FLOPs are counted in an update of ``SAMModule`` under bf16-mixed on a CPU. A
GPU starts about as many kernels: the operations are those of PyTorch, not of a device.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.gpu_fits import prepared
from benchmarks.loop import quieten
from benchmarks.peers import BASE, RHO
from benchmarks.step import resnet18
from sam_lightning.training.module import SAMModule

# FLOPs a second of dense bf16 products, and bytes a second of the memory: NVIDIA's data sheets.
GPUS = {"H100 SXM": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
BATCHES = (128, 512)
SMALL, LARGE = 4, 8  # batch sizes to count with; bytes are linear in the batch size
INPUT, METRICS, END = "gather, augment", "losses, accuracies", "restore, clip, step, log"
# They make a tensor without a kernel, as views do.
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"}
NOT_READ = {"copy_", "_foreach_copy_", "zero_", "fill_"}  # what they write to


class Count(NamedTuple):
    """Operations that start kernels, views and empty tensors, bytes read and written, FLOPs."""

    kernels: int = 0
    views: int = 0
    bytes: int = 0
    flops: int = 0

    def plus(self, other: "Count") -> "Count":
        """The sum."""
        return Count(*(a + b for a, b in zip(self, other, strict=True)))


class Counter(TorchDispatchMode):
    """Counts what PyTorch dispatches, by the ``phase`` of the update."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = INPUT
        self.counts: defaultdict[str, Count] = defaultdict(Count)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the operation and count it; what it reads and writes passes the memory once."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet, schema = func.overloadpacket, func._schema
        aliases = [r.alias_info for r in schema.returns]
        if packet.__name__ in EMPTY or any(a is not None and not a.is_write for a in aliases):
            counted = Count(views=1)
        else:
            named = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | kwargs
            changes = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
            # A fused optimizer changes gradients only for a loss scaler.
            changed = _tensors([named[n] for n in changes if n in named and n != "grads"])
            known = {id(t) for t in _tensors(named)}
            written = [*changed, *(t for t in _tensors(out) if id(t) not in known)]
            fresh = {id(t) for t in changed} if packet.__name__ in NOT_READ else set()
            moved = written + [t for t in _tensors(named) if id(t) not in fresh]
            of = flop_registry.get(packet)
            flops = of(*args, **kwargs, out_val=out) if of else 0
            counted = Count(1, 0, sum(map(_bytes, moved)), flops)
        self.counts[self.phase] = self.counts[self.phase].plus(counted)
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())  # less where it is expanded


class CountOneUpdate(L.Callback):
    """Counts from the end of one update to the end of the next."""

    def __init__(self) -> None:
        self.counter = Counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Begin after the second update."""
        if trainer.global_step == 2:
            self._mark(pl_module)
            self.counter.__enter__()
        elif trainer.global_step == 3:
            self.counter.__exit__(None, None, None)
            trainer.should_stop = True

    def _mark(self, module: SAMModule) -> None:
        """Let the parts of the update say where it is."""
        passes, sam, counter, forwards = module.passes, module.sam, self.counter, [0]

        def during(phase: str, call: Callable[..., Any], after: str) -> Callable[..., Any]:
            def marked(*args: Any, **kwargs: Any) -> Any:
                forwards[0] += phase == "forward"
                counter.phase = phase.replace("forward", f"pass {forwards[0]}: forward")
                counter.phase = counter.phase.replace("backward", f"pass {forwards[0]}: backward")
                result = call(*args, **kwargs)
                counter.phase = after
                return result

            return marked

        passes.forward = during("forward", passes.forward, METRICS)
        passes.backward = during("backward", passes.backward, METRICS)
        marked = {
            "perturb": during("perturb", sam.perturb, "perturb"),
            "restore": during(END, sam.restore, END),
        }
        vars(sam).update(marked)


class ProcessorTime(L.Callback):
    """Seconds of the processor of each update, after the first ones."""

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Note the time."""
        self.times.append(time.process_time())
        trainer.should_stop = len(self.times) > self.updates

    def median(self) -> float:
        """Of the second half of the updates."""
        half = self.times[self.updates // 2 :]
        return statistics.median(b - a for a, b in pairwise(half))


def train(batch: int, width: int, watch: L.Callback) -> None:
    """Train ResNet-18 on a CPU as ``train.py`` does, until ``watch`` stops it."""
    module = SAMModule(
        *(resnet18(width), 10, partial(SGD, **BASE), RHO),
        memory_format="channels_last",
        gradient_clip_val=1.0,
    )
    with prepared("cpu", batch, images=8 * batch) as (trainer, data):
        trainer.callbacks.append(watch)  # type: ignore[attr-defined]
        trainer.fit(module, datamodule=data)


def counted(batch: int, width: int) -> dict[str, Count]:
    """What an update does, by phase."""
    watch = CountOneUpdate()
    train(batch, width, watch)
    return dict(watch.counter.counts)


def bounds(per_update: float, per_image: Count, host: float) -> list[str]:
    """Rows of the images/s that arithmetic, memory and host allow.

    Args:
        per_update: bytes whatever the batch size.
        per_image: bytes and FLOPs of an image more.
        host: seconds of an update.
    """
    rows = []
    for gpu, (peak, bandwidth) in GPUS.items():
        for batch in BATCHES:
            seconds = {
                "arithmetic": batch * per_image.flops / peak,
                "memory": (per_update + batch * per_image.bytes) / bandwidth,
                "host": host,
            }
            speeds = [f"{batch / s:,.0f}" for s in seconds.values()]
            least = max(seconds, key=seconds.__getitem__)
            rows.append(f"| {gpu}, batch {batch} | {' | '.join(speeds)} | {least} |")
    return rows


def main(width: int = 64) -> None:
    """Count with two batch sizes, time the host, and print both tables."""
    quieten()
    torch.set_num_threads(1)
    small, large = counted(SMALL, width), counted(LARGE, width)
    print("| part of an update | kernels | views | MFLOP an image | MB an image | MB an update |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    total, fixed = Count(), 0.0
    for phase, count in large.items():
        one = Count(
            *count[:2],
            *((a - b) // (LARGE - SMALL) for a, b in zip(count[2:], small[phase][2:], strict=True)),
        )
        once = count.bytes - LARGE * one.bytes
        total, fixed = total.plus(one), fixed + once
        print(_row(phase, one, once))
    print(_row("in all", total, fixed))

    watch = ProcessorTime(60)
    train(2, 2, watch)
    host = watch.median()
    print(f"\nhost: {1e3 * host:.1f} ms of a processor for an update of ResNet-18 of width 2\n")
    print("| images/s at most, by | arithmetic | memory | host | the least is |")
    print("| --- | ---: | ---: | ---: | --- |")
    print("\n".join(bounds(fixed, total, host)))


def _row(name: str, one: Count, once: float) -> str:
    figures = f"{one.flops / 1e6:,.0f} | {one.bytes / 1e6:,.2f} | {once / 1e6:,.1f}"
    return f"| {name} | {one.kernels} | {one.views} | {figures} |"


if __name__ == "__main__":
    main()

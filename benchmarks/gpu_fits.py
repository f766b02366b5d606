"""The parts of benchmarks.gpu that train in this process: correct, speed, compiled, kernels."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from benchmarks.__main__ import environment
from benchmarks.gpu_plan import CASES, LOOPS, Task, run
from benchmarks.loop import Setting, quieten, trainer_of
from benchmarks.peers import BASE, RHO, implementations
from benchmarks.step import sam_step
from benchmarks.synthetic import data_module
from benchmarks.timing import clock_of
from sam_lightning.data.datamodule import ImageDataModule
from sam_lightning.models import SAMResNet18, WideResNet, timm_model
from sam_lightning.training.module import SAMModule

UPDATES = 50  # of ``correct``
WARM_UP = 12  # updates: graphs are recorded after three of a kind
ROUNDS = {"resnet18": (6, 25), "wrn28_10": (4, 8), "vit_s16": (4, 8)}  # and updates of a round


def model_of(name: str, small: bool) -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    if name == "resnet18":
        return SAMResNet18(width=2 if small else 64)
    if name == "wrn28_10":
        return WideResNet(depth=10, widen_factor=1) if small else WideResNet()
    if small:
        return timm_model("test_vit", 10, image_size=[32, 32])
    return timm_model("vit_small_patch16_224", 10)


def side_of(name: str, small: bool) -> int:
    """Height and width of the images of a model."""
    return 224 if name == "vit_s16" and not small else 32


@contextmanager
def prepared(
    device: str, batch: int, images: int, *, bf16: bool = True, side: int = 32
) -> Iterator[tuple[L.Trainer, ImageDataModule]]:
    """A trainer, and noise that it keeps on its device; in a folder that is removed again."""
    setting, place = Setting(torch.device(device), bf16), "cuda" if device == "cuda" else None
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(Path(folder), setting, max_epochs=-1)
        data = data_module(images, 64, trainer, batch_size=batch, side=side, device=place)
        yield trainer, data


def fit(
    task: Task,
    name: str,
    batch: int,
    watch: L.Callback,
    *,
    images: int,
    bf16: bool = True,
    graphs: bool = False,
    compiled: bool = False,
) -> list[Tensor]:
    """Train as ``train.py`` does, until ``watch`` stops it; the weights and the optimizer's state.

    On a GPU ``graphs`` must be possible: otherwise this raises an error and measures nothing else.
    """
    cuda_graph = ("auto" if task.small else True) if graphs else False
    model = model_of(name, task.small)
    if compiled:
        model.compile(backend=compiler(task))
    module = SAMModule(
        *(model, 10, partial(SGD, **BASE), RHO),
        memory_format="channels_last",
        cuda_graph=cuda_graph,
    )
    side = side_of(name, task.small)
    with prepared(task.device, batch, images, bf16=bf16, side=side) as (trainer, data):
        trainer.callbacks.append(watch)  # type: ignore[attr-defined]
        trainer.fit(module, datamodule=data)
        state = [module.state_dict(), trainer.optimizers[0].state_dict()["state"]]
    return [leaf.detach().clone() for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


def compiler(task: Task) -> str:
    """The compiler; in small, the part of it in Python alone, because the rest takes minutes."""
    return "eager" if task.small else "inductor"


class Until(L.Callback):
    """Calls ``tick`` after each update, until it says that this was the last one."""

    def __init__(self, tick: Callable[[], bool]) -> None:
        self.tick = tick

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop where it says so."""
        trainer.should_stop = self.tick()


# ---------------------------------------------------------------------------------- correct


def correct(task: Task) -> None:
    """Eager passes twice, then graphs: weights, running statistics and momentum, bit for bit."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read as CUDA's library is loaded
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    batch, updates = (8, 6) if task.small else (128, UPDATES)
    for bf16 in (True, False):
        states: dict[str, list[Tensor]] = {}
        peaks: dict[str, dict[str, float]] = {}
        for loop in ("eager", "eager again", "graphs"):
            ends = iter([False] * (updates - 1) + [True])
            with peak_memory(task) as peaks[loop]:
                states[loop] = fit(
                    *(task, "resnet18", batch, Until(ends.__next__)),
                    images=13 * batch + batch // 2,  # the last batch of an epoch is smaller
                    bf16=bf16,
                    graphs=loop == "graphs",
                )
            pairs = list(zip(states["eager"], states[loop], strict=True))
            if loop != "eager":
                task.say(
                    **{"loop": loop, "bf16": bf16, "updates": updates, "tensors": len(pairs)},
                    differ=sum(not torch.equal(a, b) for a, b in pairs),
                    largest=max((a.float() - b.float()).abs().max().item() for a, b in pairs),
                    memory={k: v / peaks["eager"][k] for k, v in peaks[loop].items()},
                )


@contextmanager
def peak_memory(task: Task) -> Iterator[dict[str, float]]:
    """The most bytes of the GPU that tensors and that the allocator had in the block."""
    peaks: dict[str, float] = {}
    if task.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield peaks
    if task.device == "cuda":
        peaks["allocated"] = torch.cuda.max_memory_allocated()
        peaks["reserved"] = torch.cuda.max_memory_reserved()


# ------------------------------------------------------------------------ speed and compiled


class Rounds:
    """Seconds of rounds of updates, after a warm-up; ``tick`` is called after each update."""

    def __init__(self, clock: Callable[[], float], rounds: int, updates: int) -> None:
        self.clock, self.rounds, self.updates = clock, rounds, updates
        self.done = -WARM_UP
        self.started = time.perf_counter()
        self.times: list[float] = []

    def tick(self) -> bool:
        """Count an update; whether this was the last one."""
        self.done += 1
        if self.done >= 0 and self.done % self.updates == 0:
            self.times.append(self.clock())
        return len(self.times) > self.rounds

    def seconds(self) -> list[float]:
        """Of each round."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def speed(task: Task) -> None:
    """Images a second of every loop, for every model and batch size."""
    compiled = task.part == "compiled"
    cases = [(model, 8) for model, _ in CASES[1::2]] if task.small else CASES
    for model, batch in cases:
        for loop in LOOPS[task.part]:
            torch.compiler.reset()  # of the case before, whose shapes are others
            torch.backends.cudnn.benchmark = loop.endswith("cudnn.benchmark")
            row: dict[str, Any] = {"model": model, "batch": batch, "loop": loop}
            rounds, updates = (2, 1) if task.small else ROUNDS[model]
            watch = Rounds(clock_of(torch.device(task.device)), rounds, updates)
            images = batch * (4 if task.small else 10 if model == "vit_s16" else 90)
            try:
                with peak_memory(task) as peak:
                    if loop.startswith("this project"):
                        until = Until(watch.tick)
                        fit(
                            *(task, model, batch, until),
                            images=images,
                            graphs="graphs" in loop,
                            compiled=compiled,
                        )
                    else:
                        peer(task, model, batch, loop, watch, images)
            except Exception as error:  # the other loops count all the same
                task.say(**row, error=f"{type(error).__name__}: {error}"[:200].replace("\n", " "))
                continue
            speeds = [batch * updates / seconds for seconds in watch.seconds()]
            task.say(
                **row,
                images_per_second=statistics.median(speeds),
                least=min(speeds),
                most=max(speeds),
                warm_up_seconds=watch.times[0] - watch.started,
                peak_bytes=peak,
            )


def peer(task: Task, name: str, batch: int, loop: str, watch: Rounds, images: int) -> None:
    """The loop that people write around the plain optimizer, or around pytorch-optimizer's."""
    make = implementations().get("pytorch_optimizer" if "pytorch" in loop else "plain loop")
    if make is None:
        raise ModuleNotFoundError("pytorch-optimizer is not installed")
    device, model = torch.device(task.device), model_of(name, task.small)
    # What is compiled chooses the layout that is fastest for it, as the person who compiles would.
    last = "channels_last" in loop or "compiled" in loop
    layout = torch.channels_last if last else torch.contiguous_format
    model.to(device, memory_format=layout)  # type: ignore[call-overload]
    if "compiled" in loop:
        model.compile(backend=compiler(task))
    optimizer = make(model)
    with prepared(task.device, batch, images, side=side_of(name, task.small)) as (_, data):
        while True:
            for raw, answers, key in data.train_dataloader():
                labels = answers.to(device)
                pictures, _ = data.finish(raw.to(device), labels, key)
                sam_step(model, optimizer, (pictures, labels), bf16=True)()
                if watch.tick():
                    return


# ---------------------------------------------------------------------------------- kernels


class OneUpdate(L.Callback):
    """Profiles one update, from the end of the one before."""

    def __init__(self, device: str) -> None:
        activities = [ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.clock = clock_of(torch.device(device))
        self.profile = profile(activities=activities)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Begin after the warm-up, and end an update later."""
        self.clock()
        if trainer.global_step == WARM_UP:
            self.profile.start()
        elif trainer.global_step > WARM_UP:
            self.profile.stop()
            trainer.should_stop = True


def kernels(task: Task) -> None:
    """Number, time and names of an update's kernels, and how often the host starts something."""
    kind = DeviceType.CPU if task.small else DeviceType.CUDA
    batch = 8 if task.small else 512
    for loop in ("eager", "graphs"):
        watch = OneUpdate(task.device)
        fit(task, "resnet18", batch, watch, images=16 * batch, graphs=loop == "graphs")
        events = watch.profile.events() or []
        spent: dict[str, list[float]] = {}
        for event in events:
            noted = getattr(event, "is_user_annotation", False) or kind == DeviceType.CPU
            if event.device_type == kind and (not noted or "aten::" in event.name):
                spent.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
        names = [(name, len(each), round(sum(each), 4)) for name, each in spent.items()]
        task.say(
            **{"loop": loop, "batch": batch, "kernels": sum(map(len, spent.values()))},
            milliseconds=sum(map(sum, spent.values())),
            launches=sum("Launch" in event.name for event in events),
            names=sorted(names, key=lambda entry: -entry[2])[:25],
        )


def measured(part: Callable[[Task], None]) -> Callable[[Task], None]:
    """A part that says first what it runs on."""

    def of(task: Task) -> None:
        quieten()
        task.say(environment=environment(task.device))
        part(task)

    return of


if __name__ == "__main__":
    run(
        {
            "correct": measured(correct),
            "speed": measured(speed),
            "compiled": measured(speed),
            "kernels": measured(kernels),
        }
    )

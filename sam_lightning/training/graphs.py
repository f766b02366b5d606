"""CUDA graphs of passes: a thousand kernels, started by one call of the host.

A small network keeps a fast GPU waiting for the host, which starts its kernels one by one. The
first passes of a kind run as always, and are watched. Then one is recorded, and from there on it is
replayed. What is recorded is the function that runs otherwise: forward, loss, backward and two
metrics. Seeds, perturbation, step, schedule and log stay outside.

A replay repeats kernels on the same memory, without Python. So a kind is all that Python may decide
by, and a model whose passes a graph could not repeat runs as always. What nobody can see is a model
or a loss that changes with numbers of its own, such as a count of calls: it must not be recorded.
"""

import itertools
import logging
import random
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from sam_lightning.config.errors import ConfigError
from sam_lightning.data.augment import MixedLabels
from sam_lightning.training.losses import Labels

log = logging.getLogger(__name__)

WATCHED = 3  # passes of a kind before it is recorded: libraries choose and compile kernels in these
KINDS = 64  # a model with more changes too often for graphs to be of use
# What Lightning, modules and parameters call in a pass, and a replay would not call.
CALLS = ("on_before_backward", "on_after_backward")
HOOKS = (
    *("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"),
    "_post_accumulate_grad_hooks",
)

Metrics = tuple[Tensor, Tensor]  # mean loss and accuracy, 1-dim of 2; the loss of each image
Pass = Callable[[Tensor, Labels], Metrics]  # adds the gradient to .grad


class Recorder(Protocol):
    """Records what a function does on a device."""

    def watched(self, run: Callable[[], Metrics], params: Sequence[Tensor]) -> tuple[Metrics, bool]:
        """Run it where it will be recorded; return its result, and whether it waited."""

    def record(self, run: Callable[[], Metrics]) -> tuple[Metrics, Callable[[], None]]:
        """Record it without doing it; return its result, which a call of the second writes."""


class CUDARecorder:
    """Records CUDA graphs; see ``Recorder``. They are replayed in turn, and share their memory."""

    def __init__(self) -> None:
        self.stream: Any = torch.cuda.Stream()
        self.pool: Any = torch.cuda.graph_pool_handle()

    def watched(self, run: Callable[[], Metrics], params: Sequence[Tensor]) -> tuple[Metrics, bool]:
        """Nodes of autograd remember their stream, so that has to be the recording one."""
        now, mode = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
        self.stream.wait_stream(now)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with torch.cuda.stream(self.stream):
                    metrics = run()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        now.wait_stream(self.stream)
        for tensor in (*metrics, *(p.grad for p in params if p.grad is not None)):
            tensor.record_stream(now)  # its memory must not be used again too early
        waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
        for w in caught:
            if w not in waits:
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        return metrics, bool(waits)

    def record(self, run: Callable[[], Metrics]) -> tuple[Metrics, Callable[[], None]]:
        """Other threads, such as one that pins images, may use CUDA meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            metrics = run()
        return metrics, graph.replay


@dataclass
class Recording:
    """A recorded pass; all of it stays where it is in memory.

    Attributes:
        inputs: images, and what the labels consist of.
        grads: of the parameters.
        metrics: of the pass.
        replay: does the pass.
    """

    inputs: list[Tensor]
    grads: list[Tensor | None]
    metrics: Metrics
    replay: Callable[[], None]


class GraphedPasses:
    """Runs passes: the first ones of a kind as always, later ones by replaying a recording.

    Args:
        model: of the passes.
        recorder: records on the model's device.
        required: a pass that cannot be recorded is an error instead of a warning.
    """

    def __init__(self, model: nn.Module, recorder: Recorder, required: bool = False) -> None:
        self.recorder, self.required = recorder, required
        self.modules = list(model.modules())
        self.params, self.buffers = list(model.parameters()), list(model.buffers())
        self.owners: list[Any] = [*self.modules, *self.params]  # of hooks
        self.why_not: str | None = None  # the reason, once a pass could not be recorded
        self._seen: Counter[Any] = Counter()  # passes by their kind
        self._recordings: dict[Any, Recording] = {}
        self._trained: list[bool] = []

    def __call__(self, run: Pass, images: Tensor, labels: Labels, share: float) -> Metrics:
        """Do a pass; ``share`` is a factor that it has on the loss.

        Raises:
            ConfigError: graphs are required, and this pass cannot be recorded.
        """
        if self.why_not is not None:
            return run(images, labels)
        inputs = [images, *_tensors(labels)]
        kind = self._kind(inputs, share)
        self._seen[kind] += 1
        if kind not in self._recordings:
            if self._seen[kind] <= WATCHED:
                return self._watched(kind, run, images, labels)
            self._record(kind, run, inputs)
            if self.why_not is not None:
                return run(images, labels)
        return self._replayed(self._recordings[kind], inputs)

    def _kind(self, inputs: list[Tensor], share: float) -> Any:
        """All that Python may decide by, and where in memory the kernels work."""
        trained = [p.requires_grad for p in self.params]
        if trained != self._trained:  # these recordings will not be replayed
            self._recordings.clear()
            self._trained = trained
        return (
            share,
            tuple((t.shape, t.dtype, t.stride()) for t in inputs),
            tuple((m.training, m.__dict__.get("track_running_stats")) for m in self.modules),
            tuple(t.data_ptr() for t in (*self.params, *self.buffers)),
            tuple(trained),
        )

    def _watched(self, kind: Any, run: Pass, images: Tensor, labels: Labels) -> Metrics:
        """A pass as always, with an eye on what a replay would not repeat."""
        before = _host_draws(images.device)
        metrics, waits = self.recorder.watched(lambda: run(images, labels), self.params)
        if waits and self._seen[kind] == WATCHED:  # the first ones compile, if anything does
            self._give_up("the model or the loss waits for the device")
        elif before != _host_draws(images.device):
            self._give_up("the model draws random numbers on the host")
        elif _has_any_global_hook() or any(map(_has_hooks, self.owners)):
            self._give_up("the model has hooks")
        elif len(self._seen) > KINDS:
            self._give_up(
                f"passes are of more than {KINDS} kinds (shapes of batches, places of weights)"
            )
        return metrics

    def _record(self, kind: Any, run: Pass, inputs: list[Tensor]) -> None:
        static, earlier = [t.clone() for t in inputs], [p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        images, *rest = static
        labels = rest[0] if len(rest) == 1 else MixedLabels(*rest)
        try:
            metrics, replay = self.recorder.record(lambda: run(images, labels))
            grads = [p.grad for p in self.params]
            self._recordings[kind] = Recording(static, grads, metrics, replay)
        except RuntimeError as error:
            self._give_up(str(error).splitlines()[0])
        finally:
            for p, grad in zip(self.params, earlier, strict=True):
                p.grad = grad

    @torch.no_grad()
    def _replayed(self, recording: Recording, inputs: list[Tensor]) -> Metrics:
        """The pass with these inputs; its gradients are copied, as others may keep them."""
        for static, given in zip(recording.inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        recording.replay()
        pairs = [(p, g) for p, g in zip(self.params, recording.grads, strict=True) if g is not None]
        added = [(p.grad, g) for p, g in pairs if p.grad is not None]
        if added:  # micro-batches
            torch._foreach_add_([held for held, _ in added], [g for _, g in added])
        if new := [(p, torch.empty_like(g), g) for p, g in pairs if p.grad is None]:
            torch._foreach_copy_([copy for _, copy, _ in new], [g for _, _, g in new])
        for p, copy, _ in new:
            p.grad = copy
        loss_and_accuracy, losses = recording.metrics
        return loss_and_accuracy.clone(), losses.clone()

    def _give_up(self, reason: str) -> None:
        if self.required:
            raise ConfigError(f"cuda_graph=true: {reason}; allowed here are auto, false")
        self.why_not = reason
        self._recordings.clear()
        log.warning("cuda_graph=auto: kernels are started one by one, as %s", reason)


def graphed_passes(
    asked: bool | str, module: L.LightningModule, model: nn.Module
) -> GraphedPasses | None:
    """What records the passes of a fit; None if that is not asked for, or ``auto`` cannot.

    Raises:
        ConfigError: ``true``, and the passes of this fit cannot be recorded.
    """
    trainer: Any = module.trainer
    required, device = asked is True, trainer.strategy.root_device
    if asked is False:
        return None
    if device.type != "cuda" or trainer.world_size > 1:
        if required:
            raise ConfigError(
                f"cuda_graph=true: needs one CUDA device, and this run has {trainer.world_size} x "
                f"{device.type}; allowed here are auto, false"
            )
        return None
    graphs = GraphedPasses(model, CUDARecorder(), required)
    bases = {module: L.LightningModule, **dict.fromkeys(trainer.callbacks, L.Callback)}
    for (called, base), name in itertools.product(bases.items(), CALLS):
        if graphs.why_not is None and getattr(type(called), name) is not getattr(base, name):
            graphs._give_up(f"{type(called).__name__} has {name}")
    return graphs


def _tensors(labels: Labels) -> list[Tensor]:
    if isinstance(labels, Tensor):
        return [labels]
    return [labels.labels, labels.other, labels.share]


def _host_draws(device: torch.device) -> tuple[Any, ...]:
    """The state of the host's random numbers, those that a replay does not draw."""
    state: Any = np.random.get_state()
    draws = random.getstate(), state[1].tobytes(), state[2]
    return draws if device.type == "cpu" else (*draws, torch.get_rng_state().numpy().tobytes())


def _has_hooks(of: Any) -> bool:
    return any(getattr(of, name, None) for name in HOOKS)

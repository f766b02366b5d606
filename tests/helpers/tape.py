"""What a CUDA graph does, on any device: operations recorded with their tensors and repeated on the
same memory, without Python."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from host_syncs import HostSyncs


class Tape(TorchDispatchMode):
    """Runs and collects operations."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, tree_leaves(out)))
        return out


class TapeRecorder:
    """A ``Recorder`` for models on a CPU.

    Recording leaves everything as it was, and fills what the pass has computed with NaN: a replay
    has to write it all.

    Args:
        model: of the passes, whose buffers they change.
    """

    def __init__(self, model):
        self.model = model

    def watched(self, run, params):
        with HostSyncs() as syncs:
            return run(), bool(syncs.found)

    def record(self, run):
        kept = [(t, t.clone()) for t in self.model.buffers()]
        draws = torch.get_rng_state()
        with Tape() as tape:
            metrics = run()
        torch.set_rng_state(draws)
        state = {t.data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            for tensor in (*metrics, *grads):
                assert tensor.data_ptr() not in state
                tensor.fill_(torch.nan)
        return metrics, lambda: replay(tape.operations)


@torch.no_grad()
def replay(operations):
    with _disable_current_modes():  # a device does it, unseen
        for func, args, kwargs, outs in operations:
            for out, new in zip(outs, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(out, Tensor) and out.data_ptr() != new.data_ptr():
                    out.detach().copy_(new)

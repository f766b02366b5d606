"""What happened since the last step: which gradients are new, and what the weights were."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sam_lightning.optim.foreach import copy_, norm_of_norms, norms_of

SPENT, SECOND = "stepped with, or set to zero", "of a second pass, before the step"


class Backup:
    """Copies of weights from before they were moved.

    On a CPU the copies keep their memory for the next step, because new pages have to be zeroed:
    that would take up to a third of a step. CUDA's allocator keeps the memory by itself.
    """

    def __init__(self) -> None:
        self._weights: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._buffers: dict[int, Tensor] = {}  # the copies of the last step, by id(weight)

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_buffers": {}}

    def __bool__(self) -> bool:
        """Whether there are copies."""
        return bool(self._weights)

    def save(self, weights: list[Tensor]) -> None:
        """Copy weights that have no copy yet."""
        known = {id(w) for w in self._weights}
        new = [w for w in weights if id(w) not in known]
        copies = [self._buffer(w) for w in new]
        if new:
            copy_(copies, new)
        self._weights = [*self._weights, *new]
        self._copies = [*self._copies, *copies]

    def restore(self) -> None:
        """Restore the weights and drop the copies."""
        if not self:
            return
        copy_(self._weights, self._copies)
        pairs = zip(self._weights, self._copies, strict=True)
        self._buffers = {id(w): copy for w, copy in pairs if w.is_cpu}
        self._weights, self._copies = [], []

    def _buffer(self, w: Tensor) -> Tensor:
        buffer = self._buffers.pop(id(w), None)
        # The weight may have been moved or converted, or another one may have its id.
        if buffer is not None and w.is_cpu and buffer.dtype is w.dtype and buffer.shape == w.shape:
            return buffer
        with torch.inference_mode(False):  # memory from that mode works only in it
            return torch.empty_like(w)

    def distance(self) -> Tensor:
        """The 2-norm of weights minus copies, 0-dim; needs at least one copy."""
        # One difference at a time, since all of them take as much memory as the weights.
        pairs = zip(self._weights, self._copies, strict=True)
        return norm_of_norms([norm for w, old in pairs for norm in norms_of([w - old])])


@dataclasses.dataclass
class StepState:
    """What happened since the last step.

    The wrappers of Lightning and Fabric inherit from the optimizer they wrap, and run its methods
    with themselves as ``self``. They share this one object with the optimizer.
    """

    clearings: int = 0  # how often gradients were cleared, ever
    held: bool = False  # the weights are at w + e
    perturbed: bool = False  # perturb() was called
    plain: bool = False  # skip_perturbation() was called
    combined: bool = False  # combine() was called
    at_w: dict[Tensor, Tensor] | None = None  # gradients there, which the transform needs
    model: nn.Module | None = None  # what the second pass calls
    local: bool = False  # nothing averages gradients before combine()
    beside: dict[Tensor, Tensor] = dataclasses.field(default_factory=dict)  # the step, times lr
    scaler: Any = None  # has scaled the gradients
    share: float = 1.0  # of the step's images that the passes are over
    backup: Backup = dataclasses.field(default_factory=Backup)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "model": None, "scaler": None}  # copies leave them out

    def keep_gradients(self, params: list[Tensor], *, cleared: bool) -> None:
        """Keep the gradients at w, which are ``cleared`` or written to before they are combined."""
        grads = {p: p.grad for p in params if p.grad is not None}
        # The next pass writes into the buffer of a view, such as a bucket of DDP's.
        self.at_w = {p: g if cleared and not g._is_view() else g.clone() for p, g in grads.items()}

    def take_gradients(self, params: Iterable[Tensor]) -> list[Tensor] | None:
        """The gradients that were kept, of these parameters; None if none were. A step begins."""
        at_w, self.at_w, self.beside = self.at_w, None, {}
        if at_w is None:
            return None
        return [at_w[p] if p in at_w else torch.zeros_like(p) for p in params]

    def mark(self, params: list[Tensor], kind: str, *, each: bool = False) -> None:
        """Note whether the present gradients are ``SPENT`` or ``SECOND``.

        The mark is on the first gradient itself and goes when the gradient does. A tensor that
        somebody assigns again after gradients were cleared is a new gradient. With ``each`` every
        gradient gets one, which takes longer and detects a backward pass that leaves out the first.
        """
        for grad in _grads(params):
            grad._sam_mark = kind, self.clearings, _version(grad)
            if not each:
                return

    def check_gradients(self, params: list[Tensor]) -> None:
        """Refuse to perturb unless a first pass has computed gradients.

        Raises:
            RuntimeError: there is no gradient, or it is the last step's or second pass's.
        """
        if not self.has_new_gradients(params, zeros_count=True):
            raise RuntimeError("no gradient since the last step: call backward() before")
        grad = next(_grads(params))
        *mark, version = getattr(grad, "_sam_mark", (None, 0, 0))
        # One write since then is a backward pass. Setting them to zero before it is another.
        if mark == [SECOND, self.clearings] and _version(grad) - version == 1:
            raise RuntimeError(
                "the gradient of the last second pass was neither stepped with nor cleared. To "
                "accumulate, run all first passes before the perturbation and all second ones in it"
            )

    def has_new_gradients(self, params: list[Tensor], *, zeros_count: bool = False) -> bool:
        """Whether a gradient was written since the last were ``SPENT``.

        Args:
            params: whose gradients.
            zeros_count: whether zeros written into an old gradient count. They may come from a
                backward pass or from somebody who cleared it. If they count, the host does not
                wait for the device.
        """
        marked = False
        for grad in _grads(params):
            *mark, version = getattr(grad, "_sam_mark", (None, 0, 0))
            if mark == [SPENT, self.clearings]:
                marked = True
                rewritten = _version(grad) != version
                if rewritten and (zeros_count or any(bool(g.any()) for g in _grads(params))):
                    return True
            elif not marked:
                return True
        return False


def _grads(params: list[Tensor]) -> Iterator[Any]:
    return (p.grad for p in params if p.grad is not None and p.requires_grad)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version

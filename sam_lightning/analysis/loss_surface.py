"""The loss of a network over fixed images, as a function of its weights.

The model comes back as it was: weights bit for bit, ``.grad``, running statistics and the training
mode of every module.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sam_lightning.config.errors import ConfigError
from sam_lightning.data.image_data import ImageData
from sam_lightning.data.seeding import draw_seed
from sam_lightning.data.source import stratified_split
from sam_lightning.optim.batch_norm import frozen_running_stats

Batch = tuple[Tensor, Tensor]


@dataclass(eq=False)
class LossSurface:
    """L(w), the mean loss over all examples of some batches, without dropout.

    Vectors in the space of the weights are flat: the trainable parameters one after the other, in
    the order of ``model.parameters()``, ``size`` numbers in all.

    Args:
        model: inputs -> outputs, on the device of the batches.
        batches: pairs of inputs and targets; a pass takes them one at a time, to save memory.
        criterion: (outputs, targets) -> mean loss over the batch.
        batch_norm: normalise by ``"stored"`` running statistics, as in evaluation, or by those of
            each ``"batch"``, as in training.
        tick: called after each pass over a batch, for a progress bar.
    """

    model: nn.Module
    batches: Sequence[Batch]
    criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    batch_norm: str = "stored"
    tick: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.size = sum(w.numel() for w in self.weights)
        self.examples = sum(len(targets) for _, targets in self.batches)

    def of(self, batches: Sequence[Batch]) -> "LossSurface":
        """The loss of the same model on other batches."""
        return replace(self, batches=batches)

    def in_batches_of(self, size: int) -> "LossSurface":
        """The same loss, with ``size`` examples in each batch."""
        inputs, targets = (torch.cat(parts) for parts in zip(*self.batches, strict=True))
        return self.of(list(zip(inputs.split(size), targets.split(size), strict=True)))

    def value(self) -> float:
        """L(w)."""
        with self._evaluating(), torch.no_grad():
            return sum(loss.item() for loss in self._losses())

    def gradient(self) -> tuple[float, Tensor]:
        """L(w) and its gradient, a flat vector."""
        value, gradient = 0.0, self.zeros()
        with self._evaluating():
            for loss in self._losses():
                gradient += _flat(_grad(loss, self.weights))
                value += loss.item()
        return value, gradient

    def hvp(self, vector: Tensor) -> Tensor:
        """The Hessian times a flat vector, exactly, by differentiating twice (Pearlmutter 1994)."""
        parts, product = self.split(vector), self.zeros()
        with self._evaluating():
            for loss in self._losses():
                slopes = _grad(loss, self.weights, create_graph=True)
                slope = torch.stack([(s * v).sum() for s, v in zip(slopes, parts, strict=True)])
                if slope.requires_grad:  # else the loss is linear
                    product += _flat(_grad(slope.sum(), self.weights))
        return product

    @contextmanager
    def moved(self, by: Tensor) -> Iterator[None]:
        """Hold the weights at w + ``by``, a flat vector; they come back bit for bit."""
        weights = [w.detach() for w in self.weights]  # views: autograd sees no change in place
        saved = [w.clone() for w in weights]
        try:
            for w, step in zip(weights, self.split(by), strict=True):
                w.add_(step)
            yield
        finally:
            for w, before in zip(weights, saved, strict=True):
                w.copy_(before)

    def along(self, directions: Sequence[Tensor], coordinates: Sequence[float]) -> Tensor:
        """L(w + a d) for each of P coordinates a, or L(w + a d + b d') for all pairs a, b.

        Args:
            directions: one or two flat vectors, d and d'.
            coordinates: of both axes.

        Returns:
            float64, P or P x P, the first direction along the first axis.
        """
        axes = [torch.tensor(coordinates, dtype=torch.float64)] * len(directions)
        losses = []
        for point in torch.cartesian_prod(*axes).reshape(-1, len(directions)).tolist():
            step = sum((a * d for a, d in zip(point, directions, strict=True)), self.zeros())
            with self.moved(step):
                losses.append(self.value())
        return torch.tensor(losses, dtype=torch.float64).reshape([len(axis) for axis in axes])

    def filter_normalised(self, generator: torch.Generator) -> Tensor:
        """A random direction in the scale of the weights (Li et al. 2018, arXiv 1712.09913, 4).

        Each filter (output unit) of a Gaussian direction gets the norm of the same filter of the
        weights; biases and normalisation layers do not move. Networks whose weights differ in scale
        become comparable.

        The generator is on the CPU; models of the same shapes draw the same Gaussians.
        """
        parts = []
        for w in self.weights:
            d = torch.randn(w.shape, generator=generator).to(w)
            if w.ndim <= 1:
                parts.append(torch.zeros_like(d))
                continue
            rows = d.flatten(1)
            length, size = (x.norm(dim=1, keepdim=True) for x in (rows, w.detach().flatten(1)))
            parts.append(rows * (size / (length + 1e-10)))
        return _flat(parts)

    def zeros(self) -> Tensor:
        """The flat vector 0."""
        return self.weights[0].new_zeros(self.size)

    def split(self, vector: Tensor) -> list[Tensor]:
        """The parts of a flat vector, in the shapes of the parameters."""
        parts = vector.split([w.numel() for w in self.weights])
        return [part.view(w.shape) for part, w in zip(parts, self.weights, strict=True)]

    def _losses(self) -> Iterator[Tensor]:
        """What each batch adds to L(w)."""
        for inputs, targets in self.batches:
            yield self.criterion(self.model(inputs), targets) * (len(targets) / self.examples)
            self.tick()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            if self.batch_norm == "batch":
                for module, _ in modes:
                    if getattr(module, "track_running_stats", False):
                        module.train()
            with frozen_running_stats(self.model):
                yield
        finally:
            for module, training in modes:
                module.training = training


def fixed_batches(
    data: ImageData, split: str, images: int, batch_size: int, seed: int, device: Any
) -> list[Batch]:
    """Batches for a ``LossSurface``: images of one split, normalised and not augmented.

    ``seed`` alone draws ``images`` of them, stratified and in random order; all if there are fewer.
    ``train`` has label noise where the run has it.

    Raises:
        ConfigError: the run has no such images.
    """
    source = getattr(data, split)
    if source is None:
        what = "validation" if split == "val" else split
        raise ConfigError(f"split={split}: this run has no {what} images")
    count = min(images, len(source))
    chosen, _ = stratified_split(source.labels.cpu(), count, draw_seed(seed))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    drawn = source.take(chosen[order].to(source.labels.device)).to(device)
    normalised = data.normalize(drawn.images)
    return list(zip(normalised.split(batch_size), drawn.labels.split(batch_size), strict=True))


def _grad(loss: Tensor, weights: list[Tensor] | list[nn.Parameter], **options: Any) -> Any:
    return torch.autograd.grad(loss, weights, materialize_grads=True, **options)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])

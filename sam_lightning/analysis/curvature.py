"""How curved and how sharp a loss is at the present weights, without the Hessian as a matrix.

A product of the Hessian with a vector costs about four passes over the images. Random vectors come
from a ``torch.Generator`` on the CPU, so that the numbers do not depend on the device.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from sam_lightning.analysis.loss_surface import LossSurface


def worst_case(surface: LossSurface, rho: float, steps: int = 1) -> float:
    """How much the loss rises within the radius rho: max L(w + e) - L(w), ||e||_2 <= rho.

    Args:
        rho: the radius, in the units of the weights.
        steps: 1 is the first-order solution, e = rho g / ||g|| (Foret et al. 2021, equation 2).
            More are projected gradient ascent (Madry et al. 2018, arXiv 1706.06083, there on
            inputs) by 2.5 rho / steps each, and the highest loss on the way counts.

    Returns:
        the rise, which one step may make negative where the loss is curved downwards.
    """
    here, gradient = surface.gradient()
    e = surface.zeros()
    rises = []
    for step in range(steps):
        e = e + 2.5 * rho / steps * _unit(gradient)
        e = e * min(1.0, rho / max(e.norm().item(), 1e-12))
        with surface.moved(e):
            if step + 1 < steps:
                there, gradient = surface.gradient()
            else:
                there = surface.value()
        rises.append(there - here)
    return max(rises)


def m_sharpness(surface: LossSurface, rho: float) -> float:
    """The mean of ``worst_case`` of single batches, of m examples each (Foret et al. 2021, 4.1)."""
    parts = [surface.of([batch]) for batch in surface.batches]
    return sum(part.examples * worst_case(part, rho) for part in parts) / surface.examples


@dataclass(frozen=True)
class Eigenpairs:
    """The largest eigenvalues of the Hessian, largest first, and their eigenvectors.

    Attributes:
        values: float64, k.
        errors: k, the residuals' norms: within this distance there is an eigenvalue for certain.
        vectors: k of them, orthonormal and flat.
    """

    values: Tensor
    errors: Tensor
    vectors: list[Tensor]


NONE_KNOWN = Eigenpairs(torch.zeros(0).double(), torch.zeros(0).double(), [])


def top_eigenpairs(
    surface: LossSurface,
    generator: Generator,
    k: int = 5,
    *,
    tolerance: float = 1e-4,
    max_steps: int = 100,
) -> Eigenpairs:
    """The k largest eigenvalues of the Hessian and their vectors, by Lanczos from a random start.

    Args:
        generator: of the start.
        k: how many; fewer are returned if there are fewer weights.
        tolerance: stop when each is known to this part of the largest in size.
        max_steps: products with the Hessian at most; each keeps one vector of the weights' size.
    """
    k = min(k, surface.size)
    before: Tensor | None = None
    process = _Lanczos(surface, torch.randn(surface.size, generator=generator))
    for _ in process.steps(min(max_steps, surface.size), generator):
        if len(process.diagonal) < k:
            continue
        values, errors, _ = process.largest(k)
        close = tolerance * process.scale
        if process.beta > 0:
            enough = bool((errors <= close).all())
        else:
            # All that the start can reach is found. A fresh start finds what else there is, such
            # as the second copy of a double eigenvalue.
            enough = before is not None and not bool(((values - before).abs() > close).any())
            before = values
        if enough:
            break
    values, errors, inside = process.largest(k)
    vectors = [
        sum((a * v for a, v in zip(row, process.basis, strict=True)), surface.zeros())
        for row in inside.tolist()
    ]
    return Eigenpairs(values, errors, vectors)


def trace(
    surface: LossSurface, generator: Generator, samples: int = 8, known: Eigenpairs = NONE_KNOWN
) -> tuple[float, float]:
    """The trace of the Hessian, the mean of v' H v over random signs v (Hutchinson 1989).

    Args:
        generator: of the signs.
        samples: vectors v.
        known: added up exactly, so that only the rest is estimated. The error is far smaller if a
            few eigenvalues are large (Meyer et al. 2021, arXiv 2010.09649), and the estimate is
            unbiased also if these are not known well.

    Returns:
        the estimate and its standard error, which is NaN for a single sample.
    """
    values = torch.zeros(samples, dtype=torch.float64)
    for i in range(samples):
        v = _outside(_signs(surface, generator), known.vectors)
        values[i] = torch.dot(v, surface.hvp(v))
    values += known.values.sum()
    return values.mean().item(), values.std().item() / math.sqrt(samples)


@dataclass(frozen=True)
class Spectrum:
    """Estimates of the distribution of the eigenvalues, one for each of S random vectors.

    Attributes:
        nodes: S x N; where the mass of each estimate lies.
        weights: S x N; how much lies there, 1 in sum for each vector.
    """

    nodes: Tensor
    weights: Tensor

    def resolution(self, known: int = 0) -> float:
        """The least width at which ``density`` does not show single nodes.

        M steps of Lanczos are exact for polynomials of degree 2 M - 1. On an interval of length l,
        what a Gaussian of width s has of higher degrees is about exp(-2 (2 M s / l)^2), here 1 %.
        The last ``known`` nodes are eigenvalues, and need not be resolved.
        """
        rest = self.nodes[:, : self.nodes.shape[1] - known]
        return 0.75 * (rest.max() - rest.min()).item() / rest.shape[1]

    def density(self, points: Tensor, width: float) -> Tensor:
        """The density at some points, each node a Gaussian of this width; it integrates to 1."""
        z = (points[:, None, None] - self.nodes) / width
        bells = torch.exp(-z.square() / 2) / (width * math.sqrt(2 * math.pi))
        return (bells * self.weights).sum(2).mean(1)


def spectrum(
    surface: LossSurface,
    generator: Generator,
    samples: int = 2,
    steps: int = 16,
    known: Eigenpairs = NONE_KNOWN,
) -> Spectrum:
    """The spectral density of the Hessian, by stochastic Lanczos quadrature.

    Ghorbani et al. 2019 (arXiv 1901.10159), algorithm 2. For a random unit vector v, M steps of
    Lanczos give the Gauss quadrature of the measure that weighs each eigenvalue by the square of
    v's part along its eigenvector; the mean over v is the density.

    Args:
        generator: of the vectors, which are of random signs.
        samples: vectors, S.
        steps: products with the Hessian for each, M; no more than there are weights.
        known: counted exactly, as nodes of the weight of one eigenvalue. The vectors are
            orthogonal to them, and few vectors and steps do for the rest.
    """
    rest = surface.size - len(known.values)
    steps = max(1, min(steps, rest))
    nodes, weights = torch.zeros(2, samples, steps + len(known.values), dtype=torch.float64)
    nodes[:, steps:], weights[:, steps:] = known.values, 1 / surface.size
    for i in range(samples):
        process = _Lanczos(surface, _signs(surface, generator), known)
        for _ in process.steps(steps):
            if process.beta == 0:
                break
        values, vectors = torch.linalg.eigh(process.matrix())
        nodes[i, : len(values)] = values
        weights[i, : len(values)] = vectors[0].square() * rest / surface.size
    return Spectrum(nodes, weights)


class _Lanczos:
    """Grows an orthonormal basis in which the Hessian is tridiagonal.

    Every vector is orthogonalised to the known eigenvectors and to all earlier ones, twice:
    rounding would bring back copies (Parlett, The Symmetric Eigenvalue Problem, 6.9 and 13).
    """

    def __init__(self, surface: LossSurface, start: Tensor, known: Eigenpairs = NONE_KNOWN) -> None:
        self.surface = surface
        self.known = known
        self.basis = [_unit(_outside(start.to(surface.weights[0]), known.vectors))]
        self.diagonal: list[float] = []
        self.beside: list[float] = []
        self.beta = 0.0  # length of what the last step found outside the basis

    def steps(self, most: int, restart: Generator | None = None) -> Iterator[None]:
        """Take a step at a time; go on from a random vector where the basis closes."""
        while True:
            last = self.basis[-1]
            product = self.surface.hvp(last)
            self.diagonal.append(torch.dot(last, product).item())
            rest = self._outside(product)
            self.beta = rest.norm().item()
            if self.beta <= 100 * torch.finfo(rest.dtype).eps * self.scale:
                self.beta = 0.0
            if len(self.diagonal) == most:
                return
            yield
            if self.beta == 0 and restart is not None:
                fresh = torch.randn(self.surface.size, generator=restart)
                rest = self._outside(_unit(fresh.to(rest)))
            self.basis.append(_unit(rest))
            self.beside.append(self.beta)

    def _outside(self, vector: Tensor) -> Tensor:
        return _outside(vector, [*self.known.vectors, *self.basis])

    def matrix(self) -> Tensor:
        """The Hessian in the basis, float64."""
        beside = torch.tensor(self.beside, dtype=torch.float64)
        diagonal = torch.tensor(self.diagonal, dtype=torch.float64)
        return torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)

    @property
    def scale(self) -> float:
        """The largest eigenvalue in size so far."""
        found = torch.linalg.eigvalsh(self.matrix())
        return torch.cat([found, self.known.values]).abs().max().item()

    def largest(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The k largest eigenvalues in the basis, norms of residuals, and vectors (k x basis)."""
        values, vectors = torch.linalg.eigh(self.matrix())
        errors = self.beta * vectors[-1].abs()
        return values.flip(0)[:k], errors.flip(0)[:k], vectors.T.flip(0)[:k]


def _signs(surface: LossSurface, generator: Generator) -> Tensor:
    bits = torch.randint(2, (surface.size,), generator=generator, dtype=torch.int8)
    return (2 * bits - 1).to(surface.weights[0])


def _outside(vector: Tensor, basis: list[Tensor]) -> Tensor:
    """What is left without the parts along an orthonormal basis, in two rounds for the rounding."""
    for known in basis * 2:
        vector = vector - torch.dot(known, vector) * known
    return vector


def _unit(vector: Tensor) -> Tensor:
    return vector / (vector.norm() + 1e-12)

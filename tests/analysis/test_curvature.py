"""Curvature without a Hessian, against the Hessian as a matrix, in float64."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian

from sam_lightning.analysis.curvature import (
    NONE_KNOWN,
    m_sharpness,
    spectrum,
    top_eigenpairs,
    trace,
    worst_case,
)
from sam_lightning.analysis.loss_surface import LossSurface, fixed_batches
from sam_lightning.config.errors import ConfigError
from sam_lightning.data import ImageSource, Split
from sam_lightning.data.datamodule import ImageDataModule

CLASSES = 4


def moment(spectrum, power):
    """The mean of ``eigenvalue ** power`` and its standard error; power < 2 M, of M steps."""
    values = (spectrum.weights * spectrum.nodes**power).sum(1)
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network():
    """Convolution, BatchNorm, ReLU, dropout, linear; one frozen layer; a mix of modes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 3, 1),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(3 * 9, CLASSES),
    ).double()
    model(torch.randn(20, 2, 5, 5, dtype=torch.float64))  # statistics that are not 0 and 1
    model[3].requires_grad_(False)
    model[0].eval()
    return model


def examples(sizes=(7, 7, 3)):
    g = generator(1)
    return [
        (
            torch.randn(n, 2, 5, 5, dtype=torch.float64, generator=g),
            torch.randint(CLASSES, (n,), generator=g),
        )
        for n in sizes
    ]


def flat_loss(model, batches):
    """The mean loss over all examples as a function of the flat trainable weights, and these."""
    model = network().eval()
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(flat):
        parts = flat.split([p.numel() for p in named.values()])
        weights = {n: v.view(p.shape) for (n, p), v in zip(named.items(), parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, weights, images), labels)

    return loss, torch.cat([p.flatten() for p in named.values()])


@pytest.fixture(scope="module")
def dense():
    loss, weights = flat_loss(network(), examples())
    return hessian(loss)(weights)


class Point(nn.Module):
    """Weights that are their own output."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(torch.as_tensor(weights, dtype=torch.float64))

    def forward(self, inputs):
        return self.weights


def quadratic(matrix, at):
    """w' A w / 2 as a surface."""
    matrix = torch.as_tensor(matrix, dtype=torch.float64)
    one = torch.zeros(1)
    return LossSurface(Point(at), [(one, one)], lambda w, _: w @ matrix @ w / 2)


def diagonal(values):
    return quadratic(torch.diag(torch.tensor(values, dtype=torch.float64)), [0.0] * len(values))


def symmetric(size, seed=2):
    a = torch.randn(size, size, dtype=torch.float64, generator=generator(seed))
    return a + a.T


def test_value_gradient_and_products_are_those_of_all_examples_together(dense):
    surface = LossSurface(network(), examples())
    loss, weights = flat_loss(network(), examples())
    value, gradient = surface.gradient()
    assert value == pytest.approx(loss(weights).item(), rel=1e-12)
    assert surface.value() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(gradient, torch.func.grad(loss)(weights))
    vector = torch.randn(surface.size, dtype=torch.float64, generator=generator(5))
    torch.testing.assert_close(surface.hvp(vector), dense @ vector)


def test_products_do_not_depend_on_the_memory_layout():
    batches = [(x.float(), y) for x, y in examples()]
    vector = torch.randn(2 * 3 * 9 + 3 + 6 + 27 * 4 + 4, generator=generator(5))
    plain = LossSurface(network().float(), batches)
    moved = LossSurface(network().float().to(memory_format=torch.channels_last), batches)
    torch.testing.assert_close(moved.hvp(vector), plain.hvp(vector))
    with moved.moved(vector), plain.moved(vector):
        assert moved.value() == pytest.approx(plain.value(), rel=1e-5)


def everything_of(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return state, modes, grads


def assert_same(model, before):
    state, modes, grads = everything_of(model)
    assert modes == before[1]
    assert all(torch.equal(state[name], value) for name, value in before[0].items())
    for a, b in zip(grads, before[2], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize(
    "measure",
    [
        lambda s: top_eigenpairs(s, generator()),
        lambda s: trace(s, generator()),
        lambda s: spectrum(s, generator(), samples=2, steps=5),
        lambda s: worst_case(s, 0.3, steps=3),
        lambda s: m_sharpness(s, 0.3),
        lambda s: s.along([s.filter_normalised(generator())], [-1.0, 1.0]),
    ],
    ids=["eigenvalues", "trace", "spectrum", "worst_case", "m_sharpness", "along"],
)
@pytest.mark.parametrize("batch_norm", ["stored", "batch"])
def test_the_model_comes_back_as_it_was(measure, batch_norm):
    model = network()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = everything_of(model)
    rng = torch.get_rng_state()
    surface = LossSurface(model, examples(), batch_norm=batch_norm)
    first = measure(surface)
    assert_same(model, before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert repr(measure(surface)) == repr(first)  # and the measure repeats


def test_the_model_comes_back_when_a_pass_fails():
    model = network()
    before = everything_of(model)
    calls = []

    def fail():
        calls.append(None)
        if len(calls) == 5:  # in the second pass, at moved weights
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        worst_case(LossSurface(model, examples(), tick=fail), 0.3)
    assert_same(model, before)
    assert caught.traceback  # held until here, and with it all frames


def test_statistics_of_the_batch():
    model = network()
    (batch,) = examples([9])
    surface = LossSurface(model, [batch], batch_norm="batch")
    reference = network().eval()
    reference[1].train()
    expected = nn.functional.cross_entropy(reference(batch[0]), batch[1])
    assert surface.value() == pytest.approx(expected.item(), rel=1e-12)
    assert surface.value() != pytest.approx(LossSurface(model, [batch]).value(), rel=1e-3)


def test_top_eigenpairs_are_those_of_the_matrix(dense):
    top = top_eigenpairs(LossSurface(network(), examples()), generator(), k=5)
    exact = torch.linalg.eigvalsh(dense).flip(0)[:5]
    torch.testing.assert_close(top.values, exact, rtol=1e-4, atol=0)
    assert (top.errors <= 1e-4 * exact[0]).all()
    assert ((top.values - exact).abs() <= top.errors + 1e-12).all()
    vectors = torch.stack(top.vectors)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(5, dtype=torch.float64))
    residuals = vectors @ dense - top.values[:, None] * vectors
    torch.testing.assert_close(residuals.norm(dim=1), top.errors, rtol=1e-6, atol=1e-12)


def test_top_eigenpairs_in_float32(dense):
    surface = LossSurface(network().float(), [(x.float(), y) for x, y in examples()])
    values = top_eigenpairs(surface, generator(), k=5).values
    exact = torch.linalg.eigvalsh(dense).flip(0)[:5]
    torch.testing.assert_close(values, exact, rtol=1e-4, atol=0)


def test_top_eigenpairs_stop_early_on_a_large_matrix():
    """5 outliers and a bulk, as networks have them."""
    passes = []
    n, outliers = 2000, torch.tensor([50.0, 40, 30, 20, 10], dtype=torch.float64)
    bulk = torch.rand(n, dtype=torch.float64, generator=generator())
    values = torch.cat([bulk[5:], outliers])
    batch = torch.zeros(1)
    surface = LossSurface(
        Point(torch.zeros(n)),
        [(batch, batch)],
        lambda w, _: (w * values * w).sum() / 2,
        tick=lambda: passes.append(1),
    )
    found = top_eigenpairs(surface, generator(), k=5)
    torch.testing.assert_close(found.values, outliers, rtol=1e-4, atol=0)
    assert len(passes) < 25


@pytest.mark.parametrize(
    ("values", "k", "expected"),
    [
        ([5.0, 5, 1], 2, [5.0, 5]),  # double
        ([5.0, 5, 5, 1, 1, -2], 4, [5.0, 5, 5, 1]),
        ([3.0, 0, 0, 0, 0, 0], 3, [3.0, 0, 0]),  # of rank 1
        ([-1.0, -9, -4], 2, [-1.0, -4]),  # largest, not largest in size
        ([0.0, 0, 0], 2, [0.0, 0]),
        ([7.0, 2], 5, [7.0, 2]),  # more than there are
    ],
)
def test_top_eigenpairs_of_special_matrices(values, k, expected):
    found = top_eigenpairs(diagonal(values), generator(), k=k)
    torch.testing.assert_close(found.values, torch.tensor(expected, dtype=torch.float64))
    vectors = torch.stack(found.vectors)
    torch.testing.assert_close(vectors * torch.tensor(values), found.values[:, None] * vectors)


def test_trace_of_a_diagonal_hessian_is_exact():
    estimate, error = trace(diagonal([3.0, -1, 0.5, 8]), generator(), samples=3)
    assert estimate == pytest.approx(10.5, rel=1e-12)
    assert error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("steps", [0, 5, 40])  # of Lanczos: nothing known, roughly, well
def test_trace_is_within_its_error_which_is_that_of_the_theory(dense, steps):
    samples = 400
    surface = quadratic(dense, torch.zeros(len(dense)))
    known, rest = NONE_KNOWN, dense
    if steps:
        known = top_eigenpairs(surface, generator(), max_steps=steps)
        inside = torch.stack(known.vectors)
        outside = torch.eye(len(dense), dtype=torch.float64) - inside.T @ inside
        rest = outside @ dense @ outside
    estimate, error = trace(surface, generator(8), samples, known)
    assert abs(estimate - dense.trace().item()) < 3 * error
    off_diagonal = rest - torch.diag(rest.diagonal())
    theory = math.sqrt(2 * off_diagonal.square().sum().item() / samples)
    assert error == pytest.approx(theory, rel=0.15)


def test_spectrum_of_a_diagonal_hessian_is_exact():
    """Every vector of signs has the same part along every eigenvector."""
    exact = torch.tensor([-2.0, 0.5, 3, 4, 9], dtype=torch.float64)
    found = spectrum(diagonal(exact.tolist()), generator(), samples=2, steps=99)
    torch.testing.assert_close(found.nodes[0], exact)
    torch.testing.assert_close(found.weights, torch.full((2, 5), 0.2, dtype=torch.float64))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_what_is_known_and_the_rest_are_the_whole(k):
    values = [9.0, 4, 0.5, -2, -3]
    surface = diagonal(values)
    known = top_eigenpairs(surface, generator(), k)
    found = spectrum(surface, generator(), samples=2, steps=99, known=known)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        order = nodes[weights > 1e-9].argsort(descending=True)
        assert nodes[weights > 1e-9][order].tolist() == pytest.approx(values)
        assert weights[weights > 1e-9].tolist() == pytest.approx([0.2] * 5)
    assert trace(surface, generator(), known=known)[0] == pytest.approx(sum(values))


def test_moments_of_the_spectrum_are_exact_for_its_vectors():
    """Gauss quadrature: M nodes give v' H^p v for every p < 2 M."""
    matrix = symmetric(12)
    steps, samples = 4, 3
    found = spectrum(quadratic(matrix, torch.zeros(12)), generator(7), samples, steps)
    for power in range(2 * steps):
        raised = torch.linalg.matrix_power(matrix, power)  # trace() draws the same vectors
        mean, error = trace(quadratic(raised, torch.zeros(12)), generator(7), samples)
        assert moment(found, power)[0] == pytest.approx(mean / 12, rel=1e-8)
        assert moment(found, power)[1] == pytest.approx(error / 12, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("k", [0, 5])
def test_density_is_that_of_the_eigenvalues(dense, k):
    exact = torch.linalg.eigvalsh(dense)
    low, high = exact[0].item(), exact[-1].item()
    width = 0.05 * (high - low)
    points = torch.linspace(low - 5 * width, high + 5 * width, 200, dtype=torch.float64)
    surface = quadratic(dense, torch.zeros(len(dense)))
    known = top_eigenpairs(surface, generator(), k) if k else NONE_KNOWN
    found = spectrum(surface, generator(), samples=50, steps=20, known=known)
    density = found.density(points, width)
    bells = torch.distributions.Normal(exact, width).log_prob(points[:, None]).exp()
    expected = bells.mean(1)
    assert torch.trapezoid(density, points).item() == pytest.approx(1, rel=1e-3)
    assert (density - expected).abs().max() < 0.02 * expected.max()
    assert (density - expected).abs()[points > exact[-5]].max() < (
        1e-3 if k else 1
    ) * expected.max()
    mean, error = moment(found, 1)
    assert abs(mean - exact.mean().item()) < 3 * error


@pytest.mark.parametrize("steps", [8, 16, 64])
def test_the_resolution_is_where_single_nodes_are_no_longer_seen(steps):
    exact = torch.cat([torch.linspace(-3, 5, 400, dtype=torch.float64), torch.tensor([70.0])])
    surface = diagonal(exact.tolist())
    found = spectrum(surface, generator(), 1, steps, top_eigenpairs(surface, generator(), 1))
    points = torch.linspace(-4, 6, 200, dtype=torch.float64)

    def off(width):
        bells = torch.distributions.Normal(exact, width).log_prob(points[:, None]).exp().mean(1)
        return ((found.density(points, width) - bells).abs().max() / bells.max()).item()

    assert found.resolution(known=1) == pytest.approx(6 / steps, rel=0.05)
    assert off(found.resolution(known=1)) < 0.03
    assert off(found.resolution(known=1) / 3) > 0.2


def test_worst_case_of_a_quadratic_is_the_closed_form():
    matrix, w, rho = symmetric(6), torch.arange(6.0, dtype=torch.float64) - 2, 0.7
    g = matrix @ w
    expected = rho * g.norm() + rho**2 * (g @ matrix @ g) / (2 * g @ g)
    surface = quadratic(matrix, w)
    assert worst_case(surface, rho) == pytest.approx(expected.item(), rel=1e-12)
    assert worst_case(surface, 0.0) == 0


def test_more_steps_come_close_to_the_true_worst_case():
    matrix = torch.tensor([[4.0, 1], [1, 0.5]], dtype=torch.float64)
    w, rho = torch.tensor([-0.1, 1.0], dtype=torch.float64), 0.5
    angles = torch.linspace(0, 2 * math.pi, 100_000, dtype=torch.float64)
    e = rho * torch.stack([angles.cos(), angles.sin()], 1)
    there = ((w + e) @ matrix * (w + e)).sum(1) / 2
    true = (there.max() - w @ matrix @ w / 2).item()  # convex: the highest point is on the rim
    surface = quadratic(matrix, w)
    one, many = worst_case(surface, rho), worst_case(surface, rho, steps=20)
    assert one < 0.96 * true
    assert 0.999 * true < many <= true * (1 + 1e-9)


def test_m_sharpness_is_the_mean_over_the_examples_batches():
    model, batches, rho = network(), examples(), 0.2
    expected = 0.0
    for images, labels in batches:
        loss, w = flat_loss(model, [(images, labels)])
        g = torch.func.grad(loss)(w)
        rise = loss(w + rho * g / g.norm()) - loss(w)
        expected += rise.item() * len(labels) / 17
    assert m_sharpness(LossSurface(model, batches), rho) == pytest.approx(expected, rel=1e-9)


def test_batches_of_another_size_are_the_same_loss():
    surface = LossSurface(network(), examples())
    again = surface.in_batches_of(4)
    assert [len(y) for _, y in again.batches] == [4, 4, 4, 4, 1]
    assert again.value() == pytest.approx(surface.value(), rel=1e-12)


def test_sharpness_at_a_flat_point_is_zero():
    assert worst_case(diagonal([0.0, 0.0]), 0.1, steps=2) == 0


# -------------------------------------------------------------------------------- fixed batches


def data(per_class=10):
    labels = torch.arange(CLASSES).repeat_interleave(per_class)  # sorted, as in image folders
    images = torch.randint(256, (len(labels), 3, 4, 4), generator=generator()).to(torch.uint8)
    split = Split(images, labels)
    module = ImageDataModule(lambda: ImageSource(split, split, list("abcd")))
    module.setup()
    return module


batches_of = partial(fixed_batches, split="train", images=24, batch_size=10, device="cpu")


def test_fixed_batches_are_stratified_shuffled_and_normalised():
    module = data()
    batches = batches_of(module, seed=3)
    labels = torch.cat([y for _, y in batches])
    assert [len(y) for _, y in batches] == [10, 10, 4]
    assert torch.bincount(labels).tolist() == [6, 6, 6, 6]
    assert len(batches[0][1].unique()) == CLASSES
    mean, std = (torch.tensor(v)[:, None, None] for v in (module.mean, module.std))
    pixels = (torch.cat([x for x, _ in batches]) * std + mean) * 255
    pairs = zip(module.train.images, module.train.labels, strict=True)
    originals = {tuple(image.flatten().tolist()): label for image, label in pairs}
    for image, label in zip(pixels, labels, strict=True):
        key = tuple(image.round().long().flatten().tolist())
        assert originals.pop(key) == label  # the right label, and no image twice


def test_fixed_batches_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first, again, other = (batches_of(data(), seed=s) for s in (3, 3, 4))
    for (images, labels), (images_again, labels_again) in zip(first, again, strict=True):
        assert torch.equal(images, images_again)
        assert torch.equal(labels, labels_again)
    assert not torch.equal(first[0][0], other[0][0])
    assert sum(len(y) for _, y in fixed_batches(data(), "test", 999, 16, 0, "cpu")) == 40


def test_fixed_batches_of_a_split_that_is_not_there():
    with pytest.raises(ConfigError, match="split=val"):
        batches_of(data(), split="val", seed=0)

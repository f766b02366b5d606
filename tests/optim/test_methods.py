"""The relatives of SAM against their formulas, published implementations, and one another."""

import copy
import math

import pytest
import pytorch_optimizer
import torch
from pytorch_optimizer.lr_scheduler import ProportionScheduler
from torch import nn
from torch.optim import SGD

from family import CHANGED, FAMILY, PlainLoop, options_of
from reference import assert_close as assert_states_close
from reference import batches as image_batches
from reference import convnet, fit, state
from sam_lightning import SAM
from sam_lightning.optim.methods.esam import RandomSubsetAscent
from sam_lightning.optim.methods.fisher_sam import FisherAscent
from sam_lightning.optim.methods.friendly_sam import FriendlyAscent
from sam_lightning.optim.methods.gsam import SurrogateGap
from sam_lightning.optim.methods.looksam import LookSAM
from sam_lightning.optim.methods.msam import MomentumAscent
from sam_lightning.optim.methods.sam_on import normalization_parameters
from sam_lightning.optim.methods.vasso import AveragedAscent
from sam_lightning.optim.methods.wsam import WeightedSharpness
from steps import (
    assert_close,
    assert_equal,
    batches,
    closure_of,
    gradient,
    loss_at,
    network,
    step_with_closure,
    step_with_context,
    weights_of,
)

MOMENTUM = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


@pytest.mark.parametrize(
    ("accumulate", "clip"), [(1, None), pytest.param(3, 0.3, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("method", [*FAMILY, "three_steps", "wsam_in_one"])
def test_twenty_updates_follow_the_formula(method, accumulate, clip):
    # BatchNorm over a few samples would amplify rounding to the size of the bound below
    data = image_batches([32, 32, 20] * 20 if accumulate == 3 else [32, 24] * 10)
    groups = [data[i : i + accumulate] for i in range(0, len(data), accumulate)]
    ours, theirs = convnet(), convnet()

    def lr_factor(step):
        return 1 - step / 25

    options = options_of(method if method in FAMILY else "sam", **CHANGED.get(method, {}))
    loop = PlainLoop(theirs, method, options["rho"], lr_factor)
    fit(
        ours,
        data,
        lr_factor=lr_factor,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        **options,
    )
    for group in groups:
        loop.update(group, clip)
    weights = dict(theirs.named_parameters())
    found = {name: value for name, value in state(ours).items() if name in weights}
    expected = {name: value.detach() for name, value in weights.items()}
    assert_states_close(found, expected, atol=1e-9, rtol=0)


# ------------------------------------------------------------------- published implementations


@pytest.mark.parametrize("sigma", [1.0, 0.7])
def test_friendly_sam_is_that_of_pytorch_optimizer(sigma):
    ours, theirs = network(), network()
    method = FriendlyAscent(sigma=sigma, decay=0.8)
    sam = SAM(ours.parameters(), torch.optim.SGD, rho=0.2, perturbation=method, **MOMENTUM)
    published = pytorch_optimizer.FriendlySAM(
        theirs.parameters(), torch.optim.SGD, rho=0.2, sigma=sigma, lmbda=0.8, **MOMENTUM
    )
    for batch in batches(20):
        step_with_closure(ours, sam, batch)
        closure = closure_of(theirs, published, batch)
        closure()
        published.step(closure)
    # the published one rounds its norm to float32
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-7, rtol=0)


def test_gsam_is_that_of_pytorch_optimizer():
    ours, theirs = network(), network()
    sam = SAM(
        ours.parameters(), torch.optim.SGD, 0.3, gradient_transform=SurrogateGap(0.4), **MOMENTUM
    )
    base = torch.optim.SGD(theirs.parameters(), **MOMENTUM)
    schedule = torch.optim.lr_scheduler.LambdaLR(base, lambda step: 1.0)
    rho = ProportionScheduler(schedule, max_lr=0.1, min_lr=0.0, max_value=0.3, min_value=0.3)
    published = pytorch_optimizer.GSAM(theirs.parameters(), base, theirs, rho, alpha=0.4)
    for batch in batches(20):
        step_with_closure(ours, sam, batch)
        published.set_closure(nn.functional.cross_entropy, *batch)
        published.step()
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-7, rtol=0)


@pytest.mark.parametrize("decouple", [True, False])
@pytest.mark.parametrize("base", [SGD, torch.optim.AdamW])
def test_wsam_is_that_of_pytorch_optimizer(base, decouple):
    ours, theirs = network(), network()
    options = MOMENTUM if base is SGD else {"lr": 0.01, "weight_decay": 0.1}
    method = WeightedSharpness(gamma=0.7, decouple=decouple)
    sam = SAM(ours.parameters(), base, rho=0.2, gradient_transform=method, **options)
    published = pytorch_optimizer.WSAM(
        theirs, theirs.parameters(), base, rho=0.2, gamma=0.7, decouple=decouple, **options
    )
    for batch in batches(20):
        step_with_closure(ours, sam, batch)
        published.zero_grad()
        published.step(closure_of(theirs, published, batch))
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-6, rtol=0)


@pytest.mark.parametrize("block", [True, False])
def test_what_wsam_does_beside_the_step_with_a_scaler(block):
    """It is unscaled, and left out where a scaler skips the step."""
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    models = ours, theirs = network(), network()
    one, two = (
        SAM(m.parameters(), SGD, 0.2, gradient_transform=WeightedSharpness(0.7), **MOMENTUM)
        for m in models
    )
    for i, batch in enumerate(batches(12)):
        before = weights_of(ours)
        overflow = float("inf") if i == 5 else 1.0
        scaler.scale(loss_at(ours, batch)).backward()
        if block:
            with one.perturbed(scaler=scaler):
                (overflow * scaler.scale(loss_at(ours, batch))).backward()
        else:
            one.first_step(zero_grad=True, scaler=scaler)
            (overflow * scaler.scale(loss_at(ours, batch))).backward()
        scaler.step(one)
        scaler.update()
        one.zero_grad()
        if i == 5:
            assert_equal(weights_of(ours), before)
        else:
            step_with_closure(theirs, two, batch)
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-11, rtol=0)


def test_looksam_is_that_of_pytorch_optimizer_for_one_tensor():
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(6, 3, bias=False).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    sam = SAM(ours.parameters(), torch.optim.SGD, 0.2, gradient_transform=LookSAM(0.7), **MOMENTUM)
    published = pytorch_optimizer.LookSAM(
        theirs.parameters(), torch.optim.SGD, rho=0.2, k=5, alpha=0.7, **MOMENTUM
    )
    for step, batch in enumerate(batches(20)):
        if step % 5:
            closure_of(ours, sam, batch)()
            sam.skip_perturbation()
            sam.step()
        else:
            step_with_closure(ours, sam, batch)
        closure = closure_of(theirs, published, batch)
        closure()
        published.step(closure)
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-6, rtol=0)


def test_momentum_sam_is_the_authors_algorithm():
    """Algorithm 1 of Becker et al. 2024, which keeps the weights perturbed between updates."""
    ours, theirs = network(), network()
    options = {"lr": 0.1, "momentum": 0.9}
    sam = SAM(ours.parameters(), torch.optim.SGD, 0.3, perturbation=MomentumAscent(), **options)
    velocity = [torch.zeros_like(p) for p in theirs.parameters()]
    moved = [torch.zeros_like(p) for p in theirs.parameters()]
    for batch in batches(20):
        step_with_closure(ours, sam, batch)
        grads = gradient(theirs, batch)
        with torch.no_grad():
            velocity = [0.9 * v + g for v, g in zip(velocity, grads, strict=True)]
            norm = math.sqrt(sum(float(v.square().sum()) for v in velocity))
            for p, v, e in zip(theirs.parameters(), velocity, moved, strict=True):
                p += e - 0.1 * v - 0.3 * v / norm
            moved = [0.3 * v / norm for v in velocity]
    unperturbed = [p + e for p, e in zip(weights_of(theirs), moved, strict=True)]
    assert_close(weights_of(ours), unperturbed, atol=1e-10, rtol=0)


def test_momentum_sam_uses_the_first_moment_of_adam():
    model = network()
    sam = SAM(model.parameters(), torch.optim.Adam, 0.3, perturbation=MomentumAscent(), lr=0.01)
    one, two = batches(2)
    step_with_closure(model, sam, one)
    before = weights_of(model)
    moments = [sam.state[p]["exp_avg"].clone() for p in model.parameters()]
    norm = math.sqrt(sum(float(m.square().sum()) for m in moments))
    with sam.perturbed():
        expected = [w - 0.3 * m / norm for w, m in zip(before, moments, strict=True)]
        assert_close(weights_of(model), expected, atol=1e-12, rtol=0)
        loss_at(model, two).backward()
    assert_equal(weights_of(model), before)


def test_the_only_pass_of_momentum_sam_updates_running_statistics():
    model, (batch, *_) = convnet(), image_batches([8])
    options = {"lr": 0.1, "momentum": 0.9, "perturbation": MomentumAscent()}
    sam = SAM(model.parameters(), torch.optim.SGD, 0.3, **options)
    for updates in (1, 2):
        sam.step(closure_of(model, sam, batch), model)
        assert model.bn1.num_batches_tracked == updates


# ------------------------------------------------------------------------------ what must hold


def test_the_mean_perturbation_of_esam_is_that_of_sam():
    torch.manual_seed(0)
    grads = [torch.randn(3, dtype=torch.float64) for _ in range(4)]
    method = RandomSubsetAscent(beta=0.6)
    draws = []
    for _ in range(4000):
        direction, norm = method(grads, grads, [None] * 4, [{}] * 4)
        draws.append(torch.cat(list(direction)) / norm)
    draws = torch.stack(draws)
    g = torch.cat(grads)
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - g / g.norm()).abs() < 5 * error).all()
    assert len(draws.unique(dim=0)) == 2**4  # each tensor is chosen or not


def test_gsam_leaves_the_part_along_the_perturbed_gradient():
    torch.manual_seed(0)
    first, second = torch.randn(2, 50, dtype=torch.float64)
    result = [second.clone()]
    SurrogateGap(alpha=0.4)([first], result, [{}])
    removed = (second - result[0]) / 0.4
    assert abs(removed @ second) < 1e-10
    assert (first - removed).norm() > 0.1
    cosine = (first - removed) @ second / (first - removed).norm() / second.norm()
    assert abs(cosine) == pytest.approx(1)


def test_fisher_sam_goes_as_far_up_as_its_ellipsoid_allows():
    torch.manual_seed(0)
    g = torch.randn(40, dtype=torch.float64)
    fisher = 1 + 3.0 * g**2
    (direction,), norm = FisherAscent(eta=3.0)([g], [g], [None], [{}])
    e = 0.2 * direction / norm
    assert (e @ (fisher * e)).sqrt() == pytest.approx(0.2)
    others = torch.randn(2000, 40, dtype=torch.float64) + 5 * g / g.norm()
    others = 0.2 * others / (others * fisher * others).sum(1, keepdim=True).sqrt()
    near = 0.99 * e + 0.01 * others  # inside too, since the ellipsoid is convex
    assert (others @ g).max() < e @ g
    assert (near @ g).max() < e @ g


@pytest.mark.parametrize(
    "options",
    [
        {"perturbation": AveragedAscent(theta=1.0)},
        {"perturbation": FisherAscent(eta=0.0)},
        {"gradient_transform": WeightedSharpness(gamma=0.5, decouple=False)},
    ],
)
def test_what_is_sam_at_an_end_of_its_range(options):
    ours, theirs = network(), network()
    one = SAM(ours.parameters(), SGD, 0.2, **MOMENTUM, **options)
    two = SAM(theirs.parameters(), SGD, 0.2, **MOMENTUM)
    for batch in batches(8):
        step_with_closure(ours, one, batch)
        step_with_closure(theirs, two, batch)
    assert_equal(weights_of(ours), weights_of(theirs))


def test_the_layers_that_sam_on_perturbs():
    model = convnet()
    found = normalization_parameters(model)
    expected = {n for n, p in model.named_parameters() if p.ndim == 1 and n != "fc.bias"}
    assert found == expected
    assert any("downsample" in name for name in found)  # not told by the name of the layer
    layers = nn.Sequential(nn.Conv1d(2, 2, 1), nn.GroupNorm(1, 2), nn.LayerNorm([2, 3]))
    assert normalization_parameters(layers) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    for without in (nn.Linear(2, 2), layers.requires_grad_(False)):
        with pytest.raises(ValueError, match=r"^perturbed_layers=normalization: .* no normalis"):
            normalization_parameters(without)


def test_the_other_weights_do_not_count_for_the_norm():
    model = network()
    names = {"2.weight", "2.bias"}
    sam = SAM(model.named_parameters(), torch.optim.SGD, rho=0.3, param_names=names, lr=0.1)
    (batch,) = batches(1)
    loss_at(model, batch).backward()
    before = dict(zip([n for n, _ in model.named_parameters()], weights_of(model), strict=True))
    with sam.perturbed():
        moves = {n: (p - before[n]).norm().item() for n, p in model.named_parameters()}
    assert {n for n, move in moves.items() if move} == names
    assert math.hypot(*moves.values()) == pytest.approx(0.3)


def test_several_steps_of_ascent_go_no_further_than_rho_and_are_taken_back():
    model = network()
    sam = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1)
    (batch,) = batches(1)
    before = weights_of(model)
    sam.zero_grad()
    loss_at(model, batch).backward()
    sam.perturb(zero_grad=True, rho_scale=0.5)
    loss_at(model, batch).backward()
    sam.perturb(zero_grad=True, rho_scale=0.5, further=True)
    assert 0.2 < sam.perturbation_norm() < 0.3
    sam.restore()
    assert_equal(weights_of(model), before)


MEMORIES = {
    "friendly": {"perturbation": FriendlyAscent()},
    "looksam": {"gradient_transform": LookSAM()},
    "vasso": {"perturbation": AveragedAscent(theta=0.4)},
}


@pytest.mark.parametrize("method", MEMORIES)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_a_state_dict_has_what_a_method_remembers(method, base):
    models = network(), network()
    one, two = (SAM(m.parameters(), base, 0.2, lr=0.01, **MEMORIES[method]) for m in models)
    data = list(batches(8))
    for batch in data[:4]:
        step_with_closure(models[0], one, batch)
    models[1].load_state_dict(models[0].state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for step, batch in enumerate(data[4:]):
        for model, sam in zip(models, (one, two), strict=True):
            if step % 2:
                step_with_context(model, sam, batch)
            else:
                closure_of(model, sam, batch)()
                sam.skip_perturbation()
                sam.step()
    assert_equal(weights_of(models[0]), weights_of(models[1]))
    plain = base(models[0].parameters(), lr=0.01)
    two = SAM(models[1].parameters(), base, 0.2, lr=0.01)
    two.load_state_dict(plain.state_dict())  # of a run without a memory
    assert not any(two.method_state.values())
    assert not any(two.state.values())


@pytest.mark.parametrize("method", MEMORIES)
def test_a_file_with_the_memory_beside_the_state_loads_too(method):
    """As it was saved before it became a part of the state."""
    models = network(), network()
    one, two = (SAM(m.parameters(), SGD, 0.2, lr=0.01, **MEMORIES[method]) for m in models)
    first, second = batches(2)
    step_with_closure(models[0], one, first)
    saved = one.state_dict()
    names = [type(one.perturbation).__name__, type(one.gradient_transform).__name__]
    memory = {i: dict(one.method_state[p]) for i, p in enumerate(models[0].parameters())}
    assert all(memory.values())
    two.load_state_dict({**saved, "state": {}, "memory": {"of": names, **memory}})
    models[1].load_state_dict(models[0].state_dict())
    for model, sam in zip(models, (one, two), strict=True):
        step_with_closure(model, sam, second)
        closure_of(model, sam, second)()
        sam.skip_perturbation()
        sam.step()
    assert_equal(weights_of(models[0]), weights_of(models[1]))
    other = SAM(models[1].parameters(), SGD, 0.2, lr=0.01)
    other.load_state_dict({**saved, "state": {}, "memory": {"of": names, **memory}})
    assert not any(other.method_state.values())


def test_a_state_loads_from_before_the_class_of_looksam_was_renamed():
    models = network(), network()
    one, two = (SAM(m.parameters(), SGD, 0.2, lr=0.01, **MEMORIES["looksam"]) for m in models)
    step_with_closure(models[0], one, next(batches(1)))
    saved = one.state_dict()
    kept = [one.method_state[p]["direction"] for p in models[0].parameters()]
    old = {i: {"GradientAscent/Reuse/direction": direction} for i, direction in enumerate(kept)}
    assert set(saved["state"][0]) == {"GradientAscent/LookSAM/direction"}
    beside = {i: {"direction": direction} for i, direction in enumerate(kept)}
    memory = {"of": ["GradientAscent", "Reuse"], **beside}
    for given in ({**saved, "state": old}, {**saved, "state": {}, "memory": memory}):
        two.load_state_dict(given)
        assert_equal([two.method_state[p]["direction"] for p in models[1].parameters()], kept)
        assert set(two.state_dict()["state"][0]) == {"GradientAscent/LookSAM/direction"}


@pytest.mark.parametrize("method", MEMORIES)
def test_a_gradient_that_is_not_finite_is_not_remembered(method):
    model = network()
    sam = SAM(model.parameters(), torch.optim.SGD, 0.2, lr=0.01, **MEMORIES[method])
    data = list(batches(3))
    step_with_closure(model, sam, data[0])
    data[1][0][0] = float("nan")
    sam.zero_grad()
    loss_at(model, data[1]).backward()
    with sam.perturbed():
        loss_at(model, data[1]).backward()
    sam.combine()
    assert all(kept.isfinite().all() for m in sam.method_state.values() for kept in m.values())
    step_with_closure(model, sam, data[2])
    assert all(w.isfinite().all() for w in weights_of(model))


def test_friendly_sam_remembers_the_gradients_at_w_once_an_update():
    model = network()
    sam = SAM(model.parameters(), torch.optim.SGD, 0.2, lr=0.01, perturbation=FriendlyAscent())
    one, two = batches(2)
    step_with_closure(model, sam, one)
    means = [sam.method_state[p]["mean"].clone() for p in model.parameters()]
    sam.zero_grad()
    loss_at(model, two).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    for further in (False, True, True):
        sam.perturb(zero_grad=True, rho_scale=1 / 3, further=further)
        loss_at(model, two).backward()
    sam.step()
    expected = [0.9 * m + 0.1 * g for m, g in zip(means, grads, strict=True)]
    assert_close([sam.method_state[p]["mean"] for p in model.parameters()], expected)


def test_looksam_corrects_what_it_has_a_direction_for():
    first, second = torch.randn(2, 3, 4, dtype=torch.float64)
    memory = [{}, {}, {}]
    LookSAM(0.7)(list(first[:2]), list(second[:2].clone()), memory[:2])
    found = list(second.clone())
    LookSAM(0.7)(None, found, memory)
    assert not torch.equal(found[0], second[0])
    assert torch.equal(found[2], second[2])


def test_looksam_keeps_no_direction_that_is_rounding():
    g = [torch.randn(100)]
    memory = [{}]
    LookSAM(0.7)(g, [g[0].clone()], memory)
    assert memory[0]["direction"].norm() == 0


def test_what_a_step_left_behind_is_not_combined_with_the_next():
    model = network()
    sam = SAM(model.parameters(), torch.optim.SGD, 0.2, lr=0.1, gradient_transform=SurrogateGap())
    one, two = batches(2)
    sam.zero_grad()
    loss_at(model, one).backward()
    with sam.perturbed():
        loss_at(model, one).backward()
    sam.zero_grad()  # and no step
    loss_at(model, two).backward()
    expected = [p - 0.1 * p.grad for p in model.parameters()]
    sam.skip_perturbation()
    sam.step()
    assert_close(weights_of(model), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perturbation": MomentumAscent()}, "momentum=0: must be above 0"),
        (
            {
                "perturbation": MomentumAscent(),
                "momentum": 0.9,
                "gradient_transform": SurrogateGap(),
            },
            "gradient_transform: combines two gradients",
        ),
        ({"param_names": {"0.weight", "nothing"}}, "param_names=nothing: no parameter"),
    ],
)
def test_what_the_optimizer_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        SAM(network().named_parameters(), torch.optim.SGD, lr=0.1, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FriendlyAscent(sigma=-1), "sigma=-1"),
        (lambda: FriendlyAscent(decay=1.0), r"decay=1\.0"),
        (lambda: RandomSubsetAscent(beta=0), "beta=0"),
        (lambda: SurrogateGap(alpha=-1), "alpha=-1"),
        (lambda: AveragedAscent(theta=0), "theta=0"),
        (lambda: FisherAscent(eta=-1), "eta=-1"),
        (lambda: WeightedSharpness(gamma=1.0), r"gamma=1\.0"),
        (lambda: LookSAM(alpha=float("nan")), "alpha=nan"),
    ],
)
def test_values_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()

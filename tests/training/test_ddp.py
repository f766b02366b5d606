"""Two real processes, connected by gloo, against the formulas of one."""

import copy
import json
import time
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from ranks import RANKS, run_ranks
from torch import nn

import reference
import sync_batch_norm
from runs import configuration
from sam_lightning import SAMModule
from sam_lightning.optim.methods.asam import AdaptiveAscent
from sam_lightning.optim.methods.esam import RandomSubsetAscent
from sam_lightning.optim.methods.fisher_sam import FisherAscent
from sam_lightning.optim.methods.friendly_sam import FriendlyAscent
from sam_lightning.optim.methods.gsam import SurrogateGap
from sam_lightning.optim.methods.linf import SignAscent
from sam_lightning.optim.methods.looksam import LookSAM
from sam_lightning.optim.methods.msam import MomentumAscent
from sam_lightning.optim.methods.vasso import AveragedAscent
from sam_lightning.optim.methods.wsam import WeightedSharpness
from sam_lightning.training.build import make_trainer
from sam_lightning.training.callbacks import last_checkpoint
from sam_lightning.training.losses import CrossEntropy

STEPS, SHARD = 6, 8

CASES = {
    "local": {},
    "asam": {"perturbation": AdaptiveAscent(eta=0.01)},
    "clipped": {"gradient_clip_val": 0.1},
    "accumulated": {"accumulate_grad_batches": 2},
    "synced": {"sync_perturbation": True},
    "synced, accumulated": {"sync_perturbation": True, "accumulate_grad_batches": 2},
    "micro": {"accumulate_grad_batches": 2, "ascent_per_micro_batch": True},
    "sgd": {"rho": 0.0},
    "skipped": {},
    "gsam": {"gradient_transform": SurrogateGap(0.4)},
    "gsam, clipped": {"gradient_transform": SurrogateGap(0.4), "gradient_clip_val": 0.1},
    "gsam, synced": {"gradient_transform": SurrogateGap(0.4), "sync_perturbation": True},
    "looksam": {"gradient_transform": LookSAM(0.7), "every": 2},
    "friendly": {"perturbation": FriendlyAscent()},
    "esam": {"perturbation": RandomSubsetAscent(beta=0.6), "descent_fraction": 0.5},
    "esam, synced": {"perturbation": RandomSubsetAscent(beta=0.6), "sync_perturbation": True},
    "gsam, accumulated": {"gradient_transform": SurrogateGap(0.4), "accumulate_grad_batches": 2},
    "looksam, synced": {
        "gradient_transform": LookSAM(0.7),
        "every": 2,
        "sync_perturbation": True,
        "gradient_clip_val": 0.1,
    },
    "weighted, synced": {
        "loss": CrossEntropy(0.1, [1, 2, 5, 0.5], [4, 3, 2, 1]),
        "sync_perturbation": True,
        "accumulate_grad_batches": 2,
    },
    "linf": {"perturbation": SignAscent(), "rho": 0.002},
    "three steps": {"ascent_steps": 3, "sync_perturbation": True},
    "msam": {"perturbation": MomentumAscent()},
    "vasso": {"perturbation": AveragedAscent(theta=0.4)},
    "fisher": {"perturbation": FisherAscent(eta=10.0)},
    "wsam": {"gradient_transform": WeightedSharpness(gamma=0.7)},
    "wsam, clipped": {"gradient_transform": WeightedSharpness(0.7), "gradient_clip_val": 0.1},
    "wsam, synced": {"gradient_transform": WeightedSharpness(0.7), "sync_perturbation": True},
    "wsam in one": {"gradient_transform": WeightedSharpness(gamma=0.7, decouple=False)},
    "decay": {"decay_in_ascent": "both", "gradient_clip_val": 0.1},
    "decay, micro": {
        "decay_in_ascent": "both",
        "accumulate_grad_batches": 2,
        "ascent_per_micro_batch": True,
    },
    "decay, synced": {"decay_in_ascent": "both", "sync_perturbation": True},
}
SYNC_BATCH_NORM = {
    "batch norm, local": {},
    "batch norm, synced": {"sync_perturbation": True},
    "batch norm, uneven": {"sync_perturbation": True},
    "batch norm, without weights": {},
}
KEPT = {"gradient_transform", "sync_perturbation", "decay_in_ascent"}  # need two gradients at once
REMEMBERS = {"perturbation": FriendlyAscent(), "gradient_transform": LookSAM(0.7), "every": 2}


def data_of(case):
    """Batches of all ranks together; each takes its part of every batch."""
    data = reference.batches([RANKS * SHARD] * STEPS)
    if case == "skipped":
        data[2][0][0, 0, 0, 0] = float("nan")  # on rank 0 alone
    return data


def shard(batch, rank, case=None):
    sizes = [5, 11] if case == "batch norm, uneven" else [SHARD] * RANKS
    return tuple(part.split(sizes)[rank] for part in batch)


def model():
    return reference.mlp(torch.float64)


def model_with_batch_norm(case):
    torch.manual_seed(0)
    weights = {"affine": case != "batch norm, without weights"}
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **weights), nn.ReLU(), nn.Flatten()]
    layers += [nn.Linear(4 * 6 * 6, 6), nn.BatchNorm1d(6, **weights), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(6, reference.CLASSES)).double()


class Weights(L.Callback):
    """Keeps weights and running statistics after each step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(reference.state(pl_module.model))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [p.grad for p in pl_module.model.parameters()]
        self.memories = len({grad.untyped_storage().data_ptr() for grad in grads})


class Watch(Weights):
    """Counts averages of gradients over the ranks too, and notes which layers are trained."""

    def __init__(self):
        super().__init__()
        self.buckets = 0

    def on_train_start(self, trainer, pl_module):
        self.layers = [type(layer).__name__ for layer in pl_module.model]

        def average(_, bucket):
            self.buckets += 1
            work = dist.all_reduce(bucket.buffer().div_(RANKS), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        trainer.model.register_comm_hook(None, average)


def program(folder):
    rank = dist.get_rank()
    results = {}
    for case, options in CASES.items():
        watch = Watch()
        module = SAMModule(model(), reference.CLASSES, reference.sgd, **{"rho": 0.2, **options})
        views = views_of(folder, f"method={'gsam' if KEPT & {*options} else 'sam'}")
        strategy = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=views)
        runner = reference.trainer(
            devices=RANKS, strategy=strategy, callbacks=[watch], use_distributed_sampler=False
        )
        runner.fit(module, reference.loader([shard(batch, rank) for batch in data_of(case)]))
        results[case] = {
            "weights": watch.weights,
            "buckets": watch.buckets,
            "memories": watch.memories,
            "skipped": module.train_metrics.skipped,
            "updates": runner.global_step,
        }
    cfg = configuration("trainer=ddp_cpu", "trainer.sync_batchnorm=true", "epochs=1")
    cfg.update(callbacks=None, logger=None, output_dir=str(folder))
    for case, options in SYNC_BATCH_NORM.items():
        watch = Watch()
        net = model_with_batch_norm(case)
        module = SAMModule(net, reference.CLASSES, reference.sgd, rho=0.2, **options)
        runner = make_trainer(cfg, RANKS, watch)
        batches = [shard(batch, rank, case) for batch in data_of(case)]
        with sync_batch_norm.on_cpu():
            runner.fit(module, reference.loader(batches))
        results[case] = {"weights": watch.weights, "layers": watch.layers}
    module, _ = epochs(2, rank)
    results["unbroken"] = {"weights": reference.state(module.model), "memory": memory_of(module)}
    _, runner = epochs(1, rank)
    runner.save_checkpoint(folder / "half.ckpt")
    module, _ = epochs(2, rank, folder / "half.ckpt")
    results["resumed"] = {"weights": reference.state(module.model), "memory": memory_of(module)}
    torch.save(results, folder / f"{rank}.pt")


def count_messages(folder):
    if dist.get_rank() == 0:  # less than a step a second
        last_checkpoint.time = SimpleNamespace(monotonic=lambda: 1000 * time.monotonic())
    found = {
        name: [messages(folder / name, steps, options) for steps in (10, 50)]
        for name, options in (("local", {}), ("synced", {"sync_perturbation": True}))
    }
    if dist.get_rank() == 0:
        (folder / "messages.json").write_text(json.dumps(found))


def messages(folder, steps, options):
    """How many messages a training of so many steps sends, of each kind."""
    cfg = configuration("trainer=ddp_cpu", "epochs=1", "trainer.log_every_n_steps=1000000")
    cfg.update(callbacks={"last": cfg.callbacks.last}, logger=None, output_dir=str(folder))
    net = model_with_batch_norm("")
    module = SAMModule(net, reference.CLASSES, reference.sgd, rho=0.2, **options)
    batches = [shard(batch, dist.get_rank()) for batch in reference.batches([16] * steps)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        make_trainer(cfg, RANKS, Watch()).fit(module, reference.loader(batches))
    found = profile.key_averages()
    return {event.key: event.count for event in found if event.key.startswith("c10d::")}


def epochs(count, rank, ckpt_path=None):
    """Train with a method that remembers what this device found."""
    module = SAMModule(model(), reference.CLASSES, reference.sgd, rho=0.2, **REMEMBERS)
    strategy = DDPStrategy(broadcast_buffers=False)
    runner = reference.trainer(
        devices=RANKS, strategy=strategy, use_distributed_sampler=False, max_epochs=count
    )
    data = reference.loader([shard(batch, rank) for batch in data_of("resumed")])
    runner.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module, runner


def memory_of(module):
    return [dict(kept) for kept in module.sam.method_state.values()]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    run_ranks(program, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("case", [*CASES, *SYNC_BATCH_NORM])
def test_all_ranks_hold_the_same_weights_after_every_step(ranks, case):
    one, two = (rank[case]["weights"] for rank in ranks)
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two, strict=True):
        reference.assert_equal(a, b)
    last = next(reversed(one[0]))
    assert not torch.equal(one[0][last], one[-1][last])


@pytest.mark.long
def test_a_step_sends_its_averages_of_gradients_and_nothing_else(tmp_path):
    run_ranks(count_messages, tmp_path)
    found = json.loads((tmp_path / "messages.json").read_text())
    for case, averages in (("local", 1), ("synced", 2)):
        ten, fifty = found[case]
        more = {kind: count - ten.get(kind, 0) for kind, count in fifty.items()}
        agreements = more.pop("c10d::allreduce_") - 40 * averages  # whether to stop: one a second
        assert 0 <= agreements <= 15
        assert not any(more.values())


@pytest.mark.parametrize(
    ("case", "averages"),
    [
        ("sgd", STEPS),
        ("local", STEPS),
        ("synced", 2 * STEPS),
        ("accumulated", STEPS // 2),
        ("synced, accumulated", STEPS),
        ("micro", STEPS // 2),
    ],
)
def test_the_gradient_is_averaged_once_per_update_and_again_only_if_synced(ranks, case, averages):
    assert [rank[case]["buckets"] for rank in ranks] == [averages] * RANKS
    accumulate = CASES[case].get("accumulate_grad_batches", 1)
    assert ranks[0][case]["updates"] == STEPS // accumulate


def mean(dicts):
    return {name: sum(d[name] for d in dicts) / len(dicts) for name in dicts[0]}


def m_sharpness(case, groups_of):
    """Every group of samples perturbs by itself; the step uses the mean of their gradients."""
    net = model()
    optimizer = reference.sgd(net.parameters())
    adaptive, clip = case == "asam", CASES[case].get("gradient_clip_val")
    for groups in groups_of:
        second = []
        for group in groups:
            first, _ = reference.mean_gradient(net, group)
            second.append(reference.perturbed_gradient(net, group, first, 0.2, adaptive)[0])
        grads = mean(second)
        for name, p in net.named_parameters():
            p.grad = grads[name]
        if clip is not None:
            assert nn.utils.clip_grad_norm_(net.parameters(), clip) > clip
        optimizer.step()
    return reference.state(net)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_in_the_memory_of_the_messages_unless_two_are_kept(ranks, case):
    memories = 4 if KEPT & {*CASES[case]} else 1
    assert [rank[case]["memories"] for rank in ranks] == [memories] * RANKS


def test_the_configuration_says_which(tmp_path):
    for method, views in (
        ("sam", True),
        ("friendly_sam", True),
        ("gsam", False),
        ("looksam", False),
    ):
        assert views_of(tmp_path, f"method={method}") == views
    assert not views_of(tmp_path, "method.sync_perturbation=true")


def views_of(folder, override):
    cfg = configuration("trainer=ddp_cpu", override)
    cfg.update(callbacks=None, logger=None, output_dir=str(folder))
    strategy = make_trainer(cfg, RANKS, L.Callback()).strategy
    return strategy._ddp_kwargs["gradient_as_bucket_view"]


@pytest.mark.parametrize("case", ["local", "asam", "clipped", "accumulated", "micro"])
def test_without_sync_each_rank_perturbs_by_itself(ranks, case):
    parts = [[shard(batch, rank) for rank in range(RANKS)] for batch in data_of(case)]
    if case == "accumulated":
        pairs = zip(parts[::2], parts[1::2], strict=True)
        groups_of = [[[a[r], b[r]] for r in range(RANKS)] for a, b in pairs]
    elif case == "micro":
        pairs = zip(parts[::2], parts[1::2], strict=True)
        groups_of = [[[part] for part in (*a, *b)] for a, b in pairs]
    else:
        groups_of = [[[part] for part in batch] for batch in parts]
    expected = m_sharpness(case, groups_of)
    reference.assert_close(ranks[0][case]["weights"][-1], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "case",
    [
        *("synced", "synced, accumulated", "sgd", "msam", "three steps"),
        *("gsam, synced", "looksam, synced", "esam, synced", "weighted, synced", "decay, synced"),
        "wsam, synced",
    ],
)
def test_synced_devices_do_what_one_does_with_the_whole_batch(ranks, case):
    options = {k: v for k, v in CASES[case].items() if k != "sync_perturbation"}
    net = model()
    reference.fit(net, data_of(case), **{"rho": 0.2, **options})
    reference.assert_close(ranks[0][case]["weights"][-1], reference.state(net), atol=1e-10, rtol=0)


def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all(ranks):
    for rank in ranks:
        weights = rank["skipped"]["weights"]
        reference.assert_equal(weights[1], weights[2])
        assert not torch.equal(weights[2]["1.weight"], weights[3]["1.weight"])
        assert rank["skipped"]["skipped"].tolist() == [1, 0, 1]


def test_what_each_device_remembers_is_taken_up_again(ranks):
    for rank in ranks:
        reference.assert_equal(rank["resumed"]["weights"], rank["unbroken"]["weights"])
        for one, two in zip(rank["resumed"]["memory"], rank["unbroken"]["memory"], strict=True):
            assert {*one} == {"mean", "direction"}
            reference.assert_equal(one, two)
    one, two = (rank["unbroken"]["memory"][0]["mean"] for rank in ranks)
    assert not torch.equal(one, two)


def flat(grads):
    return torch.cat([g.flatten() for g in grads.values()])


@pytest.mark.parametrize("case", ["decay", "decay, micro"])
def test_decay_in_both_passes_is_that_of_each_device_averaged(ranks, case):
    net, decay = model(), reference.SGD["weight_decay"]
    optimizer = reference.sgd(net.parameters(), weight_decay=0.0)
    data = data_of(case)
    size = CASES[case].get("accumulate_grad_batches", 1)
    for start in range(0, STEPS, size):
        found = []
        for batch in data[start : start + size]:
            for part in (shard(batch, rank) for rank in range(RANKS)):
                w = {name: p.detach().clone() for name, p in net.named_parameters()}
                first, _ = reference.mean_gradient(net, [part])
                first = {name: g + decay * w[name] for name, g in first.items()}
                second, _ = reference.perturbed_gradient(net, [part], first, 0.2, adaptive=False)
                step_size = 0.2 / flat(first).norm()
                moved = {name: w[name] + step_size * g for name, g in first.items()}
                found.append({name: g + decay * moved[name] for name, g in second.items()})
        grads = mean(found)
        for name, p in net.named_parameters():
            p.grad = grads[name]
        if "gradient_clip_val" in CASES[case]:
            nn.utils.clip_grad_norm_(net.parameters(), CASES[case]["gradient_clip_val"])
        optimizer.step()
    reference.assert_close(ranks[0][case]["weights"][-1], reference.state(net), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "case",
    [
        *("gsam", "gsam, clipped", "gsam, accumulated", "looksam"),
        *("wsam", "wsam, clipped", "wsam in one"),
    ],
)
def test_gradients_are_combined_on_each_device_and_then_averaged(ranks, case):
    net = model()
    optimizer = reference.sgd(net.parameters())
    sizes = [p.numel() for p in net.parameters()]
    directions = [None] * RANKS
    data = data_of(case)
    size = CASES[case].get("accumulate_grad_batches", 1)
    for step, start in enumerate(range(0, STEPS, size)):
        combined, beside = [], []
        for rank in range(RANKS):
            group = [shard(batch, rank) for batch in data[start : start + size]]
            first, _ = reference.mean_gradient(net, group)
            g = flat(first)
            if case == "looksam" and step % 2:
                v = directions[rank]
                combined.append(g + 0.7 * g.norm() * v / v.norm())
                continue
            there = flat(reference.perturbed_gradient(net, group, first, 0.2, adaptive=False)[0])
            if case == "looksam":
                directions[rank] = there - (there @ g) / (g @ g) * g
                combined.append(there)
            elif case.startswith("wsam,") or case == "wsam":
                combined.append(g)
                beside.append(0.7 / 0.3 * (there - g))
            elif case == "wsam in one":
                combined.append((0.7 * there - 0.4 * g) / 0.3)
            else:
                combined.append(there - 0.4 * (g - (g @ there) / (there @ there) * there))
        grads = sum(combined) / RANKS
        for p, part in zip(net.parameters(), grads.split(sizes), strict=True):
            p.grad = part.view_as(p).clone()
        factor = reference.SGD["lr"]
        if "gradient_clip_val" in CASES[case]:
            clip = CASES[case]["gradient_clip_val"]
            factor *= clip / nn.utils.clip_grad_norm_(net.parameters(), clip).item()
        optimizer.step()
        if beside:
            with torch.no_grad():
                moves = factor * sum(beside) / RANKS
                for p, part in zip(net.parameters(), moves.split(sizes), strict=True):
                    p -= part.view_as(p)
    tolerance = 1e-6 if case == "wsam, clipped" else 1e-10  # torch adds 1e-6 to the norm
    expected = reference.state(net)
    reference.assert_close(ranks[0][case]["weights"][-1], expected, atol=tolerance, rtol=0)


# ------------------------------------------------------------------------- trainer.sync_batchnorm


def test_the_configuration_makes_batch_norm_synchronous(ranks):
    for case in SYNC_BATCH_NORM:
        layers = ["Conv2d", "SyncBatchNorm", "ReLU", "Flatten"]
        layers += ["Linear", "SyncBatchNorm", "ReLU", "Linear"]
        assert [rank[case]["layers"] for rank in ranks] == [layers] * RANKS


def test_synced_devices_with_synchronous_batch_norm_do_what_one_does_with_the_whole_batch(ranks):
    case, kept = "batch norm, synced", Weights()
    reference.fit(model_with_batch_norm(case), data_of(case), {"callbacks": [kept]}, rho=0.2)
    for found, expected in zip(ranks[0][case]["weights"], kept.weights, strict=True):
        assert "1.running_var" in expected
        reference.assert_close(found, expected, atol=1e-10, rtol=0)


def gradients(net, copies, shards):
    """Of each copy of a network, the gradient of the mean of all losses, each of its own shard.

    BatchNorm normalises by all shards together, which ``net`` takes up in its running statistics.
    """
    outputs = [images for images, _ in shards]
    for layer, *layers in zip(net, *copies, strict=True):
        if hasattr(layer, "running_mean"):
            running = (layer.running_mean, layer.running_var)
            whole = nn.functional.batch_norm(torch.cat(outputs), *running, training=True)
            layer.num_batches_tracked += 1
            outputs = list(whole.split([len(x) for x in outputs]))
            shape = (1, -1, *[1] * (whole.ndim - 2))
            if layer.affine:
                outputs = [
                    x * own.weight.view(shape) + own.bias.view(shape)
                    for x, own in zip(outputs, layers, strict=True)
                ]
        else:
            outputs = [own(x) for x, own in zip(outputs, layers, strict=True)]
    losses = [nn.functional.cross_entropy(x, y) for x, (_, y) in zip(outputs, shards, strict=True)]
    weights = [list(own.parameters()) for own in copies]
    found = iter(torch.autograd.grad(sum(losses) / RANKS, [p for own in weights for p in own]))
    return [[next(found) for _ in own] for own in weights]


def with_shared_statistics(case):
    """Weights and running statistics after each step: SAM, each device by ``gradients``."""
    net = model_with_batch_norm(case)
    optimizer = reference.sgd(net.parameters())
    for batch in data_of(case):
        shards = [shard(batch, rank, case) for rank in range(RANKS)]
        copies = [copy.deepcopy(net) for _ in shards]
        first = gradients(net, copies, shards)
        if "sync_perturbation" in SYNC_BATCH_NORM[case]:
            first = [[sum(parts) for parts in zip(*first, strict=True)]] * RANKS
        with torch.no_grad():
            for own, grads in zip(copies, first, strict=True):
                norm = torch.cat([g.flatten() for g in grads]).norm()
                for p, g in zip(own.parameters(), grads, strict=True):
                    p += 0.2 * g / (norm + 1e-12)
        second = gradients(copy.deepcopy(net), copies, shards)  # statistics are not taken up
        for p, *parts in zip(net.parameters(), *second, strict=True):
            p.grad = sum(parts)
        optimizer.step()
        yield reference.state(net)


@pytest.mark.parametrize(
    "case", ["batch norm, synced", "batch norm, uneven", "batch norm, without weights"]
)
def test_ranks_with_synchronous_batch_norm_perturb_along_the_loss_of_all(ranks, case):
    found = ranks[0][case]["weights"]
    for one, expected in zip(found, with_shared_statistics(case), strict=True):
        reference.assert_close(one, expected, atol=1e-10, rtol=0)


def test_synchronous_batch_norm_takes_a_devices_own_weights_for_those_of_all(ranks):
    """PyTorch's backward pass does, where they differ by their perturbations: it is not exact."""
    start = reference.state(model_with_batch_norm("batch norm, local"))
    found = ranks[0]["batch norm, local"]["weights"][0]
    expected = next(with_shared_statistics("batch norm, local"))
    behind = [name for name in start if name.startswith(("5.", "7."))]
    reference.assert_close(
        *({n: of[n] for n in behind} for of in (found, expected)), atol=1e-10, rtol=0
    )
    moved = (expected["0.weight"] - start["0.weight"]).norm()
    assert 1e-4 < (found["0.weight"] - expected["0.weight"]).norm() / moved < 0.02

"""SAM under DistributedDataParallel and FSDP2, two processes on gloo, against one plain loop."""

import traceback
from contextlib import nullcontext

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy as FabricDDP
from lightning.pytorch.strategies import DDPStrategy
from ranks import RANKS, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from loops_reference import (
    COMBINES,
    DECAYS,
    METHODS,
    PlainLoop,
    assert_close,
    batches,
    loss_at,
    network,
    perturbs_at,
    sam_of,
    state_of,
)
from reference import loader, trainer
from sam_lightning import SAM

pytestmark = pytest.mark.slow

TWO_FORMS = ["perturbed", "in two"]
COMBINES = [*COMBINES, *DECAYS]
ALL = [*METHODS, *DECAYS]
DDP = [
    (method, form, own, views)
    for method in ALL
    for form in TWO_FORMS
    for own in (False, True)
    for views in (False, True)
]
REFUSED = [
    (method, what)
    for method in COMBINES
    for what in ("first", "second", "no model", "inside, first", "inside, second", "inside")
]
CUT = [(method, views, to_none) for method in ALL for views in (0, 1) for to_none in (0, 1)]
FABRIC = [(method, silent) for method in COMBINES for silent in ("", "first", "second")]
LIGHTNING = [
    (method, how)
    for method in COMBINES
    for how in ("automatic", "manual", "first", "second", "inside")
]
FSDP = [(method, form, partly) for method in ALL for form in TWO_FORMS for partly in (False, True)]


def data_of(rank):
    return batches(seed=10 + rank)


def expected(method, own=False):
    """Each device perturbs along its own gradient, or all along the mean."""
    loop = PlainLoop(method, network(batch_norm=False), own)
    for i, devices in enumerate(zip(*map(data_of, range(RANKS)), strict=True)):
        loop.update(*devices, perturb=perturbs_at(method, i))
    return state_of(loop.model)


# ---------------------------------------------------------------------- in the two processes


def nothing():
    pass


def step(
    model, optimizer, batch, perturb, form, /, silent=(), finish=nothing, late=nothing, **options
):
    """One of the two forms; passes in ``silent`` average no gradients."""
    quiet = {n: model.no_sync() if n in silent else nullcontext() for n in ("first", "second")}
    with quiet["first"]:
        loss_at(model, batch).backward()
    finish()
    if not perturb:
        optimizer.skip_perturbation()
        late()
        optimizer.step()
    elif form == "perturbed":
        with optimizer.perturbed(**options), quiet["second"]:
            loss_at(model, batch).backward()
            finish()
        late()
        optimizer.step()
    else:
        optimizer.first_step(zero_grad=True, **options)
        with quiet["second"]:
            loss_at(model, batch).backward()
        finish()
        late()
        optimizer.second_step()
    optimizer.zero_grad()


def average(params):
    for p in params:
        dist.all_reduce(p.grad)
        p.grad /= RANKS


def ddp(rank, method, form, own, views):
    model = network(batch_norm=False)
    model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=views)
    optimizer = sam_of(model.module, method)
    own_ones = own and method in COMBINES

    def late():  # what was combined on each device
        optimizer.combine()
        if own_ones:
            average(model.parameters())

    same = True
    for i, batch in enumerate(data_of(rank)):
        perturb = perturbs_at(method, i)
        if own_ones:
            options = {"silent": ["first", "second"], "local": True}
        else:
            options = {"silent": ["first"] if own else [], "model": model}
        step(model, optimizer, batch, perturb, form, late=late, **options)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        others = [torch.empty_like(weights) for _ in range(RANKS)]
        dist.all_gather(others, weights)
        same = same and torch.equal(*others)
    assert same, "the ranks have different weights"
    return state_of(model.module)


def cut(rank, method, views, to_none):
    """Of four updates one is whole, two are left out in the middle and one is skipped."""
    model = network(batch_norm=False)
    model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=bool(views))
    optimizer = sam_of(model.module, method)
    for i, batch in enumerate(data_of(rank)):
        loss_at(model, batch).backward()
        if i % 4 != 1:
            if perturbs_at(method, i):
                with optimizer.perturbed(model):
                    loss_at(model, batch).backward()
            else:
                optimizer.skip_perturbation()
            if i % 4 == 3:
                optimizer.found_inf = torch.ones(())
            if i % 4 != 2:
                optimizer.step()
        optimizer.zero_grad(set_to_none=bool(to_none))
    return state_of(model.module)


def refused(rank, method, what):
    model = nn.parallel.DistributedDataParallel(network(batch_norm=False))
    optimizer = sam_of(model.module, method)
    before, batch = state_of(model.module), data_of(rank)[0]
    messages = []
    silent = [n for n in ("first", "second") if n in what]
    known = {"model": model.module if "inside" in what else model}
    for form in TWO_FORMS:
        options = {} if what == "no model" else known
        try:
            step(model, optimizer, batch, True, form, silent, **options)
        except RuntimeError as error:
            messages.append(str(error))
        optimizer.restore()
        optimizer.zero_grad()
    assert_close(before, state_of(model.module), 0)
    return messages


def fsdp(rank, method, form, partly):
    model = network(batch_norm=False)
    mesh = init_device_mesh("cpu", (RANKS,))
    for i, layer in enumerate(model):
        if list(layer.parameters()) and (not partly or i == 0):
            fully_shard(layer, mesh=mesh)
    if not partly:
        fully_shard(model, mesh=mesh)
    plain = [p for p in model.parameters() if type(p) is nn.Parameter]
    assert bool(plain) == partly

    def finish():  # what nobody shards is averaged by hand
        average(plain)

    optimizer = sam_of(model, method)
    for i, batch in enumerate(data_of(rank)):
        perturb = perturbs_at(method, i)
        step(model, optimizer, batch, perturb, form, finish=finish, model=model)
    whole = state_of(model).items()
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in whole}


def fsdp1(rank, original):
    model = network(batch_norm=False)
    model = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
    try:
        sam_of(model, "sam")
    except ValueError as error:
        return str(error)
    return "not refused"


def zero(rank, around):
    params, sgd = network().parameters(), torch.optim.SGD
    try:
        if around:
            ZeroRedundancyOptimizer(params, SAM, base_optimizer=sgd, rho=0.1, lr=0.1)
        else:
            SAM(params, ZeroRedundancyOptimizer, rho=0.1, optimizer_class=sgd, lr=0.1)
    except ValueError as error:
        return str(error)
    return "not refused"


def fabric(rank, method, silent):
    """In Fabric's DDP, whose wrapper is around torch's."""
    strategy = FabricDDP(cluster_environment=TorchElasticEnvironment())
    fabric = L.Fabric(accelerator="cpu", devices=RANKS, strategy=strategy)
    fabric.launch()
    model = network(batch_norm=False)
    wrapped, optimizer = fabric.setup(model, sam_of(model, method))

    def backward(batch, name):
        with fabric.no_backward_sync(wrapped, enabled=silent == name):
            fabric.backward(loss_at(wrapped, batch))

    for i, batch in enumerate(data_of(rank)):
        backward(batch, "first")
        if perturbs_at(method, i):
            try:
                with optimizer.perturbed(wrapped):
                    backward(batch, "second")
            except RuntimeError as error:
                return {"refused": str(error)}
        else:
            optimizer.skip_perturbation()
        optimizer.step()
        optimizer.zero_grad()
    return state_of(model)


class Module(L.LightningModule):
    def __init__(self, method, how):
        super().__init__()
        self.model, self.method, self.how = network(batch_norm=False), method, how
        self.automatic_optimization = how == "automatic"

    def configure_optimizers(self):
        return sam_of(self.model, self.method)

    def on_train_batch_start(self, batch, i):
        if not perturbs_at(self.method, i):
            self.optimizers().skip_perturbation()

    def training_step(self, batch, i):
        if self.automatic_optimization:
            return loss_at(self.model, batch)

        def backward(name):
            quiet = self.trainer.strategy.block_backward_sync
            with quiet() if self.how == name else nullcontext():
                self.manual_backward(loss_at(self.model, batch))

        optimizer = self.optimizers()
        backward("first")
        if perturbs_at(self.method, i):
            with optimizer.perturbed(self.model if self.how == "inside" else self):
                backward("second")
        optimizer.step()
        optimizer.zero_grad()


def lightning(rank, method, how):
    module = Module(method, how)
    strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment())
    runner = trainer(devices=RANKS, strategy=strategy, use_distributed_sampler=False)
    try:
        runner.fit(module, loader(data_of(rank)))
    except RuntimeError as error:
        return {"refused": str(error)}
    return state_of(module.model)


def program(folder, kind, cases):
    """Run every case and keep what each returns, or its error."""
    rank, results = dist.get_rank(), {}
    for case in cases:
        try:
            results[case] = globals()[kind](rank, *case)
        except Exception:
            results[case] = traceback.format_exc()
        dist.barrier()
    torch.save(results, folder / f"{rank}.pt")


def run(folder, kind, cases):
    run_ranks(program, folder, kind, cases)
    results = [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(RANKS)]
    return {case: [found[case] for found in results] for case in cases}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both ranks found in all cases of a kind; they are started once."""
    known = {}

    def get(kind, cases):
        if kind not in known:
            known[kind] = run(tmp_path_factory.mktemp(kind), kind, cases)
        return known[kind]

    return get


def check(found, weights):
    for result in found:
        assert not isinstance(result, str), result
        assert_close(result, weights)


# --------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize(("method", "form", "own", "views"), DDP)
def test_ddp(results, method, form, own, views):
    check(results("ddp", DDP)[method, form, own, views], expected(method, own))


@pytest.mark.parametrize(("method", "views", "to_none"), CUT)
def test_ddp_with_updates_that_are_left_out_or_skipped(results, method, views, to_none):
    loop = PlainLoop(method, network(batch_norm=False))
    for i, devices in enumerate(zip(*map(data_of, range(RANKS)), strict=True)):
        if i % 4 == 0:
            loop.update(*devices, perturb=perturbs_at(method, i))
        elif i % 4 != 1:  # what is remembered stays
            loop.direction(0, devices, perturbs_at(method, i), (False, False))
    check(results("cut", CUT)[method, views, to_none], state_of(loop.model))


@pytest.mark.parametrize(("method", "what"), REFUSED)
def test_ddp_refuses_to_combine_gradients_of_one_device(results, method, what):
    reason = "no_sync" if what in ("first", "second") else "pass the model that Distributed"
    for messages in results("refused", REFUSED)[method, what]:
        assert isinstance(messages, list), messages
        assert len(messages) == 2
        assert all(reason in message for message in messages)


@pytest.mark.parametrize(("method", "silent"), FABRIC)
def test_fabric(results, method, silent):
    found = results("fabric", FABRIC)[method, silent]
    if silent:
        assert all("outside of no_sync" in result["refused"] for result in found)
    else:
        check(found, expected(method))


@pytest.mark.parametrize(("method", "how"), LIGHTNING)
def test_lightning(results, method, how):
    found = results("lightning", LIGHTNING)[method, how]
    if how in ("automatic", "manual"):
        check(found, expected(method))
    else:
        reason = "LightningModule" if how == "inside" else "outside of no_sync"
        assert all(reason in result["refused"] for result in found)


@pytest.mark.long
@pytest.mark.parametrize(("method", "form", "partly"), FSDP)
def test_fsdp2(results, method, form, partly):
    check(results("fsdp", FSDP)[method, form, partly], expected(method))


@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_is_refused(results, original):
    for message in results("fsdp1", [(False,), (True,)])[(original,)]:
        assert message.startswith("FullyShardedDataParallel: not supported")


@pytest.mark.parametrize("around", [False, True])
def test_zero_redundancy_is_refused(results, around):
    name = "ZeroRedundancyOptimizer around SAM" if around else "base_optimizer=ZeroRedundancy"
    for message in results("zero", [(False,), (True,)])[(around,)]:
        assert message.startswith(name)
        assert message.endswith("use torch.distributed.fsdp.fully_shard")

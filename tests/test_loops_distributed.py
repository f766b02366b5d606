"""SAM under DistributedDataParallel and FSDP2, two processes on gloo, against one plain loop."""

import traceback
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from inject import SERVER
from loops_reference import (
    COMBINES,
    METHODS,
    PlainLoop,
    assert_close,
    batches,
    climbs_at,
    loss_at,
    network,
    sam_of,
    state_of,
)

pytestmark = pytest.mark.slow

RANKS = 2
TWO_FORMS = ["perturbed", "in two"]
DDP = [
    (method, form, own, views)
    for method in METHODS
    for form in TWO_FORMS
    for own in ([False] if method in COMBINES else [False, True])
    for views in (False, True)
]
REFUSED = [(method, what) for method in COMBINES for what in ("first", "second", "no model")]
FSDP = [
    (method, form, partly) for method in METHODS for form in TWO_FORMS for partly in (False, True)
]


def data_of(rank):
    return batches(seed=10 + rank)


def expected(method, own=False):
    """Each device climbs along its own gradient, or all along the mean."""
    loop = PlainLoop(method, network(batch_norm=False), own)
    for i, devices in enumerate(zip(*map(data_of, range(RANKS)), strict=True)):
        loop.update(*devices, climb=climbs_at(method, i))
    return state_of(loop.model)


# ---------------------------------------------------------------------- in the two processes


def step(model, optimizer, batch, climb, form, silent=(), finish=lambda: None, told=True):
    """One of the two forms; passes in ``silent`` average no gradients."""
    quiet = {n: model.no_sync() if n in silent else nullcontext() for n in ("first", "second")}
    known = model if told else None
    with quiet["first"]:
        loss_at(model, batch).backward()
    finish()
    if not climb:
        optimizer.skip_perturbation()
        optimizer.step()
    elif form == "perturbed":
        with optimizer.perturbed(known), quiet["second"]:
            loss_at(model, batch).backward()
            finish()
        optimizer.step()
    else:
        optimizer.first_step(zero_grad=True, model=known)
        with quiet["second"]:
            loss_at(model, batch).backward()
        finish()
        optimizer.second_step()
    optimizer.zero_grad()


def ddp(rank, method, form, own, views):
    model = network(batch_norm=False)
    model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=views)
    optimizer = sam_of(model.module, method)
    same = True
    for i, batch in enumerate(data_of(rank)):
        climb = climbs_at(method, i)
        step(model, optimizer, batch, climb, form, ["first"] if own and climb else [])
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        others = [torch.empty_like(weights) for _ in range(RANKS)]
        dist.all_gather(others, weights)
        same = same and torch.equal(*others)
    assert same, "the ranks have different weights"
    return state_of(model.module)


def refused(rank, method, what):
    model = nn.parallel.DistributedDataParallel(network(batch_norm=False))
    optimizer = sam_of(model.module, method)
    before = state_of(model.module)
    messages = []
    for form in TWO_FORMS:
        silent = [what] if what in ("first", "second") else []
        try:
            step(model, optimizer, data_of(rank)[0], True, form, silent, told=what != "no model")
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
        for p in plain:
            dist.all_reduce(p.grad)
            p.grad /= RANKS

    optimizer = sam_of(model, method)
    for i, batch in enumerate(data_of(rank)):
        step(model, optimizer, batch, climbs_at(method, i), form, finish=finish)
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


def main(rank, folder, kind, cases):
    """Run every case and keep what each returns, or its error."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    results = {}
    for case in cases:
        try:
            results[case] = globals()[kind](rank, *case)
        except Exception:
            results[case] = traceback.format_exc()
        dist.barrier()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run(folder, kind, cases):
    processes = [SERVER.Process(target=main, args=(r, folder, kind, cases)) for r in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        if process.is_alive():
            process.kill()
    assert [p.exitcode for p in processes] == [0] * RANKS
    results = [torch.load(f"{folder}/{r}.pt", weights_only=False) for r in range(RANKS)]
    return {case: [found[case] for found in results] for case in cases}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both ranks found in all cases of a kind; they are started once."""
    known = {}

    def get(kind, cases):
        if kind not in known:
            known[kind] = run(str(tmp_path_factory.mktemp(kind)), kind, cases)
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


@pytest.mark.parametrize(("method", "what"), REFUSED)
def test_ddp_refuses_to_combine_gradients_of_one_device(results, method, what):
    reason = "pass the model" if what == "no model" else "no_sync"
    for messages in results("refused", REFUSED)[method, what]:
        assert isinstance(messages, list), messages
        assert len(messages) == 2
        assert all(reason in message for message in messages)


@pytest.mark.parametrize(("method", "form", "partly"), FSDP)
def test_fsdp2(results, method, form, partly):
    check(results("fsdp", FSDP)[method, form, partly], expected(method))


@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_is_refused(results, original):
    for message in results("fsdp1", [(False,), (True,)])[(original,)]:
        assert message.startswith("FullyShardedDataParallel: not supported")

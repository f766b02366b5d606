"""SAM with the weights of FSDP2, which are DTensors, on two processes."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import RANKS, run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from sam_lightning import SAM
from steps import BASES, RELATIVES, STEPS, batches, network

CASES = {
    f"{method}, {base}": (RELATIVES[method], base)
    for method in ("sam", "asam", "adaptive", "friendly", "looksam")
    for base in ("nesterov", "adamw")
}


def sharded(seed=0):
    from torch.distributed.fsdp import fully_shard

    model = network(seed=seed)
    for layer in (model[0], model[3], model):
        fully_shard(layer)
    return model


def train(model, sam, numbers, rank=None):
    """Steps with the whole batches, or with this rank's halves of them."""
    data = list(batches(12))
    for i in numbers:
        x, y = data[i]
        batch = (x, y) if rank is None else (x[rank::RANKS], y[rank::RANKS])
        sam.zero_grad()
        if sam.gradient_transform is not None and i % 3:
            sam.skip_perturbation()
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            sam.step()
        else:
            STEPS[i % len(STEPS)](model, sam, batch)


def optimizer(model, options, base, rho=0.3):
    cls, settings = BASES[base]
    return SAM(model.named_parameters(), cls, rho=rho, **copy.deepcopy(options), **settings)


def whole(model):
    return [p.full_tensor().detach() for p in model.parameters()]


def program(folder):
    rank, results = dist.get_rank(), {}
    for case, (options, base) in CASES.items():
        model = sharded()
        sam = optimizer(model, options, base)
        train(model, sam, range(6), rank)
        sam.zero_grad()
        restored = sharded()
        restored.load_state_dict(copy.deepcopy(model.state_dict()))
        other = optimizer(restored, options, base, rho=0.9)
        flat = StateDictOptions(flatten_optimizer_state_dict=base == "adamw")
        state = get_optimizer_state_dict(model, sam, options=flat)
        dcp.save({"optimizer": state}, checkpoint_id=folder / case)
        state = get_optimizer_state_dict(restored, other, options=flat)
        dcp.load({"optimizer": state}, checkpoint_id=folder / case)
        set_optimizer_state_dict(restored, other, state, options=flat)
        train(model, sam, range(6, 12), rank)
        train(restored, other, range(6, 12), rank)
        results[case] = {"unbroken": whole(model), "restored": whole(restored)}
    if rank == 0:
        torch.save(results, folder / "results.pt")


@pytest.mark.slow
def test_sharded_weights_move_as_whole_ones_and_continue_from_a_checkpoint(tmp_path):
    run_ranks(program, tmp_path)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for case, (options, base) in CASES.items():
        model = network()
        train(model, optimizer(model, options, base), range(12))
        unbroken, restored = results[case]["unbroken"], results[case]["restored"]
        told = f"{case}: {{}}".format  # by how much they differ
        for found, expected in zip(unbroken, model.parameters(), strict=True):
            torch.testing.assert_close(found, expected.detach(), atol=1e-10, rtol=0, msg=told)
        for found, expected in zip(restored, unbroken, strict=True):
            assert torch.equal(found, expected), case

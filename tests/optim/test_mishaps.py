"""SAM in loops where something goes wrong: overflows, errors, batches left out, odd settings."""

from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from loops_reference import (
    COMBINES,
    METHODS,
    PlainLoop,
    assert_close,
    batches,
    loss_at,
    network,
    perturbs_at,
    sam_of,
    state_of,
    with_closure,
    with_perturbed,
)
from sam_lightning import SAM
from sam_lightning.optim.methods.gsam import SurrogateGap
from sam_lightning.optim.methods.looksam import LookSAM

every_method = pytest.mark.parametrize("method", METHODS)


def after(method, data):
    """Weights and running statistics after a plain loop over batches."""
    loop = PlainLoop(method)
    for batch in data:
        loop.update(batch)
    return state_of(loop.model)


class Infinite:
    """A scaler's step over a loss that overflows."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(self, batch, factor):
        def backward():
            (self.scaler.scale(loss_at(self.model, batch)) * factor).backward()

        backward()
        with self.optimizer.perturbed(self.model, scaler=self.scaler):
            backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


@every_method
def test_a_first_step_that_overflows_leaves_no_momentum(method):
    model = network(torch.float32)
    optimizer = sam_of(model, method, fused=True, nesterov=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    (scaler.scale(loss_at(model, batches(torch.float32)[0])) * float("inf")).backward()
    optimizer.first_step(model=model, scaler=scaler)  # held: the fused kernel decides
    garbage = [torch.full_like(p, 1e30) for p in model.parameters()]  # memory to be used again
    del garbage
    scaler.step(optimizer)
    for values in optimizer.state_dict()["state"].values():
        momentum = values.get("momentum_buffer")
        assert momentum is None or not momentum.any()


@every_method
@pytest.mark.parametrize("clear", ["model", "by hand", "optimizer"])
def test_a_skipped_step_that_was_cleared_is_forgotten(method, clear):
    model = network()
    optimizer = sam_of(model, method)
    loop = Infinite(model, optimizer)
    for i, batch in enumerate(batches()[:4]):
        loop.step(batch, float("inf") if i == 1 else 1.0)
        if clear == "model":
            model.zero_grad(set_to_none=False)
        elif clear == "by hand":
            for p in model.parameters():
                p.grad.zero_()
        else:
            optimizer.zero_grad()


def test_a_state_dict_after_a_skipped_step_has_what_is_remembered():
    model = network()
    optimizer = sam_of(model, "friendly")
    loop = Infinite(model, optimizer)
    one, two, _ = batches(count=3)
    loop.step(one, 1.0)
    optimizer.zero_grad()
    loss_at(model, two).backward()
    with optimizer.perturbed(model):
        pass  # and no step
    other = sam_of(network(), "friendly")
    other.load_state_dict(optimizer.state_dict())
    for kept, loaded in zip(
        optimizer.method_state.values(), other.method_state.values(), strict=True
    ):
        assert torch.equal(kept["mean"], loaded["mean"])


@every_method
@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_update_after_a_closure_that_failed(method, failing, error):
    model = network()
    optimizer = sam_of(model, method)
    bad, *good = batches(count=4)
    calls = []

    def closure():
        calls.append(1)
        loss_at(model, bad).backward()
        if len(calls) == failing:
            raise error
        return torch.zeros(())

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(error):
        optimizer.step(closure, model)
    assert all(map(torch.equal, before, model.parameters()))
    model.load_state_dict(network().state_dict())  # running statistics of before
    reference = network()
    fresh = sam_of(reference, method)
    fresh.load_state_dict(optimizer.state_dict())  # Friendly-SAM remembers the failed batch
    for batch in good:
        with_closure(model, optimizer, batch)
        with_closure(reference, fresh, batch)
    assert_close(state_of(model), state_of(reference), 0)


@pytest.mark.parametrize("method", COMBINES)
def test_a_step_without_gradients_does_nothing(method):
    model = network()
    optimizer = sam_of(model, method)
    with_perturbed(model, optimizer, batches()[0])
    before = state_of(model)
    optimizer.skip_perturbation()
    optimizer.step()
    assert_close(state_of(model), before, 0)


@pytest.mark.parametrize("method", COMBINES)
def test_second_step_alone_leaves_the_gradients(method):
    model = network()
    optimizer = sam_of(model, method)
    with_perturbed(model, optimizer, batches()[0])
    loss_at(model, batches()[1]).backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="without a perturbation"):
        optimizer.second_step()
    assert all(map(torch.equal, before, [p.grad for p in model.parameters()]))


def test_a_frozen_layer_with_an_old_gradient_does_not_hide_that_there_is_no_new_one():
    model = network()
    optimizer = sam_of(model, "sam")
    loss_at(model, batches()[0]).backward()
    model[0].requires_grad_(False)  # and its gradient stays
    with optimizer.perturbed(model, zero_grad=False):
        loss_at(model, batches()[0]).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="no gradient since the last step"):
        optimizer.first_step()


@pytest.mark.parametrize("rho", [float("nan"), -0.1, float("inf")])
def test_a_rho_that_became_impossible_is_refused(rho):
    model = network()
    optimizer = sam_of(model, "sam")
    optimizer.param_groups[0]["rho"] = rho
    loss_at(model, batches()[0]).backward()
    for call in (optimizer.first_step, optimizer.step):
        with pytest.raises(ValueError, match=f"rho={rho}: must be a finite number >= 0"):
            call()


@pytest.mark.parametrize("descent", [SurrogateGap(0.4), LookSAM(0.7)])
def test_complex_weights_count_as_pairs_of_real_ones(descent):
    torch.manual_seed(0)
    start = torch.randn(4, 5, dtype=torch.complex128)
    target = torch.randn(4, 5, dtype=torch.complex128)
    whole = nn.Parameter(start.clone())
    pairs = nn.Parameter(torch.view_as_real(start).clone())
    views = {whole: lambda: whole, pairs: lambda: torch.view_as_complex(pairs)}
    for p, view in views.items():
        optimizer = SAM([p], torch.optim.SGD, rho=0.3, lr=0.1, gradient_transform=descent)
        for i in range(10):

            def backward(view=view):
                ((view() - target).abs().square() * (1 + view().abs())).sum().backward()

            backward()
            if isinstance(descent, LookSAM) and i % 5:
                optimizer.skip_perturbation()
            else:
                with optimizer.perturbed():
                    backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(torch.view_as_real(whole), pairs, atol=1e-10, rtol=0)


# ---------------------------------------------------------------------------------- Lightning


class Module(L.LightningModule):
    def __init__(self, method="sam", left_out=()):
        super().__init__()
        self.model, self.method, self.left_out = network(), method, left_out

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.left_out else loss_at(self.model, batch)

    def on_train_batch_start(self, batch, batch_idx):
        if not perturbs_at(self.method, batch_idx):
            self.optimizers().skip_perturbation()

    def configure_optimizers(self):
        return sam_of(self.model, self.method)


class Before(Module):
    def on_train_start(self):
        loss_at(self.model, batches()[7]).backward()
        self.model.load_state_dict(network().state_dict())


def fit(module, epochs=1, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, **quiet, **options)
    trainer.fit(module, DataLoader(batches(count=6), batch_size=None))


@every_method
def test_a_batch_that_training_step_leaves_out(method):
    module, data = Module(method, left_out=[2]), batches(count=6)
    fit(module)
    loop = PlainLoop(method)
    for i, batch in enumerate(data):
        if i != 2:
            loop.update(batch, perturb=perturbs_at(method, i))
    assert_close(state_of(module.model), state_of(loop.model))


def test_automatic_optimization_perturbs_along_its_own_gradient():
    module = Before()
    fit(module)
    assert_close(state_of(module.model), after("sam", batches(count=6)))


def test_weights_are_averaged_by_lightning():
    module = Module()
    fit(module, epochs=3, callbacks=[StochasticWeightAveraging(0.1, swa_epoch_start=1)])
    assert all(p.isfinite().all() for p in module.model.parameters())


def test_a_closure_with_a_module_in_its_arguments_is_ones_own():
    module = Module()
    optimizer = sam_of(module.model, "sam")

    def closure(given, batch):
        optimizer.zero_grad()
        loss = loss_at(given.model, batch)
        loss.backward()
        return loss

    for batch in batches():
        optimizer.step(partial(closure, module, batch))
    assert_close(state_of(module.model), after("sam", batches()))

"""SAM in the loops that people write, against plain float64 loops of its formulas."""

from contextlib import nullcontext
from functools import cache

import lightning as L
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning.fabric.plugins.precision.amp import MixedPrecision as FabricMixedPrecision
from lightning.pytorch.plugins import MixedPrecision

from loops_reference import (
    FORMS,
    METHODS,
    STEPS,
    PlainLoop,
    assert_close,
    batches,
    loss_at,
    network,
    perturbs_at,
    plain,
    sam_of,
    state_of,
    with_closure,
    with_gradients_given,
    with_perturbed,
)
from reference import loader, trainer
from sam_lightning import frozen_running_stats

every_method = pytest.mark.parametrize("method", METHODS)
every_form = pytest.mark.parametrize("form", FORMS)
two_forms = pytest.mark.parametrize("form", ["perturbed", "in two"])
CLOSURES = ["closure", "gradients given"]
PLAIN = cache(plain)


def loop(step, method, model, optimizer, data=None, **options):
    for i, batch in enumerate(data or batches()):
        step(model, optimizer, batch, perturbs_at(method, i), **options)


# ------------------------------------------------------------------------------ a plain loop


@every_form
@every_method
def test_a_plain_loop(method, form):
    model, passes = network(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    loop(FORMS[form], method, model, sam_of(model, method))
    assert_close(state_of(model), PLAIN(method))
    assert len(passes) == STEPS + sum(perturbs_at(method, i) for i in range(STEPS))


@every_method
def test_a_plain_loop_in_float32(method):
    model = network(torch.float32)
    data = [(images.float(), labels) for images, labels in batches()]
    loop(with_perturbed, method, model, sam_of(model, method), data)
    assert_close(state_of(model), PLAIN(method), 1e-5)


@pytest.mark.parametrize("step", [with_closure, with_gradients_given])
def test_rho_0_calls_the_closure_once(step):
    model, other, passes = network(), network(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    loop(step, "sam", model, sam_of(model, "sam", rho=0.0))
    base = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    base.param_groups[0]["weight_decay"] = 1e-2
    for batch in batches():
        base.zero_grad()
        loss_at(other, batch).backward()
        base.step()
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert len(passes) == STEPS


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("times", [0, 1, 2, 3])
def test_gradients_that_are_set_to_zero(times, given):
    model = network()
    optimizer = sam_of(model, "sam")
    for batch in batches():
        for _ in range(times):
            model.zero_grad(set_to_none=False)

        def closure(batch=batch):
            loss = loss_at(model, batch)
            loss.backward()
            return loss

        if given:
            optimizer.zero_grad(set_to_none=False)
            closure()
        optimizer.step(closure, model)
    assert_close(state_of(model), PLAIN("sam"))


def test_nothing_is_perturbed_along_a_second_gradient_that_no_step_used():
    model = network()
    optimizer = sam_of(model, "sam")
    one, two = batches(count=2)
    loss_at(model, one).backward()
    with optimizer.perturbed(model):
        loss_at(model, one).backward()
    loss_at(model, two).backward()
    with pytest.raises(RuntimeError, match="neither stepped with nor cleared"):
        optimizer.first_step()
    optimizer.zero_grad()
    loss_at(model, two).backward()
    optimizer.first_step()


@every_method
def test_accumulation(method):
    model, reference = network(), PlainLoop(method)
    optimizer, data = sam_of(model, method), batches(count=2 * STEPS)

    def backward(pair):
        for batch in pair:
            (loss_at(model, batch) / 2).backward()

    for i, pair in enumerate(zip(data[::2], data[1::2], strict=True)):
        perturb = perturbs_at(method, i)
        backward(pair)
        if perturb:
            with optimizer.perturbed(model):
                backward(pair)
        else:
            optimizer.skip_perturbation()
        optimizer.step()
        optimizer.zero_grad()
        reference.update(*pair, perturb=perturb)
    assert_close(state_of(model), state_of(reference.model))


# --------------------------------------------------------------------------------- Lightning


class Module(L.LightningModule):
    def __init__(self, method, form, wrapped=True, perturbs=True, scaler=None):
        super().__init__()
        self.scaler = scaler
        self.model = network()
        self.method, self.form = method, form
        self.wrapped, self.perturbs = wrapped, perturbs
        self.automatic_optimization = form == "automatic"
        self.calls = 0

    def configure_optimizers(self):
        return sam_of(self.model, self.method)

    def on_train_batch_start(self, batch, i):
        if self.automatic_optimization and not perturbs_at(self.method, i):
            self.optimizers().skip_perturbation()

    def training_step(self, batch, i):
        self.calls += 1
        if self.automatic_optimization:
            return loss_at(self.model, batch)
        optimizer = self.optimizers()
        optimizer = optimizer if self.wrapped else optimizer.optimizer
        if not self.perturbs:
            self.manual_backward(loss_at(self.model, batch))
            optimizer.step()
            return None
        options = {"backward": self.manual_backward}
        if self.scaler is not None:
            options["scaler"] = self.scaler
        if self.form in CLOSURES:  # Lightning's step takes no model
            options["told"] = False
        FORMS[self.form](self.model, optimizer, batch, perturbs_at(self.method, i), **options)
        return None


def fit(module, **options):
    runner = trainer(**options)
    runner.fit(module, loader(batches()))
    return runner


class Scaling(MixedPrecision):
    """16-mixed without its autocast, so that float64 stays what it is."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", growth_interval=3))

    def forward_context(self):
        return nullcontext()


class FabricScaling(FabricMixedPrecision):
    def __init__(self):
        super().__init__("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", growth_interval=3))

    def forward_context(self):
        return nullcontext()

    def convert_input(self, data):
        return data

    convert_output = convert_input


@pytest.mark.parametrize("form", ["automatic", *FORMS])
@every_method
def test_lightning_counts_an_update_and_runs_its_hooks_once(method, form):
    class Hooked(Module):
        def on_before_optimizer_step(self, optimizer):
            grads.append(torch.cat([p.grad.flatten() for p in self.parameters()]))

    grads, module = [], Hooked(method, form)
    runner = fit(module)
    assert_close(state_of(module.model), PLAIN(method))
    assert len(grads) == runner.global_step == STEPS
    perturbs = sum(perturbs_at(method, i) for i in range(STEPS))
    assert module.calls == (STEPS + perturbs if form == "automatic" else STEPS)


@two_forms
@every_method
def test_manual_optimization_without_the_wrapper(method, form):
    module = Module(method, form, wrapped=False)
    runner = fit(module)
    assert_close(state_of(module.model), PLAIN(method))
    assert runner.global_step == 0


@every_method
def test_automatic_optimization_clips_what_is_stepped_with(method):
    module = Module(method, "automatic")
    fit(module, gradient_clip_val=0.3)
    assert_close(state_of(module.model), PLAIN(method, clip=0.3))


@two_forms
@every_method
def test_manual_optimization_in_16_mixed(method, form):
    plugin = Scaling()
    module = Module(method, form, scaler=plugin.scaler)
    runner = fit(module, plugins=plugin)
    assert_close(state_of(module.model), PLAIN(method))
    assert runner.global_step == STEPS


def test_automatic_optimization_does_not_accumulate():
    with pytest.raises(RuntimeError, match=r"accumulate_grad_batches .* use manual optimization"):
        fit(Module("sam", "automatic"), accumulate_grad_batches=2)


@every_method
def test_automatic_optimization_in_16_mixed_is_refused(method):
    with pytest.raises(RuntimeError, match="16-mixed under Lightning"):
        fit(
            Module(method, "automatic"),
            plugins=MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu")),
        )


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_module_that_forgets_to_perturb_is_told(wrapped):
    with pytest.raises(RuntimeError, match="would be a plain step"):
        fit(Module("sam", "in two", wrapped, perturbs=False))


# ---------------------------------------------------------------------- Fabric and accelerate


def in_fabric(method, form, plugins=None, **extra):
    model = network()
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=plugins)
    model, optimizer = fabric.setup(model, sam_of(model, method))
    if form in CLOSURES:  # its step takes no model
        extra["told"] = False
    loop(FORMS[form], method, model, optimizer, backward=fabric.backward, **extra)
    return state_of(model.module)


@every_form
@every_method
def test_fabric(method, form):
    assert_close(in_fabric(method, form), PLAIN(method))


@two_forms
@every_method
def test_fabric_in_16_mixed(method, form):
    plugin = FabricScaling()
    found = in_fabric(method, form, plugin, scaler=plugin.scaler)
    assert_close(found, PLAIN(method))


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@every_form
@every_method
def test_accelerate(accelerator, method, form):
    model = network()
    model, optimizer = accelerator.prepare(model, sam_of(model, method))
    options = {"backward": accelerator.backward, "sam": optimizer.optimizer}
    if form in CLOSURES:  # its step takes no model
        options["told"] = False
    loop(FORMS[form], method, model, optimizer, **options)
    assert_close(state_of(model), PLAIN(method))


# --------------------------------------------------------------------------------- GradScaler

# In the first pass, in the second, in both; LookSAM perturbs at 5, 10 and 15.
OVERFLOWS = {5: (True, False), 7: (True, True), 10: (False, True), 15: (True, True)}


def scaled(model, optimizer, batch, perturb, scaler, overflow, form):
    def backward(second):
        factor = float("inf") if overflow[second] else 1.0
        (factor * scaler.scale(loss_at(model, batch))).backward()

    before = [p.detach().clone() for p in model.parameters()]
    backward(False)
    if not perturb:
        optimizer.skip_perturbation()
    elif form == "perturbed":
        with optimizer.perturbed(model, scaler=scaler):
            backward(True)
    else:
        optimizer.first_step(zero_grad=True, scaler=scaler)
        with frozen_running_stats(model):
            backward(True)
    scaler.step(optimizer)
    scaler.update()
    model.zero_grad()  # and SAM is not told of a step that the scaler has skipped
    return all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@two_forms
@every_method
def test_a_scaler_whose_scale_changes_and_that_overflows(method, form, fused):
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    model, reference = network(), PlainLoop(method)
    optimizer = sam_of(model, method, fused=fused)
    scales, skipped = set(), []
    for i, batch in enumerate(batches()):
        perturb, overflow = perturbs_at(method, i), OVERFLOWS.get(i, (False, False))
        if scaled(model, optimizer, batch, perturb, scaler, overflow, form):
            skipped.append(i)
        reference.update(batch, perturb=perturb, overflows=overflow)
        scales.add(scaler.get_scale())
    assert_close(state_of(model), state_of(reference.model))
    assert len(scales) >= 3
    # An infinite gradient at w alone perturbs nothing, and the second pass has that at w.
    assert skipped == ([5, 7, 10, 15] if method == "gsam" else [7, 10, 15])


@two_forms
@every_method
def test_a_scaler_that_unscales_to_clip(method, form):
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    model = network()
    optimizer = sam_of(model, method)

    def backward(loss):
        scaler.scale(loss).backward()

    class Clipping:
        """Takes the place of the optimizer's own step."""

        def __getattr__(self, name):
            return getattr(optimizer, name)

        def step(self):
            optimizer.combine()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            scaler.step(optimizer)
            scaler.update()

        def second_step(self, zero_grad):
            self.step()
            optimizer.zero_grad()

    loop(FORMS[form], method, model, Clipping(), backward=backward, scaler=scaler)
    assert_close(state_of(model), PLAIN(method, clip=0.3))


# ---------------------------------------------------------------------------------- torch.jit

JIT = {
    "script": torch.jit.script,
    "trace": lambda model: torch.jit.trace(model, batches()[0][0]),
    "in part": lambda model: torch.nn.Sequential(torch.jit.script(model[:4]), model[4:]),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("how", JIT)
@pytest.mark.parametrize("method", ["sam", "gsam"])
def test_torch_jit(method, how, told):
    model = network()
    called = JIT[how](model)
    model.load_state_dict(network().state_dict())  # a trace calls the model
    optimizer = sam_of(model, method)
    for batch in batches():
        loss_at(called, batch).backward()
        with optimizer.perturbed(called if told else None):
            loss_at(called, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = dict(zip(model.state_dict(), called.state_dict().values(), strict=True))
    assert_close(found, PLAIN(method))


# ------------------------------------------------------------------------------ torch.compile

# What aot_eager compiles, eager has traced too.
backends = pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("eager", marks=pytest.mark.long)]
)


@pytest.fixture(autouse=True)
def nothing_compiled():
    yield
    torch.compiler.reset()


def compiled_loop(method, form, what, backend):
    model = network()
    optimizer, step = sam_of(model, method), FORMS[form]
    called = model
    if what == "model":
        called = torch.compile(model, backend=backend)
    elif what == "step":
        step = torch.compile(step, backend=backend)
    elif what == "calls":
        for name in ("perturb", "first_step", "second_step", "step", "restore"):
            setattr(optimizer, name, torch.compile(getattr(optimizer, name), backend=backend))
    loop(step, method, called, optimizer)
    return state_of(model)


@pytest.mark.slow
@backends
@pytest.mark.parametrize("what", ["model", "step", "calls"])
@every_form
@pytest.mark.parametrize("method", ["gsam"])
def test_torch_compile(method, form, what, backend):
    assert_close(compiled_loop(method, form, what, backend), PLAIN(method))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "step", "calls"])
@pytest.mark.parametrize(
    "form", [f if f == "perturbed" else pytest.param(f, marks=pytest.mark.long) for f in FORMS]
)
@pytest.mark.parametrize("method", ["sam", "asam", "adaptive", "friendly", "looksam"])
def test_torch_compile_of_other_methods(method, form, what):
    assert_close(compiled_loop(method, form, what, "aot_eager"), PLAIN(method))


@backends
@pytest.mark.parametrize("method", ["sam", "friendly"])
def test_torch_compile_of_the_loss(method, backend, monkeypatch):
    compiled = torch.compile(loss_at, backend=backend)
    monkeypatch.setattr("loops_reference.loss_at", compiled)
    model = network()
    loop(with_perturbed, method, model, sam_of(model, method))
    assert_close(state_of(model), PLAIN(method))

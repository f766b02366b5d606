"""Sharpness-Aware Minimization around any torch optimizer (Foret et al. 2021, arXiv 2010.01412).

    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)

    for x, y in batches:
        loss_fn(model(x), y).backward()         # g  = grad L(w)
        with optimizer.perturbed(model):        # w <- w + rho * g / ||g||, gradients cleared
            loss_fn(model(x), y).backward()     # g' = grad L(w + e), running statistics kept
        optimizer.step()                        # w is back, bit for bit; the base steps with g'
        optimizer.zero_grad()

The same in two other forms, the second with a closure that computes the loss and its gradient:

    optimizer.first_step(zero_grad=True)        # after the first backward pass
    with frozen_running_stats(model):
        loss_fn(model(x), y).backward()
    optimizer.second_step(zero_grad=True)

    optimizer.step(closure, model)              # runs both passes

docs/loops.md has what to write in the loops of Lightning, Fabric, accelerate, a GradScaler and
others. The folder ``optim`` needs nothing but torch, and can be used without Lightning.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from sam_lightning.optim.backup import Backup
from sam_lightning.optim.batch_norm import frozen_running_stats
from sam_lightning.optim.foreach import foreach, global_norm, move
from sam_lightning.optim.loops import (
    check_gradients_can_be_combined,
    closure_in_parts,
    has_new_gradients,
    has_second_gradients,
    lightning_module,
    mark_second,
    mark_spent,
)
from sam_lightning.optim.perturbation import (
    Descent,
    GradientAscent,
    Memory,
    Perturbation,
    ascent_by_group,
)
from sam_lightning.optim.wrapper import OptimizerAround, check_rho

UNPERTURBED = (
    "step() without a perturbation: this would be a plain step of the base optimizer. Run the "
    "second pass inside `with optimizer.perturbed(model):`, or between first_step() and "
    "second_step(), or pass step() a closure that computes the gradients. (A closure does not work "
    "with a GradScaler, nor with 16-mixed under Lightning's automatic optimization.) Call "
    "skip_perturbation() first if you want a plain step. If Lightning, Fabric or accelerate has "
    "wrapped the optimizer, still call step() of the wrapper"
)


@dataclasses.dataclass
class _Update:
    """What was done since the last step.

    A wrapper that inherits from the optimizer it wraps, as those of Lightning and Fabric do, runs
    the optimizer's methods with itself as ``self``, and reads this object from the optimizer.
    """

    clearings: int = 0  # how often gradients were cleared, ever
    held: bool = False  # the weights are at w + e
    perturbed: bool = False  # perturb() was called
    plain: bool = False  # skip_perturbation() was called
    combined: bool = False  # combine() was called
    at_w: dict[Tensor, Tensor] | None = None  # the gradients there, for the descent
    model: nn.Module | None = None  # what the second pass calls
    local: bool = False  # nothing averages gradients before combine()
    backup: Backup = dataclasses.field(default_factory=Backup)


class SAM(OptimizerAround):
    """Perturb, take the gradient there, restore, step the base optimizer.

    The parameter groups, the state and the hooks are those of ``base_optimizer``, shared and not
    copied, so schedulers, ``state_dict`` and resumed runs see one optimizer.

    Args:
        params: as for any torch optimizer; a group may set its own ``rho`` and ``adaptive``. The
            norm is taken over all groups, whatever their rho (Foret et al. 2021, equation 2).
        base_optimizer: a torch optimizer class, or any callable from parameter groups to one. Its
            own ``rho``, which Adadelta has, is set by ``functools.partial``, and is the groups'
            ``base_rho``.
        rho: radius of the perturbation, >= 0 in the units of the weights; 0 is the base optimizer.
        adaptive: climb as the usual adaptive SAM does, |w| on every parameter; along the gradient,
            or Friendly-SAM's direction. For the ASAM of the paper pass
            ``perturbation=AdaptiveAscent()`` and named parameters.
        perturbation: where to climb; along the gradient if not given.
        descent: what to step with, made of the gradients at w and w + e; the latter if not given.
        only: names of the parameters to perturb, which then have to be named; all if not given.
        decay_in_ascent: climb along g + weight_decay * w, as the official JAX code does, where the
            L2 term is part of the loss. The base optimizer decays the weights at w in either case,
            where the JAX code decays those at w + e.
        **kwargs: passed to ``base_optimizer``.

    Raises:
        TypeError: ``base_optimizer`` is an optimizer, and not what makes one.
        ValueError: a rho is negative or not finite, both ways to choose a perturbation are used,
            the base optimizer evaluates the loss itself, takes sparse gradients only or shards its
            state by itself, it has no momentum to climb along, that is combined with a descent,
            ``only`` has an unknown name, or FullyShardedDataParallel or ZeroRedundancyOptimizer
            has divided the parameters.
    """

    grad_scale: Tensor | None  # set by GradScaler, which multiplies one that is there already

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        *,
        adaptive: bool = False,
        perturbation: Perturbation | None = None,
        descent: Descent | None = None,
        only: Collection[str] | None = None,
        decay_in_ascent: bool = False,
        **kwargs: Any,
    ) -> None:
        self.perturbation = perturbation or GradientAscent()
        self.descent = descent
        self.only = None if only is None else frozenset(only)
        self.decay_in_ascent = decay_in_ascent
        self._update = _Update()
        method = f"{type(self.perturbation).__name__}/{type(self.descent).__name__}"
        own = {"rho": rho, "adaptive": adaptive}
        super().__init__(params, base_optimizer, own, method, **kwargs)
        self._check()

    def _check(self) -> None:
        defaults = self.base_optimizer.defaults
        if self.along_momentum and not (defaults.get("momentum") or "betas" in defaults):
            raise ValueError(
                f"momentum={defaults.get('momentum')}: must be above 0 to climb along it"
            )
        if self.along_momentum and self.descent is not None:
            raise ValueError("descent: combines two gradients, and along the momentum there is one")
        names = {name for group in self.param_groups for name in group.get("param_names", ())}
        if self.only is not None and not self.only <= names:
            raise ValueError(f"only={min(self.only - names)}: no parameter of this name")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with a ``rho`` and an ``adaptive`` of their own or the default ones."""
        self._check_adaptive(param_group.setdefault("adaptive", self.defaults["adaptive"]))
        super().add_param_group(param_group)
        if any(getattr(p, "_fsdp_flattened", False) for p in param_group["params"]):
            raise ValueError(
                "FullyShardedDataParallel: not supported, for it hides that each device has a part "
                "of the gradient only; use torch.distributed.fsdp.fully_shard"
            )
        if "base_optimizer" in param_group:  # one of the arguments that it makes settings of
            raise ValueError(
                "ZeroRedundancyOptimizer around SAM: not supported, for each device would perturb "
                "its own part of the weights only; use torch.distributed.fsdp.fully_shard"
            )

    def _check_adaptive(self, adaptive: bool) -> None:
        if adaptive and not getattr(self.perturbation, "euclidean", False):
            name = type(self.perturbation).__name__
            raise ValueError(f"adaptive=True: not together with {name}, which decides it")

    @property
    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _has_new_gradients(self, *, zeros_count: bool) -> bool:
        clearings = self._update.clearings
        return has_new_gradients(self.param_groups, clearings, zeros_count=zeros_count)

    # ------------------------------------------------------------------------- perturbing

    @property
    def climbs(self) -> bool:
        """Whether any group has rho > 0, that is, whether a step needs its second pass.

        Raises:
            ValueError: a rho has become negative or not finite.
        """
        for group in self.param_groups:
            check_rho(group["rho"])
        return any(group["rho"] > 0 for group in self.param_groups)

    @property
    def along_momentum(self) -> bool:
        """Whether the perturbation needs no gradient at w, that is, whether one pass is enough."""
        return getattr(self.perturbation, "along", "gradient") == "momentum"

    @torch._disable_dynamo
    @torch.no_grad()
    def perturb(
        self,
        *,
        model: nn.Module | None = None,
        zero_grad: bool = False,
        scaler: GradScaler | None = None,
        length: float = 1.0,
        further: bool = False,
        local: bool = False,
    ) -> None:
        """Move the weights to w + e along the present gradients, keeping a copy of w.

        A gradient with a non-finite norm moves nothing; that is decided on the device.

        Args:
            model: what the passes call; under DistributedDataParallel a descent needs it, wrapped,
                or else the LightningModule.
            zero_grad: clear the gradients afterwards.
            scaler: what has scaled the loss. A method that remembers gradients needs it, for the
                scale changes; others climb as far without it.
            length: factor on every rho.
            further: the weights may be perturbed already, and move on from where they are.
            local: the gradients are this device's own, in both passes. You call ``combine()``, and
                average over devices what it makes of them. Without a descent this changes nothing.

        Raises:
            RuntimeError: the weights are perturbed already; there is no gradient, or only that of
                the last step; a gradient is sparse; or devices average the gradients in a way that
                does not go with the descent.
        """
        update = self._update
        first = not update.held
        if not first and not further:
            raise RuntimeError("the weights are perturbed already: call restore() first")
        needs_gradient = first and self.climbs and not self.along_momentum
        if needs_gradient and not self._has_new_gradients(zeros_count=True):
            raise RuntimeError("no gradient since the last step: call backward() before")
        if needs_gradient and has_second_gradients(self._params, update.clearings):
            raise RuntimeError(
                "the gradient of the last second pass was neither stepped with nor cleared. To "
                "accumulate, run all first passes before the perturbation and all second ones in it"
            )
        if first:
            update.plain = update.combined = False
            update.at_w, update.model, update.local = None, model, local
        update.held = True
        try:
            if self.climbs:
                self._climb(first, zero_grad, scaler, length)
        except BaseException:
            self.restore()
            raise
        update.perturbed = True
        if zero_grad:
            self.zero_grad()

    def _climb(
        self, first: bool, zero_grad: bool, scaler: GradScaler | None, length: float
    ) -> None:
        update = self._update
        if first and self.descent is not None:
            grads = {p: p.grad for p in self._params if p.grad is not None}
            if not update.local:
                check_gradients_can_be_combined(update.model, grads)
            # A view is of a buffer, such as a bucket of DDP's, that the next pass writes to.
            update.at_w = {
                p: g if zero_grad and not g._is_view() else g.clone() for p, g in grads.items()
            }
        weights, grads_of, names, rhos, adaptive = self._ascent_inputs(scaler)
        if not weights:
            return
        memory: list[Memory] = []
        if type(self.perturbation) is not GradientAscent:  # which remembers nothing
            memory = [self.memory.get(w, {}) for w in weights]
        if not first:  # what is remembered is of the gradient at w, and changes once an update
            memory = [dict(kept) for kept in memory]
        if any(adaptive) and type(self.perturbation) is GradientAscent:
            direction, norm = ascent_by_group(weights, grads_of, adaptive)
        else:
            direction, norm = self.perturbation(weights, grads_of, names, memory)
            if any(adaptive):
                self._check_adaptive(True)  # groups may be loaded or changed
                direction, norm = ascent_by_group(weights, list(direction), adaptive)
        if first and any(memory):
            self.memory.update(zip(weights, memory, strict=True))
        update.backup.save(weights)
        move(weights, direction, [rho * length for rho in rhos], norm)

    def _ascent_inputs(
        self, scaler: GradScaler | None
    ) -> tuple[list[Tensor], list[Tensor], list[str | None], list[float], list[bool]]:
        weights: list[Tensor] = []
        grads, names, rhos, adaptive, decays = [], [], [], [], []
        along_momentum, only = self.along_momentum, self.only
        for group in self.param_groups:
            before = len(weights)
            group_names = group.get("param_names") or [None] * len(group["params"])
            for name, p in zip(group_names, group["params"], strict=True):
                grad = self._momentum(p) if along_momentum else p.grad
                if grad is None or not p.requires_grad:
                    continue
                if only is not None and name not in only:
                    continue
                if grad.is_sparse:
                    raise RuntimeError("SAM does not support sparse gradients")
                weights.append(p)
                grads.append(grad)
                names.append(name)
            rho, decay = group["rho"], group.get("weight_decay", 0.0)
            if group.get("maximize") and not along_momentum:  # there the momentum is of the loss
                rho, decay = -rho, -decay
            count = len(weights) - before
            rhos += [rho] * count
            adaptive += [group["adaptive"]] * count
            decays += [decay] * count
        if not along_momentum:
            if scaler is not None and grads:
                scale = scaler.scale(torch.ones((), device=grads[0].device))
                grads = list(foreach(torch._foreach_mul, grads, 1 / scale))
            if self.decay_in_ascent:
                decayed = zip(grads, weights, decays, strict=True)
                grads = [g.add(w, alpha=decay) for g, w, decay in decayed]
        return weights, grads, names, rhos, adaptive

    def _momentum(self, p: Tensor) -> Tensor | None:
        state = self.state.get(p, {})
        momentum = state.get("momentum_buffer", state.get("exp_avg"))
        assert momentum is None or isinstance(momentum, Tensor)
        return momentum

    @torch._disable_dynamo
    @torch.no_grad()
    def restore(self) -> None:
        """Put back the weights from before ``perturb()``, bit for bit; without one, do nothing."""
        self._update.backup.restore()
        self._update.held = False

    @contextmanager
    def perturbed(
        self,
        model: nn.Module | None = None,
        *,
        zero_grad: bool = True,
        scaler: GradScaler | None = None,
        length: float = 1.0,
        local: bool = False,
    ) -> Iterator[None]:
        """Hold the weights at w + e; they are restored however the block ends.

        Args:
            model: its running statistics (BatchNorm) are frozen in the block, because the first
                pass has updated them. If it is left out, those of every layer that is called are,
                which takes a little longer. A perturbation along the momentum has no other pass
                than this one, and freezes nothing.
            zero_grad: clear the gradients on entry, so that the two passes do not add up.
            scaler, length, local: as for ``perturb()``. The end of the block calls ``combine()``.

        Raises:
            RuntimeError: as for ``perturb()`` and ``combine()``.
        """
        frozen = nullcontext() if self.along_momentum else frozen_running_stats(model)
        try:
            options: dict[str, Any] = {"scaler": scaler, "length": length, "local": local}
            self.perturb(model=model, zero_grad=zero_grad, **options)
            with frozen:
                yield
            self.combine()
            mark_second(self._params, self._update.clearings)
        except BaseException:
            self._update.at_w, self._update.perturbed = None, False
            raise
        finally:
            self.restore()

    @torch._disable_dynamo
    @torch.no_grad()
    def perturbation_norm(self) -> Tensor:
        """The distance ||e||_2 of the weights from their saved copy, 0-dim; 0 without one."""
        if not self._update.backup:
            return torch.zeros((), device=next(self._params).device)
        return self._update.backup.distance()

    # --------------------------------------------------------------------------- stepping

    def skip_perturbation(self) -> None:
        """Let the next ``step()`` be one of the base optimizer, with the gradient at w.

        LookSAM adds its correction to that gradient.
        """
        # A scaler may have skipped the step before.
        self._update.plain, self._update.combined = True, False

    @torch._disable_dynamo
    @torch.no_grad()
    def combine(self) -> None:
        """Make what is stepped with of the gradients at w and the present ones at w + e.

        That is what ``descent`` does, once a step. The end of ``perturbed()``, or else ``step()``
        calls this; call it before if gradients are changed or averaged in between.

        Raises:
            RuntimeError: the last pass was inside ``no_sync``, and it was not said to be ``local``.
        """
        update = self._update
        if update.combined or self.descent is None or not self.climbs:
            return
        at_w, update.at_w, update.combined = update.at_w, None, True
        params = [p for p in self._params if p.grad is not None]
        if not params:
            return
        second = [p.grad for p in params if p.grad is not None]
        first = None
        if at_w is not None:
            if not update.local:
                check_gradients_can_be_combined(update.model, params)
            first = [at_w[p] if p in at_w else torch.zeros_like(p) for p in params]
        self.descent(first, second, [self.memory[p] for p in params])

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and at w forget those that a step left behind."""
        update = self._update
        if not update.held:
            update.at_w, update.perturbed, update.combined = None, False, False
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            mark_spent(self._params, update.clearings, each=True)
            return
        update.clearings += 1
        for group in self.param_groups:  # in half the time that Optimizer.zero_grad takes
            for p in group["params"]:
                p.grad = None

    def first_step(
        self,
        zero_grad: bool = False,
        *,
        model: nn.Module | None = None,
        scaler: GradScaler | None = None,
        local: bool = False,
    ) -> None:
        """Perturb the weights; the familiar name of ``perturb()``."""
        self.perturb(model=model, zero_grad=zero_grad, scaler=scaler, local=local)

    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and step the base optimizer with the present gradients."""
        self.restore()
        if self._update.perturbed:
            self.combine()  # before a wrapper unscales the gradients
        self.step()
        if zero_grad:
            self.zero_grad()

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None, model: nn.Module | None = None) -> Any:
        """Step the base optimizer with the present gradients, or do a whole SAM step.

        After ``perturb()`` or ``perturbed()`` it is the end of that update. Otherwise the closure
        computes the loss and its gradient. It is called at w and at w + e, each time with cleared
        gradients; only at w + e if a backward pass since the last step has left the gradient at w;
        only at w if every rho is 0 or after ``skip_perturbation()``; only at the perturbed weights
        if the perturbation is along the momentum.

        Args:
            closure: computes the loss and its gradient, and returns the loss. Any other, such as
                Lightning's, which computes nothing after a perturbation, is called once.
            model: what the closure calls; as for ``perturbed()``.

        Returns:
            what the closure returned, at w if it was called there; None if it was not called.

        Raises:
            RuntimeError: nothing was perturbed, so it would be a plain step. That is taken for an
                error unless every rho is 0, every learning rate is 0, or ``skip_perturbation()``
                was called.
        """
        update, result = self._update, None
        if closure is not None:
            ended = update.held or (update.perturbed and lightning_module(closure) is not None)
            try:
                with torch.enable_grad():
                    result = closure() if ended else self._evaluate(closure, model)
            except BaseException:  # what it has computed is not a gradient to climb along
                mark_spent(self._params, update.clearings)
                raise
        self.restore()
        if not update.perturbed and not update.plain and self.climbs:
            self._dry_run()
        self._combine_and_unscale()
        self.step_base()
        mark_spent(self._params, update.clearings)
        update.perturbed = update.plain = update.combined = False
        return result

    def _evaluate(self, closure: Callable[[], Any], model: nn.Module | None) -> Any:
        """Compute the gradient to step with by a closure, and perturb in between."""
        if self._update.perturbed:  # by a pass that was not stepped with
            self.zero_grad()
        module = lightning_module(closure)
        automatic = module is not None and module.automatic_optimization
        compute, finish = closure_in_parts(closure)
        if self._update.plain or not self.climbs:
            result = compute() if automatic else self._gradient_at_w(compute)
            self.combine()
            finish()
            return result
        if automatic and _accumulates(module.trainer):
            raise RuntimeError(
                "accumulate_grad_batches under automatic optimization: SAM needs a second pass "
                "over all accumulated batches; use manual optimization"
            )
        model = module if model is None else model
        if self.along_momentum:
            with self.perturbed(model):
                result = compute()
        elif not automatic and self._has_new_gradients(zeros_count=False):
            self._second_pass(compute, model)
            result = None
        else:
            self.zero_grad()
            result = compute()
            if any(p.grad is not None for p in self._params):
                self._second_pass(compute, model)
            elif automatic:
                self.skip_perturbation()  # training_step, or a callback, left this batch out
        finish()
        return result

    def _gradient_at_w(self, compute: Callable[[], Any]) -> Any:
        """Compute the gradient, if it is not there and the closure computes any."""
        if self._has_new_gradients(zeros_count=False):
            return None
        grads = [(p, p.grad) for p in self._params]
        self.zero_grad()
        result = compute()
        if all(p.grad is None for p in self._params):
            for p, grad in grads:
                p.grad = grad
        return result

    def _second_pass(self, closure: Callable[[], Any], model: nn.Module | None) -> None:
        grads = [(p, p.grad) for p in self._params]
        with self.perturbed(model):
            closure()
            if all(p.grad is None for p in self._params):  # the closure computes nothing
                for p, grad in grads:
                    p.grad = grad
                raise RuntimeError(UNPERTURBED)

    @torch.no_grad()
    def _dry_run(self) -> None:
        """Take a step that moves nothing, as torch.distributed.checkpoint does to make state.

        What a method remembers is made too, so that a checkpoint can be loaded into it.
        """
        params = [p for p in self._params if p.grad is not None]
        if not params or any(group.get("lr", 1) != 0 for group in self.param_groups):
            raise RuntimeError(UNPERTURBED)
        weights, grads, names, _, _ = self._ascent_inputs(None)
        remembered: list[Memory] = [{} for _ in [*weights, *params]]
        if not self.along_momentum:
            self.perturbation(weights, grads, names, remembered[: len(weights)])
        if self.descent is not None:
            zeros = [torch.zeros_like(p) for p in params]
            self.descent(zeros, [z.clone() for z in zeros], remembered[len(weights) :])
        for p, kept in zip([*weights, *params], remembered, strict=True):
            for name, value in kept.items():
                self.memory[p].setdefault(name, torch.zeros_like(value))
        self._update.combined = True

    @torch.no_grad()
    def _combine_and_unscale(self) -> None:
        """Combine, and divide by a GradScaler's scale where it leaves that to the optimizer."""
        scale = getattr(self, "grad_scale", None)
        if self.found_inf is not None and scale is None and self._update.at_w is not None:
            raise RuntimeError(
                "scaler.unscale_(): of the two gradients that are combined it has unscaled one. "
                "Run the second pass in `with optimizer.perturbed(model):`, or call combine() "
                "before scaler.unscale_()"
            )
        self.combine()
        if scale is None or self.found_inf is None:
            return
        grads = [p.grad for p in self._params if p.grad is not None]
        if grads:
            foreach(torch._foreach_mul_, grads, 1 / scale)
            # It looked at the gradients before they were combined. Fused kernels compare with 1.
            bad = (global_norm(grads) * 0 != 0).to(self.found_inf)
            self.found_inf = torch.maximum(self.found_inf, bad)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler calls step() also if a gradient overflowed.

        It has to, while the weights are perturbed.
        """
        return self._update.held

    def __getstate__(self) -> dict[str, Any]:
        names = ("perturbation", "descent", "only", "decay_in_ascent")
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in names},
            # A copy made at w + e can go back to w.
            "_update": dataclasses.replace(self._update, model=None),
        }


def _accumulates(trainer: Any) -> bool:
    """Whether Lightning accumulates gradients; averaging weights, it says so and computes none."""
    computes = not getattr(trainer.fit_loop, "_skip_backward", False)
    return bool(computes and trainer.accumulate_grad_batches > 1)

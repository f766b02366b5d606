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

See docs/loops.md for Lightning, Fabric, accelerate, GradScaler and others. This needs only torch.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from sam_lightning.optim.ascent import ascend, check_adaptive, check_choices
from sam_lightning.optim.base_step import keep_beside, step_base
from sam_lightning.optim.batch_norm import frozen_running_stats
from sam_lightning.optim.closures import lightning_module, run_passes
from sam_lightning.optim.decay import BOTH, add_decay
from sam_lightning.optim.distributed import check_averaged, check_not_divided, make_method_state
from sam_lightning.optim.grad_scaler import check_scaled, combine_and_unscale, scale_of
from sam_lightning.optim.perturbation import GradientAscent, GradientTransform, Perturbation
from sam_lightning.optim.step_state import SECOND, SPENT, StepState
from sam_lightning.optim.wrapper import OptimizerAround, check_rho


class SAM(OptimizerAround):
    """Perturb, compute the gradient there, restore, step the base optimizer.

    SAM and ``base_optimizer`` share parameter groups, state and hooks. So schedulers,
    ``state_dict`` and resumed runs see one optimizer.

    Args:
        params: as for any torch optimizer; a group may set its own ``rho`` and ``adaptive``. The
            norm is taken over all groups, whatever their rho (Foret et al. 2021, equation 2).
        base_optimizer: a torch optimizer class, or a callable that makes one from parameter groups.
            Set its own ``rho`` (Adadelta) by ``functools.partial``; groups call it ``base_rho``.
        rho: radius of the perturbation, >= 0 in the units of the weights; 0 is the base optimizer.
        adaptive: scale the ascent by |w| on every parameter, as the usual PyTorch port of SAM does.
            For the ASAM of the paper pass ``perturbation=AdaptiveAscent()`` and named parameters.
        perturbation: where to perturb; along the gradient by default.
        gradient_transform: combines the gradients at w and w + e; the latter by default.
        param_names: the named parameters to perturb; all by default.
        decay_in_ascent: perturb along g + weight_decay * w; the base optimizer decays at w. With
            "both", weight decay is an L2 term of the loss, as in the official JAX code: the step
            uses the gradient g' + weight_decay * (w + e), and the base optimizer decays nothing.
        **kwargs: passed to ``base_optimizer``.

    Raises:
        TypeError: ``base_optimizer`` is an optimizer instead of its class.
        ValueError: an argument is out of range, two do not go together, or SAM does not support the
            base optimizer or how the parameters are divided over ranks.
    """

    grad_scale: Tensor | None  # set by GradScaler, which multiplies one that is there already
    _copied = (
        *OptimizerAround._copied,
        *("perturbation", "gradient_transform", "param_names", "decay_in_ascent", "_step_state"),
    )

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        *,
        adaptive: bool = False,
        perturbation: Perturbation | None = None,
        gradient_transform: GradientTransform | None = None,
        param_names: Collection[str] | None = None,
        decay_in_ascent: bool | str = False,
        **kwargs: Any,
    ) -> None:
        self.perturbation = perturbation or GradientAscent()
        self.gradient_transform = gradient_transform
        self.param_names = None if param_names is None else frozenset(param_names)
        self.decay_in_ascent = decay_in_ascent
        self._step_state = StepState()
        method = f"{type(self.perturbation).__name__}/{type(gradient_transform).__name__}"
        super().__init__(
            params, base_optimizer, {"rho": rho, "adaptive": adaptive}, method, **kwargs
        )
        check_choices(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their own ``rho`` and ``adaptive`` or the default ones."""
        if param_group.setdefault("adaptive", self.defaults["adaptive"]):
            check_adaptive(self.perturbation)
        super().add_param_group(param_group)
        check_not_divided(param_group)

    @property
    def params(self) -> list[Tensor]:
        """The parameters of all groups."""
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def perturbs(self) -> bool:
        """Whether any group has rho > 0, so that a step perturbs the weights."""
        for group in self.param_groups:
            check_rho(group["rho"])
        return any(group["rho"] > 0 for group in self.param_groups)

    @property
    def needs_gradient(self) -> bool:
        """Whether the perturbation needs the gradient at w; if not, a step has one pass."""
        return getattr(self.perturbation, "needs_gradient", True)

    @property
    def combines(self) -> bool:
        """Whether ``combine()`` changes the gradients of a step that perturbs."""
        return self.gradient_transform is not None or self.decay_in_ascent == BOTH

    # --------------------------------------------------------------------------- one step

    @contextmanager
    def perturbed(
        self,
        model: nn.Module | None = None,
        *,
        zero_grad: bool = True,
        scaler: GradScaler | None = None,
        rho_scale: float = 1.0,
        local: bool = False,
        share: float = 1.0,
    ) -> Iterator[None]:
        """Hold the weights at w + e in the block; restore them however it ends.

        Args:
            model: its running statistics (BatchNorm) are frozen, since the first pass has updated
                them; without it, every called layer's (slower). A step's only pass freezes none.
            zero_grad: clear the gradients on entry, so that the two passes do not add up.
            scaler, rho_scale, local, share: as for ``perturb()``; ends with ``combine()``.
        """
        step, more = self._step_state, dict[str, Any](rho_scale=rho_scale, share=share)
        frozen = frozen_running_stats(model) if self.needs_gradient else nullcontext()
        try:
            self.perturb(zero_grad, model=model, scaler=scaler, local=local, **more)
            with frozen:
                yield
            self.combine()
            step.mark(self.params, SECOND)
        except BaseException:
            step.at_w, step.perturbed, step.combined = None, False, True
            raise
        finally:
            self.restore()

    @torch._disable_dynamo
    @torch.no_grad()
    def perturb(
        self,
        zero_grad: bool = False,
        *,
        model: nn.Module | None = None,
        scaler: GradScaler | None = None,
        rho_scale: float = 1.0,
        further: bool = False,
        local: bool = False,
        share: float = 1.0,
    ) -> None:
        """Move the weights to w + e along the present gradients, keeping a copy of w.

        If the norm of the gradients is not finite, no weight moves. The device decides this.

        Args:
            zero_grad: clear the gradients afterwards.
            model: what the passes call. Under DistributedDataParallel what ``combines`` needs the
                wrapped model or the LightningModule.
            scaler: scales the loss. Methods that remember gradients, Fisher SAM, WSAM and
                ``decay_in_ascent`` need it.
            rho_scale: factor on every rho.
            further: move on from where the weights are, if they are perturbed already.
            local: no pass averages gradients over ranks. Call ``combine()``, and average the
                gradients after it. Only what ``combines`` needs this.
            share: of the step's images that this perturbation is for, if there are several.

        Raises:
            RuntimeError: the weights are perturbed already; there is no new gradient, or a sparse
                one; or the gradient transform needs gradients that are averaged over ranks.
        """
        step = self._step_state
        first = not step.held
        if not first and not further:
            raise RuntimeError("the weights are perturbed already: call restore() first")
        perturbs = self.perturbs
        if first:
            if perturbs and self.needs_gradient:
                step.check_gradients(self.params)
            step.plain = step.combined = False
            step.at_w, step.model, step.local = None, model, local
            step.scaler, step.share = scaler, share
        step.held = True
        try:
            if perturbs:
                if first and self.combines:
                    check_averaged(step, self.params)
                if first and self.gradient_transform is not None:
                    step.keep_gradients(self.params, cleared=zero_grad)
                ascend(self, step.backup, first, scaler, rho_scale)
        except BaseException:
            step.combined = True
            self.restore()
            raise
        step.perturbed = True
        if zero_grad:
            self.zero_grad()

    @torch._disable_dynamo
    @torch.no_grad()
    def restore(self) -> None:
        """Put back the weights from before ``perturb()``, bit for bit; without one, do nothing."""
        step = self._step_state
        try:
            if step.held and self.decay_in_ascent == BOTH:
                self.combine()  # while the weights are at w + e
        finally:
            step.backup.restore()
            step.held = False

    @torch._disable_dynamo
    @torch.no_grad()
    def combine(self, scaler: GradScaler | None = None) -> None:
        """Apply ``gradient_transform``, then ``decay_in_ascent="both"``, once a step.

        ``perturbed()`` calls this at its end, and otherwise ``step()`` does. Call it yourself if
        you change or average gradients before that, at a plain step with the loss's ``scaler``.

        Raises:
            RuntimeError: the last pass was inside ``no_sync``, without ``local=True``.
        """
        step = self._step_state
        if step.combined or not self.combines:
            return
        step.combined = True
        grads = {p: p.grad for p in self.params if p.grad is not None}
        scale = scale_of(self, step.scaler if step.held else scaler)
        first = step.take_gradients(grads)
        if self.perturbs and (first is not None or step.held):
            check_averaged(step, grads)
        if grads and self.gradient_transform is not None and self.perturbs:
            states = [self.method_state[p] for p in grads]
            beside = self.gradient_transform(first, list(grads.values()), states)
            keep_beside(self, step, dict(zip(grads, beside, strict=True)) if beside else {}, scale)
        if self.decay_in_ascent == BOTH:
            add_decay(self, scale, step.share if step.held else 1.0)

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None, model: nn.Module | None = None) -> Any:
        """Step the base optimizer with the present gradients, or do a whole SAM step.

        After ``perturb()`` or ``perturbed()`` it ends that step. Otherwise the closure runs at w
        and at w + e, each time with cleared gradients. It runs only at w + e if you have computed
        the gradient at w since the last step, or if the perturbation does not need it. It runs
        only at w if every rho is 0 or after ``skip_perturbation()``.

        Args:
            closure: computes the loss and its gradient, and returns the loss. A closure that does
                not, such as Lightning's after a perturbation, is called once.
            model: what the closure calls; as for ``perturbed()``.

        Returns:
            what the closure returned, at w if it ran there; None if it did not run.

        Raises:
            RuntimeError: nothing was perturbed, and not every rho or learning rate is 0. Call
                ``skip_perturbation()`` before a plain step.
        """
        step, result = self._step_state, None
        if closure is not None:
            ends = step.held or (step.perturbed and lightning_module(closure) is not None)
            try:
                with torch.enable_grad():
                    result = closure() if ends else run_passes(self, step, closure, model)
            except BaseException:  # its gradients are not complete
                step.mark(self.params, SPENT)
                raise
        check_scaled(self, step)
        self.restore()
        if not step.perturbed and not step.plain and self.perturbs:
            make_method_state(self)  # or raise the error
            step.combined = True
        combine_and_unscale(self)
        step_base(self, step)
        step.mark(self.params, SPENT)
        step.perturbed = step.plain = step.combined = False
        return result

    def skip_perturbation(self) -> None:
        """Make the next ``step()`` one of the base optimizer, with the gradient at w.

        LookSAM adds its correction to that gradient.
        """
        # A scaler may have skipped the step before.
        self._step_state.plain, self._step_state.combined = True, False

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; unless the weights are perturbed, also what no step has used."""
        step = self._step_state
        if not step.held:
            step.at_w, step.perturbed, step.combined = None, False, False
        if set_to_none:
            step.clearings += 1
            for p in self.params:  # in half the time of Optimizer.zero_grad
                p.grad = None
        else:
            super().zero_grad(set_to_none=False)
            step.mark(self.params, SPENT, each=True)

    first_step = perturb  # the familiar name

    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and step the base optimizer with the present gradients."""
        self.restore()
        if self._step_state.perturbed:
            self.combine()  # before a wrapper unscales the gradients
        self.step()
        if zero_grad:
            self.zero_grad()

    @torch._disable_dynamo
    @torch.no_grad()
    def perturbation_norm(self) -> Tensor:
        """The distance ||e||_2 of the weights from their saved copy, 0-dim; 0 without one."""
        backup = self._step_state.backup
        return backup.distance() if backup else torch.zeros((), device=self.params[0].device)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler calls step() also if a gradient overflowed; yes while perturbed."""
        return self._step_state.held

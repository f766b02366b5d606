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

This file needs nothing but torch, ``perturbations.py``, ``vectors.py`` and
``models/running_stats.py``, and can be used without Lightning.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sam_lightning.models.running_stats import frozen_running_stats
from sam_lightning.perturbations import (
    AdaptiveAscent,
    Descent,
    GradientAscent,
    Memory,
    Perturbation,
)
from sam_lightning.vectors import move, norm_of_norms, norms_of


class SAM(Optimizer):
    """Perturb, take the gradient there, restore, step the base optimizer.

    The parameter groups and the state are those of ``base_optimizer``, shared and not copied, so
    schedulers, ``state_dict`` and resumed runs see one optimizer.

    Args:
        params: as for any torch optimizer; a group may set its own ``rho``. The norm is taken over
            all groups, whatever their rho (Foret et al. 2021, equation 2).
        base_optimizer: a torch optimizer class, or any callable from parameter groups to one.
        rho: radius of the perturbation, >= 0 in the units of the weights; 0 is the base optimizer.
        adaptive: climb as the usual adaptive SAM does, |w| on every parameter. For the ASAM of the
            paper pass ``perturbation=AdaptiveAscent()`` and named parameters.
        perturbation: where to climb; along the gradient if not given.
        descent: what to step with, made of the gradients at w and w + e; the latter if not given.
        only: names of the parameters to perturb, which then have to be named; all if not given.
        decay_in_ascent: climb along g + weight_decay * w, as the official JAX code does, where the
            L2 term is part of the loss. The base optimizer decays the weights in either case.
        **kwargs: passed to ``base_optimizer``.

    Raises:
        ValueError: a rho is negative or not finite, both ways to choose a perturbation are used,
            the base optimizer has no momentum to climb along, that is combined with a descent, or
            ``only`` has an unknown name.
    """

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
        if adaptive and perturbation is not None:
            raise ValueError("adaptive=True: not together with perturbation, which decides it")
        if adaptive:
            perturbation = AdaptiveAscent(eta=0.0, normalize_bias=True)
        self.perturbation = perturbation or GradientAscent()
        self.descent = descent
        self.only = None if only is None else frozenset(only)
        self.decay_in_ascent = decay_in_ascent
        self.memory: dict[Tensor, Memory] = defaultdict(dict)  # of perturbation and descent
        # 0-dim tensor; non-zero makes the next step() a no-op, decided on the device.
        self.found_inf: Tensor | None = None
        self._saved: tuple[list[Tensor], list[Tensor]] | None = None
        self._rooms: dict[int, Tensor] = {}  # where the last copies were, by the id of their weight
        self._at_w: dict[Tensor, Tensor] | None = None  # the gradients there, for the descent
        super().__init__(params, {"rho": rho})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.defaults = {**self.base_optimizer.defaults, "rho": rho}
        self._share()
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

    def _share(self) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with a ``rho`` of their own or the default one."""
        rho = param_group.setdefault("rho", self.defaults["rho"])
        if not (rho >= 0 and math.isfinite(rho)):
            raise ValueError(f"rho={rho}: must be a finite number >= 0")
        if hasattr(self, "base_optimizer"):
            self.base_optimizer.add_param_group(param_group)
        else:  # called by Optimizer.__init__, before there is a base optimizer to share with
            super().add_param_group(param_group)

    @property
    def climbs(self) -> bool:
        """Whether any group has rho > 0, that is, whether a step needs its second pass."""
        return any(group["rho"] > 0 for group in self.param_groups)

    @property
    def _method(self) -> list[str]:
        return [type(self.perturbation).__name__, type(self.descent).__name__]

    @property
    def along_momentum(self) -> bool:
        """Whether the perturbation needs no gradient at w, that is, whether one pass is enough."""
        return getattr(self.perturbation, "along", "gradient") == "momentum"

    @torch.no_grad()
    def perturb(
        self,
        *,
        zero_grad: bool = False,
        inv_scale: Tensor | None = None,
        length: float = 1.0,
        further: bool = False,
    ) -> None:
        """Move the weights to w + e along the present gradients, keeping a copy of w.

        A gradient with a non-finite norm moves nothing; that is decided on the device.

        Args:
            zero_grad: clear the gradients afterwards.
            inv_scale: 1 / loss scale, 0-dim, where the gradients are those of a scaled loss.
            length: factor on every rho.
            further: the weights may be perturbed already, and move on from where they are.

        Raises:
            RuntimeError: the weights are perturbed already, or a gradient is sparse.
        """
        if self._saved is not None and not further:
            raise RuntimeError("the weights are perturbed already: call restore() first")
        first = self._saved is None
        at_w = self._gradients(clone=not zero_grad) if first and self.descent else self._at_w
        weights, grads, names, rhos = self._ascent_inputs(inv_scale)
        if weights and self.climbs:
            known = self.memory  # looked up by weight only where there is one: a look-up is slow
            memory = [known.get(w, {}) for w in weights] if known else [{} for _ in weights]
            # What is remembered is of the gradient at w, and changes once an update.
            memory = memory if first else [dict(kept) for kept in memory]
            direction, norm = self.perturbation(weights, grads, names, memory)
            if first and any(memory):
                known.update(zip(weights, memory, strict=True))
            self._save(weights)
            move(weights, direction, [rho * length for rho in rhos], norm)
        if zero_grad:
            self.zero_grad()
        self._at_w = at_w

    def _gradients(self, *, clone: bool) -> dict[Tensor, Tensor]:
        grads = {p: p.grad for g in self.param_groups for p in g["params"] if p.grad is not None}
        return {p: g.clone() for p, g in grads.items()} if clone else grads

    def _save(self, weights: list[Tensor]) -> None:
        known, saved = self._saved or ([], [])
        ids = {id(w) for w in known}
        new = [w for w in weights if id(w) not in ids] if ids else weights
        copies = self._rooms_for(new)
        if new:
            torch._foreach_copy_(copies, new)
        self._saved = [*known, *new], [*saved, *copies]

    def _rooms_for(self, weights: list[Tensor]) -> list[Tensor]:
        """Memory for copies: on a CPU that of the last step, for new pages have to be zeroed.

        CUDA's allocator keeps what is given back, for whoever needs it next.
        """
        rooms = []
        for w in weights:
            room = self._rooms.get(id(w))
            # The model may have been moved or converted since, or the id be another weight's now.
            if room is None or room.dtype is not w.dtype or room.shape != w.shape or not w.is_cpu:
                room = self._new_room(w)
            rooms.append(room)
        return rooms

    def _new_room(self, w: Tensor) -> Tensor:
        if not w.is_cpu:
            self._rooms.pop(id(w), None)  # of before it was moved there
            return torch.empty_like(w)
        with torch.inference_mode(False):  # memory made in that mode is for that mode only
            self._rooms[id(w)] = torch.empty_like(w)
        return self._rooms[id(w)]

    def _ascent_inputs(
        self, inv_scale: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], list[str | None], list[float]]:
        weights, grads, names, rhos, decays = [], [], [], [], []
        along_momentum, only = self.along_momentum, self.only
        for group in self.param_groups:
            rho, decay = group["rho"], group.get("weight_decay", 0.0)
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
                rhos.append(rho)
                decays.append(decay)
        if along_momentum:
            return weights, grads, names, rhos
        if inv_scale is not None and grads:
            grads = list(torch._foreach_mul(grads, inv_scale))
        if self.decay_in_ascent:
            grads = [g.add(w, alpha=wd) for g, w, wd in zip(grads, weights, decays, strict=True)]
        return weights, grads, names, rhos

    def _momentum(self, p: Tensor) -> Tensor | None:
        state = self.state.get(p, {})
        momentum = state.get("momentum_buffer", state.get("exp_avg"))
        assert momentum is None or isinstance(momentum, Tensor)
        return momentum

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the weights from before ``perturb()``, bit for bit; without one, do nothing."""
        if self._saved is not None:
            torch._foreach_copy_(*self._saved)
            if len(self._rooms) > len(self._saved[0]):  # some are of weights that have gone
                self._rooms = {id(w): copy for w, copy in zip(*self._saved, strict=True)}
            self._saved = None

    @contextmanager
    def perturbed(
        self,
        model: nn.Module | None = None,
        *,
        zero_grad: bool = True,
        inv_scale: Tensor | None = None,
        length: float = 1.0,
    ) -> Iterator[None]:
        """Hold the weights at w + e; they are restored however the block ends.

        Args:
            model: its running statistics (BatchNorm) are frozen in the block, because the first
                pass has updated them. Leave it out only for a model that has none. A perturbation
                along the momentum has no other pass than this one, and freezes nothing.
            zero_grad: clear the gradients on entry, so that the two passes do not add up.
            inv_scale, length: as for ``perturb()``.
        """
        if model is None or self.along_momentum:
            statistics: AbstractContextManager[None] = nullcontext()
        else:
            statistics = frozen_running_stats(model)
        try:
            self.perturb(zero_grad=zero_grad, inv_scale=inv_scale, length=length)
            with statistics:
                yield
        except BaseException:
            self._at_w = None
            raise
        finally:
            self.restore()

    @torch.no_grad()
    def combine(self) -> None:
        """Make what is stepped with of the gradients at w and the present ones at w + e.

        That is what ``descent`` does, once a step. ``step()`` calls this. With a loss scale, call
        it before the gradients are unscaled, for those at w are scaled too. Under DDP leave
        ``gradient_as_bucket_view`` off: the second pass would write over the gradients at w.
        """
        at_w, self._at_w = self._at_w, None
        if self.descent is None or not self.climbs:
            return
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        second = [p.grad for p in params if p.grad is not None]
        first = None
        if at_w is not None:
            first = [at_w[p] if p in at_w else torch.zeros_like(p) for p in params]
        self.descent(first, second, [self.memory[p] for p in params])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and at w forget those that a step left behind."""
        if self._saved is None:
            self._at_w = None
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:  # in half the time that Optimizer.zero_grad takes
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def perturbation_norm(self) -> Tensor:
        """The distance ||e||_2 of the weights from their saved copy, 0-dim; 0 without one."""
        if self._saved is None:
            return torch.zeros((), device=self.param_groups[0]["params"][0].device)
        # One difference at a time, for all of them would take the memory of the weights again.
        differences = zip(*self._saved, strict=True)
        return norm_of_norms([norm for w, old in differences for norm in norms_of([w - old])])

    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights; the familiar name of ``perturb()``."""
        self.perturb(zero_grad=zero_grad)

    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and step the base optimizer with the present gradients."""
        self.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None, model: nn.Module | None = None) -> Any:
        """Step the base optimizer with the present gradients, or do a whole SAM step.

        Args:
            closure: computes the loss and its gradient, and returns the loss. It is called twice,
                at w and at w + e (once if every rho is 0, or if the perturbation is along the
                momentum), each time with cleared gradients.
            model: what the closure calls; as for ``perturbed()``.

        Returns:
            the loss of the first call, or None without a closure.
        """
        loss = None
        if closure is not None:
            self.restore()
            self.zero_grad()
            with torch.enable_grad():
                if not self.along_momentum:
                    loss = closure()
                if self.climbs or self.along_momentum:
                    with self.perturbed(model):
                        loss_there = closure()
                    loss = loss_there if self.along_momentum else loss
        self.restore()
        self.combine()
        self._base_step()
        return loss

    def _base_step(self) -> None:
        found_inf, self.found_inf = self.found_inf, None
        if found_inf is None:
            self.base_optimizer.step()
        elif getattr(self.base_optimizer, "_step_supports_amp_scaling", False):
            # torch's fused kernels take the decision to skip from a tensor: no host sync.
            first = not self.state
            base: Any = self.base_optimizer
            base.found_inf = found_inf
            try:
                base.step()
            finally:
                del base.found_inf
            if first:  # a skipped first step leaves fused SGD's new momentum uninitialised
                for value in (v for s in self.state.values() for v in s.values()):
                    if isinstance(value, Tensor):
                        value.masked_fill_(found_inf.to(value.device).bool(), 0)
        elif not found_inf:
            self.base_optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and groups, ``rho`` among them; never any weights.

        A method with a memory adds it, as ``memory``: for each parameter's index its tensors.
        Another method does not take it up.
        """
        state = self.base_optimizer.state_dict()
        params = [p for group in self.param_groups for p in group["params"]]
        memory = {i: dict(self.memory[p]) for i, p in enumerate(params) if self.memory.get(p)}
        return {**state, "memory": {"of": self._method, **memory}} if memory else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; ``rho`` comes from it, where it has one."""
        memory = state_dict.get("memory", {})
        self.base_optimizer.load_state_dict(
            {name: value for name, value in state_dict.items() if name != "memory"}
        )
        self._share()
        self.memory.clear()
        if memory.get("of") != self._method:
            memory = {}
        for i, p in enumerate(p for group in self.param_groups for p in group["params"]):
            for name, value in memory.get(i, {}).items():
                self.memory[p][name] = value.to(p.device, copy=True)
        for group in self.param_groups:
            group.setdefault("rho", self.defaults["rho"])

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer's own keeps the groups and the state only.
        return {
            **super().__getstate__(),
            "base_optimizer": self.base_optimizer,
            "perturbation": self.perturbation,
            "descent": self.descent,
            "only": self.only,
            "decay_in_ascent": self.decay_in_ascent,
            "memory": self.memory,
            "found_inf": None,
            "_saved": self._saved,  # a copy made at w + e can go back to w
            "_rooms": {},
            "_at_w": self._at_w,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

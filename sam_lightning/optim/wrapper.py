"""An optimizer around another one, so that schedulers and checkpoints see only one."""

import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_lightning.optim.perturbation import State

UNSUPPORTED: dict[type[Optimizer], str] = {
    torch.optim.LBFGS: "since it evaluates the loss itself, many times a step",
    torch.optim.SparseAdam: "since it takes only sparse gradients, and SAM takes none",
}


class OptimizerAround(Optimizer):
    """Shares parameter groups, state and hooks with a base optimizer, and steps it.

    A group's ``rho`` is this optimizer's. ``base_rho`` is the base optimizer's own (Adadelta).
    ``method_state`` has what a method remembers of each parameter. Between two steps the state has
    it too, under keys that begin with the method's name.

    Args:
        params, base_optimizer, kwargs: as for ``SAM``.
        defaults: of this optimizer's own keys of a group, ``rho`` among them.
        method: the method's name; another method does not load its state.
    """

    _copied: tuple[str, ...] = ("defaults", "base_optimizer", "method", "method_state", "_own")

    # GradScaler or a training loop sets it; if it is not 0, the next step does nothing. The device
    # decides.
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., Optimizer],
        defaults: dict[str, Any],
        method: str,
        **kwargs: Any,
    ) -> None:
        _check_base(base_optimizer)
        check_rho(defaults["rho"])
        self.method = method
        self.method_state: dict[Tensor, State] = defaultdict(dict)
        self._own = dict(defaults)
        self.base_optimizer: Any = SimpleNamespace()  # holds groups and state until there is one
        super().__init__(params, defaults)
        base = base_optimizer(self.param_groups, **kwargs)
        _check_base(type(base))
        if "rho" in base.defaults:
            self._own["base_rho"] = base.defaults["rho"]
        self.base_optimizer = base
        self.param_groups = base.param_groups
        self.defaults = {**base.defaults, **self._own}
        self._share_hooks()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the base optimizer, with this one's own keys too."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups
        for group in groups:
            self._complete(group)

    def _complete(self, group: dict[str, Any]) -> None:
        for name, value in self._own.items():
            group.setdefault(name, value)

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of the base optimizer and, between two steps, of the method."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.base_optimizer.state = state

    def _share_hooks(self) -> None:
        for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            hooks = getattr(self, name)
            hooks.update(getattr(self.base_optimizer, name))
            setattr(self.base_optimizer, name, hooks)

    def __getattr__(self, name: str) -> Any:
        if name in ("train", "eval"):  # of schedule-free optimizers
            return getattr(self.base_optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their own settings or the default ones.

        Raises:
            ValueError: ``rho`` is negative or not finite.
        """
        check_rho(param_group.setdefault("rho", self.defaults["rho"]))
        if not isinstance(self.base_optimizer, Optimizer):  # called by Optimizer.__init__
            super().add_param_group(param_group)
            return
        self._complete(param_group)
        self.base_optimizer.add_param_group(param_group)

    # --------------------------------------------------------------------------- stepping

    def step_base(self) -> None:
        """Step the base optimizer with the present gradients, unless ``found_inf`` is set."""
        base, found_inf = self.base_optimizer, self.found_inf
        self.found_inf = None
        with self._for_base():
            if found_inf is None:
                _step_without_hooks(base)
            elif getattr(base, "_step_supports_amp_scaling", False):
                # torch's fused kernels read the tensor on the device: no host sync.
                known, empty = len(self.state), [s for s in self.state.values() if not s]
                base.found_inf = found_inf
                try:
                    _step_without_hooks(base)
                finally:
                    del base.found_inf
                # A parameter's skipped first step leaves fused SGD's new momentum uninitialised.
                for state in (*empty, *islice(self.state.values(), known, None)):
                    for value in state.values():
                        if isinstance(value, Tensor):
                            value.masked_fill_(found_inf.to(value.device).bool(), 0)
            elif not found_inf:
                _step_without_hooks(base)

    @contextmanager
    def _for_base(self) -> Iterator[None]:
        """Show the base optimizer only its own ``rho`` and state."""
        groups = [group for group in self.param_groups if "base_rho" in group]
        for group in groups:
            group["rho"], group["base_rho"] = group["base_rho"], group["rho"]
        for p, state in self.method_state.items():
            for name in state:
                self.state[p].pop(f"{self.method}/{name}", None)
        try:
            yield
        finally:
            for group in groups:
                group["rho"], group["base_rho"] = group["base_rho"], group["rho"]
            self._show_method_state()

    def _show_method_state(self) -> None:
        for p, state in self.method_state.items():
            for name, value in state.items():
                self.state[p][f"{self.method}/{name}"] = value

    # -------------------------------------------------------------------- saving, copying

    def state_dict(self) -> dict[str, Any]:
        """The state of the base optimizer and of the method; never any weights."""
        self._show_method_state()  # it may be newer than the last step
        if not self._overrides("state_dict"):
            return super().state_dict()
        saved = self.base_optimizer.state_dict
        first = self.register_state_dict_post_hook(lambda *_: saved(), prepend=True)
        try:
            return super().state_dict()
        finally:
            first.remove()

    def _overrides(self, name: str) -> bool:
        return getattr(type(self.base_optimizer), name) is not getattr(Optimizer, name)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; ``rho`` comes from it, where it has one.

        A state of the base optimizer alone loads too. The state of another method is left out.
        """
        adapted: dict[str, Any] = {}

        def adapt(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            adapted.update(self._adapted(given))
            return adapted

        # A user's hooks see the state before it is adapted, and after all is loaded.
        last = self.register_load_state_dict_pre_hook(adapt)
        first = self.register_load_state_dict_post_hook(
            lambda _: self._load_base(adapted), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            first.remove()

    def _load_base(self, adapted: dict[str, Any]) -> None:
        """Load again by the base optimizer's own method, which may take more or cast less."""
        if not self._overrides("load_state_dict"):
            return
        rows = adapted["state"].items()
        own = {i: {k: v for k, v in values.items() if "/" not in k} for i, values in rows}
        state = {i: values for i, values in own.items() if values}
        self.base_optimizer.load_state_dict({**adapted, "state": state})
        self._show_method_state()
        self._complete_groups()

    def _adapted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Make a state that this optimizer can load from one that it or another one has saved."""
        state = {i: dict(values) for i, values in state_dict["state"].items()}
        older = dict(state_dict.get("memory", {}))  # earlier versions saved it beside the state
        method = "/".join(older.pop("of", []))
        for i, values in older.items():
            state.setdefault(i, {}).update({f"{method}/{n}": v for n, v in values.items()})
        if any("old_p" in values for values in state.values()):
            warnings.warn(
                "load_state_dict: the state is of another SAM; its copies of weights are left out, "
                "and the base optimizer starts afresh where it has no state",
                stacklevel=2,
            )
        # The class of LookSAM was once called Reuse.
        adapted = {
            i: {k.replace("/Reuse/", "/LookSAM/"): v for k, v in values.items() if k != "old_p"}
            for i, values in state.items()
        }
        rest = {name: value for name, value in state_dict.items() if name != "memory"}
        return {**rest, "state": {i: values for i, values in adapted.items() if values}}

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._copied}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base_optimizer" in state:  # a copy
            super().__setstate__(state)
            self._share_hooks()
            return
        self.method_state.clear()  # called by load_state_dict
        for p, values in state["state"].items():
            for key in [key for key in values if "/" in key]:
                value = values.pop(key)
                method, _, name = key.rpartition("/")
                if method == self.method:
                    self.method_state[p][name] = value.clone()
        self.base_optimizer.__setstate__(state)
        self._show_method_state()
        self._complete_groups()

    def _complete_groups(self) -> None:
        for group in self.param_groups:
            if "base_rho" in self._own and "rho" in group and "base_rho" not in group:
                group["base_rho"] = group["rho"]
                if not {*self._own} <= {*group}:  # only the base optimizer saved it
                    del group["rho"]
            self._complete(group)


def _check_base(base_optimizer: Any) -> None:
    if isinstance(base_optimizer, Optimizer):
        name = type(base_optimizer).__name__
        raise TypeError(
            f"base_optimizer: this is an optimizer of class {name}; pass the class itself, "
            f"SAM(params, {name}, ...)"
        )
    made = getattr(base_optimizer, "func", base_optimizer)  # of a functools.partial
    for cls, reason in UNSUPPORTED.items():
        if inspect.isclass(made) and issubclass(made, cls):
            raise ValueError(f"base_optimizer={made.__name__}: not supported, {reason}")
    if hasattr(made, "consolidate_state_dict"):  # ZeroRedundancyOptimizer, whose import takes long
        raise ValueError(
            f"base_optimizer={made.__name__}: not supported, since state_dict() does not find its "
            "state; use torch.distributed.fsdp.fully_shard"
        )


def check_rho(rho: float) -> None:
    """Raise a ValueError if a radius is negative or not finite."""
    if not (rho >= 0 and math.isfinite(rho)):
        raise ValueError(f"rho={rho}: must be a finite number >= 0")


def _step_without_hooks(optimizer: Optimizer) -> None:
    """Step; the hooks are shared, and the step of the optimizer around has run them."""
    step = type(optimizer).step
    replaced = vars(optimizer).get("step")
    if hasattr(replaced, "_wrapped_by_lr_sched"):  # a scheduler replaced it, to count steps
        replaced, optimizer._opt_called = None, True  # type: ignore[attr-defined]
    if replaced is not None or not getattr(step, "hooked", False):
        optimizer.step()
    else:
        step.__wrapped__(optimizer)  # type: ignore[attr-defined]

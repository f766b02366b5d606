"""The parameter groups of a run: what each began with, and what it has now."""

import math
from collections.abc import Iterator

from torch.optim.lr_scheduler import LambdaLR

from sam_lightning.optim.sam import SAM


class Groups:
    """The settings of each parameter group, as this run's configuration has them.

    Args:
        sam: before it loads a checkpoint, which has the settings of an earlier part of the run.
    """

    def __init__(self, sam: SAM) -> None:
        self.sam = sam
        of_parameters = ("params", "param_names")
        self.given = [
            {key: value for key, value in group.items() if key not in of_parameters}
            for group in sam.param_groups
        ]

    def put_back(self, schedule: LambdaLR) -> None:
        """Give each group its own settings again, and the learning rate of the schedule's step."""
        schedule.base_lrs = [given["initial_lr"] for given in self.given]
        rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        lrs = [lr * factor(schedule.last_epoch) for lr, factor in rates]
        for group, given, lr in zip(self.sam.param_groups, self.given, lrs, strict=True):
            group.update({**given, "lr": lr})

    def set_radius(self, rho_min: float) -> None:
        """Let rho fall to ``rho_min`` as the learning rate falls to 0; other rhos in proportion."""
        rho = self.sam.defaults["rho"]
        if rho == 0:
            return
        for group, given in zip(self.sam.param_groups, self.given, strict=True):
            fraction = float(group["lr"]) / group["initial_lr"]
            radius = rho_min + (rho - rho_min) * fraction
            group["rho"] = radius * (given["rho"] / rho)

    def lr(self) -> float:
        """The present learning rate of a group with a factor of 1."""
        factor, lr = min(
            ((group.get("lr_factor", 1.0), float(group["lr"])) for group in self.sam.param_groups),
            key=lambda pair: abs(math.log(pair[0])),
        )
        return lr / factor

    def counts(self) -> tuple[int, int]:
        """Numbers of weights that train at some time of the run, and of those that SAM perturbs."""
        trained = sum(p.numel() for group in self.sam.param_groups for p in group["params"])
        return trained, sum(number for number, _ in self._perturbed())

    def perturbed_from(self) -> int:
        """The first epoch, counted from 0, in which SAM perturbs weights, if it ever does."""
        return int(min(epoch for _, epoch in self._perturbed()))

    def _perturbed(self) -> Iterator[tuple[int, float]]:
        """Number and first epoch of the weights of each parameter that SAM perturbs."""
        chosen = self.sam.param_names
        for group, given in zip(self.sam.param_groups, self.given, strict=True):
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if given["rho"] > 0 and (chosen is None or name in chosen):
                    yield p.numel(), given.get("from_epoch", 0)

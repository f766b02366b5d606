"""SAM, its relatives, schedules. Needs only torch."""

from sam_lightning.optim.batch_norm import frozen_running_stats
from sam_lightning.optim.methods.asam import AdaptiveAscent
from sam_lightning.optim.methods.esam import RandomSubsetAscent
from sam_lightning.optim.methods.fisher_sam import FisherAscent
from sam_lightning.optim.methods.friendly_sam import FriendlyAscent
from sam_lightning.optim.methods.gsam import SurrogateGap
from sam_lightning.optim.methods.linf import SignAscent
from sam_lightning.optim.methods.looksam import LookSAM
from sam_lightning.optim.methods.msam import MomentumAscent
from sam_lightning.optim.methods.vasso import AveragedAscent
from sam_lightning.optim.methods.wsam import WeightedSharpness
from sam_lightning.optim.perturbation import GradientAscent
from sam_lightning.optim.sam import SAM
from sam_lightning.optim.schedules import constant, cosine, multistep

__all__ = [
    "SAM",
    "AdaptiveAscent",
    "AveragedAscent",
    "FisherAscent",
    "FriendlyAscent",
    "GradientAscent",
    "LookSAM",
    "MomentumAscent",
    "RandomSubsetAscent",
    "SignAscent",
    "SurrogateGap",
    "WeightedSharpness",
    "constant",
    "cosine",
    "frozen_running_stats",
    "multistep",
]

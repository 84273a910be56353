"""The losses on a router behind one interface, by name.

Another loss is one file and one line here. What a loss is, and which of them depend on how a step is cut
into micro-batches: interface.py. What methods make of several: terms.py.
"""

from __future__ import annotations

from collections.abc import Callable

from dsmixer.losses.aesl import AeslOrthogonalityLoss, AeslVarianceLoss
from dsmixer.losses.auxiliary import AuxiliaryLoss, MixLoraLoss, QuadraticLoss, SwitchLoss
from dsmixer.losses.gmoe import GmoeNormalLoss, GmoePoissonLoss
from dsmixer.losses.interface import RoutingLoss
from dsmixer.losses.mean_entropy import MoleBalanceLoss, MutualInformationLoss
from dsmixer.losses.rsl import RoutingSpecializationLoss
from dsmixer.losses.supervised_gate import SupervisedGateLoss
from dsmixer.losses.supervised_margin import SupervisedMarginLoss
from dsmixer.losses.token_losses import TsallisEntropyLoss, ZLoss

__all__ = ["RoutingLoss", "SwitchLoss", "routing_losses"]

routing_losses: dict[str, Callable[..., RoutingLoss]] = {
    "rsl": RoutingSpecializationLoss,
    "switch": SwitchLoss,
    "auxiliary": AuxiliaryLoss,
    "quadratic": QuadraticLoss,
    "mixlora": MixLoraLoss,
    "z": ZLoss,
    "tsallis": TsallisEntropyLoss,
    "mutual_information": MutualInformationLoss,
    "mole": MoleBalanceLoss,
    "gmoe_poisson": GmoePoissonLoss,
    "gmoe_normal": GmoeNormalLoss,
    "aesl_orthogonality": AeslOrthogonalityLoss,
    "aesl_variance": AeslVarianceLoss,
    "supervised_gate": SupervisedGateLoss,
    "supervised_margin": SupervisedMarginLoss,
}

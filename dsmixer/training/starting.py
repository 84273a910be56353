"""What the mixers of a run start from, where that is not chance: adapters, or a published mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from dsmixer.adapters.importing import Pool, check_paths, check_scales, fill_bank, on_base, read_pool
from dsmixer.adapters.saved_mixture import SavedMixture, check_base, copy_router, read_mixture
from dsmixer.config.from_mixture import mixture_folder
from dsmixer.config.schema import Recipe
from dsmixer.experts.bank import ExpertBank
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.routing.router import Router


@dataclass(frozen=True)
class Start:
    """Ready-made weights of a run.

    Attributes:
        pool: adapters among its experts; None: all are new.
        mixture: the published mixture that all experts and routers come from; None: the routers are new.
    """

    pool: Pool | None = None
    mixture: SavedMixture | None = None

    def check(self, config: MixerConfig) -> None:
        """Refuse a mixture that gives an expert another rank, alpha or scale than its own.

        Raises:
            UserError: names the expert and both values.
        """
        if self.pool is not None:
            check_scales(self.pool, config)

    def fill(self, path: str, module: nn.Module, local: Sequence[str]) -> None:
        """Write what there is into a bank or a router just made.

        Args:
            path: of the projection that owns it.
            module: the bank or router.
            local: names of the experts in a bank, in its order.
        """
        if self.pool is not None and isinstance(module, ExpertBank):
            fill_bank(self.pool, path, module, local)
        if self.mixture is not None and isinstance(module, Router):
            copy_router(self.mixture, path, module)


def read_start(recipe: Recipe, bare: PreTrainedModel, targets: Sequence[str]) -> Start:
    """Read what the recipe starts from and hold it against the base's structure.

    Args:
        recipe: the run's.
        bare: the base without weights.
        targets: the projections that get mixers.

    Raises:
        UserError: an adapter or the mixture can't be read, or does not fit the base.
    """
    if recipe.mixer.mixture is not None:
        saved = read_mixture(mixture_folder(recipe.mixer.mixture))
        check_base(saved, bare, transfer=recipe.mixer.transfer)
        start = Start(saved.pool, saved)
    else:
        folders = {spec.name: spec.path for spec in recipe.mixer.experts or () if spec.path is not None}
        start = Start(on_base(read_pool(folders), bare) if folders else None)
    if start.pool is not None:
        check_paths(start.pool, bare, targets)
    return start

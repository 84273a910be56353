"""A mixture of ready-made adapters, made without the weights of its base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dsmixer.adapters.importing import Pool, fill_bank, on_base, pool_config
from dsmixer.config.schema import BaseConfig
from dsmixer.experts.bank import ExpertBank
from dsmixer.experts.init import named_generator, normal_rows
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.load import bare_base, load_tokenizer
from dsmixer.model.targets import find_targets


def assemble_mixture(
    base: BaseConfig, pool: Pool, *, targets: Sequence[str] | None = None, **options: Any
) -> Mixture:
    """A pool on the modules of a base, which stay on the meta device; experts and routers are real.

    The routers start as those of ``attach_mixers`` do, from the seed. It can be saved, not run.

    Args:
        base: the base model; only its configuration is read.
        pool: the adapters.
        targets: what gets mixers; None: the projections that the adapters have.
        options: other fields of ``MixerConfig``, such as ``top_k``.

    Raises:
        UserError: the base is not there or of a kind that can't be used, or an adapter does not fit it.
    """
    bare = bare_base(base)
    pool = on_base(pool, bare)
    config = pool_config(pool, bare, targets, **options)
    blocks = {target.path: target.block for target in find_targets(bare, config.targets)}

    @torch.no_grad()
    def settle(path: str, module: nn.Module) -> None:
        module.to_empty(device="cpu")
        if isinstance(module, ExpertBank):
            module.start(config.seed, path)
            fill_bank(pool, path, module, list(config.experts))
        else:
            generator = named_generator(config.seed, blocks[path], "router")
            weight_ED = module.get_parameter("weight")
            weight_ED.copy_(
                normal_rows(len(config.experts), weight_ED.shape[1], config.router_std, generator)
            )

    return attach_mixers(bare, config, settle=settle)


def tokenizer_of(base: BaseConfig) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer; None of a folder that has none.

    Raises:
        UserError: there is one and it can't be loaded.
    """
    folder = Path(base.model)
    if folder.is_dir() and not any(folder.glob("*token*")):
        return None
    return load_tokenizer(base.model, base.revision)

"""Module names of earlier releases of transformers, which adapters that were trained then still have.

Since 4.52 the language model of several models with images is ``model.language_model``, and was
``language_model.model``. Transformers renames the base's weights while it loads them, PEFT the adapter's;
here the same renaming is asked of transformers, for names that the base does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from dsmixer.adapters.low_rank_forms import LoraPair
from dsmixer.adapters.module_names import base_module_names
from dsmixer.adapters.peft_format import LoraAdapter


def with_names_of(model: nn.Module, adapters: Mapping[str, LoraAdapter]) -> dict[str, LoraAdapter]:
    """The adapters with the names that the model's modules have now.

    An adapter stays as it is unless each of its names leads to a module, and each to another.

    Args:
        model: the base; its weights may be on the meta device.
        adapters: by expert name.
    """
    if not isinstance(model, PreTrainedModel):
        return dict(adapters)
    names = set(base_module_names(model))
    if all(path in names for adapter in adapters.values() for path in adapter.pairs):
        return dict(adapters)
    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    found = {}
    for name, adapter in adapters.items():
        pairs: dict[str, LoraPair] = {}
        for path, pair in adapter.pairs.items():
            weight, _ = rename_source_key(f"{path}.weight", renamings, [])
            pairs[path if path in names else weight.removesuffix(".weight")] = pair
        fits = len(pairs) == len(adapter.pairs) and pairs.keys() <= names
        changed = fits and pairs.keys() != adapter.pairs.keys()
        found[name] = replace(adapter, pairs=pairs, verbatim=False) if changed else adapter
    return found

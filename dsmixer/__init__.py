"""dsmixer: mixtures of LoRA experts on frozen language models, trained on DeepSpeed.

The public names are loaded on first use, so that ``import dsmixer`` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsmixer.adapters.importing import import_adapters
    from dsmixer.adapters.loading import load_mixture
    from dsmixer.adapters.mixture_folder import save_mixture
    from dsmixer.adapters.pool_merge import merge_mixtures
    from dsmixer.adapters.pools import add_experts, remove_experts, rename_experts
    from dsmixer.config.errors import UserError
    from dsmixer.model.inject import Mixture, attach_mixers, route_to
    from dsmixer.model.mixer_config import MixerConfig
    from dsmixer.model.serving import ready_to_serve
    from dsmixer.routing.requests import BY_ROUTERS

__version__ = "0.1.0"

__all__ = [
    "BY_ROUTERS",
    "MixerConfig",
    "Mixture",
    "UserError",
    "add_experts",
    "attach_mixers",
    "import_adapters",
    "load_mixture",
    "merge_mixtures",
    "ready_to_serve",
    "remove_experts",
    "rename_experts",
    "route_to",
    "save_mixture",
]

_HOMES = {
    "BY_ROUTERS": "dsmixer.routing.requests",
    "MixerConfig": "dsmixer.model.mixer_config",
    "Mixture": "dsmixer.model.inject",
    "UserError": "dsmixer.config.errors",
    "add_experts": "dsmixer.adapters.pools",
    "attach_mixers": "dsmixer.model.inject",
    "import_adapters": "dsmixer.adapters.importing",
    "load_mixture": "dsmixer.adapters.loading",
    "merge_mixtures": "dsmixer.adapters.pool_merge",
    "ready_to_serve": "dsmixer.model.serving",
    "remove_experts": "dsmixer.adapters.pools",
    "rename_experts": "dsmixer.adapters.pools",
    "route_to": "dsmixer.model.inject",
    "save_mixture": "dsmixer.adapters.mixture_folder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

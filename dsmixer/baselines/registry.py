"""All methods by name, at their own settings. A new one is a file and a line here."""

from __future__ import annotations

from dsmixer.baselines.arrow import Arrow
from dsmixer.baselines.interface import Method
from dsmixer.baselines.lora_lego import LoraLego
from dsmixer.baselines.lorahub import LoraHub
from dsmixer.baselines.mixlora import MixLora
from dsmixer.baselines.mole import Mole
from dsmixer.baselines.one_lora import OneLora
from dsmixer.baselines.phatgoose import Phatgoose
from dsmixer.baselines.uniform import Own, Uniform, UniformFactors

methods: dict[str, Method] = {
    "own": Own(),
    "uniform": Uniform(),
    "uniform_factors": UniformFactors(),
    "lora_lego": LoraLego(),
    "arrow": Arrow(),
    "lorahub": LoraHub(),
    "lorahub_per_domain": LoraHub(per_domain=True),
    "phatgoose": Phatgoose(),
    "mole": Mole(),
    "one_lora": OneLora(),
    "mixlora": MixLora(),
}

"""The mixture as a method of PEFT: ``import dsmixer.peft``, then PEFT's own calls.

    get_peft_model(model, dsmixer.peft.MixerConfig(targets=["q", "v"], experts=["law", "chess"]))
    AutoPeftModelForCausalLM.from_pretrained("runs/NAME/mixture")

Everything that leans on PEFT's insides is in this file: the new member of its enum, and what its model asks
of a tuner and of a layer. It is tested with the versions that ``TESTED`` names.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import peft
import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import PeftType, register_peft_method
from torch import nn

from dsmixer.adapters.card import facts_of_mixers
from dsmixer.adapters.importing import check_expert_name, check_paths, check_scales, fill_bank
from dsmixer.adapters.mixture_folder import CONFIG_FILE, EXPERTS_FOLDER, ROUTERS_FILE, form_of_base
from dsmixer.adapters.peft_format import KEY_PREFIX
from dsmixer.adapters.peft_method import (
    IN_FILE,
    IN_FOLDERS,
    OF_BASE,
    PEFT_TYPE,
    check_file,
    check_saved,
    without_prefix,
    write_card,
)
from dsmixer.adapters.saved_mixture import read_mixture
from dsmixer.config.errors import UserError
from dsmixer.experts.bank import ExpertBank
from dsmixer.losses.rsl import RoutingSpecializationLoss
from dsmixer.model.inject import Mixture, attach_mixers, mixture_of
from dsmixer.model.mixed_linear import MixedLinear
from dsmixer.model.mixer_config import MixerConfig as Mixers
from dsmixer.model.routing_loss import RoutingInLoss

__all__ = ["MixerConfig", "MixtureModel"]

TESTED = ((0, 21), (0, 22))
TRAINED = ("both", "experts", "routers")


def check_version(version: str) -> None:
    """Refuse a PEFT whose insides were not tried.

    Raises:
        UserError: names the version and the range.
    """
    found = tuple(int(part) for part in version.split(".")[:2])
    if not TESTED[0] <= found < TESTED[1]:
        low, high = (".".join(map(str, end)) for end in TESTED)
        problem = f"PEFT {version} is installed, and dsmixer.peft is tested with {low} to before {high}"
        raise UserError(problem, fix=f"pip install 'peft>={low},<{high}'")


def extend_enum() -> PeftType:
    """PEFT's type of method with a member for mixtures; the same one however often it is asked for."""
    if PEFT_TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, PEFT_TYPE)
        member._name_, member._value_ = PEFT_TYPE, PEFT_TYPE
        # before the maps know it: an enum refuses to have a member set anew
        type.__setattr__(PeftType, PEFT_TYPE, member)
        PeftType._member_map_[PEFT_TYPE] = member
        PeftType._value2member_map_[PEFT_TYPE] = member
        PeftType._member_names_.append(PEFT_TYPE)
    return PeftType[PEFT_TYPE]


check_version(peft.__version__)
METHOD = extend_enum()


def _rsl() -> dict[str, Any]:
    return {"alpha": 0.1, "entropy_weight": 0.05, "entropy": "specialize", "usage": "topk"}


@dataclass
class MixerConfig(PeftConfig):
    """The mixers of ``dsmixer.MixerConfig``, as PEFT's calls take them; fields of that name mean the same.

    Attributes:
        train: what trains: ``experts``, ``routers`` or ``both``.
        rsl: ``alpha``, ``entropy_weight``, ``entropy`` and ``usage`` of the routing specialisation loss,
            which the model adds to its own loss in training; what is left out has its default. The usage is
            the micro-batch's own, and nothing ramps up.
        model_type: kind of the base; this and the next three are filled from the model.
        dtype: of the base.
        quantization: ``none``, ``nf4`` or ``fp4``, of the base.
        double_quantization: whether its scales are quantised too.
        weights_in: where a folder holds the weights; not for users.
    """

    targets: Sequence[str] = ()
    experts: Sequence[str] = ()
    rank: int = 64
    alpha: float = 128
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    rslora: bool = False
    router: str = "per_projection"
    router_std: float = 0.02
    compute: str = "auto"
    routing: str = "topk"
    top_k: int | None = None
    renormalize: bool = True
    top_p: float = 0.9
    seed: int = 0
    train: str = "both"
    rsl: Mapping[str, Any] = field(default_factory=_rsl)
    model_type: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    double_quantization: bool | None = None
    weights_in: str = IN_FILE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = METHOD
        self.targets, self.experts = list(self.targets), list(self.experts)
        self.ranks, self.alphas = dict(self.ranks), dict(self.alphas)
        self.rsl = {**_rsl(), **self.rsl}
        for name in self.experts:
            check_expert_name(name)
        self._trains = True
        self._source: tuple[str, dict[str, Any]] | None = None
        unknown = set(self.rsl) - set(_rsl())
        if unknown:
            fix = f"choose from {', '.join(_rsl())}"
            raise UserError(f"unknown keys {', '.join(sorted(unknown))}", where="rsl", fix=fix)
        if self.train not in TRAINED:
            raise UserError(
                f"{self.train!r} can't train", where="train", fix=f"choose from {', '.join(TRAINED)}"
            )
        routing = self.to_mixer_config().default_routing()
        alone = routing.mode == "topk" and routing.top_k == 1 and routing.renormalize
        if alone and self.train != "experts" and len(self.experts) > 1 and not self.inference_mode:
            raise UserError(
                "one expert a token, renormalised, has weight 1: the router gets no gradient from the task",
                where="top_k",
                fix="use top_k of 2 or more, renormalize=False, or train='experts'",
            )

    def to_mixer_config(self) -> Mixers:
        """The mixers alone, checked."""
        return Mixers(**{key.name: getattr(self, key.name) for key in fields(Mixers)})

    def routing_loss(self) -> RoutingSpecializationLoss:
        """RSL with the micro-batch's own usage."""
        return RoutingSpecializationLoss(**self.rsl, usage_from="micro_batch")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's, which also fills the card that PEFT has begun."""
        super().save_pretrained(save_directory, **kwargs)
        facts = {
            **facts_of_mixers(self.to_mixer_config()),
            "base": self.base_model_name_or_path,
            "task_type": str(getattr(self.task_type, "value", self.task_type)),
        }
        source = None if self._trains else self._loaded_from()
        write_card(Path(save_directory), facts, source)

    def _loaded_from(self) -> Path | None:
        """The folder on this machine that the configuration came from."""
        source, hub = self._source or ("", {})
        folder = Path(source) / (hub.get("subfolder") or "")
        return folder if source and folder.is_dir() else None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """PEFT's, which also remembers where the weights beside it are."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        hub = {key: kwargs[key] for key in ("revision", "cache_dir", "token") if kwargs.get(key) is not None}
        config._source = (str(pretrained_model_name_or_path), {**hub, "subfolder": subfolder})
        return config


class MixtureLayer(MixedLinear, BaseTunerLayer):
    """A mixed projection as PEFT knows layers: ``attach_mixers``' own, of another class."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[..., D]`` to ``[..., O]``; the base's own while adapters are disabled."""
        if self.disable_adapters:
            answer: torch.Tensor = self.base(x, *args, **kwargs)
            return answer
        return super().forward(x, *args, **kwargs)

    @property
    def base_layer(self) -> nn.Module:
        return self.base

    def enable_adapters(self, enabled: bool) -> None:
        """Let the experts speak or not; what trains is not this switch's business."""
        self._disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if names != self.active_adapters:
            raise _one_adapter(f"{', '.join(names) or 'none'} can't be made active")

    def _get_available_adapters(self) -> set[str]:
        return set(self.active_adapters)


def _one_adapter(problem: str) -> UserError:
    fix = "a mixture is one adapter with many experts: choose among them with dsmixer.route_to(model, NAME)"
    return UserError(problem, fix=fix)


class MixtureModel(BaseTuner):
    """PEFT's tuner that puts a mixture on a model."""

    prefix = "dsmixer_"
    tuner_layer_cls = MixtureLayer

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Attach the mixers that the configuration names.

        Raises:
            UserError: the model has mixers already, or lacks a target.
        """
        config = self._config(adapter_name)
        if getattr(model, "dsmixer", None) is not None:
            raise _one_adapter(f"the model has a mixture already, and {adapter_name} would be a second one")
        if config.weights_in == IN_FOLDERS and config._source is None:
            raise UserError(
                "the configuration of a mixture folder came without its folder, which holds the weights",
                fix="use PeftModel.from_pretrained(base, FOLDER) or an AutoPeftModel, without config=",
            )
        folder = config._loaded_from()
        if config.weights_in == IN_FILE and folder is not None:
            check_file(folder)
        config._trains = not config.inference_mode
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            mixture = attach_mixers(model, config.to_mixer_config())
        for mixer in mixture.mixers.values():
            mixer.__class__ = MixtureLayer
            cast(MixtureLayer, mixer)._active_adapter = [adapter_name]
        self.set_requires_grad(adapter_name, not config.inference_mode)
        _tell_base(config, mixture)
        self.in_loss = RoutingInLoss(mixture, config.routing_loss())
        self.targeted_module_names = list(mixture.mixers)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """What ``train`` names trains, or nothing does."""
        mixture, train = mixture_of(self.model), self._config(*self.peft_config).train
        for _, parameter in mixture.expert_parameters():
            parameter.requires_grad_(requires_grad and train != "routers")
        for _, parameter in mixture.router_parameters():
            parameter.requires_grad_(requires_grad and train != "experts")

    def _config(self, adapter_name: str) -> MixerConfig:
        config = self.peft_config[adapter_name]
        assert isinstance(config, MixerConfig), config
        return config

    def delete_adapter(self, adapter_name: str) -> None:
        raise _one_adapter("the only adapter can't be deleted")

    def unload(self) -> nn.Module:
        """The base model, without mixers."""
        mixture = mixture_of(self.model)
        for path, mixer in mixture.mixers.items():
            parent, _, name = path.rpartition(".")
            setattr(self.model.get_submodule(parent), name, mixer.base)
        self.in_loss.remove()
        del self.model.dsmixer
        return self.model

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: what a mixture adds depends on the token."""
        fix = "dsmixer export FOLDER --static TASK --out ADAPTER averages it into one plain adapter"
        raise UserError("a routed mixture can't be merged into the base's weights", fix=fix)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        self.merge_and_unload()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing: what trains is float32 from the start."""

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("inject_adapter attaches all mixers at once")

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Any, unwanted_adapter_names: Any
    ) -> dict[str, torch.Tensor]:
        mixture = mixture_of(model)
        names = [name for name, _ in (*mixture.expert_parameters(), *mixture.router_parameters())]
        prefix = KEY_PREFIX if any(key.startswith(KEY_PREFIX) for key in state_dict) else ""
        return {prefix + name: state_dict[prefix + name] for name in names}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        mixture, where = mixture_of(model), config._source[0] if config._source else "the adapter's weights"
        if config.weights_in == IN_FOLDERS and not state_dict:
            tensors = _folder_tensors(mixture, _local_folder(config))
            # saved again by PEFT, the weights are in its file
            config.weights_in = IN_FILE
        elif not state_dict:
            fix = "open it by itself: PeftModel.from_pretrained(base, FOLDER) on a base without a mixture"
            raise UserError("a mixture folder can't be loaded over a mixture that is on the model", fix=fix)
        else:
            tensors = without_prefix(state_dict)
        check_saved(mixture, tensors, where)
        return {KEY_PREFIX + name: tensor for name, tensor in tensors.items()}


def _tell_base(config: MixerConfig, mixture: Mixture) -> None:
    """Write into the configuration how the base is held; a warning where it was packed otherwise."""
    found = {**dict.fromkeys(OF_BASE), **form_of_base(mixture)}
    if config.quantization not in (None, found["quantization"]):
        warnings.warn(
            f"the base's quantization is {found['quantization']}, and the mixture was made on "
            f"{config.quantization}: its answers will be others. Load the base with the quantization_config "
            "of the training, or use dsmixer.load_mixture, which does",
            stacklevel=2,
        )
    for key, value in found.items():
        # what only answers goes on to say what it was trained on
        if getattr(config, key) is None or not config.inference_mode:
            setattr(config, key, value)


def _local_folder(config: MixerConfig) -> Path:
    """The mixture folder that a configuration came with; of the hub, what of it is needed is downloaded."""
    assert config._source is not None
    source, hub = config._source
    subfolder = hub.get("subfolder") or ""
    if not Path(source).is_dir():
        kept = [
            f"{subfolder}/{name}".lstrip("/") for name in (CONFIG_FILE, ROUTERS_FILE, f"{EXPERTS_FOLDER}/*")
        ]
        options = {key: value for key, value in hub.items() if key != "subfolder"}
        source = snapshot_download(source, allow_patterns=kept, **options)
    return Path(source) / subfolder


def _folder_tensors(mixture: Mixture, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a mixture folder by their names in the model, as its parameters hold them."""
    saved = read_mixture(folder)
    check_scales(saved.pool, mixture.config)
    check_paths(saved.pool, mixture.model, mixture.mixers)
    tensors = {f"{owner}.router.weight": weight_ED for owner, weight_ED in saved.routers.items()}
    for path, mixer in mixture.mixers.items():
        live = mixer.bank
        shape = {"ranks": live.ranks, "alphas": live.alphas, "rslora": live.rslora, "rank": live.rank}
        bank = ExpertBank(live.names, live.in_features, live.out_features, **shape)  # type: ignore[arg-type]
        fill_bank(saved.pool, path, bank, live.names)
        tensors[f"{path}.bank.lora_A"], tensors[f"{path}.bank.lora_B"] = bank.lora_A.data, bank.lora_B.data
    return tensors


if METHOD not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(
        name=PEFT_TYPE.lower(), config_cls=MixerConfig, model_cls=MixtureModel, prefix=MixtureModel.prefix
    )

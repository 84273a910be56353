"""Training written the plain way, with PEFT, autograd, ``clip_grad_norm_`` and ``torch.optim.AdamW``.

Of the package they take the data order and the start of the weights, and ``PlainStageTwo`` the mixers'
forward pass (which other tests hold to PEFT); no loss, scale, optimizer or engine of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

from dsmixer.config.recipe import LoadedRecipe, load_recipe
from dsmixer.config.schema import BaseConfig
from dsmixer.config.stages import StageConfig
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.load import load_base, load_tokenizer
from dsmixer.routing.modes import Routing
from dsmixer.training.data import StageData, load_run_data, stage_data
from dsmixer.training.run import mixer_config
from dsmixer.training.world import World
from support.comparing import Tensors

PEFT_TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "attn.c_proj"],
    "t5": ["q", "k", "v", "o"],
}


def mixture_of_recipe(recipe: Path, overrides: Sequence[str]) -> Mixture:
    """Base and mixers as a run starts with them."""
    loaded = load_recipe(recipe, overrides)
    data = load_run_data(loaded.recipe, None)
    base = load_base(loaded.recipe.base)
    return attach_mixers(base.model, mixer_config(loaded.recipe, data.expert_names(loaded.recipe), None))


def plain_base(base: BaseConfig) -> Any:
    """A base as transformers and bitsandbytes load it, without anything of this package."""
    dtype = getattr(torch, base.dtype)
    encoder = AutoConfig.from_pretrained(base.model).is_encoder_decoder
    auto_class = AutoModelForSeq2SeqLM if encoder else AutoModelForCausalLM
    if base.quantization == "none":
        return auto_class.from_pretrained(base.model, dtype=dtype)
    packing = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=base.quantization,
        bnb_4bit_use_double_quant=base.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    return auto_class.from_pretrained(base.model, dtype=dtype, quantization_config=packing)


@dataclass(frozen=True)
class Steps:
    """The examples of each optimizer step of a stage: ``[(domain, token ids, first target), ...]``."""

    loaded: LoadedRecipe
    data: StageData

    @classmethod
    def of(cls, recipe: Path, overrides: Sequence[str], stage: int) -> Steps:
        loaded = load_recipe(recipe, overrides)
        run_data = load_run_data(loaded.recipe, None)
        config = loaded.stage(f"stage{stage}")
        assert config.global_batch_size is not None
        data = stage_data(
            loaded,
            stage,
            run_data,
            run_data.expert_names(loaded.recipe),
            load_tokenizer(loaded.recipe.base.model),
            World(0, 1, torch.device("cpu")),
        )
        return cls(loaded, data)

    def __len__(self) -> int:
        return self.data.sampler.num_steps

    def __getitem__(self, step: int) -> list[tuple[int, torch.Tensor, int]]:
        store = self.data.store
        chosen = [example for row in self.data.sampler.rows(step) for example in row]
        return [
            (
                int(store.domain_ids[i]),
                torch.from_numpy(store.input_ids(i).astype("int64"))[None],
                int(store.target_starts[i]),
            )
            for i in chosen
        ]


def cosine_rate(peak: float, step: int, num_steps: int, warmup_ratio: float) -> float:
    """Linear warm-up to the peak over the first steps, then half a cosine that reaches 0 after the last."""
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))) / 2


def inputs_of(model: Any, ids_1S: torch.Tensor, first_target: int) -> dict[str, torch.Tensor]:
    """One example as the forward pass takes it: what an encoder reads and what its decoder is to write, or
    one text."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids_1S}
    return {"input_ids": ids_1S[:, :first_target], "labels": ids_1S[:, first_target:]}


def summed_loss(logits_1SV: torch.Tensor, ids_1S: torch.Tensor, first_target: int) -> torch.Tensor:
    """Cross-entropy of one example, summed over its targets."""
    if logits_1SV.shape[1] < ids_1S.shape[1]:  # a decoder's, which shifts labels by itself
        return functional.cross_entropy(logits_1SV[0], ids_1S[0, first_target:], reduction="sum")
    return functional.cross_entropy(
        logits_1SV[0, first_target - 1 : -1], ids_1S[0, first_target:], reduction="sum"
    )


def _adamw(parameters: list[nn.Parameter], config: StageConfig) -> torch.optim.AdamW:
    """The learning rate is set anew in every step."""
    betas, eps = config.betas, config.eps
    return torch.optim.AdamW(parameters, lr=1.0, betas=betas, eps=eps, weight_decay=config.weight_decay)


class PeftExperts:
    """Stage one as separate PEFT LoRA trainings, one a domain."""

    def __init__(self, recipe: Path, overrides: Sequence[str], kind: str) -> None:
        self.steps = Steps.of(recipe, overrides, 1)
        self.config = self.steps.loaded.recipe.stage1
        self.rank = self.steps.loaded.recipe.mixer.rank
        start = mixture_of_recipe(recipe, overrides)
        self.paths = list(start.mixers)
        self.models = [self._model(start, e, kind) for e in range(len(start.expert_names))]
        self.optimizers = [_adamw(self._lora(m), self.config) for m in self.models]

    def _model(self, start: Mixture, expert: int, kind: str) -> Any:
        mixer = self.steps.loaded.recipe.mixer
        lora = LoraConfig(
            r=mixer.rank,
            lora_alpha=mixer.alpha,  # type: ignore[arg-type]
            target_modules=PEFT_TARGETS[kind],
            fan_in_fan_out=kind == "gpt2",
        )
        base = plain_base(self.steps.loaded.recipe.base)
        model: Any = get_peft_model(base, lora)
        for path in self.paths:
            layer = model.base_model.model.get_submodule(path)
            bank = start.mixers[path].bank
            layer.lora_A.default.weight.data.copy_(bank.lora_A[expert, : self.rank])
            layer.lora_B.default.weight.data.copy_(bank.lora_B[expert, : self.rank].T)
        return model.train()

    def _lora(self, model: nn.Module) -> list[nn.Parameter]:
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run_step(self, step: int) -> tuple[float, dict[int, float], list[int]]:
        """Mean loss over all targets of the step, gradient norm by expert at work, targets by expert."""
        examples = self.steps[step]
        targets = [0] * len(self.models)
        for domain, ids, first in examples:
            targets[domain] += ids.shape[1] - first
        total = 0.0
        for domain, ids, first in examples:
            model = self.models[domain]
            loss = summed_loss(model(**inputs_of(model, ids, first)).logits, ids, first)
            (loss / targets[domain]).backward()
            total += loss.item()
        rate = cosine_rate(self.config.learning_rate, step, len(self.steps), self.config.warmup_ratio)
        norms = {e: self._update(e, rate) for e, count in enumerate(targets) if count}
        return total / sum(targets), norms, targets

    def _update(self, expert: int, rate: float) -> float:
        assert self.config.clip is not None
        norm = nn.utils.clip_grad_norm_(self._lora(self.models[expert]), self.config.clip)
        optimizer = self.optimizers[expert]
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    def weights(self, like: Tensors) -> Tensors:
        """The adapters as stacked banks, padded with zero rows."""
        stacked = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
        for path in self.paths:
            for e, model in enumerate(self.models):
                layer = model.base_model.model.get_submodule(path)
                stacked[f"{path}.bank.lora_A"][e, : self.rank] = layer.lora_A.default.weight.detach()
                stacked[f"{path}.bank.lora_B"][e, : self.rank] = layer.lora_B.default.weight.detach().T
        return stacked


class PlainStageTwo:
    """Stage two with ``topk`` routing by one autograd graph over the whole step, an AdamW for each expert."""

    def __init__(self, recipe: Path, overrides: Sequence[str], stage_one: Tensors) -> None:
        self.steps = Steps.of(recipe, overrides, 2)
        self.config = self.steps.loaded.recipe.stage2
        self.mixture = mixture_of_recipe(recipe, overrides)
        self.mixture.model.requires_grad_(False).train()
        self.experts: list[dict[str, nn.Parameter]] = [
            {name: nn.Parameter(tensor[e].clone()) for name, tensor in stage_one.items()}
            for e in range(len(self.mixture.expert_names))
        ]
        self.origin = [{name: p.detach().clone() for name, p in expert.items()} for expert in self.experts]
        self.routers = {
            name: nn.Parameter(parameter.detach().clone())
            for name, parameter in self.mixture.router_parameters()
        }
        self.units = [list(unit.values()) for unit in (*self.experts, self.routers)]
        self.optimizers = [_adamw(unit, self.config) for unit in self.units]
        num_experts = len(self.experts)
        self.usage = torch.full((len(self.routers), num_experts), 1.0 / num_experts)
        self._logits: dict[int, list[torch.Tensor]] = {}
        for index, router in enumerate(self.mixture.routers.values()):
            router.register_forward_hook(self._keeper(index))

    def _keeper(self, index: int) -> Any:
        return lambda module, inputs, logits: self._logits.setdefault(index, []).append(logits)

    def run_step(self, step: int) -> dict[str, float]:
        """The figures of a metrics row, from one backward pass."""
        task, tokens = self._task(self.steps[step])
        rsl, entropy = self._rsl(step, tokens)
        preserve = self._preserve()
        (task + rsl + preserve).backward()
        grads = [p.grad for unit in self.units for p in unit if p.grad is not None]
        grad_norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
        self._update(step)
        return {
            "task_loss": task.item(),
            "rsl": rsl.item(),
            "preserve": preserve.item(),
            "grad_norm": grad_norm,
            "routing_entropy": entropy,
        }

    def _task(self, examples: list[tuple[int, torch.Tensor, int]]) -> tuple[torch.Tensor, int]:
        self._logits.clear()
        weights = {name: torch.stack([e[name] for e in self.experts]) for name in self.experts[0]}
        routing = Routing(mode="topk", top_k=self.config.top_k)
        model = self.mixture.model
        losses, targets, tokens = [], 0, 0
        with self.mixture.context.routed(routing):
            for _, ids, first in examples:
                given = inputs_of(model, ids, first)
                out = functional_call(model, {**weights, **self.routers}, (), given)
                losses.append(summed_loss(out.logits, ids, first))
                targets, tokens = targets + ids.shape[1] - first, tokens + ids.shape[1]
        return torch.stack(losses).sum() / targets, tokens

    def _rsl(self, step: int, tokens: int) -> tuple[torch.Tensor, float]:
        """``mean over routers of alpha sum_i p_i f_i + lambda mean H(p)``, f of the step before."""
        rsl = self.config.rsl
        ramp = min(1.0, (step + 1) / (rsl.ramp * len(self.steps)))
        losses, entropies, usage = [], [], []
        for index in range(len(self.routers)):
            p_TE = torch.cat(self._logits[index]).softmax(1)
            assert p_TE.shape[0] == tokens or self.mixture.model.config.is_encoder_decoder
            entropy = -(p_TE * p_TE.log()).sum(1).mean()
            balance = (p_TE.mean(0) * self.usage[index]).sum()
            losses.append(ramp * (rsl.alpha * balance + rsl.entropy_weight * entropy))
            entropies.append(entropy.item())
            top = p_TE.detach().topk(self.config.top_k, dim=1)
            shares = top.values / top.values.sum(1, keepdim=True)
            usage.append(torch.zeros_like(p_TE).scatter(1, top.indices, shares).mean(0))
        self.usage = torch.stack(usage)
        return torch.stack(losses).mean(), sum(entropies) / len(entropies)

    def _preserve(self) -> torch.Tensor:
        """``beta sum over the named experts of ||theta - theta(0)||^2``; every expert is reached here."""
        assert bool((self.usage.sum(0) > 0).all())
        held = self.config.preserve.experts
        terms = [
            (expert[name] - before).square().sum()
            for expert, origin, own in zip(self.experts, self.origin, self.mixture.expert_names, strict=True)
            if held == "all" or own in held
            for name, before in origin.items()
        ]
        return self.config.preserve.beta * torch.stack(terms).sum()

    def _update(self, step: int) -> None:
        assert self.config.clip is not None and self.config.router_learning_rate is not None
        for unit, optimizer in zip(self.units, self.optimizers, strict=True):
            nn.utils.clip_grad_norm_(unit, self.config.clip)
            peak = self.config.router_learning_rate if unit is self.units[-1] else self.config.learning_rate
            optimizer.param_groups[0]["lr"] = cosine_rate(
                peak, step, len(self.steps), self.config.warmup_ratio
            )
            optimizer.step()
            optimizer.zero_grad()

    def weights(self) -> Tensors:
        """All experts and routers, by parameter name."""
        return dict(self._weights())

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.experts[0]:
            yield name, torch.stack([expert[name].detach() for expert in self.experts])
        for name, router in self.routers.items():
            yield name, router.detach().clone()

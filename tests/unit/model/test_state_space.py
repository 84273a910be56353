"""Experts on state-space projections act, with and without fused kernels, in training and in decoding.

The oracle is transformers' own untouched model with ``W0 + s B A`` in place of a projection's weight. With
kernels it is transformers' fused path over plain operations (``support.state_space_kernels``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from support.state_space_kernels import CALLS, modeling_with_kernels
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.modeling_utils import PreTrainedModel

from dsmixer import import_adapters, save_mixture
from dsmixer.config.errors import UserError
from dsmixer.config.schema import BaseConfig
from dsmixer.model.inject import Mixture, attach_mixers, route_to
from dsmixer.model.load import bare_base, checkpoint_activations
from dsmixer.model.mixed_linear import MixedLinear
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.model.quantized import freeze_packed
from dsmixer.model.targets import find_targets

TinyModel = Callable[..., PreTrainedModel]

CLASSES = {
    "mamba": "MambaForCausalLM",
    "falcon_mamba": "FalconMambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
}
PROJECTIONS = {
    "mamba": ("in", "x", "dt", "out"),
    "falcon_mamba": ("in", "x", "dt", "out"),
    "mamba2": ("in", "out"),
}
CASES = [(kind, fused) for kind in PROJECTIONS for fused in (False, True)]
RANK, ALPHA = 4, 8
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def build(tiny: TinyModel, kind: str, fused: bool, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model whose logits are of size one, as transformers defines it with or without kernel packages."""
    plain = tiny(kind)
    for name, parameter in plain.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    if not fused:
        return plain.to(dtype)
    model: PreTrainedModel = getattr(modeling_with_kernels(kind), CLASSES[kind])(plain.config)
    model.load_state_dict(plain.state_dict())
    return model.to(dtype).eval()


def attach(model: PreTrainedModel, kind: str, roles: tuple[str, ...] = ()) -> Mixture:
    config = MixerConfig(roles or PROJECTIONS[kind], ["a", "b"], rank=RANK, alpha=ALPHA)
    mixture = attach_mixers(model, config)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in mixture.expert_parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return mixture


def merged(model: PreTrainedModel, mixture: Mixture, expert: int) -> dict[str, nn.Parameter]:
    """The weights of an untouched model into which one expert is added, as leaves of a graph."""
    return {
        f"{path}.weight": nn.Parameter(
            model.get_parameter(f"{path}.weight").detach()
            + ALPHA / RANK * (mixer.bank.lora_A[expert].T @ mixer.bank.lora_B[expert].detach()).T
        )
        for path, mixer in mixture.mixers.items()
    }


def oracle_of(tiny: TinyModel, kind: str, fused: bool) -> PreTrainedModel:
    """Falcon-Mamba's kernel for training computes something else than it decodes with; that is followed."""
    return build(tiny, kind, fused and kind != "falcon_mamba")


def largest(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).detach().abs().max())


@pytest.fixture(autouse=True)
def _no_calls() -> Iterator[None]:
    CALLS.clear()
    yield


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_the_kernels_used_here_compute_what_transformers_does_without_them(
    tiny: TinyModel, kind: str
) -> None:
    """But for Falcon-Mamba's in training, whose norm of the time step stands behind ``dt_proj``."""
    plain, fused = (build(tiny, kind, with_kernels) for with_kernels in (False, True))
    for training in (False, True):
        apart = largest(plain.train(training)(IDS).logits, fused.train(training)(IDS).logits)
        print(f"{kind} training={training}: {apart:.1e}")
        assert apart > 0.1 if training and kind == "falcon_mamba" else apart < 1e-5
    whole = {"mamba2": "mamba_split_conv1d_scan_combined"}.get(kind, "mamba_inner_fn")
    assert CALLS[whole] == 2 and CALLS["causal_conv1d_fn"] == 4, CALLS


@pytest.mark.parametrize(("kind", "fused"), CASES)
@pytest.mark.parametrize("training", [False, True])
def test_an_expert_computes_what_the_untouched_model_computes_with_its_product_in_the_weights(
    tiny: TinyModel, kind: str, fused: bool, training: bool
) -> None:
    """Logits, and by the chain rule the gradients of A and B, for each projection alone and for all."""
    for roles in (*((role,) for role in PROJECTIONS[kind]), PROJECTIONS[kind]):
        model, untouched = build(tiny, kind, fused).train(training), oracle_of(tiny, kind, fused)
        base = untouched(IDS).logits
        mixture = attach(model, kind, roles)
        weights = merged(untouched, mixture, 0)
        theirs = functional_call(untouched.train(training), weights, (IDS,)).logits
        with route_to(model, "a"):
            ours = model(IDS).logits
        assert largest(theirs, base) > 1e-2, "the expert shows"
        apart = largest(ours, theirs)
        assert apart < 2e-5, (roles, apart)
        pattern = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
        (ours * pattern).sum().backward()
        (theirs * pattern).sum().backward()
        worst = 0.0
        for path, mixer in mixture.mixers.items():
            grad_OD, A, B = weights[f"{path}.weight"].grad, mixer.bank.lora_A[0], mixer.bank.lora_B[0]
            assert grad_OD is not None and mixer.bank.lora_A.grad is not None
            assert mixer.bank.lora_B.grad is not None
            for grad, by_chain_rule in (
                (mixer.bank.lora_A.grad, ALPHA / RANK * B.detach() @ grad_OD),
                (mixer.bank.lora_B.grad, ALPHA / RANK * A.detach() @ grad_OD.T),
            ):
                assert grad[0].any() and not grad[1].any()
                worst = max(worst, largest(grad[0], by_chain_rule) / float(by_chain_rule.abs().max()))
        print(f"{kind} fused={fused} training={training} {','.join(roles)}: {apart:.1e} {worst:.1e}")
        assert worst < 1e-4, (roles, worst)


class WrittenOut(nn.Module):
    """``W0 x + sum over the K likeliest experts of w_e s B_e A_e x``, token by token and expert by expert.

    transformers multiplies by ``dt_proj.weight`` and adds the bias later: ``weight`` is the whole sum there.
    """

    def __init__(self, mixer: MixedLinear, router: nn.Module) -> None:
        super().__init__()
        self.linear, self.top_k = mixer.base, mixer.context.routing.top_k
        self.G = nn.Parameter(router.weight.detach().clone())
        self.A, self.B = (nn.Parameter(m.detach().clone()) for m in (mixer.bank.lora_A, mixer.bank.lora_B))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        rows = []
        for token in x.reshape(-1, x.shape[-1]):
            p, chosen = torch.softmax(self.G @ token, 0), []
            likeliest = p.topk(self.top_k).indices
            for e in likeliest:
                chosen.append(p[e] / p[likeliest].sum() * ALPHA / RANK * (self.B[e].T @ (self.A[e] @ token)))
            rows.append(self.linear.weight @ token + sum(chosen))
        return torch.stack(rows).view(*x.shape[:-1], -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x) if self.bias is None else self.product(x) + self.bias

    @property
    def bias(self) -> Any:
        return self.linear.bias

    @property
    def weight(self) -> WrittenOut:
        return self

    def __matmul__(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_mixture_of_two_of_three_experts_is_the_sum_written_out_in_transformers_own_pass(
    tiny: TinyModel, kind: str
) -> None:
    """Logits, and gradients of every A, B and router, in training."""
    model, written = build(tiny, kind, False).train(), build(tiny, kind, False).train()
    config = MixerConfig(PROJECTIONS[kind], ["a", "b", "c"], rank=RANK, alpha=ALPHA, top_k=2, router_std=0.5)
    mixture = attach_mixers(model, config)
    for _, parameter in mixture.expert_parameters():
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    sums = {}
    for path, mixer in mixture.mixers.items():
        parent, _, name = path.rpartition(".")
        sums[path] = WrittenOut(mixer, mixture.routers[path])
        setattr(written.get_submodule(parent), name, sums[path])
    ours, theirs = model(IDS).logits, written(IDS).logits
    assert largest(ours, theirs) < 2e-5
    for logits in (ours, theirs):
        logits.square().sum().backward()
    worst = 0.0
    for path, mixer in mixture.mixers.items():
        own = (mixer.bank.lora_A.grad, mixer.bank.lora_B.grad, mixture.routers[path].weight.grad)
        for grad, expected in zip(
            own, (p.grad for p in (sums[path].A, sums[path].B, sums[path].G)), strict=True
        ):
            assert grad is not None and expected is not None and grad.any()
            worst = max(worst, largest(grad, expected) / float(expected.abs().max()))
    print(f"{kind}: {largest(ours, theirs):.1e} {worst:.1e}")
    assert worst < 1e-4


@pytest.mark.parametrize(
    ("kind", "whole"), [("mamba", "mamba_inner_fn"), ("mamba2", "mamba_split_conv1d_scan_combined")]
)
def test_transformers_fused_path_stays_where_only_in_carries_experts(
    tiny: TinyModel, kind: str, whole: str
) -> None:
    """It calls ``in_proj`` as a module; any other projection takes the path that calls them all."""
    calls = []
    for roles in (("in",), ("out",)):
        model = build(tiny, kind, True).train()
        attach(model, kind, roles)
        CALLS.clear()
        model(IDS)
        calls.append((CALLS[whole], CALLS["causal_conv1d_fn"]))
    assert calls == [(2, 2), (0, 2)], "two layers, whose convolution is a kernel in both"


@pytest.mark.parametrize("fused", [False, True])
def test_falcon_mamba_trains_on_the_function_that_it_decodes_with(tiny: TinyModel, fused: bool) -> None:
    """Its fused kernel for training computes another one, even where only ``in`` carries experts."""
    model = build(tiny, "falcon_mamba", fused)
    attach(model, "falcon_mamba", ("in",))
    assert largest(model.train()(IDS).logits, model.eval()(IDS).logits) < 1e-5
    assert not CALLS["mamba_inner_fn"]


@torch.no_grad()
def decoded(model: PreTrainedModel, ids: torch.Tensor, first: int) -> torch.Tensor:
    """Logits behind each position from ``first`` on, one position at a time behind a cache."""
    out = model(ids[:, :first], use_cache=True)
    steps, cache = [out.logits[:, -1]], out.cache_params
    for i in range(first, ids.shape[1]):
        steps.append(model(ids[:, i : i + 1], cache_params=cache, use_cache=True).logits[:, -1])
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize(("kind", "fused"), CASES)
@pytest.mark.parametrize("prompt", [1, 6])
def test_decoding_token_by_token_equals_the_whole_forward_pass(
    tiny: TinyModel, kind: str, fused: bool, prompt: int
) -> None:
    """By one expert, and by the routers; a prompt shorter than the convolution is wide, and a longer one."""
    model = build(tiny, kind, fused)
    attach(model, kind)
    for expert in ("a", None):
        with torch.no_grad(), nullcontext() if expert is None else route_to(model, expert):
            whole = model(IDS).logits[:, prompt - 1 :]
            apart = largest(decoded(model, IDS, prompt), whole)
        print(f"{kind} fused={fused} prompt={prompt} {expert or 'routers'}: {apart:.1e}")
        assert apart < 2e-5
    steps = 2 * 2 * (IDS.shape[1] - prompt)
    assert CALLS["selective_state_update"] == CALLS["causal_conv1d_update"] == (steps if fused else 0)


@pytest.mark.parametrize(("kind", "fused"), CASES)
def test_a_left_padded_batch_generates_what_each_prompt_generates_alone(
    tiny: TinyModel, kind: str, fused: bool
) -> None:
    model = build(tiny, kind, fused)
    attach(model, kind)
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    prompts = [IDS[0], IDS[1, :5], IDS[1, :2]]
    padded = torch.stack([nn.functional.pad(ids, (9 - len(ids), 0)) for ids in prompts])
    together = model.generate(padded, attention_mask=(padded != 0).long(), **options)
    for row, ids in enumerate(prompts):
        alone = model.generate(ids[None], attention_mask=torch.ones_like(ids)[None], **options)
        assert torch.equal(alone.sequences[0, len(ids) :], together.sequences[row, 9:])
        for one, all_rows in zip(alone.logits, together.logits, strict=True):
            assert largest(one[0], all_rows[row]) < 2e-5


@pytest.mark.parametrize(("kind", "fused"), CASES)
def test_experts_that_add_nothing_leave_the_base_as_it_was_in_bfloat16(
    tiny: TinyModel, kind: str, fused: bool
) -> None:
    """To the bit: the bias of the time step joins its product behind the rounding, as in transformers."""
    model = build(tiny, kind, fused, torch.bfloat16)
    before = model(IDS).logits
    attach_mixers(model, MixerConfig(PROJECTIONS[kind], ["a", "b"], rank=RANK))
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_layers_that_are_run_again_in_the_backward_pass_get_the_same_gradients(
    tiny: TinyModel, kind: str
) -> None:
    grads = []
    for again in (False, True):
        model = build(tiny, kind, False).train()
        mixture = attach(model, kind)
        if again:
            checkpoint_activations(model)
        model(IDS).logits.square().sum().backward()
        grads.append([p.grad for _, p in (*mixture.expert_parameters(), *mixture.router_parameters())])
    for one, other in zip(*grads, strict=True):
        assert one is not None and other is not None and one.any()
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_base_in_4_bits_computes_with_the_weights_that_it_packs(
    tiny: TinyModel, kind: str, tmp_path: Path
) -> None:
    """transformers multiplies by Mamba's ``dt_proj.weight`` as it is stored; here the layer is called."""
    build(tiny, kind, False).save_pretrained(tmp_path)
    packing = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=packing, dtype=torch.float32)
    freeze_packed(model, torch.float32)
    unpacked = build(tiny, kind, False)
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        value = parameter if state is None else dequantize_4bit(parameter.data, state)
        unpacked.get_parameter(name).data.copy_(value)
    mixture = attach(model, kind, ("in",))
    with route_to(model, None):
        assert largest(model(IDS).logits, unpacked(IDS).logits) < 2e-5
    weights = merged(unpacked, mixture, 1)
    with route_to(model, "b"):
        assert largest(model(IDS).logits, functional_call(unpacked, weights, (IDS,)).logits) < 2e-5


def test_an_unknown_kind_of_state_space_mixer_takes_experts_on_in_alone(tiny: TinyModel) -> None:
    model = tiny("mamba")
    for layer in model.backbone.layers:
        layer.mixer.__class__ = type("AnotherMixer", (type(layer.mixer),), {})
    assert len(find_targets(model, ["in"])) == 2
    for target in ("out", "dt_proj"):
        with pytest.raises(UserError, match="AnotherMixer, which may hand its weight to a fused kernel"):
            find_targets(model, [target])


def test_rows_of_several_examples_are_refused_because_the_state_would_go_on(
    tiny: TinyModel, tmp_path: Path
) -> None:
    for kind in PROJECTIONS:
        tiny(kind).config.save_pretrained(tmp_path)
        base = BaseConfig(model=str(tmp_path))
        assert bare_base(base, packing=False).config.model_type == kind
        with pytest.raises(UserError, match=f"{kind} carries its state") as caught:
            bare_base(base, packing=True)
        assert "data.packing" in str(caught.value) and "packing: false" in str(caught.value)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_an_expert_folder_computes_the_same_in_peft_wherever_peft_acts(
    tiny: TinyModel, kind: str, tmp_path: Path
) -> None:
    """PEFT refuses ``out_proj``, and what it puts on ``dt_proj`` transformers passes over; imported again, an
    expert on any of them acts."""
    for role in PROJECTIONS[kind]:
        model, untouched = build(tiny, kind, False), build(tiny, kind, False)
        mixture = attach_mixers(model, MixerConfig([role], ["a"], rank=8, alpha=16))
        for _, parameter in mixture.expert_parameters():
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
        save_mixture(mixture, tmp_path / role, base="a base")
        folder = tmp_path / role / "experts" / "a"
        with route_to(model, "a"):
            ours = model(IDS).logits
        again = build(tiny, kind, False)
        import_adapters(again, {"a": folder})
        with route_to(again, "a"):
            assert torch.equal(again(IDS).logits, ours)
        base = untouched(IDS).logits
        assert largest(ours, base) > 1e-2
        if role == "out":
            with pytest.raises(ValueError, match="out_proj"):
                PeftModel.from_pretrained(untouched, folder)
            continue
        theirs = PeftModel.from_pretrained(untouched, folder).eval()(IDS).logits
        # PEFT multiplies in another order, and not every processor rounds a product of other sizes alike
        torch.testing.assert_close(theirs, base if role == "dt" else ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_peft_on_x_and_dt_has_no_effect_in_training_with_fused_kernels(tiny: TinyModel, kind: str) -> None:
    """Why the mixers' own pass is needed: no error, no change, no gradient."""
    for name, acts in (("in_proj", True), ("x_proj", False), ("dt_proj", False)):
        model = build(tiny, kind, True).train()
        base = model(IDS).logits
        lora: Any = get_peft_model(model, LoraConfig(r=RANK, target_modules=[name], init_lora_weights=False))
        logits = lora.train()(IDS).logits
        assert (largest(logits, base) > 1e-2) == acts == logits.requires_grad
        assert acts or torch.equal(logits, base)

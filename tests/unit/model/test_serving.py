"""A mixture that only answers: the same outputs from weights in the base's dtype."""

from __future__ import annotations

import pytest
import torch
from support.tiny import CONFIGS
from transformers import AutoModelForCausalLM

from dsmixer import MixerConfig, UserError, attach_mixers, ready_to_serve, save_mixture


def small(dtype):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS["llama"](), dtype=dtype).eval()


@pytest.mark.parametrize("router", ["per_projection", "per_block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_weights_in_the_bases_dtype_give_the_same_logits_bit_for_bit(dtype, router):
    model = small(dtype)
    mixture = attach_mixers(
        model, MixerConfig(targets=("q", "k", "o"), experts=("a", "b", "c"), rank=4, router=router)
    )
    for mixer in mixture.mixers.values():
        mixer.bank.lora_B.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(3, 259, (2, 40), generator=torch.Generator().manual_seed(2))
    before = model(input_ids=ids).logits
    assert ready_to_serve(model) is model
    parameters = [*mixture.expert_parameters(), *mixture.router_parameters()]
    assert {parameter.dtype for _, parameter in parameters} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_a_large_pool_answers_a_prompt_and_a_token_as_before_but_for_the_rounding_of_the_weights(dtype):
    model, names = small(dtype), [f"e{number}" for number in range(40)]
    mixture = attach_mixers(model, MixerConfig(targets=("q", "k", "o"), experts=names, rank=8))
    for mixer in mixture.mixers.values():
        mixer.bank.lora_B.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(1))
    for router in mixture.routers.values():  # wide, so that no rounding changes a choice
        router.weight.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(3))
    ids = torch.randint(3, 259, (1, 40), generator=torch.Generator().manual_seed(2))
    before = [model(input_ids=of).logits for of in (ids, ids[:, :1])]
    ready_to_serve(model)
    after = [model(input_ids=of).logits for of in (ids, ids[:, :1])]
    bound = {torch.float32: 0.0, torch.bfloat16: 2e-2}[dtype]
    for left, right in zip(before, after, strict=True):
        assert (left - right).norm() <= bound * left.norm()


def test_what_is_ready_to_serve_is_no_longer_saved(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        model = small(dtype)
        mixture = attach_mixers(model, MixerConfig(targets=("q",), experts=("a", "b"), rank=4))
        ready_to_serve(model)
        if dtype == torch.float32:  # nothing was lost
            save_mixture(mixture, tmp_path / "m", base="org/base")
            continue
        with pytest.raises(UserError, match="float32 digits are gone"):
            save_mixture(mixture, tmp_path / "lost", base="org/base")
        assert not (tmp_path / "lost").exists()


def test_a_model_without_mixers_is_refused():
    with pytest.raises(UserError, match="has no mixers"):
        ready_to_serve(small(torch.float32))

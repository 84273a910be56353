"""Dense training with sparse inference: stage two routes in one way, the mixture that it makes in another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import CONFIGS
from transformers import AutoModelForCausalLM

from dsmixer import attach_mixers
from dsmixer.config.recipe import load_recipe
from dsmixer.routing.modes import Routing
from dsmixer.training.run import mixer_config
from dsmixer.training.stages import routing_in_training

EXPERTS = ["law", "chess", "go"]


def both(tmp_path: Path, *overrides: str) -> tuple[Any, Routing]:
    """What a recipe makes of its mixture, and how its stage two routes."""
    path = tmp_path / "recipe.yaml"
    path.write_text("base: {model: org/m}\ndata: {domains: [{name: law, train: org/d}]}\n")
    recipe = load_recipe(path, list(overrides)).recipe
    config = mixer_config(recipe, EXPERTS, None)
    return config, routing_in_training(recipe.stage2, config)


@pytest.mark.parametrize(
    ("written", "trained", "used"),
    [
        ([], "topk", "topk"),
        (["stage2.routing=soft"], "soft", "soft"),
        (["stage2.routing=soft", "stage2.inference_routing=topk"], "soft", "topk"),
        (["stage2.inference_routing=top_p", "stage2.top_p=0.5"], "topk", "top_p"),
    ],
)
def test_the_second_key_is_the_mixtures_alone(
    tmp_path: Path, written: Sequence[str], trained: str, used: str
) -> None:
    config, routing = both(tmp_path, *written, "stage2.top_k=2")
    assert (routing.mode, config.default_routing().mode) == (trained, used)
    assert routing.top_k == config.default_routing().top_k == 2


def test_the_mixture_answers_without_an_expert_that_is_no_tokens_choice(tmp_path: Path) -> None:
    """The third expert's logit is the least of every token; it speaks in training, and in use it does not."""
    config, routing = both(
        tmp_path, "stage2.routing=soft", "stage2.inference_routing=topk", "stage2.top_k=2", "mixer.rank=2"
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    ids = torch.randint(3, 200, (1, 6))
    with torch.no_grad():
        alone = base(ids).logits
        mixture = attach_mixers(base, config)
        for mixer in mixture.mixers.values():
            mixer.bank.lora_B[2].normal_()
            # logits in descending order: those of the third come last
            mixer._outside[1].register_forward_hook(lambda module, given, z: z.sort(1, descending=True)[0])
        assert torch.equal(mixture.model(ids).logits, alone)
        with mixture.context.routed(routing):
            assert not torch.allclose(mixture.model(ids).logits, alone, atol=1e-2)

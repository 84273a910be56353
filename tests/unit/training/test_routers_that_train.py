"""Stage two tells a loss on the routers whose rows train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import CONFIGS
from transformers import AutoModelForCausalLM

from dsmixer import MixerConfig, attach_mixers
from dsmixer.config.stages import RoutingTermConfig, Stage2Config
from dsmixer.data.collate import MicroBatch, StepBatch
from dsmixer.routing.modes import Routing, topk
from dsmixer.routing.statistics import RouterOutput
from dsmixer.training.stages import SoftStage, expert_lookup

EXPERTS = ["law", "chess", "new"]
LOGITS = [[1.0, 0.5, 3.0], [2.0, 1.0, 0.5]]


@pytest.mark.parametrize(
    ("routers", "expected"),
    [
        (("new",), [1 + 3.0 - 0.5, 1 + 2.0 - 0.5]),  # K = 2: the second of the others; the best of them
        ("all", [1 + 3.0 - 1.0, 1 + 2.0 - 0.5]),
    ],
)
def test_a_margin_is_paid_by_the_rows_that_the_recipe_names(routers: Any, expected: list[float]) -> None:
    """One token of law and one of new."""
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    mixture = attach_mixers(model, MixerConfig(targets=["q"], experts=EXPERTS, rank=2, alpha=4))
    term = RoutingTermConfig(loss="supervised_margin", settings={"weight": 1.0})
    stage = SoftStage(
        config=Stage2Config(experts="frozen", routers=routers, routing_loss=(term,)),
        num_steps=1,
        mixture=mixture,
        routing=Routing(top_k=2),
        device=torch.device("cpu"),
        num_domains=2,
        expert_of_domain=expert_lookup([0, 2], torch.device("cpu")),
    )
    domain_ids = torch.tensor([[0, 1]])
    micro = MicroBatch(domain_ids, domain_ids, domain_ids, domain_ids, domain_ids, 2, 2)
    stage.start_step(0, StepBatch([micro], torch.tensor([1, 1]), 2))
    stage.batch_routing(micro)
    logits_TE = torch.tensor(LOGITS)
    p_TE = logits_TE.softmax(1)
    loss, _ = stage.router_loss()
    assert loss is not None
    output = RouterOutput(logits_TE, p_TE, topk(p_TE, stage.routing), None)
    assert loss(output, 0).item() == pytest.approx(sum(expected))

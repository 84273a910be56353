"""The mixture as a textbook has it: a loop over the experts, each on the tokens that chose it.

Plain torch, nothing of the package but the loss of the logits. The same sum as ours: softmax of a router, the
K largest with sum 1, products in the dtype of the base, what trains in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.bench.case import Case
from tests.bench.decoding import Decoding
from tests.bench.systems.interface import Built
from tests.bench.systems.llama import SCALING, expert_pair, is_target, place_of, random_llama, router_weight
from tests.bench.systems.training import AdamWStep, mean_loss


class LoopMixture(nn.Module):
    """``y = W0 x + sum over the K chosen of w_e s B_e A_e x``.

    Args:
        base: the frozen projection.
        case: the shapes.
        layer: of the projection.
        role: of the projection.
    """

    def __init__(self, base: nn.Module, case: Case, layer: int, role: str) -> None:
        super().__init__()
        self.base, self.top_k = base, case.top_k
        self.router = nn.Parameter(router_weight(case, layer, role))
        pairs = [expert_pair(case, layer, role, number) for number in range(case.experts)]
        self.lora_A = nn.ParameterList([a_RD for a_RD, _ in pairs])
        self.lora_B = nn.ParameterList([b_OR for _, b_OR in pairs])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TD = x.flatten(0, -2)
        p_TE = F.linear(x_TD, self.router.to(x.dtype)).float().softmax(-1)
        weights_TK, chosen_TK = p_TE.topk(self.top_k, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        y = self.base(x)
        sum_TO = torch.zeros_like(y.flatten(0, -2))
        for expert, (a_RD, b_OR) in enumerate(zip(self.lora_A, self.lora_B, strict=True)):
            tokens, places = (chosen_TK == expert).nonzero(as_tuple=True)
            if len(tokens):
                low = F.linear(x_TD[tokens], a_RD.to(x.dtype))
                out = F.linear(low, b_OR.to(x.dtype)) * SCALING
                weights = weights_TK[tokens, places, None].to(out.dtype)
                sum_TO = sum_TO.index_add(0, tokens, out * weights)
        return y + sum_TO.view_as(y)


def build(case: Case) -> Built:
    """Experts and routers train."""
    model: Any = random_llama(case)
    for path in [name for name, _ in model.named_modules() if is_target(name)]:
        model.set_submodule(path, LoopMixture(model.get_submodule(path), case, *place_of(path)))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if case.what == "decode":
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(model.dtype)
        return Built(0, decode_token=Decoding(model, case.rows, case.sequence, case.device).next_token)
    step = AdamWStep(case, parameters, mean_loss(model.train()))
    return Built(step.trained, step)

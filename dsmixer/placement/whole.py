"""Whole tensors from the parts that the ranks hold."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from dsmixer.placement.exchange import Placement, TokenExchange
from dsmixer.placement.groups import unpartitioned
from dsmixer.placement.pieces import is_bank, whole_shape


def whole_parameter(name: str, parameter: nn.Parameter, placement: Placement) -> torch.Tensor:
    """A parameter's full value over all ranks, on the CPU.

    A collective where ZeRO-3 holds it partitioned, or where experts are spread over ranks.
    """
    own = unpartitioned(parameter)
    layout, exchange = placement.layout, placement.exchange
    if not is_bank(name) or layout.size == 1:
        return own.cpu().clone()
    whole = own.new_zeros(whole_shape(name, tuple(own.shape), layout))
    first = torch.tensor(layout.counted, device=own.device)
    whole[torch.tensor(layout.local, device=own.device)[first]] = own[first]
    assert isinstance(exchange, TokenExchange)
    dist.all_reduce(whole, group=exchange.group)
    return whole.cpu()

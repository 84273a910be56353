"""The router's product against ``F.linear``, and what it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsmixer.routing.router import Router


def make(dtype: torch.dtype) -> tuple[Router, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    router = Router(5, 8)
    torch.nn.init.normal_(router.weight, generator=draw)
    x_TD = torch.randn(7, 8, generator=draw).to(dtype).requires_grad_()
    return router, x_TD, torch.randn(7, 5, generator=draw)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_and_gradients_are_those_of_a_linear_layer_in_the_input_s_type(dtype: torch.dtype) -> None:
    router, x_TD, incoming_TE = make(dtype)
    weight_ED = router.weight.detach().clone().requires_grad_()
    expected_TE = F.linear(x_TD, weight_ED.to(dtype))
    logits_TE = router(x_TD)
    assert logits_TE.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(logits_TE, expected_TE.to(logits_TE.dtype))
    wanted = torch.autograd.grad(expected_TE, (x_TD, weight_ED), incoming_TE.to(dtype))
    found = torch.autograd.grad(logits_TE, (x_TD, router.weight), incoming_TE.to(logits_TE.dtype))
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right)


def test_a_frozen_router_passes_its_input_s_gradient_on_and_gets_none() -> None:
    router, x_TD, incoming_TE = make(torch.float32)
    router.requires_grad_(False)
    router(x_TD).backward(incoming_TE)
    assert router.weight.grad is None and x_TD.grad is not None
    torch.testing.assert_close(x_TD.grad, incoming_TE @ router.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_and_the_weight_themselves_are_kept_and_nothing_else(dtype: torch.dtype) -> None:
    router, x_TD, _ = make(dtype)
    kept = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        router(x_TD)
    assert kept == {t.untyped_storage().data_ptr() for t in (x_TD, router.weight)}

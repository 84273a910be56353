"""The routers' loss inside a model's own: the closed form, where it counts and where it must not."""

from __future__ import annotations

import pytest
import torch
from support.tiny import CONFIGS
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from dsmixer.config.errors import UserError
from dsmixer.losses.rsl import RoutingSpecializationLoss
from dsmixer.model.inject import attach_mixers
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.model.routing_loss import RoutingInLoss
from dsmixer.routing.router import Router

K = 2
ALPHA, LAMBDA = 0.7, 0.3


def mixture_on(model, **options):
    settings = {"targets": ["q", "v"], "experts": list("abcd"), "rank": 2, "alpha": 4, "router_std": 0.3}
    return attach_mixers(model, MixerConfig(**{**settings, "top_k": K, **options}))


def causal(kind="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32)


def loss_of(alpha=ALPHA, entropy_weight=LAMBDA):
    return RoutingSpecializationLoss(alpha=alpha, entropy_weight=entropy_weight, usage_from="micro_batch")


@pytest.fixture
def batch():
    ids = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 6:] = mask[2, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def read_inputs(model):
    """What each router is given, in the order of the modules, by a hook that is not ours."""
    seen = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_pre_hook(lambda module, args: seen.append((module, args[0].detach())))
    return seen


def closed_form(seen, real_T, alpha=ALPHA, entropy_weight=LAMBDA):
    """eq. 5 with the micro-batch's usage, in float64, one token after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for router, x_TD in seen:
        tokens = x_TD.double()[real_T]
        p_TE = torch.softmax(tokens @ router.weight.double().T, dim=1)
        usage_E = torch.zeros(p_TE.shape[1], dtype=torch.float64)
        for p_E in p_TE.detach():
            best = p_E.topk(K).indices
            usage_E[best] += p_E[best] / p_E[best].sum()
        balance = (p_TE.mean(0) * usage_E / len(tokens)).sum()
        entropy = -(p_TE * p_TE.log()).sum(1).mean()
        total = total + alpha * balance + entropy_weight * entropy
    return total / len(seen)


@pytest.mark.parametrize("router", ["per_projection", "per_block"])
def test_the_models_loss_gains_the_closed_form_and_its_gradient(router, batch):
    mixture = mixture_on(causal(), router=router)
    model = mixture.model.train()
    bare = model(**batch).loss
    seen = read_inputs(model)
    in_loss = RoutingInLoss(mixture, loss_of())
    loss = model(**batch).loss
    assert len(seen) == len(mixture.routers)
    real_T = batch["attention_mask"].flatten().bool()
    want = closed_form(seen, real_T)
    torch.testing.assert_close(loss.double() - bare.double(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(in_loss.last.double(), want, rtol=1e-6, atol=1e-7)
    # experts that say nothing yet leave the routers no gradient of the task
    weights = [found.weight for found in mixture.routers.values()]
    got, exact = torch.autograd.grad(loss, weights), torch.autograd.grad(want, weights)
    for have, wanted in zip(got, exact, strict=True):
        torch.testing.assert_close(have, wanted.float(), rtol=1e-4, atol=1e-7)
    in_loss.remove()
    assert torch.equal(model(**batch).loss, bare)


def test_it_counts_in_training_with_labels_alone(batch):
    mixture = mixture_on(causal())
    model = mixture.model.train()
    bare = model(**batch)
    in_loss = RoutingInLoss(mixture, loss_of())
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, bare.loss)
    assert torch.equal(model.eval()(**batch).loss, bare.loss) and in_loss.last is None
    unlabelled = {key: batch[key] for key in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model.train()(**unlabelled).logits, bare.logits)
    for router in mixture.routers.values():
        router.weight.requires_grad_(False)
    assert torch.equal(model(**batch).loss, bare.loss) and in_loss.last is None


def test_a_step_of_several_batches_weighs_routing_as_it_weighs_the_task(batch):
    mixture = mixture_on(causal())
    model = mixture.model.train()
    targets = (batch["labels"][:, 1:] != -100).sum()
    bare = model(**batch, num_items_in_batch=4 * targets).loss
    in_loss = RoutingInLoss(mixture, loss_of())
    gained = model(**batch, num_items_in_batch=4 * targets).loss - bare
    torch.testing.assert_close(gained, in_loss.last / 4)
    assert isinstance(model(**batch, return_dict=False), tuple)


@pytest.mark.parametrize("between", [False, True])
def test_layers_run_twice_count_once(batch, between):
    """``between``: another pass without gradients comes before the backward pass, as of a reference model."""
    want = {}
    for checkpointed in (False, True):
        mixture = mixture_on(causal())
        model = mixture.model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        RoutingInLoss(mixture, loss_of())
        loss = model(**batch, use_cache=False).loss
        if between:
            with torch.no_grad():
                model(input_ids=batch["input_ids"][:1, :3])
        loss.backward()
        found = [loss.detach(), *(router.weight.grad for router in mixture.routers.values())]
        for name, value in enumerate(found):
            torch.testing.assert_close(value, want.setdefault(name, value))


def test_under_autocast_the_loss_is_taken_in_full_precision(batch):
    mixture = mixture_on(causal())
    model = mixture.model.train()
    in_loss = RoutingInLoss(mixture, loss_of())
    seen = read_inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch).loss.backward()
    assert all(x.dtype == torch.bfloat16 for _, x in seen)
    want = closed_form(seen, batch["attention_mask"].flatten().bool())
    torch.testing.assert_close(in_loss.last.double(), want, rtol=5e-3, atol=0)


def test_behind_an_encoder_each_router_has_its_own_tokens():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    mixture = mixture_on(T5ForConditionalGeneration(config))
    model = mixture.model.train()
    in_loss = RoutingInLoss(mixture, loss_of())
    seen = read_inputs(model)
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    labels = torch.tensor([[5, 6, 1], [7, 1, -100]])
    model(input_ids=ids, attention_mask=mask, labels=labels)
    real = {14: mask.flatten().bool(), 6: (labels != -100).flatten()}
    parts = [closed_form([one], real[len(one[1])]) for one in seen]
    torch.testing.assert_close(in_loss.last.double(), torch.stack(parts).mean(), rtol=1e-5, atol=1e-7)


def test_under_checkpointing_a_second_pass_waits_for_the_first_ones_backward(batch):
    mixture = mixture_on(causal())
    model = mixture.model.train()
    RoutingInLoss(mixture, loss_of())
    other = {key: value[:2] for key, value in batch.items()}
    for given in (batch, other):
        model(**given).loss.backward()
    wanted = [router.weight.grad.clone() for router in mixture.routers.values()]
    model.zero_grad()
    # nothing is run again without checkpointing: both at once are fine
    (model(**batch).loss + model(**other).loss).backward()
    for router, want in zip(mixture.routers.values(), wanted, strict=True):
        torch.testing.assert_close(router.weight.grad, want, rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch).loss.backward()
    first = model(**batch).loss
    with pytest.raises(UserError, match="second training pass"):
        model(**other)
    del first  # a pass that was given up is waited for no longer
    model.zero_grad()
    for given in (batch, other):
        model(**given).loss.backward()
    for router, want in zip(mixture.routers.values(), wanted, strict=True):
        torch.testing.assert_close(router.weight.grad, want, rtol=1e-4, atol=1e-6)

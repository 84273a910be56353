"""What a model computes for an example in a packed row is what it computes for the example alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from dsmixer.data.collate import MicroBatch, collate
from dsmixer.data.packing import pack
from dsmixer.data.store import TokenStore

VOCABULARY = 90
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**COMMON),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=5),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
}
LENGTHS = [14, 3, 2, 9, 20, 7, 11, 2, 5, 6]
TARGET_STARTS = [4, 1, 1, 5, 10, 6, 1, 1, 2, 3]


@pytest.fixture(scope="module")
def store(make_store: Callable[..., TokenStore]) -> TokenStore:
    return make_store(LENGTHS, target_starts=TARGET_STARTS, vocab_size=VOCABULARY)


def model_of(name: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # The usual start is so small that attention is nearly uniform and a leak would hardly show.
            torch.nn.init.normal_(parameter, std=0.3)
    return model.float().eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    return model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits


def token_losses(model: PreTrainedModel, batch: MicroBatch) -> dict[tuple[int, int], float]:
    """The loss of every target token by its example and its position there, shifted as transformers does."""
    logits = logits_of(model, batch)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch.labels[:, 1:], ignore_index=-100, reduction="none"
    )
    kept = batch.labels[:, 1:] != -100
    keys = zip(batch.example_ids[:, 1:][kept].tolist(), batch.position_ids[:, 1:][kept].tolist(), strict=True)
    return dict(zip(keys, losses[kept].tolist(), strict=True))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_logits_are_those_of_each_example_alone(store: TokenStore, name: str, attention: str) -> None:
    model = model_of(name, attention)
    rows = pack(store.lengths, range(len(store)), 44)
    assert len(rows) == 2 and min(map(len, rows)) > 2
    batch = collate(store, rows, pad_token_id=0)
    assert (batch.example_ids == -1).any(), "the case has no padding"
    packed, flat = logits_of(model, batch), logits_of(model, batch.flat())[0]
    for i in range(len(store)):
        alone = model(input_ids=torch.tensor(store.input_ids(i).tolist())[None], use_cache=False).logits[0]
        assert (packed[batch.example_ids == i] - alone).abs().max() < 1e-5
        assert (flat[batch.flat().example_ids[0] == i] - alone).abs().max() < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_and_unpacked_batches_give_every_target_token_the_same_loss(
    store: TokenStore, name: str
) -> None:
    model = model_of(name, "sdpa")
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(3)).tolist()
    packed: dict[tuple[int, int], float] = {}
    unpacked: dict[tuple[int, int], float] = {}
    for rows in ([*pack(store.lengths, order, 44), ()],):
        packed |= token_losses(model, collate(store, rows, 0))
    for first in range(0, len(order), 4):
        unpacked |= token_losses(model, collate(store, [(i,) for i in order[first : first + 4]], 0))
    assert set(packed) == set(unpacked) and len(packed) == store.target_counts.sum()
    assert max(abs(packed[key] - unpacked[key]) for key in packed) < 1e-5


def test_what_stands_beside_an_example_changes_nothing_in_it(store: TokenStore) -> None:
    model = model_of("llama", "sdpa")
    one = logits_of(model, collate(store, [(0, 3)], 0))[0, 14:23]
    other = logits_of(model, collate(store, [(4, 3, 7)], 5))[0, 20:29]
    assert (one - other).abs().max() < 1e-5

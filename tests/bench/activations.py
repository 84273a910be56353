"""Bytes a token that the experts on one decoder block keep for the backward pass, beside PEFT's.

    python tests/bench/activations.py [--hidden 2048] [--pools 6x64 64x16]

A Llama of random weights with experts on q, k, v and o of every layer. A training forward pass is run under
saved-tensor hooks, every piece of memory counted once, weights left out. What grows with tokens in one more
layer, less what the frozen base keeps by itself, is the figure: layers 1 and 2, n and 2 n tokens. So casts of
weights and what a model keeps once (X-LoRA's classifier) are not in it.

The methods, with float32 adapters as PEFT makes them, each at the pool's rank and dropout:

- LoRA: one PEFT LoRA;
- LoRA x E: E PEFT LoRA adapters, active together;
- X-LoRA: PEFT's, E adapters that train, a scaling for each layer, token and adapter, K of them not zero;
- stage one: this mixture, every token with its own expert;
- stage two: this mixture, a router for each projection, K of E experts, with the routing loss.

D = 2048, K = 3, PEFT 0.21, torch 2.13:

     E   r  type      dropout      LoRA   LoRA x E     X-LoRA  stage one  stage two
     6  64  bfloat16  0          33,792     38,912    235,760      4,096      4,352
     6  64  bfloat16  0.1        66,560    399,360    432,368      4,096      4,352
     6  64  float32   0           9,216     14,336    211,328      8,192      8,448
     6  64  float32   0.1        66,560    399,360    407,936      8,192      8,448
    64  16  bfloat16  0          33,024     49,152  2,147,936      4,096      5,280
    64  16  bfloat16  0.1        65,792  4,210,688  4,245,088      4,096      5,280
    64  16  float32   0           8,448     24,576  2,124,896      8,192      9,376
    64  16  float32   0.1        65,792  4,210,688  4,222,048      8,192      9,376

What o reads is attention's output, which the base keeps. In bfloat16 PEFT keeps a float32 copy of what each
projection reads. Its masks take 4 bytes an entry on the CPU, where this was run, and 1 on a GPU: 41,984
there instead of 66,560, and of the two large pools' 4.2 million 2.6 are left.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from dsmixer.losses.balance import routing_losses
from dsmixer.model.inject import attach_mixers
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.routing.context import BatchRouting
from dsmixer.routing.modes import Routing

TOP_K = 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Setting:
    """E experts of rank R, D wide."""

    num_experts: int
    rank: int
    hidden: int
    dtype: torch.dtype
    dropout: float

    @property
    def names(self) -> list[str]:
        return [str(e) for e in range(self.num_experts)]

    def lora(self) -> LoraConfig:
        """One expert as PEFT has it."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank,
            lora_dropout=self.dropout,
            target_modules=TARGETS,
            task_type="CAUSAL_LM",
        )


# a model of so many layers, and what to run its forward pass in
Built = tuple[Any, Callable[[int], Any]]


def base(setting: Setting, num_layers: int) -> LlamaForCausalLM:
    """Frozen, in training, with hidden states that have a gradient as those between layers do."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=setting.hidden,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(setting.dtype).requires_grad_(False)
    model.enable_input_require_grads()
    return model


def bare(setting: Setting, num_layers: int) -> Built:
    return base(setting, num_layers), lambda tokens: nullcontext()


def one_lora(setting: Setting, num_layers: int) -> Built:
    return get_peft_model(base(setting, num_layers), setting.lora()), lambda tokens: nullcontext()


def loras_together(setting: Setting, num_layers: int) -> Built:
    model = get_peft_model(base(setting, num_layers), setting.lora(), adapter_name="0")
    for name in setting.names[1:]:
        model.add_adapter(name, setting.lora())
    model.base_model.set_adapter(setting.names)
    return model, lambda tokens: nullcontext()


def x_lora(setting: Setting, num_layers: int) -> Built:
    """Its adapters come from a folder; here all from one."""
    with tempfile.TemporaryDirectory() as folder:
        saved, _ = one_lora(setting, num_layers)
        saved.save_pretrained(folder)
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=setting.hidden,
            adapters=dict.fromkeys(setting.names, str(Path(folder))),
            layerwise_scalings=True,
            top_k_lora=TOP_K,
            use_trainable_adapters=True,
        )
        model = get_peft_model(base(setting, num_layers), config)
    return model, lambda tokens: nullcontext()


def mixture(setting: Setting, num_layers: int, routing: Routing) -> Built:
    config = MixerConfig(
        "qkvo",
        setting.names,
        rank=setting.rank,
        alpha=2 * setting.rank,
        dropout=setting.dropout,
        top_k=TOP_K,
        router_std=0.02,
    )
    made = attach_mixers(base(setting, num_layers), config)
    for _, parameter in (*made.expert_parameters(), *made.router_parameters()):
        parameter.requires_grad_(True)
    made.context.routing = routing
    loss, usage_E = routing_losses["rsl"](), torch.full((setting.num_experts,), 1 / setting.num_experts)

    def recording(tokens: int) -> Any:
        batch = BatchRouting(torch.arange(tokens) % setting.num_experts, torch.ones(tokens))
        return made.context.recording(batch, None, lambda output, index: loss(output, usage_E, 1.0))

    return made.model, recording


def stage_one(setting: Setting, num_layers: int) -> Built:
    return mixture(setting, num_layers, Routing(mode="hard"))


def stage_two(setting: Setting, num_layers: int) -> Built:
    return mixture(setting, num_layers, Routing(mode="topk", top_k=TOP_K))


METHODS: dict[str, Callable[[Setting, int], Built]] = {
    "LoRA": one_lora,
    "LoRA x E": loras_together,
    "X-LoRA": x_lora,
    "stage one": stage_one,
    "stage two": stage_two,
}


def saved_bytes(built: Built, tokens: int) -> int:
    """Bytes that a training forward pass keeps."""
    model, around = built
    model.train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    pieces: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            pieces[memory.data_ptr()] = memory.nbytes()
        return tensor

    ids = torch.arange(tokens)[None] % 128
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), around(tokens):
        model(input_ids=ids)
    return sum(pieces.values())


def a_layer(method: Callable[[Setting, int], Built], setting: Setting, tokens: int) -> float:
    """Bytes a token of one layer."""
    found: dict[tuple[int, int], int] = {}
    for num_layers in (1, 2):
        built = method(setting, num_layers)
        for length in (tokens, 2 * tokens):
            found[num_layers, length] = saved_bytes(built, length)
    few, many = (found[2, n] - found[1, n] for n in (tokens, 2 * tokens))
    return (many - few) / tokens


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048, help="D")
    parser.add_argument("--tokens", type=int, default=64, help="n")
    parser.add_argument("--pools", nargs="+", default=["6x64", "64x16"], help="experts x rank")
    args = parser.parse_args()
    table = Table("E", "r", "type", "dropout", *METHODS, title="bytes a token and decoder block")
    for pool in args.pools:
        num_experts, rank = (int(number) for number in pool.split("x"))
        for dtype in (torch.bfloat16, torch.float32):
            for dropout in (0.0, 0.1):
                setting = Setting(num_experts, rank, args.hidden, dtype, dropout)
                alone = a_layer(bare, setting, args.tokens)
                values = [a_layer(method, setting, args.tokens) - alone for method in METHODS.values()]
                cells = (f"{value:,.0f}" for value in values)
                name = str(dtype).removeprefix("torch.")
                table.add_row(str(num_experts), str(rank), name, f"{dropout:g}", *cells)
                print(pool, dtype, dropout, *values, flush=True)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()

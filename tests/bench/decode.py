"""One decoded token with a mixture, beside the bare base and beside PEFT's LoRA with one adapter.

    python -m tests.bench.decode                  # all sizes
    python -m tests.bench.decode --short          # one small size, to see that it runs

A random Llama of a few layers and a small vocabulary, so that the layers weigh as much as they do in a deep
model. Prefill, then tokens with the cache on, greedy; the three take turns token by token, so that a busy
machine slows all of them. With one thread (``OMP_NUM_THREADS=1``) it is that thread's own time. Times are
medians; a ratio is the median over the tokens of (own time / time of the bare base in the same turn), with
its quartiles.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dsmixer.model.inject import attach_mixers
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.model.serving import ready_to_serve
from tests.bench.decoding import Decoding
from tests.bench.timing import in_rounds, ratios, spread, turn_of

POOLS = ((6, 64), (64, 16), (196, 16))  # experts and rank
TARGETS = ("q", "k", "v", "o")
PROMPT_TOKENS = 32
WARM_UP = 3  # tokens that are not counted


@dataclass(frozen=True)
class Size:
    """One line of the table."""

    width: int
    dtype: str
    batch: int
    experts: int
    rank: int


@dataclass(frozen=True)
class Timing:
    """Milliseconds a token and the ratio to the bare base: median and quartiles."""

    who: str
    milliseconds: float
    ratio: float
    ratio_low: float
    ratio_high: float


def main() -> None:
    """Measure, print, and write where asked."""
    args = _arguments()
    torch.manual_seed(0)
    results = []
    for size in _sizes(args):
        timings = measure(size, args.layers, args.tokens)
        results.append({**asdict(size), "timings": [asdict(timing) for timing in timings]})
        _show_line(size, timings)
    Console(width=110).print(_table(results))
    if args.json is not None:
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "layers": args.layers}
        args.json.write_text(json.dumps({**facts, "sizes": results}, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--pools", type=int, nargs="+", default=[0, 1, 2], help=f"places in {POOLS}")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=60, help="decoded by each")
    parser.add_argument("--short", action="store_true", help="one small size")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.short:
        args.widths, args.dtypes, args.batches, args.pools = [256], ["float32"], [1], [0]
        args.layers, args.tokens = 2, 10
    return args


def _sizes(args: argparse.Namespace) -> Iterator[Size]:
    for width, dtype, pool, batch in itertools.product(args.widths, args.dtypes, args.pools, args.batches):
        yield Size(width, dtype, batch, *POOLS[pool])


def measure(size: Size, num_layers: int, tokens: int) -> list[Timing]:
    """The three models, a token each in turns."""
    base = _llama(size, num_layers)
    models = {
        "base": base,
        "PEFT LoRA": _with_lora(_twin(base), size.rank),
        "dsmixer": _with_mixers(_twin(base), size),
    }
    runs = {name: Decoding(model, size.batch, PROMPT_TOKENS) for name, model in models.items()}
    turns = {name: turn_of(run.next_token, torch.get_num_threads()) for name, run in runs.items()}
    in_rounds(turns, WARM_UP)
    times = in_rounds(turns, tokens)
    return [_timing(name, times[name], times["base"]) for name in models]


def _llama(size: Size, num_layers: int) -> LlamaForCausalLM:
    heads = size.width // 64
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=size.width,
        intermediate_size=size.width * 7 // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
    )
    return LlamaForCausalLM(config).to(getattr(torch, size.dtype)).eval()


def _twin(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """Another model over the same weights."""
    with torch.device("meta"):
        twin = LlamaForCausalLM(base.config)
    twin.load_state_dict(base.state_dict(), assign=True)
    twin.model.rotary_emb = base.model.rotary_emb
    return twin.eval()


def _with_lora(model: LlamaForCausalLM, rank: int) -> nn.Module:
    names = [f"{role}_proj" for role in TARGETS]
    lora = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
    return lora.to(next(model.parameters()).dtype).eval()


def _with_mixers(model: LlamaForCausalLM, size: Size) -> nn.Module:
    names = [f"expert{e}" for e in range(size.experts)]
    mixture = attach_mixers(
        model, MixerConfig(targets=TARGETS, experts=names, rank=size.rank, alpha=size.rank)
    )
    for mixer in mixture.mixers.values():
        nn.init.normal_(mixer.bank.lora_B, std=0.01)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    ready_to_serve(model)
    return model


def _timing(who: str, times: Sequence[float], base: Sequence[float]) -> Timing:
    ratio = ratios(times, base)
    return Timing(who, 1e3 * spread(times).median, ratio.median, ratio.low, ratio.high)


def _show_line(size: Size, timings: Sequence[Timing]) -> None:
    parts = [
        f"{t.who} {t.milliseconds:.2f} ms {t.ratio:.3f} ({t.ratio_low:.3f}..{t.ratio_high:.3f})"
        for t in timings
    ]
    print(f"{size}: " + ", ".join(parts), flush=True)


def _table(results: Sequence[dict]) -> Table:
    table = Table(title="One decoded token, times the bare base", title_justify="left")
    for name in ("width", "dtype", "batch", "E", "r", "base ms", "PEFT LoRA", "dsmixer", "quartiles"):
        table.add_column(name, justify="right")
    for row in results:
        base, lora, ours = row["timings"]
        cells = (row["width"], row["dtype"], row["batch"], row["experts"], row["rank"])
        table.add_row(
            *map(str, cells),
            f"{base['milliseconds']:.2f}",
            f"{lora['ratio']:.3f}",
            f"{ours['ratio']:.3f}",
            f"{ours['ratio_low']:.3f} to {ours['ratio_high']:.3f}",
        )
    return table


if __name__ == "__main__":
    main()

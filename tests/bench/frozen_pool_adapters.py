"""Five LoRA adapters as others make them: PEFT and transformers' Trainer, each on one benchmark.

    python -m tests.bench.frozen_pool_adapters sst2 gsm8k --base BASE --pool runs/frozen_pool

Nothing of dsmixer takes part. Ranks, alphas and the way of scaling differ on purpose: a pool of adapters
found ready-made has no common rank.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
MAX_LENGTH = 512
ROWS_A_STEP = 8


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter of the pool: its benchmark and what its LoRA is made of."""

    name: str
    rank: int
    alpha: float
    rslora: bool = False
    epochs: int = 1


SPECS = (
    AdapterSpec("sst2", rank=8, alpha=16),
    AdapterSpec("qnli", rank=16, alpha=16),
    AdapterSpec("gsm8k", rank=32, alpha=64),
    AdapterSpec("mbpp", rank=16, alpha=8, rslora=True, epochs=3),
    AdapterSpec("arc_easy", rank=4, alpha=8),
)


def main() -> None:
    """Train adapters one after the other and save each as PEFT does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=[spec.name for spec in SPECS])
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--pool", type=Path, required=True, help="folder with rows/, which gets adapters/")
    args = parser.parse_args()
    for spec in SPECS:
        if spec.name in args.names:
            text = (args.pool / "rows" / f"{spec.name}.adapter.jsonl").read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.splitlines()]
            train(spec, rows, args.base, args.pool / "adapters" / spec.name)


def train(spec: AdapterSpec, rows: list[dict[str, Any]], base: Path, out: Path) -> None:
    """One LoRA on q, k, v and o, whose loss is that of the completions."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            lora_dropout=0.05,
            use_rslora=spec.rslora,
            target_modules=TARGETS,
            task_type="CAUSAL_LM",
        ),
    )
    settings = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=spec.epochs,
        per_device_train_batch_size=ROWS_A_STEP,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        train_sampling_strategy="group_by_length",
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    encoded = [encode(row, tokenizer) for row in rows]
    Trainer(
        model=model,
        args=settings,
        train_dataset=[row for row in encoded if len(row["input_ids"]) <= MAX_LENGTH],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    ).train()
    model.save_pretrained(out)


def encode(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """Prompt, completion and end of sequence; the prompt carries no loss."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    whole = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
    return {
        "input_ids": whole,
        "attention_mask": [1] * len(whole),
        "labels": [-100] * len(prompt) + whole[len(prompt) :],
    }


if __name__ == "__main__":
    main()

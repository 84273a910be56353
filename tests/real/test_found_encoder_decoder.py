"""A Flan-T5 adapter as found, trained on: routers over it and another one, in a run under the launcher."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.found_adapters import train_by_chance
from support.launching import REPOSITORY, TIMEOUT_SECONDS, launch
from support.tiny import byte_tokenizer
from transformers import T5Config, T5ForConditionalGeneration

FOUND = Path(__file__).resolve().parents[3] / "shared" / "adapters" / "flan-t5-small"

pytestmark = [
    pytest.mark.skipif(not FOUND.is_dir(), reason="the adapters are not beside the checkout"),
    pytest.mark.timeout(TIMEOUT_SECONDS),
]
TARGETS = ["q", "k", "v", "o"]
SHAPE = {
    "vocab_size": 260,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
}
"""Flan-T5's, but for a small vocabulary."""


def write_recipe(folder: Path) -> Path:
    """A base of random weights in Flan-T5's small shape, the found adapter and one on q, k, v and o."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**SHAPE)).eval()
    model.save_pretrained(folder / "base")
    byte_tokenizer(ends=True).save_pretrained(folder / "base")
    other = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    train_by_chance(other)
    other.save_pretrained(folder / "other")
    lines = [json.dumps({"prompt": f"say {c}", "completion": c * 3}) + "\n" for c in "abcdefgh"]
    (folder / "data.jsonl").write_text("".join(lines))
    data = str(folder / "data.jsonl")
    recipe = {
        "run": {"name": "found", "dir": str(folder / "runs"), "tensorboard": False},
        "base": {"model": str(folder / "base"), "dtype": "float32"},
        "data": {
            "max_length": 16,
            "packing": False,
            "domains": [{"name": name, "train": data, "test": data} for name in ("found", "other")],
        },
        "mixer": {
            "targets": TARGETS,
            "dropout": 0.0,
            "experts": [
                {"name": "found", "path": str(FOUND)},
                {"name": "other", "path": str(folder / "other")},
            ],
        },
        "stage1": {"enabled": False},
        "stage2": {
            "experts": "frozen",
            "learning_rate": 0.01,
            "max_steps": 4,
            "top_k": 2,
            "global_batch_size": 2,
        },
        "evaluation": {"max_examples": 2, "generate_max_new_tokens": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def test_routers_train_over_a_found_adapter_which_comes_out_as_it_was(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    launch(REPOSITORY / "launch" / "train.py", ["--config", str(recipe)], ranks=1).check()
    run = tmp_path / "runs" / "found"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    print("losses", [round(row["task_loss"], 4) for row in rows])
    assert len(rows) == 4 and len({row["task_loss"] for row in rows}) == 4
    scored = json.loads((run / "evaluation.json").read_text())["rows"]
    losses = {row["method"]: row["value"] for row in scored if row["metric"] == "loss"}
    print("held-out nats", losses)
    assert len(set(losses.values())) == len(losses) == 5
    ours = load_file(run / "mixture" / "experts" / "found" / "adapter_model.safetensors")
    theirs = load_file(FOUND / "adapter_model.safetensors")
    assert {key: tensor.shape for key, tensor in ours.items()} == {k: t.shape for k, t in theirs.items()}
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-6, atol=0)
    routers = load_file(run / "mixture" / "routers.safetensors")
    assert len(routers) == 8 * 4 + 8 * 8 and all(bool(t.any()) for t in routers.values())

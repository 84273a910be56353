"""``dsmixer generate`` on a base that has learned so many positions and no more."""

from __future__ import annotations

import json

import pytest
import torch
from support.tiny import byte_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config

from dsmixer import MixerConfig, attach_mixers, load_mixture, save_mixture
from dsmixer.cli.main import main
from dsmixer.evaluation.answers import learned_positions

POSITIONS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("positions")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=260,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=POSITIONS,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder / "base")
    mixture = attach_mixers(model, MixerConfig(targets=("q", "k", "v"), experts=("a", "b"), rank=2))
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None  # answers go on to their limit
    tokenizer.pad_token = "<pad>"
    return save_mixture(mixture, folder / "mixture", tokenizer=tokenizer, base=str(folder / "base"))


def test_too_long_is_one_message_before_anything_is_written(folder, tmp_path, capsys):
    asked = tmp_path / "asked.jsonl"
    asked.write_text(
        '{"prompt": "short", "max_new_tokens": 4}\n{"prompt": "eight by", "max_new_tokens": 18}\n'
    )
    for flags, where in (
        (["--prompt", "eight by", "--max-new-tokens", "18"], "--max-new-tokens: the prompt has 8 tokens"),
        (["--requests", str(asked)], "asked.jsonl:2: max_new_tokens: the prompt has 8 tokens"),
    ):
        assert main(["generate", str(folder), "--device", "cpu", *flags]) == 2
        out, error = capsys.readouterr()
        assert not out and where in error and "give 17 or fewer" in error
    long = ["--prompt", "x" * 30, "--max-new-tokens", "1"]
    assert main(["generate", str(folder), "--device", "cpu", *long]) == 2
    assert "give a shorter prompt" in capsys.readouterr().err


def test_what_just_fits_is_answered_beside_what_would_drag_it_past_the_end(folder, tmp_path, capsys):
    requests = [("eight by", 17), ("x", 24), ("yz", 3), ("abcdefghijklmnopqrst", 5)]
    asked = tmp_path / "asked.jsonl"
    asked.write_text(
        "".join(json.dumps({"prompt": text, "max_new_tokens": new}) + "\n" for text, new in requests)
    )
    assert main(["generate", str(folder), "--device", "cpu", "--requests", str(asked)]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["num_tokens"] for answer in found] == [new for _, new in requests]
    model, tokenizer = load_mixture(folder)
    assert learned_positions(model) == POSITIONS
    for (text, new), answer in zip(requests, found, strict=True):
        ids = torch.tensor([tokenizer.encode(text)])
        alone = model.generate(ids, max_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(ids))
        assert answer["text"] == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)

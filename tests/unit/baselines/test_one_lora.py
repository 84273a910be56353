"""One LoRA on everything: the same training as PEFT's own in a plain loop."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

from dsmixer.baselines.fitting import Fit
from dsmixer.baselines.interface import Given
from dsmixer.baselines.one_lora import OneLora, PlainLora
from dsmixer.data.collate import collate


def test_one_lora_is_pefts_lora_trained_on_all_rows(make_mixture, load_base, rows, logits_of):
    mixture = make_mixture()
    fitting = Fit(steps=4, batch_size=11, learning_rate=1e-2, clip=0.5)
    fitted = OneLora(fitting=fitting)(Given(mixture, rows, seed=5))
    model = load_base("llama")
    config = LoraConfig(r=12, lora_alpha=18, target_modules=["q_proj", "v_proj", "o_proj"])
    model = get_peft_model(model, config).eval()
    for path, mixer in mixture.mixers.items():
        start = PlainLora(mixer.bank, path, 12, None, seed=5)
        layer = model.get_submodule(f"base_model.model.{path}")
        layer.lora_A["default"].weight.data = start.a_RD.data.clone()
        assert not layer.lora_B["default"].weight.any()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    micro = collate(rows.store, [(row,) for row in range(11)], 0)
    for _ in range(4):
        model(input_ids=micro.input_ids, labels=micro.labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    found = logits_of(mixture.model, fitted.under(""))
    torch.testing.assert_close(found, logits_of(model), rtol=1e-3, atol=1e-4)
    assert fitted.num_trainable == sum(p.numel() for p in weights)
    assert fitted.found["rank"] == fitted.merged.rank == 12

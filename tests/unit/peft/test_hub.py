"""A mixture of the hub opens in PEFT, and no more of it is downloaded than it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch
from safetensors.torch import load_file, save_file
from support.hub import serve_model
from support.tiny import byte_tokenizer

from dsmixer import save_mixture
from dsmixer.model.inject import mixture_of

OPEN_FROM_THE_HUB = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
import dsmixer.peft
from peft import AutoPeftModelForCausalLM
told = json.loads(sys.argv[1])
model = AutoPeftModelForCausalLM.from_pretrained("someone/mixture")
with torch.no_grad():
    save_file({"logits": model(input_ids=load_file(told["ids"])["ids"]).logits}, told["out"])
"""


def test_a_mixture_of_the_hub_opens_in_peft(made, base, ids, tmp_path):
    model = made().eval()
    folder = tmp_path / "mixture"
    facts = {"pictures": {"routing.png": b"a picture"}}
    save_mixture(mixture_of(model), folder, tokenizer=byte_tokenizer(), base=str(base), facts=facts)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    told = {name: str(tmp_path / f"{name}.safetensors") for name in ("ids", "out")}
    with serve_model(folder, "someone/mixture") as (address, downloaded):
        cache = str(tmp_path / "cache")
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": cache}
        environment["HF_HUB_DISABLE_XET"] = "1"
        command = [sys.executable, "-c", OPEN_FROM_THE_HUB, json.dumps(told)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        want = model(input_ids=ids).logits
    assert torch.equal(load_file(told["out"])["logits"], want)
    weights = {f"experts/{name}/adapter_model.safetensors" for name in ("law", "chess", "go")}
    assert weights | {"routers.safetensors", "mixer_config.json"} <= set(downloaded)
    assert not {"routing.png", "README.md"} & set(downloaded)

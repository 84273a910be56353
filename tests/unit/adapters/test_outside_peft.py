"""What a mixture can do and PEFT's plain LoRA can't is said and refused; what a card's code says runs."""

from __future__ import annotations

import re

import pytest
import torch
from peft import PeftModel
from support.peft_mixtures import SETTINGS, stir
from support.tiny import STATE_SPACE, byte_tokenizer, write_base
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from dsmixer import MixerConfig, attach_mixers, save_mixture
from dsmixer.adapters.outside_peft import not_applied_by_peft
from dsmixer.cli.main import main

OPTIONS = {key: value for key, value in SETTINGS.items() if key != "task_type"}
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A mixture folder on a base of a kind."""

    def make(kind, targets):
        folder = tmp_path_factory.mktemp(kind)
        base = write_base(folder / "base", kind)
        auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
        mixture = attach_mixers(
            auto.from_pretrained(base, dtype=torch.float32), MixerConfig(**{**OPTIONS, "targets": targets})
        )
        stir(mixture)
        tokenizer = byte_tokenizer(ends=kind == "t5")
        return save_mixture(mixture, folder / "mixture", tokenizer=tokenizer, base=str(base))

    return make


@pytest.mark.parametrize(
    ("kind", "silent"),
    [
        ("mamba", {"x_proj", "dt_proj", "out_proj"}),
        ("falcon_mamba", {"x_proj", "dt_proj", "out_proj"}),
        ("mamba2", {"out_proj"}),
    ],
)
def test_experts_that_peft_can_not_apply_are_not_exported_and_the_card_says_so(
    kind, silent, published, tmp_path, capsys
):
    folder = published(kind, STATE_SPACE[kind])
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "1+1=", "completion": "2"}\n' * 5)
    for what in (["--static", str(task), "--device", "cpu"], ["--expert", "law"]):
        assert main(["export", str(folder), *what, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "PEFT can't apply" in error and all(name in error for name in silent)
        assert "in_proj" not in error and not (tmp_path / "out").exists()
    card = (folder / "README.md").read_text()
    assert "not for PEFT alone" in card and "PeftModel.from_pretrained(base_model" not in card
    with pytest.raises(ValueError, match="out_proj.*incompatible"):
        base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
        PeftModel.from_pretrained(base, folder / "experts" / "law")


def test_what_peft_applies_in_a_state_space_model_is_exported(published, tmp_path):
    folder = published("mamba", ["in"])
    assert main(["export", str(folder), "--expert", "law", "--out", str(tmp_path / "one")]) == 0
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        want = base(ids).logits
        found = PeftModel.from_pretrained(base, tmp_path / "one")(ids).logits
    assert not torch.allclose(found, want, atol=1e-2)
    assert not_applied_by_peft("llama", ["model.layers.0.self_attn.out_proj"]) == {}


@pytest.mark.parametrize(("kind", "targets"), [("llama", ["q", "v"]), ("t5", ["q", "v"])])
def test_the_code_of_a_card_runs(kind, targets, published):
    folder = published(kind, targets)
    blocks = CODE.findall((folder / "README.md").read_text())
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        code = block.replace("PATH_OF_THIS_FOLDER", str(folder)).replace('"..."', '"1+1="')
        exec(code, names)
    assert type(names["model"]).__name__ == {"t5": "PeftModelForSeq2SeqLM"}.get(kind, "PeftModelForCausalLM")

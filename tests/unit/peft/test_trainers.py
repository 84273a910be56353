"""transformers' Trainer and TRL's SFTTrainer train a mixture as they are, the routers' loss included."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from support.peft_mixtures import SETTINGS
from support.tiny import byte_tokenizer
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from dsmixer import save_mixture
from dsmixer.model.inject import mixture_of
from dsmixer.peft import MixerConfig

OFF = {"alpha": 0.0, "entropy_weight": 0.0}
HARD = {"alpha": 0.0, "entropy_weight": 5.0}
ARGUMENTS = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "seed": 3,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def records():
    pairs = [(i, j) for i in range(6) for j in range(0, 120, 17)]
    return [{"prompt": f"{i}+{j}=", "completion": str(i + j)} for i, j in pairs]


def by_trainer(made, records, folder, **options):
    tokenizer = byte_tokenizer()
    rows = []
    for record in records:
        prompt, answer = (tokenizer(record[key])["input_ids"] for key in ("prompt", "completion"))
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    trainer = Trainer(
        model=made(fresh=True, **options.pop("config", {})),
        args=TrainingArguments(output_dir=str(folder), **{**ARGUMENTS, **options}),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def by_sft_trainer(made, records, folder, **options):
    model = made(fresh=True, **options.pop("config", {}))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), **{**ARGUMENTS, **options}),
        train_dataset=Dataset.from_list(records),
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    return trainer


TRAINERS = [by_trainer, by_sft_trainer]


def routers_of(trainer):
    return torch.cat([router.weight.detach() for router in mixture_of(trainer.model).routers.values()])


def losses_of(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("train", TRAINERS)
def test_experts_and_routers_learn_the_task(train, made, records, tmp_path):
    trainer = train(made, records, tmp_path, max_steps=12, learning_rate=5e-2, save_strategy="no")
    losses = losses_of(trainer)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    start = torch.cat([router.weight.detach() for router in mixture_of(made()).routers.values()])
    assert not torch.equal(routers_of(trainer), start)


@pytest.mark.parametrize("train", TRAINERS)
def test_the_routers_loss_alone_moves_routers_of_silent_experts(train, made, records, tmp_path):
    """Experts whose B is zero leave routers no gradient of the task: what moves them is RSL, or nothing."""
    start = torch.cat([router.weight.detach() for router in mixture_of(made()).routers.values()])
    silent = {"train": "routers", "routing": "soft"}
    still = train(made, records, tmp_path / "a", config={**silent, "rsl": OFF}, save_strategy="no")
    assert torch.equal(routers_of(still), start)
    moved = train(made, records, tmp_path / "b", config={**silent, "rsl": HARD}, save_strategy="no")
    assert not torch.equal(routers_of(moved), start)
    told = [moved.model.base_model.in_loss.last, still.model.base_model.in_loss.last]
    assert told[0] < 5 * torch.tensor(3.0).log() and told[1] == 0


@pytest.mark.parametrize("train", TRAINERS)
def test_accumulation_and_checkpointed_layers_change_nothing_but_rounding(train, made, records, tmp_path):
    """Rows of one length, so that every cut of a step has as many tokens as targets."""
    even = [record for record in records if len(record["prompt"] + record["completion"]) == 7]
    assert len(even) >= 8
    config = {"routing": "soft", "rsl": {**HARD, "entropy_weight": 0.5}}
    common = {"max_steps": 2, "save_strategy": "no", "config": config, "optim": "sgd", "max_grad_norm": 0.0}
    whole = train(made, even[:8], tmp_path / "a", per_device_train_batch_size=8, **dict(common))
    cut = train(
        made, even[:8], tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4,
        gradient_checkpointing=True, **dict(common),
    )  # fmt: skip
    torch.testing.assert_close(routers_of(cut), routers_of(whole), rtol=1e-4, atol=1e-6)


def test_a_trainer_goes_on_from_its_checkpoint_as_if_never_stopped(made, records, tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    whole = by_sft_trainer(made, records, tmp_path / "run", **options)
    again = type(whole)(
        model=made(fresh=True),
        args=whole.args,
        train_dataset=whole.train_dataset,
        data_collator=whole.data_collator,
        processing_class=whole.processing_class,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(routers_of(again), routers_of(whole))


def test_the_evaluation_of_a_trainer_is_the_task_alone(made, records, tmp_path):
    held = Dataset.from_list(records[:4])
    trainer = by_sft_trainer(made, records, tmp_path, max_steps=1, save_strategy="no", config={"rsl": HARD})
    rows = [trainer.train_dataset[i] for i in range(4)]
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        want = trainer.model.eval()(**batch).loss
    evaluated = trainer.evaluate(Dataset.from_list(rows) if "input_ids" in rows[0] else held)
    assert evaluated["eval_loss"] == pytest.approx(float(want), abs=1e-4)


def test_sft_trainer_makes_the_mixture_from_its_configuration(base, records, tmp_path):
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=SFTConfig(output_dir=str(tmp_path), **{**ARGUMENTS, "bf16": True, "max_steps": 2}),
        train_dataset=Dataset.from_list(records),
        processing_class=byte_tokenizer(),
        peft_config=MixerConfig(**SETTINGS),
    )
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert all(row["aux_loss"] > 0 for row in trainer.state.log_history if "aux_loss" in row)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()


IN_A_FRESH_PROCESS = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
told = json.loads(sys.argv[1])
ids = load_file(told["ids"])["ids"]
from dsmixer import load_mixture
found = {}
with torch.no_grad():
    model, _ = load_mixture(told["by_sft"])
    found["by_sft"] = model(input_ids=ids).logits
    assert "dsmixer.peft" not in sys.modules
    import dsmixer.peft
    from peft import AutoPeftModelForCausalLM
    found["mixture"] = AutoPeftModelForCausalLM.from_pretrained(told["mixture"])(input_ids=ids).logits
save_file(found, told["out"])
"""


def test_fresh_processes_give_the_same_logits_both_ways(made, base, records, ids, tmp_path):
    trainer = by_sft_trainer(made, records, tmp_path / "sft", save_strategy="no")
    trainer.save_model(tmp_path / "sft" / "last")
    model = trainer.model.eval()
    save_mixture(mixture_of(model), tmp_path / "mixture", base=str(base))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    told = {"ids": "ids.safetensors", "by_sft": "sft/last", "mixture": "mixture", "out": "out.safetensors"}
    told = {key: str(tmp_path / name) for key, name in told.items()}
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, json.dumps(told)]
    subprocess.run(command, check=True, capture_output=True)
    found = load_file(told["out"])
    with torch.no_grad():
        want = model(input_ids=ids).logits
        assert torch.equal(
            AutoPeftModelForCausalLM.from_pretrained(told["by_sft"])(input_ids=ids).logits, want
        )
    assert torch.equal(found["by_sft"], want) and torch.equal(found["mixture"], want)

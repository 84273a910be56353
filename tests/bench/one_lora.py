"""One PEFT LoRA on everything, beside a finished run: same data, same steps, as many trainable weights.

    python -m tests.bench.one_lora runs/real_small

The adapter has the rank of all experts together, so that its weights are as many as theirs. It sees the
rows of stage one and then those of stage two, in the run's order and batches, with the run's learning
rates for experts, torch's AdamW and clipping of the whole gradient. The figures are the mean loss of the
target tokens (nats) and the accuracy of the choice, by the run's own scoring, beside the run's rows in its
``evaluation.json``. ``one_lora.json`` in the run folder keeps them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

from dsmixer.config.recipe import LoadedRecipe, load_recipe
from dsmixer.data.collate import MicroBatch
from dsmixer.data.encode import pad_token_id
from dsmixer.evaluation.scoring import domain_rows, score_rows
from dsmixer.evaluation.sheet import make_sheet
from dsmixer.losses.task import token_losses
from dsmixer.model.load import LoadedBase, load_base
from dsmixer.model.targets import find_targets
from dsmixer.training.data import RunData, StageData, load_run_data, stage_data
from dsmixer.training.schedule import rate_share
from dsmixer.training.world import World


def main() -> None:
    """Train, score, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    folder: Path = parser.parse_args().run
    loaded = load_recipe(folder / "config.yaml")
    recipe = loaded.recipe
    data = load_run_data(recipe, None)
    base = load_base(recipe.base, packing=recipe.data.packing)
    model, num_weights = one_lora(loaded, data, base)
    began = time.perf_counter()
    num_steps = sum(
        train_on(model, loaded, number, stage_rows(loaded, data, base, number))
        for number in (1, 2)
        if loaded.stage(f"stage{number}").enabled
    )
    rows = score(model, loaded, data, base)
    result = {
        "weights": num_weights,
        "steps": num_steps,
        "seconds": time.perf_counter() - began,
        "rows": rows,
    }
    (folder / "one_lora.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result, json.loads((folder / "evaluation.json").read_text())["rows"])


def one_lora(loaded: LoadedRecipe, data: RunData, base: LoadedBase) -> tuple[torch.nn.Module, int]:
    """The base with one LoRA whose rank is the sum of the experts' ranks, at the experts' scale."""
    mixer = loaded.recipe.mixer
    num_experts = len(data.expert_names(loaded.recipe))
    torch.manual_seed(loaded.recipe.run.seed)
    config = LoraConfig(
        r=mixer.rank * num_experts,
        lora_alpha=mixer.alpha * num_experts,
        lora_dropout=mixer.dropout,
        target_modules=[target.path for target in find_targets(base.model, mixer.targets)],
    )
    model = get_peft_model(base.model, config)
    return model, sum(p.numel() for p in model.parameters() if p.requires_grad)


def stage_rows(loaded: LoadedRecipe, data: RunData, base: LoadedBase, number: int) -> StageData:
    """The rows of a stage as one process sees them: all of each step."""
    experts = data.expert_names(loaded.recipe)
    return stage_data(loaded, number, data, experts, base.tokenizer, World(0, 1, torch.device("cpu")))


def train_on(model: torch.nn.Module, loaded: LoadedRecipe, number: int, data: StageData) -> int:
    """All steps of a stage; the number of them."""
    stage = loaded.stage(f"stage{number}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, betas=stage.betas, eps=stage.eps, weight_decay=stage.weight_decay
    )
    model.train()
    for step in range(data.sampler.num_steps):
        batch = data.batch(step)
        total = sum(backward(model, micro, int(batch.target_tokens.sum())) for micro in batch.micro_batches)
        if stage.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, stage.clip)
        share = rate_share(step, data.sampler.num_steps, stage.warmup_ratio, stage.scheduler)
        optimizer.param_groups[0]["lr"] = stage.learning_rate * share
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"stage {number} step {step + 1}/{data.sampler.num_steps} loss {total:.4f}", flush=True)
    return data.sampler.num_steps


def backward(model: torch.nn.Module, micro: MicroBatch, num_targets: int) -> float:
    """One micro-batch's part of the step's mean loss."""
    logits = model(input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False).logits
    loss = token_losses(logits, micro.labels).sum() / num_targets
    loss.backward()
    return float(loss.detach())


def score(
    model: torch.nn.Module, loaded: LoadedRecipe, data: RunData, base: LoadedBase
) -> list[dict[str, Any]]:
    """The run's own test examples and scoring."""
    recipe = loaded.recipe
    sheet = make_sheet(
        data.domains,
        base.tokenizer,
        max_length=recipe.data.max_length,
        max_examples=recipe.evaluation.max_examples,
        seed=recipe.run.seed,
    )
    everywhere = range(len(sheet.domains))
    scores = score_rows(
        model.eval(),
        sheet,
        sheet.rows(everywhere),
        batch_size=recipe.evaluation.batch_size,
        pad_token_id=pad_token_id(base.tokenizer),
        end_token_id=base.tokenizer.eos_token_id,
    )
    return domain_rows(sheet, scores, "one LoRA", everywhere)


def show(result: dict[str, Any], run_rows: list[dict[str, Any]]) -> None:
    """One table a metric: the run's methods and the one LoRA."""
    print(
        f"one LoRA: {result['weights']:,} trainable weights, {result['steps']} steps, "
        f"{result['seconds']:.0f} s with scoring"
    )
    rows = [*run_rows, *result["rows"]]
    for metric in dict.fromkeys(row["metric"] for row in result["rows"]):
        cells = {(r["domain"], r["method"]): r["value"] for r in rows if r["metric"] == metric}
        methods = [m for m in ("base", "uniform", "mixture", "one LoRA") if any(k[1] == m for k in cells)]
        table = Table("domain", "own expert", *methods, title=metric, title_justify="left")
        for domain in dict.fromkeys(domain for domain, _ in cells):
            own = cells.get((domain, f"expert:{domain}"))
            values = [own, *(cells.get((domain, method)) for method in methods)]
            table.add_row(domain, *("" if value is None else f"{value:.4f}" for value in values))
        Console(width=120).print(table)


if __name__ == "__main__":
    main()

"""Bad DeepSpeed files, adapters and run folders."""

from __future__ import annotations

from pathlib import Path

from dsmixer.config.recipe import dump_recipe, load_recipe
from support.bad_input import Site, case


def ds_file(site: Site, text: str) -> str:
    path = site.data("ds.json", text)
    site.change("  zero_stage: 2", f"  zero_stage: 2\n  config: {path}")
    return str(path)


@case("a ds_config that contradicts")
def _(site: Site) -> tuple[list[str], list[str]]:
    path = ds_file(site, '{\n "zero_optimization": {\n  "stage": 3\n }\n}\n')
    says = [
        site.place("zero_stage"),
        "deepspeed.zero_stage is 2 here and 3",
        f"{path}:3: zero_optimization.stage",
    ]
    return site.train(), [*says, '"auto"']


@case("a malformed ds_config")
def _(site: Site) -> tuple[list[str], list[str]]:
    path = ds_file(site, '{\n "zero_optimization": {"stage": 2},\n}\n')
    return site.train(), [f"{path}:", "malformed JSON", "correct the JSON"]


@case("a ds_config with fp16")
def _(site: Site) -> tuple[list[str], list[str]]:
    path = ds_file(site, '{\n "fp16": {"enabled": true}\n}\n')
    return site.train(), [f"{path}:2: fp16.enabled", "not supported", "bfloat16"]


@case("a ds_config that is not there")
def _(site: Site) -> tuple[list[str], list[str]]:
    missing = f"{site.root}/ds.json"
    return site.train("--deepspeed_config", missing), [
        f"--deepspeed_config {missing}",
        "no such file",
        "Fix: ",
    ]


def with_experts(site: Site, path: Path) -> list[str]:
    experts = f"mixer.experts=[{{name: law, path: {path}}}, {{name: chess}}]"
    return site.train("stage1.enabled=false", experts)


@case("an adapter that is not there")
def _(site: Site) -> tuple[list[str], list[str]]:
    return with_experts(site, site.root / "adapter"), [
        "mixer.experts=[{name: law",
        f"no such file or folder: {site.root}/adapter",
        "Fix: ",
    ]


@case("an adapter that is a pickle")
def _(site: Site) -> tuple[list[str], list[str]]:
    folder = site.data("adapter/adapter_config.json", '{"peft_type": "LORA", "r": 4, "lora_alpha": 8}').parent
    site.data("adapter/adapter_model.bin", "never read")
    return with_experts(site, folder), [str(folder), "safetensors", "Fix: "]


@case("a run of another configuration in the folder")
def _(site: Site) -> tuple[list[str], list[str]]:
    other = dump_recipe(load_recipe(site.recipe, ["mixer.rank=2"]).recipe)
    path = site.data("runs/mini/config.yaml", other)
    site.data("runs/mini/metrics.jsonl", '{"stage": 1, "step": 1}\n')
    return site.train(), [str(path), "mixer.rank: 2 there, 4 here", "another run.name"]


@case("other files in the folder")
def _(site: Site) -> tuple[list[str], list[str]]:
    site.data("runs/mini/thesis.txt", "years of work\n")
    return site.train(), [str(site.run), "not empty and holds no run", "another run.name"]


@case("the run folder is a file")
def _(site: Site) -> tuple[list[str], list[str]]:
    site.data("runs/mini", "years of work\n")
    return site.train(), [str(site.run), "a file, not a folder", "another run.name"]


@case("a file on the way to the run folder")
def _(site: Site) -> tuple[list[str], list[str]]:
    site.data("runs", "years of work\n")
    return site.train(), [f"{site.root}/runs", "a file, not a folder", "run.dir"]


@case("stage two before stage one")
def _(site: Site) -> tuple[list[str], list[str]]:
    return site.train("--stages", "2"), [f"{site.run}/checkpoints/stage1", "not finished", "--stages 1"]


@case("a disabled stage asked for")
def _(site: Site) -> tuple[list[str], list[str]]:
    return site.train("stage2.enabled=false", "--stages", "2"), ["--stages", "enables no stage", "Fix: "]


@case("a mixture folder that is not there")
def _(site: Site) -> tuple[list[str], list[str]]:
    return ["generate", f"{site.root}/none", "--prompt", "a"], [
        f"{site.root}/none",
        "no such folder",
        "Fix: ",
    ]


@case("a folder that is no mixture")
def _(site: Site) -> tuple[list[str], list[str]]:
    return ["evaluate", str(site.root)], [str(site.root), "neither a mixture nor a run", "runs/NAME"]


@case("a report of no run")
def _(site: Site) -> tuple[list[str], list[str]]:
    return ["report", f"{site.root}/none"], [f"{site.root}/none", "Fix: "]

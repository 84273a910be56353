"""What of a DeepSpeed JSON file does not go with the recipe's ZeRO stage, or with what is trained here."""

from __future__ import annotations

from collections.abc import Iterator

from dsmixer.config.ds_file import DsFile, read_ds_file
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import STAGES, LoadedRecipe

_QUANTISED = {
    "zero_quantized_weights": "ZeRO++ sends weights in 8 bits, and packed 4-bit ones as if they were numbers",
    "zero_quantized_nontrainable_weights": "ZeRO++ would store the frozen base in 8 bits, with a loss",
    "zero_quantized_gradients": "ZeRO++ sends gradients in 4 bits, and each expert's mean would be off",
}
_LOW_PRECISION = ("fp16", "float16", "bf16", "bfloat16", "half")


def check_ds_config(loaded: LoadedRecipe) -> None:
    """Refuse offloading that the ZeRO stage does not have, and whatever rounds weights or gradients.

    Args:
        loaded: the recipe, DeepSpeed file merged in.

    Raises:
        UserError: names the key in the file.
    """
    file = read_ds_file(loaded.recipe.deepspeed.config)
    for check in (_check_offload, _check_quantised, _check_precision):
        check(loaded, file)


def _offloaded(file: DsFile) -> Iterator[tuple[str, str]]:
    """Each offload block that is at work, with its device."""
    for name in ("offload_param", "offload_optimizer"):
        device = file.get(f"zero_optimization.{name}.device")
        if device not in (None, "none"):
            yield name, str(device)


def _check_offload(loaded: LoadedRecipe, file: DsFile) -> None:
    stage = loaded.recipe.deepspeed.zero_stage
    for name, device in _offloaded(file):
        where = file.where(f"zero_optimization.{name}.device")
        if device != "cpu":
            path = file.get(f"zero_optimization.{name}.nvme_path")
            without = "" if path else ", and nvme_path is missing"
            problem = f"{device!r} is not supported: DeepSpeed swaps weights of one type only{without}"
            raise UserError(problem, where=where, fix="write cpu, or remove the block")
        stage_where = loaded.where("deepspeed.zero_stage")
        if not isinstance(stage, int):
            problem = f"{name} depends on the ZeRO stage, which is left open ({stage_where})"
            raise UserError(problem, where=where, fix="write the stage, such as deepspeed.zero_stage: 3")
        if name == "offload_param" and stage != 3:
            problem = f"parameters are offloaded by ZeRO stage 3 only, not {stage} ({stage_where})"
            raise UserError(
                problem, where=where, fix="remove offload_param, or write deepspeed.zero_stage: 3"
            )
        if name == "offload_optimizer":
            _check_paged(loaded, where)
        if name == "offload_optimizer" and stage == 0:
            problem = f"ZeRO stage 0 has no optimizer state to offload ({stage_where})"
            fix = "remove offload_optimizer, or write deepspeed.zero_stage: 1, 2 or 3"
            raise UserError(problem, where=where, fix=fix)


def _check_paged(loaded: LoadedRecipe, offload_where: str) -> None:
    for name in STAGES:
        stage = loaded.stage(name)
        if stage.enabled and stage.optimizer.startswith("paged"):
            raise UserError(
                f"the moments are on the host already (offload_optimizer, {offload_where})",
                where=loaded.where(f"{name}.optimizer"),
                fix=f"write {stage.optimizer.removeprefix('paged_')}, or remove offload_optimizer",
            )


def _check_quantised(loaded: LoadedRecipe, file: DsFile) -> None:
    for key, reason in _QUANTISED.items():
        if file.get(f"zero_optimization.{key}"):
            fix = "remove it; base.quantization: nf4 stores the base in 4 bits"
            raise UserError(f"not supported: {reason}", where=file.where(f"zero_optimization.{key}"), fix=fix)
    for key in ("weight_quantization", "compression_training", "quantize_training"):
        if file.get(key):
            problem = "not supported: it would quantise what base.quantization decides about"
            raise UserError(problem, where=file.where(key), fix="remove it, or write base.quantization: nf4")


def _check_precision(loaded: LoadedRecipe, file: DsFile) -> None:
    for key in ("communication_data_type", "data_types.grad_accum_dtype"):
        value = file.get(key)
        if isinstance(value, str) and value.lower() in _LOW_PRECISION:
            problem = f"{value!r} is not supported: what trains is float32, and so are its gradients"
            raise UserError(problem, where=file.where(key), fix="remove it, or write fp32")

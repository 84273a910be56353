"""Where the marked blocks of the documentation run: a folder a page, with the tree and a small run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from support.doc_blocks import Block
from support.launching import REPOSITORY, free_port, launch_environment

SERVER = Path(__file__).with_name("doc_server.py")
PREPARED_RUN = os.environ.get("DSMIXER_DOC_RUN")
"""A finished run of launch/recipes/quickstart.yaml; without it a short one is trained."""

FEW: dict[str, dict[str, Any]] = {
    "data": {"max_length": 64},
    "stage1": {"max_steps": 2, "micro_batch_size": 1, "global_batch_size": 8},
    "stage2": {"max_steps": 2, "micro_batch_size": 1, "global_batch_size": 8},
    "evaluation": {"exact_match": False},
}
"""What makes the quickstart's recipe a matter of seconds, on one rank or on eight."""

FEW_EXAMPLES = {"max_train": 48, "max_test": 4}
LINKED = [
    "README.md",
    "constraints.txt",
    "docs",
    "ds_configs",
    "dsmixer",
    "launch",
    "pyproject.toml",
    "tests",
]
EXPERTS = "runs/quickstart/mixture/experts"
SECONDS = 600.0
LONG_SECONDS = 7200.0


@dataclass(frozen=True)
class Done:
    """How a block ended.

    Attributes:
        returncode: the exit code.
        output: standard output.
        problems: standard error.
    """

    returncode: int
    output: str
    problems: str


class AbsentError(Exception):
    """What a block takes for granted can't be had here."""


class Workshop:
    """A copy of the tree, the process that commands are forked from, and a run.

    Args:
        folder: an empty one, where all of it is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._tree = folder, folder / "tree"
        self._name = f"dsmixer-docs-{os.getpid()}"
        ignored = shutil.ignore_patterns("__pycache__", ".*", "runs")
        for name in LINKED:
            source = REPOSITORY / name
            if source.is_dir():
                shutil.copytree(source, self._tree / name, ignore=ignored)
            else:
                self._tree.mkdir(exist_ok=True)
                shutil.copy(source, self._tree / name)
        self._write_programs()
        command = [sys.executable, str(SERVER), "serve", self._name]
        self._server = subprocess.Popen(
            command, env=self._environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            self._prepare_run()
        except BaseException:
            self.close()
            raise

    def _write_programs(self) -> None:
        """``dsmixer``, ``run-python`` and ``deepspeed`` as a shell finds them."""
        programs = self._folder / "bin"
        programs.mkdir()
        deepspeed = Path(sys.executable).with_name("deepspeed")
        lines = {
            "dsmixer": f"exec '{sys.executable}' -SE '{SERVER}' dsmixer \"$@\"",
            "run-python": f"exec '{sys.executable}' -SE '{SERVER}' python \"$@\"",
            # a port of its own: the default one may be another test's
            "deepspeed": f'exec \'{deepspeed}\' --master_port "$DOC_PORT" "$@"',
        }
        for name, line in lines.items():
            (programs / name).write_text(f"#!/bin/sh\n{line}\n")
            (programs / name).chmod(0o755)

    def _environment(self) -> dict[str, str]:
        path = [str(self._folder / "bin"), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        return {
            **launch_environment(),
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": os.pathsep.join([str(self._tree), str(self._tree / "tests")]),
            "COLUMNS": "300",
            "DOC_PORT": str(free_port()),
            "DSMIXER_DOC_SERVER": self._name,
        }

    def _prepare_run(self) -> None:
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n", "the process for commands has not started"
        if PREPARED_RUN is not None:
            shutil.copytree(PREPARED_RUN, self._tree / "runs" / "quickstart")
            return
        write_recipe(self._tree / "few.yaml", "quickstart")
        done = self.shell("dsmixer train --config few.yaml", self._tree)
        assert done.returncode == 0, done.output + done.problems

    def page(self, page: Path) -> Path:
        """A new folder for the blocks of a page: the tree, and the run as it was."""
        folder = self._folder / "pages" / page.stem
        folder.mkdir(parents=True)
        for name in LINKED:
            (folder / name).symlink_to(self._tree / name)
        shutil.copytree(self._tree / "runs", folder / "runs")
        activate = Path(sys.executable).with_name("activate")
        if activate.is_file():
            (folder / ".venv" / "bin").mkdir(parents=True)
            (folder / ".venv" / "bin" / "activate").symlink_to(activate)
        shared = folder.parent / "shared"
        if not shared.is_symlink() and (REPOSITORY.parent / "shared").is_dir():
            shared.symlink_to(REPOSITORY.parent / "shared")
        return folder

    def shell(self, command: str, folder: Path, seconds: float = SECONDS) -> Done:
        """Run a command line in ``bash``, which stops at the first command that fails."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=folder,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def run(self, block: Block, folder: Path) -> Done:
        """Run a block in the folder of its page."""
        code = ""
        for name in block.given:
            if name in PYTHON_GIVENS:
                code += PYTHON_GIVENS[name]
            else:
                GIVENS[name](folder)
        seconds = LONG_SECONDS if block.is_long else SECONDS
        if not block.is_python:
            return self.shell(block.text, folder, seconds)
        (folder / "block.py").write_text(code + block.text, encoding="utf-8")
        return self.shell("run-python block.py", folder, seconds)

    def close(self) -> None:
        """End the process, and what was forked from it."""
        os.killpg(self._server.pid, 9)
        self._server.wait()
        assert self._server.stdout is not None
        self._server.stdout.close()


PYTHON_GIVENS = {
    "base_model": "from transformers import AutoModelForCausalLM\n"
    "base_model = AutoModelForCausalLM.from_pretrained('launch/embedded/base')\n",
    "tokenizer": "from transformers import AutoTokenizer\n"
    "tokenizer = AutoTokenizer.from_pretrained('launch/embedded/base')\n",
    "prompts": "prompts = ['1+8+7+3+8 =', 'a', 'bc', 'defg']\n",
    "dataset": "from datasets import Dataset\n"
    "dataset = Dataset.from_list([{'prompt': '1+1 =', 'completion': ' 2'}] * 4)\n",
}
"""What a Python block takes for granted, as the code that makes it."""


def llama3_8b(folder: Path) -> None:
    """The configuration of LLaMA3-8B under its id, as a folder of that name is preferred to the hub."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ).save_pretrained(folder / "meta-llama" / "Meta-Llama-3-8B")


def adapters(folder: Path) -> None:
    """Adapters by the names that the pages have for them, out of the run's experts."""
    names = {"adapters/law": "totals", "adapters/gsm8k": "dates", "someone/chess-lora": "reviews"}
    for name, expert in names.items():
        shutil.copytree(folder / EXPERTS / expert, folder / name, dirs_exist_ok=True)


def pools(folder: Path) -> None:
    """Two mixtures, runs/five and runs/other, out of the run's experts."""
    from dsmixer.adapters.pools import remove_experts, rename_experts

    mixture = folder / "runs" / "quickstart" / "mixture"
    five = ["sst2", "cola", "qnli", "arc_easy", "mbpp"]
    experts = ["brackets", "codebook", "dates", "reversal", "reviews"]
    rename_experts(mixture, dict(zip(experts, five, strict=True)), folder / "all")
    remove_experts(folder / "all", ["totals"], folder / "runs" / "five")
    remove_experts(mixture, ["brackets", "codebook"], folder / "runs" / "other")


def recipe(folder: Path) -> None:
    """RECIPE.yaml: a run that takes seconds."""
    write_recipe(folder / "RECIPE.yaml", "few_steps")


def write_recipe(path: Path, name: str) -> None:
    """The quickstart's recipe with few steps and examples, for a run of this name."""
    shipped = REPOSITORY / "launch" / "recipes" / "quickstart.yaml"
    content = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    for section, values in FEW.items():
        content[section] |= values
    for domain in content["data"]["domains"]:
        domain |= FEW_EXAMPLES
    content["run"]["name"] = name
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def settings(folder: Path) -> None:
    """settings.json, as the page on other methods describes it."""
    (folder / "settings.json").write_text('{"mole": {"balance": 0.1, "fitting.steps": 10}}', encoding="utf-8")


def no_run(folder: Path) -> None:
    """Nothing was trained yet."""
    shutil.rmtree(folder / "runs")


def shared(folder: Path) -> None:
    """The models and data beside the checkout, or the block is left out."""
    if not (folder.parent / "shared").is_dir():
        raise AbsentError("there is no ../shared")


GIVENS: dict[str, Callable[[Path], None]] = {
    "llama3_8b": llama3_8b,
    "adapters": adapters,
    "pools": pools,
    "recipe": recipe,
    "no_run": no_run,
    "settings": settings,
    "shared": shared,
}
"""What a page takes for granted, as what puts it into its folder."""

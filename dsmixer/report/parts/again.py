"""The whole configuration, and the commands that make the run once more."""

from __future__ import annotations

import shlex

from dsmixer.report.frames import definitions, note, section
from dsmixer.report.html import Markup, join, tag
from dsmixer.report.run_folder import RunFolder

MAX_CHARACTERS = 400_000  # of a configuration: a thousand domains have a fourth of it


def again(run: RunFolder) -> Markup:
    """Commands, versions, and ``config.yaml`` folded up."""
    remark = (
        "The recipe is the resolved one, every default written out. Paths in it are as they were given: "
        "call the commands from where the run was started, with the versions below."
    )
    versions = definitions([("Seed", run.setting("run.seed")), *sorted(run.versions.items())])
    commands = tag("pre", tag("code", "\n".join(commands_of(run))), tabindex="0")
    return section("Once more", note(remark), commands, versions, _configuration(run), key="again")


def commands_of(run: RunFolder) -> list[str]:
    """Shell lines: train under another name, evaluate that, report on it."""
    folder, name = str(run.path), f"{run.name}_again"
    ranks, on_one = run.plan.get("world_size"), run.plan.get("ranks_per_node")
    config, named = shlex.quote(f"{folder}/config.yaml"), shlex.quote(f"run.name={name}")
    made = shlex.quote(f"{run.setting('run.dir') or 'runs'}/{name}")
    if isinstance(ranks, int) and ranks > 1:
        apart = isinstance(on_one, int) and ranks > on_one
        where = "--hostfile HOSTFILE" if apart else f"--num_accelerators {ranks}"
        train = f"deepspeed {where} launch/train.py --config {config} {named}"
    else:
        train = f"dsmixer train --config {config} {named}"
    return [train, f"dsmixer evaluate {made}", f"dsmixer report {made}"]


def _configuration(run: RunFolder) -> Markup:
    text = run.config_text
    if not text:
        return Markup("")
    left = len(text) - MAX_CHARACTERS
    cut = note(f"{left} more characters are in config.yaml") if left > 0 else ""
    shown = tag("pre", tag("code", text[:MAX_CHARACTERS]), tabindex="0")
    lines = f"The whole configuration, {len(text.splitlines()):,} lines"
    return tag("details", tag("summary", lines), join(shown, cut), class_="folded")

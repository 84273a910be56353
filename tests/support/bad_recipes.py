"""Bad recipes and bad command lines."""

from __future__ import annotations

from support.bad_input import Site, case


def changed(name: str, old: str, new: str, line: str, *says: str) -> None:
    """A case that is one change of the recipe; the message names the line that holds ``line``."""

    @case(name)
    def spoil(site: Site) -> tuple[list[str], list[str]]:
        site.change(old, new)
        return site.train(), [site.place(line), *says]


changed("malformed yaml", "  rank: 4", "  rank: [4", "alpha: 8", "malformed YAML", "Fix: correct the YAML")
changed("wrong type", "rank: 4", "rank: many", "rank:", "mixer.rank", "'many' (text)", "write a whole number")
changed("wrong type in a list", "targets: [q, v]", "targets: 7", "targets", "mixer.targets", "write a list")
changed("unknown key", "  top_k: 2", "  topk: 2", "topk", "'topk'", "Fix: write stage2.top_k")
changed("unknown section", "stage2:", "stage3:", "stage3", "'stage3'", "Fix: write stage2")
changed("top-k above E", "top_k: 2", "top_k: 3", "top_k", "stage2.top_k", "3 experts", "write at most 2")
changed("top-k 1 renormalised", "top_k: 2", "top_k: 1", "top_k", "stage2.top_k", "renormalize: false")
changed("duplicate domain", "name: chess", "name: law", "- name: law", "'law' is taken", "its own name")
changed("domain name ..", "name: chess", "name: '..'", "'..'", "data.domains.1.name", "write a name")
changed(
    "domain name with a slash", "name: chess", "name: ../x", "../x", "data.domains.1.name", "write a name"
)
changed(
    "unknown quantization",
    "  dtype: float32",
    "  quantization: int8",
    "int8",
    "base.quantization",
    "write one of none, nf4, fp4",
)
changed("unsupported placement", "deepspeed:", "placement: {mode: tokens}\ndeepspeed:", "tokens", "replicate")


changed(
    "unknown lm-eval task",
    "  enabled: false",
    "  tasks: [dsmixer_arceasy]",
    "dsmixer_arceasy",
    "evaluation.tasks",
    "write dsmixer_arc_easy",
)


@case("negative weight")
def _(site: Site) -> tuple[list[str], list[str]]:
    site.change("chess.jsonl\n", "chess.jsonl\n      weight: -1\n")
    return site.train(), [site.place("weight: -1"), "data.domains.1.weight", "a number above 0"]


@case("both stages disabled")
def _(site: Site) -> tuple[list[str], list[str]]:
    arguments = site.train("stage1.enabled=false", "stage2.enabled=false")
    return arguments, ["command line: stage2.enabled=false", "set stage1.enabled or stage2.enabled"]


@case("missing recipe file")
def _(site: Site) -> tuple[list[str], list[str]]:
    return ["train", "--config", f"{site.root}/nowhere.yaml"], [
        "nowhere.yaml",
        "no such recipe",
        "check the path",
    ]


@case("override without =")
def _(site: Site) -> tuple[list[str], list[str]]:
    return site.train("stage1.epochs"), ["command line: stage1.epochs", "without '='", "stage1.epochs=2"]


@case("override of an unknown key")
def _(site: Site) -> tuple[list[str], list[str]]:
    return site.train("mixer.rnk=3"), ["command line: mixer.rnk=3", "'rnk'", "write mixer.rank"]


@case("unknown stage")
def _(site: Site) -> tuple[list[str], list[str]]:
    return site.train("--stages", "3"), ["--stages", "invalid choice: '3'", "'1', '2', 'both'"]


@case("unknown command")
def _(site: Site) -> tuple[list[str], list[str]]:
    return ["trian", "--config", str(site.recipe)], ["invalid choice: 'trian'", "train"]

"""``dsmixer evaluate RUN --methods``: the figures of the command, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml
from support.tiny import byte_tokenizer, write_recipe

from dsmixer import load_mixture
from dsmixer.adapters.mixture_folder import save_mixture
from dsmixer.baselines.evaluate import evaluate_methods
from dsmixer.baselines.interface import Given
from dsmixer.baselines.registry import methods
from dsmixer.baselines.rows import training_rows
from dsmixer.cli.main import main
from dsmixer.config.recipe import load_recipe
from dsmixer.data.domains import load_domains
from dsmixer.evaluation.sheet import make_sheet
from dsmixer.model.inject import mixture_of

SIZES = {"sums": 30, "words": 20}
HELD_OUT = 12


@pytest.fixture(scope="module")
def run(make_mixture, tmp_path_factory):
    """A run folder without checkpoints; test rows are the training rows."""
    folder = tmp_path_factory.mktemp("methods")
    recipe = yaml.safe_load(write_recipe(folder / "source", sizes=SIZES).read_text())
    for domain in recipe["data"]["domains"]:
        domain["test"] = domain["train"]
    recipe["stage2"]["data"] = {"held_out": HELD_OUT, "max_examples": 8, "max_share": 0.4}
    recipe["evaluation"] = {"max_examples": 3, "exact_match": False}
    path = folder / "runs" / "one"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(recipe))
    mixture = make_mixture(experts=list(SIZES))
    save_mixture(mixture, path / "mixture", tokenizer=byte_tokenizer(), base=recipe["base"]["model"])
    return path


def evaluated(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def values(result: dict, method: str) -> dict:
    rows = [row for row in result["rows"] if row["method"] == method]
    return {(row["domain"], row["metric"]): (row["value"], row["num_examples"]) for row in rows}


def close(one: dict, two: dict) -> bool:
    assert one and one.keys() == two.keys()
    return all(one[key] == (pytest.approx(two[key][0], rel=1e-5), two[key][1]) for key in one)


def test_the_command_gives_the_rows_of_the_run_and_of_the_methods_with_what_they_cost(run, capsys) -> None:
    names = ["base", "mixture", "experts", "own", "uniform", "lorahub"]
    found = evaluated(capsys, run, "--methods", ",".join(names))
    plain = evaluated(capsys, run)
    for name in ("base", "mixture", "expert:sums", "expert:words", "uniform"):
        assert close(values(found, name), values(plain, name))
    for domain in SIZES:
        own = {k: v for k, v in values(plain, f"expert:{domain}").items() if k[0] == domain}
        assert close({k: v for k, v in values(found, "own").items() if k[0] == domain}, own)
    assert found["own_experts"] == plain["own_experts"]
    costs = found["costs"]
    assert list(costs) == ["base", "mixture", "expert:sums", "expert:words", "own", "uniform", "lorahub"]
    assert (costs["lorahub"]["trainable"], costs["lorahub"]["steps"]) == (2, 41)
    assert [name for name, cost in costs.items() if cost["told"]] == ["own"]
    assert all(cost["seconds_per_example"] > 0 for cost in costs.values())
    mixture = mixture_of(load_mixture(run / "mixture")[0])
    experts = sum(2 * 4 * (m.bank.in_features + m.bank.out_features) for m in mixture.mixers.values())
    routers = sum(2 * m.bank.in_features for m in mixture.mixers.values())
    assert costs["mixture"]["trainable"] == experts + routers, "what stage two trains: it preserves experts"
    assert costs["mixture"]["steps"] is None, "this run has logged none"


def test_methods_train_on_the_rows_of_the_runs_routers_and_those_with_experts_on_all(
    run, tmp_path, capsys
) -> None:
    """The same methods by hand on these rows, the ones that are first in their order, and on others."""
    settings = tmp_path / "settings.json"
    asked = {
        "mole": {"fitting": {"steps": 2, "batch_size": 3}},
        "one_lora": {"rank": 2, "fitting": {"batch_size": 3}},
    }
    settings.write_text(json.dumps(asked))
    flags = ["--methods", "mole,one_lora", "--method-settings", settings, "--seed", 5]
    found = evaluated(capsys, run, *flags, "--output", tmp_path / "out.json")
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert found["training"] == {
        "source": "the run's router rows",
        "examples": 8,
        "all_examples": 50,
        "seed": 5,
    }
    assert {name: cost["steps"] for name, cost in found["costs"].items()} == {"mole": 2, "one_lora": 17}

    recipe = load_recipe(run / "config.yaml").recipe
    domains = load_domains(recipe.data, seed=recipe.run.seed, quarantine=None)
    from dsmixer.data.holdout import hold_out_router_examples

    router = hold_out_router_examples(domains, recipe.stage2.data, recipe.run.seed)[1]
    model, tokenizer = load_mixture(run / "mixture")
    sheet = make_sheet(domains, tokenizer, max_length=64, max_examples=3, seed=recipe.run.seed)
    mole, one_lora = methods["mole"], methods["one_lora"]
    chosen = {
        "mole": replace(mole, fitting=replace(mole.fitting, steps=2, batch_size=3)),
        "one_lora": replace(one_lora, rank=2, fitting=replace(one_lora.fitting, batch_size=3)),
    }

    def by_hand(name, rows):
        own = [replace(d, train=[e for e in rows if e.domain == d.name]) for d in domains]
        given = Given(mixture_of(model), training_rows(own, tokenizer, max_length=64), seed=5)
        scored = evaluate_methods(given, tokenizer, sheet, {name: chosen[name]})
        return values({"rows": scored.rows}, name)

    everything = [e for d in domains for e in d.train]
    assert close(values(found, "mole"), by_hand("mole", router))
    assert close(values(found, "one_lora"), by_hand("one_lora", everything))
    others = by_hand("mole", [e for e in everything if e not in router])
    assert any(abs(others[key][0] - value[0]) > 1e-6 for key, value in values(found, "mole").items())
    fewer = by_hand("one_lora", router)
    assert any(abs(fewer[key][0] - value[0]) > 1e-6 for key, value in values(found, "one_lora").items())


def test_without_router_rows_methods_train_on_the_train_part(run, tmp_path, capsys) -> None:
    other = tmp_path / "two"
    other.mkdir()
    (other / "mixture").symlink_to(run / "mixture")
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["stage2"] = {"enabled": False}
    (other / "config.yaml").write_text(yaml.safe_dump(recipe))
    found = evaluated(capsys, other, "--methods", "mixture,lorahub_per_domain", "--train-examples", 7)
    assert found["training"] == {"source": "the train part", "examples": 14, "all_examples": 14, "seed": 3}
    assert found["costs"]["mixture"]["trainable"] == 0, "nothing has trained its routers"
    assert main(["evaluate", str(other), "--methods", "lorahub,own"]) == 0
    printed = capsys.readouterr().out
    assert "told the domain" in printed and "methods that train had 50 examples of the train part" in printed


def test_other_test_data_are_scored_with_methods_trained_on_the_runs_own(run, tmp_path, capsys) -> None:
    data = tmp_path / "new.jsonl"
    data.write_text('{"prompt": "3+4=", "completion": "7"}\n')
    found = evaluated(capsys, run, "--data", f"new={data}", "--methods", "base,lorahub")
    assert {row["domain"] for row in found["rows"]} == {"new"}
    assert found["training"]["examples"] == 8


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{run}", "--methods", "mol"], "write mole"),
        (["{run}", "--methods", "expert:sum"], "write expert:sums"),
        (["{run}", "--methods", "own,,base"], "empty name"),
        (["{run}", "--methods", "own", "--method-settings", "{tmp}/absent.json"], "absent.json"),
        (
            ["{run}", "--methods", "own", "--method-settings", "{tmp}/mole.json"],
            "no method of this name here",
        ),
        (["{run}", "--methods", "own", "--method-settings", "{tmp}/list.json"], "no JSON object"),
        (["{run}", "--methods", "expert:sums@stage1"], "no checkpoint of the run"),
        (["{run}/mixture", "--methods", "arrow", "--tasks", "arc"], "once with --methods"),
        (["{run}", "--seed", "3"], "add --methods"),
        (["{run}", "--limit", "3"], "add --tasks"),
        (["{run}", "--tasks", "arc", "--max-examples", "3"], "tasks bring their own data"),
        (["{alone}", "--methods", "expert:sums@stage1", "--data", "a={tmp}/a.jsonl"], "the run with its"),
        (["{alone}", "--methods", "mole", "--data", "a={tmp}/a.jsonl"], "mole trains"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_two(arguments, reason, run, tmp_path, capsys) -> None:
    (tmp_path / "mole.json").write_text('{"mole": {}}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": " c"}\n')
    alone = tmp_path / "alone" / "mixture"
    alone.parent.mkdir()
    alone.symlink_to(run / "mixture")
    filled = [a.format(run=run, tmp=tmp_path, alone=alone) for a in arguments]
    try:
        code = main(["evaluate", *filled])
    except SystemExit as left:  # argparse's own
        code = left.code
    printed = capsys.readouterr()
    assert code == 2 and printed.out == "" and reason in printed.err


def test_ready_made_experts_that_nothing_trains_have_no_other_state_and_this_is_said(
    run, tmp_path, capsys
) -> None:
    other = tmp_path / "imported"
    other.mkdir()
    (other / "mixture").symlink_to(run / "mixture")
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["stage1"]["enabled"] = False
    recipe["stage2"]["experts"] = "frozen"
    recipe["mixer"]["experts"] = [
        {"name": name, "path": str(run / "mixture" / "experts" / name)} for name in SIZES
    ]
    (other / "config.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["evaluate", str(other), "--methods", "expert:sums@stage1"]) == 2
    assert "expert:NAME is the same by construction" in capsys.readouterr().err

"""Recipes: defaults, errors that name their place, and the canonical form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from dsmixer.config.errors import UserError
from dsmixer.config.recipe import (
    LoadedRecipe,
    dump_recipe,
    expert_names,
    load_recipe,
    resolved_differences,
)
from dsmixer.config.schema import Recipe, schema_json

Load = Callable[..., LoadedRecipe]

PUBLISHED = """
mixer: {targets: [q, k, v, o], rank: 64, alpha: 128, dropout: 0.1, router: per_projection, compute: auto,
        experts: null}
stage1: {enabled: true, learning_rate: 1.0e-5, epochs: 1, max_steps: null, micro_batch_size: 1,
         gradient_accumulation_steps: 4, global_batch_size: null, warmup_ratio: 0.1, scheduler: cosine,
         clip: 1.0}
stage2: {enabled: true, learning_rate: 1.0e-5, epochs: 1, max_steps: null, micro_batch_size: 1,
         gradient_accumulation_steps: 4, global_batch_size: null, warmup_ratio: 0.1, scheduler: cosine,
         clip: 1.0, routing: topk, renormalize: true, experts: preserve,
         data: {max_examples: 2000, source: null},
         rsl: {alpha: 0.1, entropy_weight: 0.05, entropy: specialize, usage: topk,
               usage_from: previous_step, ramp: 0.3},
         preserve: {beta: 5.0e-5, experts: all}}
placement: {mode: auto, expert_parallel_size: auto}
deepspeed: {zero_stage: auto, config: null}
checkpoint: {every: 100, keep: 3}
evaluation: {enabled: true, tasks: []}
"""


def test_the_published_recipe_is_what_a_short_one_means(load: Load) -> None:
    assert load(PUBLISHED).recipe == load().recipe


def test_defaults_are_the_papers(load: Load) -> None:
    recipe = load().recipe
    assert (recipe.mixer.rank, recipe.mixer.alpha, recipe.mixer.dropout) == (64, 128, 0.1)
    assert (recipe.stage1.learning_rate, recipe.stage1.gradient_accumulation_steps) == (1e-5, 4)
    assert (recipe.stage2.rsl.alpha, recipe.stage2.rsl.entropy_weight, recipe.stage2.preserve.beta) == (
        0.1,
        0.05,
        5e-5,
    )


def test_an_unwritten_top_k_is_at_most_the_number_of_experts(load: Load) -> None:
    assert load().recipe.stage2.top_k == 2
    assert (
        load(
            "", "data.domains.2={name: c, train: x}", "data.domains.3={name: d, train: x}"
        ).recipe.stage2.top_k
        == 3
    )
    assert load("stage2: {top_k: 3}\n").recipe.stage2.top_k == 3


def test_empty_sections_mean_their_defaults(load: Load) -> None:
    assert load("stage1:\nstage2:\n  rsl:\n").recipe == load().recipe


def test_written_holds_what_the_user_wrote_and_nothing_else(load: Load) -> None:
    written = load("stage1:\n  epochs: 2\n", "mixer.targets=[q, v]", "stage1.epochs=3").written
    assert {key: value for key, value in written.items() if not key.startswith(("data.", "base."))} == {
        "stage1.epochs": 3,
        "mixer.targets": ["q", "v"],
    }
    assert written["data.domains.1.name"] == "chess"


BAD = [
    ("stage1:\n  epochz: 2\n", 9, "stage1.epochz", "unknown key 'epochz'", "stage1.epochs"),
    ("stagee1: {}\n", 8, "stagee1", "unknown key", "stage1"),
    ("mixer:\n  top_k: 2\n", 9, "mixer.top_k", "unknown key", "stage2.top_k"),
    (
        "stage2:\n  data:\n    max_exampels: 5\n",
        10,
        "stage2.data.max_exampels",
        "unknown key",
        "max_examples",
    ),
    ("mixer:\n  experts:\n    - name: a\n      rnk: 3\n", 11, "mixer.experts.0.rnk", "unknown key", "rank"),
    ("zebra: 1\n", 8, "zebra", "unknown key", "the keys of a recipe are run, base"),
    ("stage1:\n  learning_rate: fast\n", 9, "stage1.learning_rate", "'fast' (text)", "a number above 0"),
    ("stage1:\n  epochs: 1.5\n", 9, "stage1.epochs", "1.5 (a number)", "a whole number at least 1"),
    ("mixer:\n  rank: true\n", 9, "mixer.rank", "true (true or false)", "a whole number"),
    ("deepspeed:\n  zero_stage: true\n", 9, "deepspeed.zero_stage", "true", "auto or a whole number"),
    ("deepspeed:\n  zero_stage: 4\n", 9, "deepspeed.zero_stage", "4", "at most 3"),
    ("stage1:\n  clip: 0\n", 9, "stage1.clip", "0", "above 0 or null"),
    ("stage1:\n  clip: .inf\n", 9, "stage1.clip", "inf", "a number above 0"),
    ("stage1:\n  betas: [0.9]\n", 9, "stage1.betas", "[0.9] (a list)", "a list of 2"),
    ("stage2:\n  routing: top-k\n", 9, "stage2.routing", "'top-k'", "write topk"),
    ("mixer:\n  targets: q\n", 9, "mixer.targets", "'q' (text)", "[q]"),
    ("mixer:\n  targets: []\n", 9, "mixer.targets", "[]", "not empty"),
    ("stage2:\n  preserve: {experts: law}\n", 9, "stage2.preserve.experts", "'law'", "[law]"),
    ("run:\n  name: ../x\n", 9, "run.name", "'../x'", "letters, digits"),
    ("run:\n  name: no\n", 9, "run.name", "false", "quotes"),
    ("run:\n  name: 2024\n", 9, "run.name", "2024", '"2024"'),
    ("evaluation: 3\n", 8, "evaluation", "3 (a whole number)", "a mapping with keys of enabled"),
    ("data: {}\n", 8, "data", "written twice", "keep one"),
]


@pytest.mark.parametrize(
    ("more", "line", "key", "found", "fix"), BAD, ids=[case[2] + ":" + case[3] for case in BAD]
)
def test_a_mistake_is_named_with_file_line_field_and_fix(
    load: Load, tmp_path: Path, more: str, line: int, key: str, found: str, fix: str
) -> None:
    with pytest.raises(UserError) as error:
        load(more)
    assert error.value.where == f"{tmp_path}/recipe.yaml:{line}: {key}"
    assert found in error.value.problem
    assert fix in str(error.value.fix)


def test_an_unknown_key_inside_a_domain_is_named(recipe_file: Callable[..., Path]) -> None:
    path = recipe_file()
    path.write_text(path.read_text() + "      wieght: 2\n")
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert error.value.where == f"{path}:8: data.domains.1.wieght"
    assert "data.domains.1.weight" in str(error.value.fix)


def test_a_missing_key_is_named_with_the_line_of_its_section(recipe_file: Callable[..., Path]) -> None:
    path = recipe_file()
    path.write_text(path.read_text().replace("model:", "revision:"))
    with pytest.raises(
        UserError, match=r"recipe.yaml:1: base.model: missing \(folder or hub id of the base model\)"
    ):
        load_recipe(path)


def test_several_mistakes_come_in_one_message(load: Load) -> None:
    with pytest.raises(UserError) as error:
        load("stage1: {epochz: 1}\nmixer: {rank: 0}\n", "run.sed=1")
    for part in ("recipe.yaml:8: stage1.epochz", "recipe.yaml:9: mixer.rank", "command line: run.sed=1"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the recipe is empty"),
        (b"# nothing\n", "the recipe is empty"),
        (b"- a\n- b\n", "a recipe is a mapping of sections"),
        (b"just text\n", "a recipe is a mapping of sections"),
        (b"a: 1\nb: \xff\n", "recipe.yaml:2: this recipe is not UTF-8"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        load_recipe(path)


def test_a_missing_recipe_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="cannot read this recipe"):
        load_recipe(tmp_path)


def test_a_byte_order_mark_is_no_mistake(recipe_file: Callable[..., Path]) -> None:
    path = recipe_file()
    plain = load_recipe(path).recipe
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_recipe(path).recipe == plain


def test_a_dumped_recipe_loads_back_equal_and_any_yaml_reader_gets_its_values(
    load: Load, tmp_path: Path
) -> None:
    more = "run: {name: '1e5', seed: 3}\nstage1: {global_batch_size: 8, learning_rate: 3e-7}\n"
    recipe = load(more, "stage2.preserve.experts=[law]", "mixer.experts=[{name: law}, {name: chess}]").recipe
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_recipe(recipe))
    assert load_recipe(saved).recipe == recipe
    assert yaml.safe_load(saved.read_text()) == recipe.model_dump(mode="json")
    assert dump_recipe(load_recipe(saved).recipe) == saved.read_text()


def test_differences_name_key_old_and_new(load: Load) -> None:
    old = load("stage1: {epochs: 2}\n").recipe
    new = load("stage1: {epochs: 3}\ndeepspeed: {zero_stage: 1}\n", "data.domains.1.weight=2.0").recipe
    assert resolved_differences(dump_recipe(old), old) == []
    assert resolved_differences(dump_recipe(old), new) == [
        "data.domains.1.weight: 1.0 there, 2.0 here",
        "stage1.epochs: 2 there, 3 here",
        "deepspeed.zero_stage: 'auto' there, 1 here",
    ]
    ignored = resolved_differences(dump_recipe(old), new, ignore=("deepspeed", "data.domains"))
    assert ignored == ["stage1.epochs: 2 there, 3 here"]


def test_differences_with_another_versions_file(load: Load) -> None:
    recipe = load().recipe
    saved = yaml.safe_load(dump_recipe(recipe))
    del saved["health"]
    assert resolved_differences(yaml.safe_dump(saved), recipe) == []
    saved["run"]["colour"] = "red"
    assert "run.colour: 'red' there, absent here" in resolved_differences(yaml.safe_dump(saved), recipe)
    with pytest.raises(UserError, match="malformed YAML"):
        resolved_differences("a: [", recipe)


def test_expert_names_come_from_the_pool_or_the_domains(load: Load) -> None:
    assert expert_names(load().recipe) == ["law", "chess"]
    shared = load("", "data.domains.2={name: poker, train: x, expert: chess}").recipe
    assert expert_names(shared) == ["law", "chess"]
    assert expert_names(load("mixer: {experts: [{name: b}, {name: a}]}\n").recipe) == ["b", "a"]
    assert expert_names(load("", "data.source={train: x, column: topic}").recipe) is None


def _sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    found = [model]
    for field in model.model_fields.values():
        for kind in _classes(field.annotation):
            found += _sections(kind)
    return found


def _classes(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for inner in get_args(annotation) for kind in _classes(inner)]


def test_every_key_has_a_line_of_help_and_no_section_can_be_changed(load: Load) -> None:
    sections = _sections(Recipe)
    assert len(set(sections)) == 20
    for section in sections:
        for name, field in section.model_fields.items():
            assert field.description and "\n" not in field.description, f"{section.__name__}.{name}"
    with pytest.raises(ValidationError, match="frozen"):
        load().recipe.stage1.epochs = 2


def test_the_json_schema_describes_the_published_keys() -> None:
    schema = json.loads(schema_json())
    sections = set(yaml.safe_load(PUBLISHED)) | {"run", "base", "data", "health"}
    assert set(schema["properties"]) == sections
    for section, values in yaml.safe_load(PUBLISHED).items():
        definition = schema["$defs"][schema["properties"][section]["$ref"].rsplit("/", 1)[1]]
        assert set(values) <= set(definition["properties"])
        assert definition["additionalProperties"] is False

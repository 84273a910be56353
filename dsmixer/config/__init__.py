"""Recipes: the schema, YAML and overrides, checks between keys, and DeepSpeed's configuration."""

from dsmixer.config.checks import check_recipe, check_world
from dsmixer.config.ds_json import deepspeed_config, merge_ds_config
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe, dump_recipe, expert_names, load_recipe, resolved_differences
from dsmixer.config.schema import Recipe, schema_json

__all__ = [
    "LoadedRecipe",
    "Recipe",
    "UserError",
    "check_recipe",
    "check_world",
    "deepspeed_config",
    "dump_recipe",
    "expert_names",
    "load_recipe",
    "merge_ds_config",
    "resolved_differences",
    "schema_json",
]

"""The configuration: its schema, and the loader that composes YAML files, choices and `key=value` settings."""

from prism_deco.config.choices import CONF_DIR, choices, load_choice
from prism_deco.config.compose import compose, default_run_id
from prism_deco.config.load import (
    changed_from_defaults,
    flat,
    is_free,
    load_config,
    named_choice,
    read_config,
    read_stored,
    save_config,
    shipped_choices,
    value_origins,
)
from prism_deco.config.schema import GROUPS
from prism_deco.config.values import parse_value, read_yaml, value_text
from prism_deco.files import building_folder, cache_dir

__all__ = [
    "CONF_DIR",
    "GROUPS",
    "building_folder",
    "cache_dir",
    "changed_from_defaults",
    "choices",
    "compose",
    "default_run_id",
    "flat",
    "is_free",
    "load_choice",
    "load_config",
    "named_choice",
    "parse_value",
    "read_config",
    "read_stored",
    "read_yaml",
    "save_config",
    "shipped_choices",
    "value_origins",
    "value_text",
]

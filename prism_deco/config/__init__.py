"""The configuration: its schema, and the loader that composes YAML choices and `key=value` overrides."""

from prism_deco.config.compose import (
    CONF_DIR,
    GROUPS,
    cache_dir,
    choices,
    compose,
    default_run_id,
    is_free,
    load_choice,
    load_config,
    parse_overrides,
    parse_value,
    read_config,
    read_yaml,
    save_config,
    validate,
)

__all__ = [
    "CONF_DIR",
    "GROUPS",
    "cache_dir",
    "choices",
    "compose",
    "default_run_id",
    "is_free",
    "load_choice",
    "load_config",
    "parse_overrides",
    "parse_value",
    "read_config",
    "read_yaml",
    "save_config",
    "validate",
]

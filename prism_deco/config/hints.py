"""What a user may have meant by a key that does not exist."""

from __future__ import annotations

import difflib

from omegaconf import DictConfig, OmegaConf

from prism_deco.config.choices import choices, load_choice
from prism_deco.config.parse import flatten
from prism_deco.config.reference import reference
from prism_deco.config.schema import GROUPS
from prism_deco.errors import UsageError

_LISTED = 12
"""Keys of a group that a message lists; of more it names the command that explains them."""


def unknown_key(config: DictConfig, key: str, origin: str = "") -> UsageError:
    """The error for a key that a configuration does not have, with the nearest ones.

    Args:
        origin: where the key stands, in parentheses; empty on the command line.
    """
    content = OmegaConf.to_container(config, resolve=False)
    assert isinstance(content, dict)
    leaves = flatten(content)
    valid = {*content, *leaves}
    parent = key.rpartition(".")[0]
    siblings = sorted(name.rpartition(".")[2] for name in valid if name.rpartition(".")[0] == parent)
    listed = f" Keys of {parent or 'the configuration'}: {', '.join(siblings)}." if siblings else ""
    if len(siblings) > _LISTED:
        listed = f" All keys: prism-deco keys {parent}."
    return UsageError(f"Unknown key {key}{origin}.{_hint(key, valid)}{listed}")


def _hint(key: str, valid: set[str]) -> str:
    group, _, leaf = key.rpartition(".")
    # A key of the right name in the wrong group is the commonest slip, then one of another choice, then a typo.
    own = sorted(name for name in valid if name.startswith(f"{group}.") and name.endswith(f"_{leaf}"))
    if same := own + sorted(name for name in valid if name.rpartition(".")[2] == leaf):
        return f" Did you mean {' or '.join(same[:3])}?"
    if group in GROUPS:
        owners = [choice for choice in choices(group) if leaf in load_choice(group, choice)]
        if owners:
            return f" It is a key of {group}={f' or {group}='.join(owners[:3])}."
    names = sorted(valid - set(GROUPS))
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.85) or _by_meaning(leaf)
    near = near or difflib.get_close_matches(key, names, n=3)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _by_meaning(leaf: str) -> list[str]:
    """Keys whose description has all words of a name: `learning_rate` -> `recipe.lr`."""
    words = leaf.lower().split("_")
    found = [key for key in reference().values() if all(word in key.meaning.lower() for word in words)]
    # The shortest description is the one that the words describe best.
    return [key.name for key in sorted(found, key=lambda key: len(key.meaning))[:3]]

"""The configuration: its schema, and the loader that composes YAML choices and `key=value` overrides.

`conf/config.yaml` names a default choice per group; `conf/<group>/<choice>.yaml` holds what that
choice sets. A command line such as `backbone=mini_clip recipe.epochs=2` replaces choices and keys.
The dataclasses below are the schema: unknown keys and wrong types are errors. The keys that only one
component has (the depth of one projector, say) are declared by that component's YAML: the value
there is the default and its type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any

from omegaconf import II, MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from prism_deco.registry import unknown

# In a wheel conf/ lies inside the package, in a checkout beside it.
_PACKAGE = Path(__file__).parent
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"


@dataclass
class BackboneConfig:
    """The frozen vision tower, or an ensemble of them (`conf/backbone`)."""

    name: str = MISSING
    """The choice: the YAML's file name."""
    family: str = MISSING
    """The registered class that builds it (`prism_deco/backbones/<family>.py`)."""
    pretrained: bool = True
    """Load pretrained weights; false starts from random ones (tests, planning, timing)."""
    weights: str | None = None
    """A local file or folder with the weights, instead of the hub's."""
    image_size: int | None = None
    """Side of the square input in pixels; None keeps the tower's own. Position tables are resampled."""
    layer: int = -2
    """The transformer block whose output is used; -2 is the second-to-last (PRISM, LLaVA)."""
    resize: str = "letterbox"
    """How an image becomes square: letterbox | pad | resize-naive | resize-crop."""


@dataclass
class ProjectorConfig:
    """What turns patch features into visual tokens (`conf/projector`)."""

    name: str = MISSING
    """The choice: the registered name and the YAML's file name."""
    num_tokens: int | None = None
    """Number of visual tokens, a square; None keeps every patch (`linear` only)."""


@dataclass
class LLMConfig:
    """The language model, its tokenizer and its chat format (`conf/llm`)."""

    name: str = MISSING
    """The choice: the YAML's file name."""
    hub: str | None = None
    """Repository id of the weights and the tokenizer on the Hugging Face hub."""
    pretrained: bool = True
    """Load pretrained weights; false starts from random ones."""
    weights: str | None = None
    """A local folder or file with the weights, instead of the hub's."""


@dataclass
class DataConfig:
    """Conversations and images to train on (`conf/data`)."""

    name: str = MISSING
    """The choice: the YAML's file name."""
    family: str = MISSING
    """The registered source (`prism_deco/data/<family>.py`)."""
    limit: int | None = None
    """Use only the first records; None uses all."""
    val_fraction: float = II("recipe.val_fraction")
    """Share of the images held out for `val/loss`; ignored where the source brings a validation file."""
    on_bad_image: str = "fail"
    """An image that is missing or unreadable: fail | skip (drop the record) | blank (mean-coloured image)."""
    num_workers: int = 0
    """Loader processes per rank; 0 loads in the training process."""


@dataclass
class RecipeConfig:
    """How the model is composed and optimised (`conf/recipe`)."""

    name: str = MISSING
    """The choice: the YAML's file name."""
    num_tokens: int = 144
    """Visual tokens that compressing projectors produce (they refer to this key)."""
    image_slot: str = "after_bos"
    """Where visual tokens go: after_bos (PRISM) | in_place (LLaVA: where `<image>` stands in the text)."""
    standardise_features: bool = False
    """Standardise each feature channel by statistics of the training images (not part of PRISM)."""
    token_scale: float | None = None
    """Multiplies the projector's output; None is off (not part of PRISM)."""
    turn_mask: str = "causal"
    """What a turn attends to: causal (all before it) | block (image and itself only; not part of PRISM)."""
    blind: bool = False
    """Zero the visual tokens: the trained image-blind baseline."""
    val_fraction: float = 0.005
    """Share of the images held out for validation, where the data brings none (`data.val_fraction` refers to it)."""
    epochs: int = 1
    """Passes over the training records."""
    max_steps: int | None = None
    """Stop after that many optimizer steps; None trains all epochs."""
    global_batch_size: int = 128
    """Records per optimizer step, over all devices and accumulation steps."""
    micro_batch_size: int = 16
    """Records per forward pass on one device."""
    max_text_tokens: int = 2048
    """Text is cut to this many tokens before the visual tokens are inserted."""
    lr: float = 2e-5
    """Peak learning rate."""
    projector_lr: float | None = None
    """Peak learning rate of the projector; None uses `lr`."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices; vectors and biases have none."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises linearly from 0; a cosine to 0 follows."""
    grad_clip: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 is off."""
    loss: str = "token_mean"
    """token_mean (over the global batch) | micro_batch_mean (per forward pass, then averaged: prismatic)."""
    sampler: str = "grouped"
    """Order of the records: shuffled | grouped (by modality and length) | prismatic (strict PRISM)."""


@dataclass
class TrainerConfig:
    """What the training runs on (`conf/trainer`)."""

    name: str = MISSING
    """The choice: the YAML's file name."""
    accelerator: str = "auto"
    """Lightning's accelerator: auto | cpu | gpu."""
    devices: int = 1
    """Processes (devices) per node."""
    num_nodes: int = 1
    """Number of nodes."""
    strategy: str = "auto"
    """Lightning's strategy: auto | ddp."""
    precision: str = "32-true"
    """Lightning's precision: 32-true | bf16-mixed."""
    threads: int | None = None
    """CPU threads of torch per process; None leaves torch's choice."""
    log_every: int = 10
    """Optimizer steps between two entries in TensorBoard."""
    val_every: float = 0.25
    """Share of an epoch between two passes over the validation records."""
    samples: int = 4
    """Validation images whose generated answers are logged with each validation."""


@dataclass
class EvaluateConfig:
    """The scoring that follows training."""

    benchmarks: str | None = None
    """Names under `conf/benchmark`, separated by commas, or a group of them; None scores nothing."""
    split: str | None = None
    """Split of the benchmarks; None takes each YAML's own."""
    limit: int | None = None
    """Ask only that many questions of each benchmark; None asks all."""
    batch_size: int = 64
    """Questions per generation batch."""


@dataclass
class Config:
    """A whole run: `prism-deco train` needs nothing else."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    seed: int = 7
    """Seeds initialisation, data order and dropout."""
    runs_dir: str = "runs"
    """Folder that holds the run folders."""
    run_id: str | None = None
    """Name of the run's folder; None derives it from the choices and the seed."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import first: they register components from outside the package."""


GROUPS = tuple(f.name for f in fields(Config) if f.name not in ("evaluate", "seed", "runs_dir", "run_id", "plugins"))


def choices(group: str) -> list[str]:
    """Names of the shipped YAMLs of a group."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def load_choice(group: str, choice: str) -> dict[str, Any]:
    """The content of `conf/<group>/<choice>.yaml`, plus its `name`.

    `choice` is a shipped name, or the path of a YAML file of the user's own (it ends in `.yaml`).
    Interpolations such as `${recipe.num_tokens}` are left as they are.
    """
    path = Path(choice) if choice.endswith((".yaml", ".yml")) else CONF_DIR / group / f"{choice}.yaml"
    if not path.is_file():
        if path.parent == CONF_DIR / group:
            raise unknown(group, choice, choices(group))
        raise ValueError(f"{group}={choice}: there is no such file.")
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected `key: value` lines.")
    return {"name": path.stem} | {str(key): value for key, value in content.items()}


def load_config(overrides: Iterable[str] = ()) -> DictConfig:
    """Composes the configuration of a run.

    Args:
        overrides: `group=choice` and `key=value` pairs, as on the command line.

    Raises:
        ValueError: an unknown choice or key (with the nearest valid ones) or a value of a wrong type.
    """
    chosen, values = _split(overrides)
    defaults = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "config.yaml"))
    assert isinstance(defaults, dict)
    chosen = defaults.pop("defaults") | chosen
    contents = {group: load_choice(group, choice) for group, choice in chosen.items()}
    return compose(defaults | contents, values)


def compose(contents: Mapping[Any, Any], values: Iterable[str] = ()) -> DictConfig:
    """Merges the schema, the given contents (one mapping per group) and `key=value` overrides."""
    schema = OmegaConf.structured(Config)
    for group in GROUPS:
        base = Config.__dataclass_fields__[group].default_factory
        schema[group] = OmegaConf.structured(_extend(base, contents.get(group) or {}))  # type: ignore[arg-type]
    config = _merge(schema, OmegaConf.create(dict(contents)))
    for value in values:
        key = value.partition("=")[0]
        try:
            update = OmegaConf.from_dotlist([value])
        except Exception as error:  # YAML errors have many classes, and none names the key
            raise ValueError(f"{value}: the value of {key} is not valid YAML ({error}).") from error
        config = _merge(config, update, source=value)
    return config


def save_config(config: DictConfig, path: Path) -> None:
    """Writes the composed configuration, interpolations resolved."""
    path.write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")


def read_config(path: Path) -> DictConfig:
    """Reads what `save_config` wrote."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {path.parent} is not a run folder.")
    content = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected `key: value` lines.")
    return compose(content)


def _split(overrides: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    chosen: dict[str, str] = {}
    values: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r} is not an override: write key=value, for example projector=avgpool.")
        if key in GROUPS:
            chosen[key] = text
        else:
            values.append(override)
    return chosen, values


def _extend(base: type, content: Mapping[str, Any]) -> type:
    """The schema of one group: the base dataclass plus the keys its YAML declares, typed by their values."""
    known = {f.name for f in fields(base)}
    extra = []
    for key, value in content.items():
        if key in known:
            continue
        # Containers and None say nothing about the type of what may stand there.
        kind = Any if value is None or isinstance(value, (dict, list)) or _is_interpolation(value) else type(value)
        extra.append((key, kind if kind is Any else kind | None, field(default=None)))
    return make_dataclass(base.__name__, extra, bases=(base,))


def _is_interpolation(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def _merge(config: DictConfig, update: DictConfig, source: str = "") -> DictConfig:
    try:
        merged = OmegaConf.merge(config, update)
    except (ConfigKeyError, ConfigAttributeError) as error:
        raise _unknown_key(config, update, source) from error
    except (ValidationError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source or error.full_key}: {reason}.") from error
    assert isinstance(merged, DictConfig)
    return merged


def _unknown_key(config: DictConfig, update: DictConfig, source: str) -> ValueError:
    """Names the first key of `update` that `config` does not have, and the nearest that it has."""
    valid = set(_keys(config))
    wrong = next((key for key in _keys(update) if key not in valid), source)
    leaf = wrong.rpartition(".")[2]
    # A key of the right name in the wrong group is the commonest slip.
    near = [key for key in valid if key.rpartition(".")[2] == leaf] or difflib.get_close_matches(wrong, valid, n=3)
    hint = f" Did you mean {' or '.join(sorted(near)[:3])}?" if near else ""
    parent = wrong.rpartition(".")[0]
    siblings = sorted(key for key in valid if key.rpartition(".")[0] == parent)
    return ValueError(f"Unknown key {wrong}.{hint} Keys of {parent or 'the configuration'}: {', '.join(siblings)}.")


def _keys(config: DictConfig, prefix: str = "") -> Iterable[str]:
    for key in config:
        name = f"{prefix}{key}"
        yield name
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            yield from _keys(node, f"{name}.")

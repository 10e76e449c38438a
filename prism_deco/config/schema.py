"""The schema of the configuration: every key that all choices of a group share, its type, its meaning, and the values
it takes where its type allows more. Names of registered components (projector, loss, sampler, ...) are checked by
their registries, which plug-ins may extend."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any

from omegaconf import II, MISSING

from prism_deco.config.fields import Range, number, one_of

# Stated here and imported where they act: those modules import torch, for which a configuration must not wait.
RESIZE = ("letterbox", "pad", "resize-naive", "resize-crop")
ON_BAD_IMAGE = ("fail", "skip", "blank")
ON_BAD_RECORD = ("fail", "skip")
ODD_RECORDS = ("refuse", "train")
LM = ("full", "frozen", "lora", "qlora")
PROMPT = ("chat", "plain")
TOKENIZE = ("per_turn", "whole")
IMAGE_SLOT = ("after_bos", "in_place")
TURN_MASK = ("causal", "block")
ACCELERATOR = ("auto", "cpu", "gpu", "cuda")
STRATEGY = ("auto", "ddp", "fsdp")
PRECISION = ("32-true", "bf16-mixed")
REDUCE_DTYPE = ("float32", "bfloat16")
ACTIVATION_CHECKPOINTING = ("none", "selective", "full")
NONFINITE = ("stop", "skip")
LOSS = ("token_mean", "micro_batch_mean")
SAMPLER = ("shuffled", "grouped", "llava", "prismatic")


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
    image_size: int | None = number(None, least=1)
    """Side of the square input in pixels; None keeps the tower's own. Position tables are resampled."""
    layer: int = -2
    """The transformer block whose output is used; -2 is the second-to-last (PRISM, LLaVA)."""
    resize: str = one_of(RESIZE, II("recipe.resize"))
    """How an image becomes square: letterbox | pad | resize-naive | resize-crop; the recipe says which."""


@dataclass
class ProjectorConfig:
    """What turns patch features into visual tokens (`conf/projector`)."""

    name: str = MISSING
    """The choice: the registered name and the YAML's file name."""
    num_tokens: int | None = number(None, least=1)
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
    """The registered source (`prism_deco/data/sources.py`, or a plug-in)."""
    limit: int | None = number(None, least=1)
    """Use only the first records; None uses all."""
    val_fraction: float = number(II("recipe.val_fraction"), least=0, below=1)
    """Share of the images held out for `val/loss`; ignored where the source brings a validation file."""
    on_bad_image: str = one_of(ON_BAD_IMAGE, "fail")
    """An image that is missing or unreadable: fail | skip (drop the record) | blank (mean-coloured image)."""
    on_bad_record: str = one_of(ON_BAD_RECORD, "fail")
    """A record that cannot be trained on: fail | skip (leave it out; the manifest counts them)."""
    draft_jpeg: bool = False
    """Decode JPEGs that are more than twice as large as the towers' input at a reduced size, in a half to a quarter
    of the time. Pixels then differ, on average by less than one of 255 levels."""
    num_workers: int = number(0, least=0)
    """Loader processes per rank; 0 loads in the training process."""
    statistics: dict[str, Any] | None = None
    """What `prism-deco plan` goes by where the files are not on disk: `images` with `records_per_image` each (1),
    `text_records` without one (0), and per record `text_tokens`, `supervised_tokens`, `longest_text_tokens`,
    `longest_supervised_tokens` (of a record beside the longest)."""


@dataclass
class RecipeConfig:
    """How the model is composed and optimised (`conf/recipe`)."""

    name: str = MISSING
    """The choice: the YAML's file name."""
    stages: dict[str, list[str]] | None = None
    """Runs that follow one another: a name and what its command line begins with, each; None is a single run."""
    start_from: str | None = None
    """Folder of a finished run of the same model to start from, whatever data it was trained on: its projector, and
    its LLM or adapters where it trained them."""
    lm: str = one_of(LM, "full")
    """What is trained of the LLM: full (all of it) | frozen (nothing) | lora (adapters) | qlora (adapters on
    four-bit weights; needs a GPU)."""
    lora_r: int = number(128, least=1)
    """Rank of the adapters."""
    lora_alpha: int = number(256, least=1)
    """The adapters' updates are scaled by `lora_alpha / lora_r`."""
    lora_dropout: float = number(0.05, least=0, below=1)
    """Share of an adapter's inputs that are dropped in training."""
    prompt: str = one_of(PROMPT, "chat")
    """chat (the LLM's format) | plain (LLaVA's alignment: image and caption; questions are left out)."""
    tokenize: str | None = one_of(TOKENIZE, None)
    """per_turn (PRISM) | whole (LLaVA: a conversation at once); None is what the LLM's YAML says."""
    added_tokens: bool = True
    """Add the padding token that the LLM's YAML names (PRISM); false pads with the unknown token instead, and keeps the
    embedding tables as they are (LLaVA)."""
    resize: str = one_of(RESIZE, "letterbox")
    """How an image becomes square: letterbox | pad | resize-naive | resize-crop (`backbone.resize` refers to it)."""
    num_tokens: int = number(144, least=1)
    """Visual tokens that compressing projectors produce (they refer to this key)."""
    image_slot: str = one_of(IMAGE_SLOT, "after_bos")
    """Where visual tokens go: after_bos (PRISM) | in_place (LLaVA: where `<image>` stands in the text)."""
    standardise_features: bool = False
    """Standardise each feature channel by statistics of the training images (not part of PRISM)."""
    token_scale: float | None = number(None, above=0)
    """Multiplies the projector's output; None is off (not part of PRISM)."""
    turn_mask: str = one_of(TURN_MASK, "causal")
    """What a turn attends to: causal (all before it) | block (image and itself only; not part of PRISM)."""
    blind: bool = False
    """Zero the visual tokens: the trained image-blind baseline."""
    val_fraction: float = number(0.005, least=0, below=1)
    """Share of the images held out for validation, where the data brings none (`data.val_fraction` refers to it)."""
    odd_records: str = one_of(ODD_RECORDS, "refuse")
    """`<image>` in a record without an image, several for one image, a last question without an answer: refuse (likely
    a mistake: a bad record, see `data.on_bad_record`) | train (as PRISM does after BOS, and LLaVA in place)."""
    epochs: int = number(1, least=1)
    """Passes over the training records."""
    max_steps: int | None = number(None, least=1)
    """Stop after that many optimizer steps; None trains all epochs."""
    global_batch_size: int = number(128, least=1)
    """Records per optimizer step, over all devices and accumulation steps."""
    micro_batch_size: int = number(16, least=1)
    """Records per forward pass on one device."""
    max_text_tokens: int = number(2048, least=1)
    """Text is cut to this many tokens before the visual tokens are inserted."""
    max_positions: int | None = number(None, least=1)
    """Text is cut so that, with its visual tokens, it has at most this length; None is what the LLM was made for."""
    lr: float = number(2e-5, above=0)
    """Peak learning rate."""
    projector_lr: float | None = number(None, above=0)
    """Peak learning rate of the projector; None uses `lr`."""
    betas: tuple[float, float] = number((0.9, 0.999), least=0, below=1)
    """AdamW's betas."""
    eps: float = number(1e-8, above=0)
    """AdamW's epsilon."""
    weight_decay: float = number(0.1, least=0)
    """AdamW's decay of matrices; vectors and biases have none."""
    warmup_ratio: float = number(0.03, least=0, most=1)
    """Share of the steps in which the learning rate rises linearly from 0; a cosine to 0 follows."""
    grad_clip: float = number(1.0, least=0)
    """Global gradient norm above which gradients are scaled down; 0 is off."""
    loss: str = one_of(LOSS, "token_mean")
    """token_mean (over the global batch) | micro_batch_mean (per forward pass, then averaged: prismatic)."""
    sampler: str = one_of(SAMPLER, "grouped")
    """Order of the records: shuffled | grouped (by modality and length) | llava (by modality) | prismatic (strict
    PRISM)."""
    packing: bool = False
    """Put the records of a forward pass one behind the other in one row, each attending to itself, instead of
    padding them: the same loss, without the padding's time and memory. Needs `llm.attention=sdpa`."""
    max_logits: int | None = number(2**26, least=1)
    """Logits (positions times vocabulary) that exist at once, more are computed in chunks; None knows no limit.
    The default is 256 MiB in float32."""


@dataclass
class TrainerConfig:
    """What the training runs on (`conf/trainer`)."""

    name: str = MISSING
    """The choice: the YAML's file name."""
    accelerator: str = one_of(ACCELERATOR, "auto")
    """Lightning's accelerator: auto | cpu | gpu (cuda is the same)."""
    devices: int = 1
    """Processes (devices) per node."""
    num_nodes: int = number(1, least=1)
    """Number of nodes."""
    strategy: str = one_of(STRATEGY, "auto")
    """auto (one device) | ddp (each device holds the whole model) | fsdp (weights, gradients and optimizer sharded)."""
    shard_size: int | None = number(None, least=1)
    """fsdp: devices that share one copy of the weights; None is all. The GPUs of a node: hybrid sharding, whose
    groups exchange gradients only."""
    precision: str = one_of(PRECISION, "32-true")
    """32-true | bf16-mixed (bf16 compute over fp32 master weights)."""
    reduce_dtype: str = one_of(REDUCE_DTYPE, "float32")
    """fsdp: what gradients are summed in across devices: float32 | bfloat16 (prismatic)."""
    activation_checkpointing: str = one_of((*ACTIVATION_CHECKPOINTING, "auto"), "none")
    """Less memory for more computation in the LLM: none | selective (keep matrix products) | full (keep inputs of
    layers; prismatic) | auto (the least of these that the plan fits into nine tenths of a device's memory)."""
    checkpoint_every: float = number(0.25, above=0)
    """Optimizer steps between two checkpoints; below 1 a share of all steps."""
    keep_checkpoints: int = number(2, least=1)
    """How many of the newest checkpoints stay; the one with the best `val/loss` stays as well."""
    nonfinite: str = one_of(NONFINITE, "stop")
    """A loss or gradient that is not finite: stop (and name its origin) | skip (the step; counted)."""
    timeout_minutes: float = number(30.0, above=0)
    """Devices that wait for another one that long give up, and name it."""
    accept_changed_inputs: bool = False
    """Continue a run although its data, backbone weights or start model changed since its last checkpoint;
    `manifest.json` records it."""
    requeue: bool = False
    """SLURM: ask for the job to be queued again when it is preempted."""
    feature_cache: bool = False
    """Compute the features of the frozen towers once and keep them on disk, for all epochs and for all runs with the
    same towers and images. Pays where an image is seen several times and the towers are much of the work."""
    threads: int | None = number(None, least=1)
    """CPU threads of torch per process; None leaves torch's choice."""
    log_every: int = number(10, least=1)
    """Optimizer steps between two entries in TensorBoard."""
    val_every: float = number(0.25, above=0)
    """Share of the training between two passes over the validation records."""
    samples: int = number(4, least=0)
    """Validation images whose generated answers are logged with each validation."""
    preflight: bool = False
    """Check labels, gradients, learning, the use of images and saving on eight records before a new run starts
    (seconds for small models). Sweeps do it for every cell unless it is set to false."""


@dataclass
class EvaluateConfig:
    """The scoring that follows training."""

    benchmarks: str | None = None
    """Names under `conf/benchmark`, separated by commas, or a group of them; None scores nothing."""
    split: str | None = None
    """Split of the benchmarks; None takes each YAML's own."""
    limit: int | None = number(None, least=1)
    """Ask only that many questions of each benchmark; None asks all."""
    relevance: str | None = None
    """A benchmark with boxes: the relevance maps (R-GAE) of its questions are measured as well."""
    relevance_limit: int = number(100, least=1)
    """Questions whose relevance maps are measured."""
    batch_size: int = number(64, least=1)
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
    benchmark: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Keys of single benchmarks to replace, by the benchmark's name: `benchmark.vqav2.root=DIR`."""
    seed: int = number(7, least=0, most=2**32 - 1)
    """Seeds initialisation, data order and dropout."""
    runs_dir: str = "runs"
    """Folder that holds the run folders."""
    run_id: str | None = None
    """Name of the run's folder; None derives it from the choices and the seed."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import first: they register components from outside the package."""


GROUPS = ("backbone", "projector", "llm", "data", "recipe", "trainer")
"""Groups that a choice, a YAML of `conf/<group>`, fills."""

STATISTICS = (
    "images", "records_per_image", "text_records", "text_tokens", "supervised_tokens", "longest_text_tokens",
    "longest_supervised_tokens",
)  # fmt: skip
"""Keys of `data.statistics`."""

TEXT_OPTIONS = {
    "backbone": ("model", "hub", "file"),
    "projector": ("weights",),
    "llm": ("revision", "tokenizer", "dtype", "attention", "quantize"),
    "data": ("root", "json", "image_root", "val_json", "path", "val_path", "repo", "revision"),
    "benchmark": ("family", "root", "annotations", "questions", "instances", "ocr", "image", "split", "on_bad_image"),
}
"""Options of single components that are text. Where a YAML's default is null, its type says nothing."""


RETIRED = {
    "trainer.feature_cache=auto": "auto is no longer a choice, since it needed a plan of every run: use true where an "
    "image is seen several times, by epochs or by runs of a sweep, and the towers are much of the work, else false",
    "trainer.feature_cache_runs": "only trainer.feature_cache=auto used it, which is no longer a choice",
}
"""Keys and values of earlier versions: stored configurations may hold them, new ones may not."""


@cache
def schema_keys() -> dict[str, Field[Any]]:
    """The field of every key: `recipe.lr`, `seed`, ..."""
    found: dict[str, Field[Any]] = {}
    for member in fields(Config):
        kind = member.default_factory
        if is_dataclass(kind):
            found |= {f"{member.name}.{leaf.name}": leaf for leaf in fields(kind)}
        else:
            found[member.name] = member
    return found


def is_text_key(key: str) -> bool:
    """Whether a key's value is text: the name of a choice, a `str` field, or one of `TEXT_OPTIONS`."""
    first, _, rest = key.partition(".")
    if first == "benchmark":  # benchmark.NAME.KEY
        key = f"benchmark.{rest.rpartition('.')[2]}"
    elif rest and first not in Config.__dataclass_fields__:  # STAGE.GROUP.KEY
        key = rest
    return key in _text_keys()


@cache
def _text_keys() -> frozenset[str]:
    texts = {key for key, member in schema_keys().items() if member.type in ("str", "str | None")}
    options = {f"{group}.{key}" for group, keys in TEXT_OPTIONS.items() for key in keys}
    return frozenset({*GROUPS, *texts, *options})


def allowed() -> dict[str, Range | tuple[str, ...]]:
    """The keys that take only a part of their type: `recipe.lr` -> above 0, `recipe.prompt` -> two names."""
    return {key: member.metadata["allowed"] for key, member in schema_keys().items() if "allowed" in member.metadata}

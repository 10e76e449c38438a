"""The schema of the configuration: every key that all choices of a group share, with its type, default, range and
meaning. Names of components that plug-ins can add (projector, data family, ...) are checked by their registries.

`prism-deco keys` and `conf/README.md` show users the strings below the fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import II, MISSING

from prism_deco.config.fields import number, one_of

# Defined here and not in the modules that use them: those import torch, which takes seconds.
RESIZE = ("letterbox", "pad", "resize-naive", "resize-crop")
ON_BAD_IMAGE = ("fail", "skip", "blank")
ON_BAD_RECORD = ("fail", "skip")
ODD_RECORDS = ("refuse", "train")
LM = ("full", "frozen", "lora", "qlora")
TOWER = ("frozen", "full", "lora")
PROMPT = ("chat", "plain")
TOKENIZE = ("per_turn", "whole")
LONG_QUESTIONS = ("shorten", "cut")
IMAGE_SLOT = ("after_bos", "after_first_token", "in_place")
AS_TRAINED = "as_trained"
"""The default of `evaluate.ask`: the same prompt as in training."""
TURN_MASK = ("causal", "block")
ACCELERATOR = ("auto", "cpu", "gpu", "cuda")
STRATEGY = ("auto", "ddp", "fsdp")
PRECISION = ("32-true", "bf16-mixed")
REDUCE_DTYPE = ("float32", "bfloat16")
ACTIVATION_CHECKPOINTING = ("none", "selective", "full")
NONFINITE = ("stop", "skip")
WARMUP_ROUNDING = ("down", "up")
PROJECTOR_INIT = ("normal", "torch")
PROJECTOR_SEED = ("run", "tower_width")
LOSS = ("token_mean", "micro_batch_mean")
SAMPLER = ("shuffled", "grouped", "llava", "prismatic")
STATISTICS = (
    "images", "records_per_image", "text_records", "text_tokens", "supervised_tokens", "longest_text_tokens",
    "longest_supervised_tokens",
)  # fmt: skip
"""Keys of `data.statistics`."""
NAME_LISTS = ("evaluate.benchmarks", "evaluate.ask")
"""Keys that hold comma-separated names, or a list of them in a YAML."""
GROUPS = ("backbone", "projector", "llm", "data", "recipe", "trainer")
"""Groups whose content is a choice: a YAML of `conf/<group>`."""


@dataclass
class BackboneConfig:
    """The vision tower, or an ensemble of them (`conf/backbone`)."""

    name: str = MISSING
    """Name of the choice: the file name of its YAML."""
    family: str = MISSING
    """Registered class that builds the tower (`prism_deco/backbones/FAMILY.py`)."""
    pretrained: bool = True
    """Load pretrained weights; false starts from random ones (for tests and timing)."""
    weights: str | None = None
    """Local file or folder to load the weights from instead of the hub."""
    image_size: int | None = number(None, least=1)
    """Side of the square input in pixels; null keeps the tower's own. Position embeddings are resampled."""
    layer: int = -2
    """Transformer block whose output is used; -2 is the second-to-last (PRISM, LLaVA)."""
    extra_layers: list[int] = field(default_factory=list)
    """More blocks whose outputs are used; channels are concatenated in the order of the blocks (`token_packer`)."""
    resize: str = one_of(RESIZE, II("recipe.resize"))
    """How an image is made square; the default is the recipe's."""


@dataclass
class ProjectorConfig:
    """The projector from patch features to visual tokens (`conf/projector`)."""

    name: str = MISSING
    """Name of the choice: the registered name of the projector, and the file name of its YAML."""
    num_tokens: int | None = number(None, least=1)
    """Number of visual tokens, a square number; null keeps every patch (`linear` only)."""


@dataclass
class LLMConfig:
    """The language model, its tokenizer and its chat format (`conf/llm`)."""

    name: str = MISSING
    """Name of the choice: the file name of its YAML."""
    hub: str | None = None
    """Hugging Face repository of the weights and the tokenizer."""
    pretrained: bool = True
    """Load pretrained weights; false starts from random ones."""
    weights: str | None = None
    """Local folder or file to load the weights from instead of the hub."""


@dataclass
class DataConfig:
    """Conversations and images to train on (`conf/data`)."""

    name: str = MISSING
    """Name of the choice: the file name of its YAML."""
    family: str = MISSING
    """Registered data source (`prism_deco/data/sources.py`, or a plug-in's)."""
    limit: int | None = number(None, least=1)
    """Use only the first N records; null uses all."""
    val_fraction: float = number(II("recipe.val_fraction"), least=0, below=1)
    """Fraction of the images held out for `val/loss`; ignored if the data has a validation file."""
    on_bad_image: str = one_of(ON_BAD_IMAGE, "fail")
    """How to handle a missing or unreadable image: fail, skip its record, or use a blank image of mean colour. The
    manifest counts them each time they are read, so once per epoch."""
    on_bad_record: str = one_of(ON_BAD_RECORD, "fail")
    """How to handle a record that cannot be trained on: fail, or skip it (the manifest counts them)."""
    draft_jpeg: bool = False
    """Decode JPEGs that are more than twice as large as the tower's input at a reduced size, which is two to four times
    faster. Pixels change by less than one of 255 levels on average."""
    num_workers: int | None = number(None, least=0)
    """DataLoader workers per rank; 0 loads in the training process. Null is 0 on a CPU, and on GPUs one per core of the
    rank, at most eight."""
    statistics: dict[str, Any] | None = None
    """Sizes for `prism-deco plan` if the files are not on disk: `images`, `records_per_image` (1), `text_records`
    without an image (0), and per record `text_tokens`, `supervised_tokens`, `longest_text_tokens`,
    `longest_supervised_tokens` (in the batch with the longest record)."""


@dataclass
class RecipeConfig:
    """How the model is composed and optimised (`conf/recipe`)."""

    name: str = MISSING
    """Name of the choice: the file name of its YAML."""
    stages: dict[str, list[str]] | None = None
    """Runs to train one after the other: the name and the settings of each; null is a single run."""
    start_from: str | None = None
    """Folder of a finished run of the same model to start from, with any data: its projector, and its LLM or adapters
    if it trained them."""
    lm: str = one_of(LM, "full")
    """How the LLM is trained: full (all weights), frozen, lora (adapters), or qlora (adapters on 4-bit weights; needs a
    GPU)."""
    tower: str = one_of(TOWER, "frozen")
    """How the vision tower is trained: frozen, full (all weights), or lora (adapters on the linear layers that its
    forward pass calls; in CLIP those of the MLPs). A trained tower is stored with the run."""
    tower_layers: int | None = number(None, least=1)
    """Train only the last N blocks of each tower up to the layer whose features are used; patch and position
    embeddings stay frozen. Null trains all."""
    lora_r: int = number(128, least=1)
    """Rank of the LoRA adapters of the LLM and of the tower."""
    lora_alpha: int = number(256, least=1)
    """The adapters' output is scaled by `lora_alpha / lora_r`."""
    lora_dropout: float = number(0.05, least=0, below=1)
    """Dropout on the adapters' input."""
    prompt_set: str | None = None
    """Which of the `prompt_sets` in the LLM's YAML to use: it overrides the chat format and other keys of the LLM, and
    keys of the recipe. An LLM without that set is refused; null is the LLM's own format."""
    prompt: str = one_of(PROMPT, "chat")
    """Format of the text: chat (the LLM's chat format) or plain (LLaVA's alignment: image and caption, no question)."""
    tokenize: str | None = one_of(TOKENIZE, None)
    """Tokenize turn by turn (per_turn, PRISM) or the whole conversation (whole, LLaVA); null is the LLM's default."""
    added_tokens: bool = True
    """Add the pad token that the LLM's YAML names (PRISM); false pads with the unknown token and leaves the embedding
    tables as they are (LLaVA)."""
    resize: str = one_of(RESIZE, "letterbox")
    """How an image is made square: letterbox (pad, as prismatic), pad (as LLaVA-1.5), resize-naive (scale both sides),
    or resize-crop (scale the shorter side and crop, as CLIP)."""
    num_tokens: int = number(144, least=1)
    """Number of visual tokens after compression, for projectors that compress."""
    projector_init: str = one_of(PROJECTOR_INIT, "normal")
    """Initialisation of the abstractors' weights: normal (N(0, 0.02), Honeybee) or torch (the defaults of torch's
    layers, as in the code of DeCo's authors)."""
    projector_seed: str = one_of(PROJECTOR_SEED, "run")
    """Seed of the projector's weights: run (the run's seed) or tower_width (the width of the tower's features, as in
    prismatic, which gives the same weights under every seed)."""
    image_slot: str = one_of(IMAGE_SLOT, "after_bos")
    """Where visual tokens go: after_bos (after the BOS token, PRISM), after_first_token (after the first token of the
    text, whatever it is; DeCo's authors), or in_place (at the position of `<image>`, LLaVA)."""
    standardise_features: bool = False
    """Standardise each feature channel with the statistics of the training images (not part of PRISM)."""
    token_scale: float | None = number(None, above=0)
    """Factor that scales the projector's output; null is off (not part of PRISM)."""
    turn_mask: str = one_of(TURN_MASK, "causal")
    """What a turn attends to: causal (everything before it) or block (only the image and itself; not part of PRISM)."""
    blind: bool = False
    """Replace the visual tokens by zeros: the image-blind baseline."""
    val_fraction: float = number(0.005, least=0, below=1)
    """Fraction of the images held out for validation if the data has no validation file."""
    odd_records: str = one_of(ODD_RECORDS, "refuse")
    """How to handle records with `<image>` but no image, with several tags for one image, or with an unanswered last
    question: refuse them as bad records (see `data.on_bad_record`), or train on them as PRISM and LLaVA do."""
    epochs: int = number(1, least=1)
    """Passes over the training records."""
    max_steps: int | None = number(None, least=1)
    """Stop after this many optimizer steps; null trains all epochs."""
    global_batch_size: int = number(128, least=1)
    """Records per optimizer step, summed over devices and accumulation steps."""
    micro_batch_size: int = number(16, least=1)
    """Records per forward pass on one device."""
    max_text_tokens: int = number(2048, least=1)
    """Text is truncated to this many tokens before the visual tokens are inserted."""
    long_questions: str = one_of(LONG_QUESTIONS, "shorten")
    """How to handle a first question that leaves no room for its answer: shorten the question (drop its middle), or cut
    the text after it, so that nothing is learnt from the record (prismatic, LLaVA)."""
    max_positions: int | None = number(None, least=1)
    """Longest sequence, visual tokens included, to which the text is truncated; null is the LLM's own limit."""
    lr: float = number(2e-5, above=0)
    """Peak learning rate."""
    projector_lr: float | None = number(None, above=0)
    """Peak learning rate of the projector; null uses `lr`."""
    tower_lr: float | None = number(None, above=0)
    """Peak learning rate of a trained tower; null uses `lr`."""
    update_idle_projector: bool = True
    """Let AdamW's momentum and weight decay update the projector, and a trained tower, in steps without an image
    (LLaVA); false leaves their weights unchanged in such steps (prismatic)."""
    betas: tuple[float, float] = number((0.9, 0.999), least=0, below=1)
    """AdamW's betas."""
    eps: float = number(1e-8, above=0)
    """AdamW's epsilon."""
    weight_decay: float = number(0.1, least=0)
    """AdamW's weight decay, applied to matrices but not to vectors and biases."""
    warmup_ratio: float = number(0.03, least=0, most=1)
    """Fraction of the steps with linear warmup from 0; cosine decay to 0 follows."""
    warmup_rounding: str = one_of(WARMUP_ROUNDING, "down")
    """How the warmup is rounded to whole steps: down (prismatic) or up (LLaVA). The first step has a learning rate of 0
    unless `warmup_ratio` is 0."""
    grad_clip: float = number(1.0, least=0)
    """Gradients are clipped to this global norm; 0 is off."""
    loss: str = one_of(LOSS, "token_mean")
    """How the loss is averaged: token_mean (over the tokens of the global batch) or micro_batch_mean (per forward pass,
    then over these; prismatic)."""
    sampler: str = one_of(SAMPLER, "grouped")
    """Order of the records: shuffled, grouped (by modality and length), llava (by modality), or prismatic."""
    packing: bool = False
    """Pack the records of a forward pass into one sequence, each attending to itself only, instead of padding them: the
    same loss without the cost of padding. Needs `llm.attention=sdpa`."""
    max_logits: int | None = number(2**26, least=1)
    """Largest number of logits (positions times vocabulary) in memory; beyond it they are computed in chunks. The
    default takes 256 MiB in float32; null is unlimited."""


@dataclass
class TrainerConfig:
    """Hardware, precision, checkpoints and logging (`conf/trainer`)."""

    name: str = MISSING
    """Name of the choice: the file name of its YAML."""
    accelerator: str = one_of(ACCELERATOR, "auto")
    """Lightning's accelerator; cuda is the same as gpu."""
    devices: int = 1
    """Devices per node, one process each; -1 takes all."""
    num_nodes: int = number(1, least=1)
    """Number of nodes."""
    strategy: str = one_of(STRATEGY, "auto")
    """Auto (one device), ddp (every device holds the whole model), or fsdp (weights, gradients and optimizer state are
    sharded)."""
    shard_size: int | None = number(None, least=1)
    """With fsdp, the number of devices that share one copy of the weights; null is all. The number of GPUs per node
    gives hybrid sharding, where only gradients cross nodes."""
    precision: str = one_of(PRECISION, "32-true")
    """Float32 throughout, or bfloat16 compute with float32 master weights."""
    reduce_dtype: str = one_of(REDUCE_DTYPE, "float32")
    """With fsdp, the type in which gradients are reduced across devices: float32, or bfloat16 (prismatic)."""
    activation_checkpointing: str = one_of((*ACTIVATION_CHECKPOINTING, "auto"), "none")
    """Recompute activations of the LLM, and of a trained tower, in the backward pass: none, selective (keep matrix
    products), full (keep the inputs of layers; prismatic), or auto (the least that fits nine tenths of a device's
    memory by the plan)."""
    compile: bool = False
    """Compile each block of the towers and of the LLM (`torch.compile`). Meant for GPUs, where steps get faster after
    minutes of warm-up. Results differ by rounding. Needs a C++ compiler."""
    checkpoint_every: float = number(0.25, above=0)
    """Optimizer steps between checkpoints; below 1, a fraction of all steps."""
    keep_checkpoints: int = number(2, least=1)
    """Number of newest checkpoints to keep; the one with the best `val/loss` is kept as well."""
    nonfinite: str = one_of(NONFINITE, "stop")
    """How to handle a loss or gradient that is not finite: stop and name its origin, or skip the step (counted)."""
    timeout_minutes: float = number(30.0, above=0)
    """Minutes to wait for another process before giving up; the error names it."""
    accept_changed_inputs: bool = False
    """Resume a run although its data, tokenizer, frozen weights or start model changed since its last checkpoint;
    `manifest.json` records it."""
    requeue: bool = False
    """Under SLURM, requeue the job when it is preempted."""
    feature_cache: bool = False
    """Cache the features of the frozen towers on disk, for all epochs and all runs with the same towers and images.
    Pays off if images are seen several times and the towers are much of the work."""
    threads: int | None = number(None, least=1)
    """CPU threads of torch per process; null is torch's default."""
    loggers: list[Any] = field(default_factory=lambda: ["tensorboard"])
    """Lightning's loggers for metrics, samples and hyperparameters (tensorboard, csv, wandb, mlflow, comet), by name or
    with options: `[tensorboard,{wandb: {project: x}}]`. `metrics.jsonl` is always written."""
    log_every: int = number(10, least=1)
    """Optimizer steps between log entries."""
    val_every: float = number(0.25, above=0)
    """Fraction of the training between validations."""
    samples: int = number(4, least=0)
    """Number of validation images whose generated answers are logged at each validation."""
    preflight: bool = False
    """Before a new run starts, check labels, gradients, learning, the use of images and saving on eight records. Takes
    seconds for small models. Sweeps check every cell unless this is false."""


@dataclass
class EvaluateConfig:
    """Evaluation after training."""

    benchmarks: str | None = None
    """Benchmarks to score, separated by commas: names or groups of `conf/benchmark`, or YAML files; null is none."""
    split: str | None = None
    """Split of the benchmarks; null is the default of each benchmark."""
    limit: int | None = number(None, least=1)
    """Ask only this many questions of each benchmark; null asks all."""
    ask: str = AS_TRAINED
    """Ways to ask, separated by commas: as_trained (the same prompt as in training), or an alternative from the LLM's
    YAML (`asks`), with its own results in `eval/BENCHMARK-ASK`."""
    num_tokens: list[int] = field(default_factory=list)
    """Other numbers of visual tokens to score the trained model with: scales of `matryoshka`, or, with `compressors`,
    the number they keep. Each has its own results, `eval/tokens36/BENCHMARK` or `eval/fastv36/BENCHMARK`."""
    compressors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Training-free compressors to score a `linear` run with (fastv, visionzip, prumerge) and their options:
    `{fastv: {layer: 2}, visionzip: {}}`."""
    relevance: str | None = None
    """Benchmark with boxes to measure relevance maps (R-GAE) on."""
    relevance_limit: int = number(100, least=1)
    """Number of questions to measure relevance maps on."""
    batch_size: int = number(64, least=1)
    """Questions per generation batch."""


@dataclass
class Config:
    """The configuration of a run."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    benchmark: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Overrides of single benchmarks: `benchmark.vqav2.root=DIR`."""
    seed: int = number(7, least=0, most=2**32 - 1)
    """Seed of initialisation, data order and dropout."""
    runs_dir: str = "runs"
    """Parent of the run folders."""
    run_id: str | None = None
    """Name of the run's folder; null derives it from the choices and the seed."""
    plugins: list[str] = field(default_factory=list)
    """Python modules to import first, which register components from outside the package. A component's YAML can list
    them, too."""

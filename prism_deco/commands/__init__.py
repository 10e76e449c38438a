"""The commands of `prism-deco`: each has a function in a module of this package, and another one that adds its
arguments.

A module is imported when its command is named, and heavy imports stand inside the functions: `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """Where a command is, and what `--help` says about it.

    Attributes:
        place: `module:function`; `function_arguments(parser)` in the same module adds its arguments.
        summary: what it does, in a few words.
        example: a command line, without `prism-deco`.
    """

    place: str
    summary: str
    example: str


COMMANDS = {
    "train": Command(
        "train:train",
        "compose and train a model, then score it",
        "train projector=c_abstractor projector.depth=2 recipe.epochs=2 seed=3",
    ),
    "evaluate": Command(
        "evaluate:evaluate",
        "score a finished run, or a predictions file",
        "evaluate runs/RUN_ID benchmark=pope,gqa limit=500",
    ),
    "explain": Command(
        "explain:explain",
        "show where in the image each generated word looked (R-GAE)",
        'explain runs/RUN_ID --image cat.jpg --prompt "What is it?"',
    ),
    "chat": Command("chat:chat", "talk with a trained model about an image", "chat runs/RUN_ID --image cat.jpg"),
    "export": Command(
        "export:export", "write a model to one folder for use elsewhere", "export runs/RUN_ID --to exported --hf"
    ),
    "sweep": Command(
        "sweep:sweep",
        "train a grid of models and keep its ledger",
        "sweep projector=avgpool,c_abstractor seed=1,2,3 --jobs 2",
    ),
    "plan": Command(
        "sweep:plan",
        "estimate memory, hours and disk of a run or a sweep",
        "plan generalization trainer.devices=8 --accelerator h100",
    ),
    "report": Command("sweep:report", "write tables, statistics and figures of a sweep or of runs", "report runs/mini"),
    "keys": Command("keys:keys", "list the configuration's keys with types, defaults and meanings", "keys recipe"),
    "data check": Command(
        "data:data_check",
        "read a data set and report every fault",
        "data check data=llava data.json=train.json data.image_root=images",
    ),
    "data prepare": Command(
        "data:data_prepare",
        "download a published data set and lay it out for training",
        "data prepare llava_v1_5_mix665k --root data/mix665k --plan",
    ),
    "bench projectors": Command(
        "bench:bench_projectors",
        "time forward and backward passes of the projectors",
        "bench projectors avgpool c_abstractor --device cuda",
    ),
    "bench data": Command(
        "bench:bench_data",
        "count images per second, compared with PIL and torchvision",
        "bench data backbone=clip_vit_l_336 llm=phi2",
    ),
    "bench train": Command(
        "bench:bench_train",
        "time a training step, compared with transformers' own LLaVA",
        "bench train --preset qwen_small --ablation",
    ),
    "pretrain-mini": Command(
        "miniature:pretrain_mini",
        "train the miniature's towers and tokenizers again",
        "pretrain-mini mini_clip --out assets",
    ),
    "record-blind": Command(
        "miniature:record_blind",
        "keep the scores of an image-blind run as a reference",
        "record-blind runs/RUN_ID --out blind.json",
    ),
}
"""In the order of `--help`."""

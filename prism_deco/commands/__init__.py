"""The commands of `prism-deco`: each is a function in a module of this package, with another one that adds its
arguments.

Only the module of the given command is imported, and heavy imports are inside the functions, so that `--help` is fast.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """The module of a command, and its entry in `--help`.

    Attributes:
        summary: what it does, in a few words.
        example: a command line, without `prism-deco`.
        module: module of this package with the command's function, `data_check` for `data check`, and
            `data_check_arguments(parser)`, which adds its arguments; by default the command's first word.
    """

    summary: str
    example: str
    module: str = ""


COMMANDS = {
    "train": Command("compose and train a model, then score it", "train projector=c_abstractor recipe.epochs=2 seed=3"),
    "evaluate": Command(
        "score a finished run, or a predictions file", "evaluate runs/RUN_ID benchmark=pope,gqa limit=500"
    ),
    "explain": Command(
        "show where in the image each generated word looked (R-GAE)",
        'explain runs/RUN_ID --image cat.jpg --prompt "What is it?"',
    ),
    "probe": Command(
        "read labels and patches from the visual tokens without the LLM",
        "probe runs/RUN_ID --objects instances.json --images train2017",
    ),
    "chat": Command("talk with a trained model about an image", "chat runs/RUN_ID --image cat.jpg"),
    "export": Command("write a model to one folder for use elsewhere", "export runs/RUN_ID --to exported --hf"),
    "sweep": Command(
        "train a grid of models and keep its ledger", "sweep projector=avgpool,c_abstractor seed=1,2,3 --jobs 2"
    ),
    "plan": Command(
        "estimate memory, hours and disk of a run or a sweep",
        "plan generalization trainer.devices=8 --accelerator h100",
        module="sweep",
    ),
    "report": Command("write tables, statistics and figures of a sweep or of runs", "report runs/mini", module="sweep"),
    "keys": Command("list the configuration's keys with types, defaults and meanings", "keys recipe"),
    "data check": Command(
        "read a data set and report every fault", "data check data=llava data.json=train.json data.image_root=images"
    ),
    "data prepare": Command(
        "download a published data set and lay it out for training",
        "data prepare llava_v1_5_mix665k --root data/mix665k --plan",
    ),
    "bench projectors": Command(
        "time forward and backward passes of the projectors", "bench projectors avgpool c_abstractor --device cuda"
    ),
    "bench data": Command(
        "count images per second, compared with PIL and torchvision", "bench data backbone=clip_vit_l_336 llm=phi2"
    ),
    "bench train": Command(
        "time a training step, compared with transformers' own LLaVA",
        "bench train --preset qwen_small recipe.packing=false",
    ),
    "bench gpu": Command("prove a GPU: results, memory and speed, in half an hour", "bench gpu --out runs/bench_gpu"),
}
"""In the order of `--help`."""

"""Regional compilation (`trainer.compile`): block by block, so that equal blocks are compiled once."""

from __future__ import annotations

import logging

import torch

from prism_deco.llms.layers import decoder_layers
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)


def compile_layers(vlm: VLM, *, backend: str = "inductor") -> None:
    """Compiles each block of the towers and each decoder layer in place; names of weights stay as they are.

    As torchtitan does it: after activation checkpointing is set, before weights are sharded. Nothing is compiled until
    a block first runs. Generation stays as it is: every length of its cache would be compiled.

    Args:
        backend: of `torch.compile`.
    """
    blocks = [*vlm.backbone.blocks, *decoder_layers(vlm.lm)]
    for block in blocks:
        block.compile(backend=backend)
    vlm.generate = torch.compiler.set_stance("force_eager")(vlm.generate)  # type: ignore[method-assign]
    log.info(
        "Compiling %d blocks of the towers and the LLM: the first steps, and the first validation, take minutes longer",
        len(blocks),
    )

"""Regional compilation (`trainer.compile`): block by block, so that identical blocks are compiled only once."""

from __future__ import annotations

import logging

import torch

from prism_deco.llms.layers import decoder_layers
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)


def compile_layers(vlm: VLM, *, backend: str = "inductor") -> None:
    """Compiles each tower block and each decoder layer in place; parameter names stay the same.

    Call it after activation checkpointing is set and before weights are sharded, as torchtitan does. A block is
    compiled when it first runs. Generation stays eager: it would recompile for every cache length.
    """
    blocks = [*vlm.backbone.blocks, *decoder_layers(vlm.lm)]
    for block in blocks:
        block.compile(backend=backend)
    vlm.generate = torch.compiler.set_stance("force_eager")(vlm.generate)  # type: ignore[method-assign]
    log.info(
        "Compiling %d blocks of the towers and the LLM: the first steps, and the first validation, take minutes longer",
        len(blocks),
    )

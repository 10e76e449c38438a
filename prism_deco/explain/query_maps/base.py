"""Query-to-Patch for any projector.

The projector's class selects the implementation (`functools.singledispatch`). The default uses its `query_to_patch()`
or gradients; a plug-in projector with its own attention can add `@trace.register(ItsClass)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from prism_deco.explain.query_maps.gradient import InputGradient
from prism_deco.explain.query_maps.maps import Fixed, QueryMaps
from prism_deco.projectors import Projector

Project = Callable[[Tensor], Tensor]


@singledispatch
def trace(projector: Projector, project: Project, features: Tensor) -> QueryMaps:
    """Runs the projector on one image and keeps what its maps are computed from.

    Args:
        project: float[1, N, D] -> float[1, M, E]: the projector, including the model's post-processing of its output.
        features: float[1, N, D], one image's patch features.
    """
    # None if the map depends on the image, or is unknown.
    fixed = projector.query_to_patch()
    if fixed is not None:
        with torch.no_grad():
            return Fixed(project(features), fixed.to(features))
    return InputGradient(projector, project, features)


@contextmanager
def outputs_of(modules: Iterable[nn.Module]) -> Iterator[list[Any]]:
    """Collects the outputs of modules, in the order in which they run."""
    outputs: list[Any] = []
    handles = [module.register_forward_hook(lambda _, __, output: outputs.append(output)) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()

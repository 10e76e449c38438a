"""Chosen patches: each visual token is one patch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from prism_deco.explain.query_maps.base import Project, trace
from prism_deco.explain.query_maps.maps import Fixed
from prism_deco.projectors.controls import RandomPatches


@trace.register
def _(projector: RandomPatches, project: Project, features: Tensor) -> Fixed:
    # int64[M] -> int64[M, N], one 1 in each row.
    chosen = F.one_hot(projector.chosen(features)[0], features.shape[1])
    with torch.no_grad():
        return Fixed(project(features), chosen.to(features))

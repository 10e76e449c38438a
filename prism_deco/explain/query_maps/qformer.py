"""Q-Former: the relevance rules applied to its self- and cross-attention."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerModel

from prism_deco.explain.attention import batched_gradients, eager_attention
from prism_deco.explain.propagate import query_to_patch, weigh
from prism_deco.explain.query_maps.base import Project, outputs_of, trace
from prism_deco.explain.query_maps.maps import QueryMaps, in_parts
from prism_deco.projectors.qformer import QFormer


@trace.register(QFormer)
class QFormerMaps(QueryMaps):
    """Queries start without patches; the last cross-attention is the raw-attention map."""

    def __init__(self, projector: QFormer, project: Project, features: Tensor):
        body, queries = cast(Blip2QFormerModel, projector.body), cast(nn.Parameter, projector.queries)
        trained = queries.requires_grad
        # The first self-attention does not depend on patches, so its graph must start at the learned queries.
        queries.requires_grad_(True)
        try:
            with eager_attention(body), torch.enable_grad():
                exposed = cast("list[tuple[str, nn.Module]]", projector.expose_attention())  # type: ignore[operator]
                with outputs_of(module for _, module in exposed) as outputs:
                    self.tokens = project(features)
        finally:
            queries.requires_grad_(trained)
        self.kinds = [kind for kind, _ in exposed]
        self.probabilities: list[Tensor] = [output[1] for output in outputs]

    def relevance(self, gradients: Tensor) -> Tensor:
        return in_parts(self._relevance, gradients, sum(p.numel() for p in self.probabilities))

    def _relevance(self, gradients: Tensor) -> Tensor:
        taken = batched_gradients(self.tokens, self.probabilities, gradients[:, None])
        weighed = [weigh(p.detach()[0], g[:, 0]) for p, g in zip(self.probabilities, taken, strict=True)]
        # Only its shape is needed: [T, M, N].
        cross = weighed[self.kinds.index("cross")]
        return query_to_patch(zip(self.kinds, weighed, strict=True), start=torch.zeros_like(cross))

    def attention(self) -> Tensor:
        cross = [p for kind, p in zip(self.kinds, self.probabilities, strict=True) if kind == "cross"]
        return cross[-1].detach()[0].mean(dim=0)

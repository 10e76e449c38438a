"""Every cell of the miniature grid trains: each tiny backbone x each tiny LLM x each projector."""

from itertools import product

import pytest
import torch

from prism_deco.backbones import build_backbone
from prism_deco.config import choices
from prism_deco.llms import build_llm
from prism_deco.projectors import PROJECTORS, build_projector
from prism_deco.sequence import build_batch
from prism_deco.training.optim import parameter_groups
from prism_deco.vlm import VLM

BACKBONES = [name for name in choices("backbone") if name.startswith("mini_")]
LLMS = [name for name in choices("llm") if name.startswith("mini_")]
SMALL = {"c_abstractor": {"hidden_dim": 32}, "d_abstractor": {"hidden_dim": 32, "ffn_dim": 32}}
SMALL["qformer"] = {"hidden_dim": 24, "ffn_dim": 48}
TALK = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "a red circle"}]
TEXT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]


@pytest.mark.parametrize(("backbone_name", "llm_name"), list(product(BACKBONES, LLMS)))
def test_every_projector_trains_between_these_two(backbone_name, llm_name):
    for projector_name in PROJECTORS.names():
        torch.manual_seed(0)
        backbone, llm = build_backbone(backbone_name), build_llm(llm_name)
        tokens = 16 if PROJECTORS.get(projector_name).compresses else None
        options = SMALL.get(projector_name, {})
        projector = build_projector(
            projector_name, backbone.embed_dim, llm.embed_dim, backbone.grid, tokens, **options
        ).eval()  # no dropout: the loss must fall from step to step
        vlm = VLM(backbone, projector, llm.model)
        pixels = {name: torch.randn(1, 3, backbone.image_size, backbone.image_size) for name in backbone.towers}
        encoded = [llm.encode(TALK, num_images=1), llm.encode(TEXT)]
        batch = build_batch(encoded, projector.num_tokens, pixels=pixels)
        groups = parameter_groups(projector, llm.model, lr=1e-3, projector_lr=None, weight_decay=0.0)
        optimizer = torch.optim.AdamW(groups)
        tower = backbone.sha256()
        losses = []
        for _ in range(3):
            loss = vlm(batch)
            losses.append(loss.total.item())
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
        cell = f"{backbone_name} x {projector_name} x {llm_name}"
        assert losses[0] > losses[1] > losses[2] > 0, cell
        assert all(p.grad is not None and p.grad.isfinite().all() for p in projector.parameters()), cell
        assert backbone.sha256() == tower, cell

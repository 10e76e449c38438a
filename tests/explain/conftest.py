"""Small real models in float64, so that agreement to many digits implies the same formula."""

import pytest
import torch
from PIL import Image

from prism_deco.backbones import build_backbone
from prism_deco.config import load_choice
from prism_deco.llms import build_llm
from prism_deco.projectors import build_projector
from prism_deco.vlm import VLM

SMALL = {
    "linear": {},
    "avgpool": {},
    "maxpool": {},
    "qformer": {"hidden_dim": 32, "heads": 4, "ffn_dim": 48, "depth": 3},
    "c_abstractor": {"hidden_dim": 32, "depth": 1},
    "d_abstractor": {"hidden_dim": 32, "heads": 4, "ffn_dim": 48, "points": 3},
    "window_attention": {"heads": 4, "hidden_dim": 64, "ffn_dim": 64},
    "token_packer": {"heads": 4, "hidden_dim": 64},
    "resampler": {"depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn_dim": 64},
    "random_patches": {},
}


@pytest.fixture
def small():
    """(llm choice, projector) -> (VLM, LanguageModel), random weights in float64, seeded."""

    def build(
        llm="mini_qwen2",
        projector="avgpool",
        tokens=16,
        backbone="mini_siglip",
        architecture=None,
        prompt="chat",
        **options,
    ):
        torch.manual_seed(0)
        tower = build_backbone(backbone, pretrained=False)
        numbers = load_choice("llm", llm)["architecture"] | {"initializer_range": 0.02} | (architecture or {})
        language = build_llm(llm, pretrained=False, architecture=numbers, prompt=prompt)
        # With this initialisation attention is nearly uniform; larger weights make layers, heads and rows differ.
        for name, parameter in language.model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                parameter.data.mul_(8)
        project = build_projector(
            projector,
            tower.embed_dim,
            language.embed_dim,
            tower.grid,
            None if projector == "linear" else tokens,
            **SMALL[projector] | options,
        )
        vlm = VLM(tower, project, language.model, standardise_features=True, token_scale=0.5)
        return vlm.double().eval(), language

    return build


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """A wide image of seeded noise with a red square."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 120, (60, 100, 3), generator=generator, dtype=torch.uint8).numpy()
    image = Image.fromarray(noise)
    image.paste((220, 20, 20), (60, 20, 80, 40))
    return image

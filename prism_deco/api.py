"""`prism_deco.load(run)`: a trained model as a researcher uses it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from prism_deco.data.images import open_image
from prism_deco.data.loader import stack_pixels
from prism_deco.explain import Relevance, relevance
from prism_deco.inference import answer, first_token_probabilities
from prism_deco.llms import LanguageModel
from prism_deco.training.artifacts import load_model
from prism_deco.vlm import VLM

ImageLike = Image.Image | str | Path | Tensor | None


class Model:
    """A trained vision-language model in eval mode: raw questions and images in, text out.

    Attributes:
        vlm: the `nn.Module`.
        llm: the language model's tokenizer and chat format.
        config: the configuration it was trained with.
    """

    def __init__(self, vlm: VLM, llm: LanguageModel, config: DictConfig):
        self.vlm = vlm
        self.llm = llm
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where the model's weights lie."""
        return next(self.vlm.lm.parameters()).device

    def generate(self, images: Sequence[ImageLike], prompts: Sequence[str], max_new_tokens: int = 128) -> list[str]:
        """Answers a batch of questions greedily.

        Args:
            images: one per question: a PIL image, a path, ready visual tokens float[M, E] (see
                `encode_images`), or None for a text-only question.
            prompts: raw questions; the chat template is applied here.
        """
        return answer(self.vlm, self.llm, self._visual(images, prompts), prompts, max_new_tokens=max_new_tokens)

    def choice_probabilities(
        self, images: Sequence[ImageLike], prompts: Sequence[str], choices: Sequence[str]
    ) -> Tensor:
        """float[questions, choices]: the first answer token's softmax restricted to the choices."""
        return first_token_probabilities(self.vlm, self.llm, self._visual(images, prompts), prompts, choices)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image | str | Path]) -> list[Tensor]:
        """The visual tokens float[M, E] of each image, to be used for several questions."""
        if not images:
            return []
        opened = [image if isinstance(image, Image.Image) else open_image(Path(image)) for image in images]
        pixels = stack_pixels([self.vlm.backbone.transform(image.convert("RGB")) for image in opened])
        assert pixels is not None
        return list(self.vlm.visual_tokens({tower: p.to(self.device) for tower, p in pixels.items()}))

    def relevance(
        self, image: Image.Image | str | Path, prompt: str, answer: str | None = None, **options: Any
    ) -> Relevance:
        """R-GAE: where in the image the model looked for each token of an answer (DeCo, section 3.1).

        Args:
            prompt: the raw question.
            answer: the text to explain; None takes the model's own answer.
            options: see `prism_deco.explain.relevance` (method, chunk, through_backbone, max_new_tokens).
        """
        return relevance(self.vlm, self.llm, image, prompt, answer, **options)

    def _visual(self, images: Sequence[ImageLike], prompts: Sequence[str]) -> list[list[Tensor]]:
        """Visual tokens per question; images that are no tensors yet are encoded in one batch."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts: give one image (or None) per prompt.")
        pending = [image for image in images if image is not None and not isinstance(image, Tensor)]
        encoded = iter(self.encode_images(pending))
        return [[] if image is None else [image] if isinstance(image, Tensor) else [next(encoded)] for image in images]


def load(run: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Model:
    """Loads a finished run.

    Args:
        run: a run folder, or its `model/` folder.
        dtype: casts the weights; None keeps the training precision (float32 master weights).

    Raises:
        ValueError: the folder holds no finished model, or its files do not fit together.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give a run folder such as runs/RUN_ID.")
    vlm, llm, config = load_model(folder / "model" if (folder / "model").is_dir() else folder)
    return Model(vlm.to(device=device, dtype=dtype), llm, config)

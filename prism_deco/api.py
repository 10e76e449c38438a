"""The Python interface: `prism_deco.train(config)` trains a model, `prism_deco.load(run)` loads one to ask it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from prism_deco.config.registry import import_plugins
from prism_deco.config.schema import AS_TRAINED
from prism_deco.data.images import open_image
from prism_deco.data.loader import stack_pixels
from prism_deco.distributed import requested_device
from prism_deco.errors import UsageError
from prism_deco.explain import Relevance, relevance
from prism_deco.export import SHARD_SIZE, save_folder
from prism_deco.files import check_folder
from prism_deco.inference import answer, answer_losses, first_token_probabilities
from prism_deco.llms import LanguageModel
from prism_deco.machine import cores
from prism_deco.training.model_folder import load_model, model_folder
from prism_deco.vlm import VLM

ImageLike = Image.Image | str | Path | Tensor
"""A PIL image, a path, or visual tokens float[M, E] (see `Model.encode_images`)."""
Images = ImageLike | Sequence[ImageLike] | None
"""The images of one question: one, several, or none."""


class Model:
    """A trained vision-language model in eval mode: raw questions and images in, text out.

    Attributes:
        vlm: the `nn.Module`.
        llm: the language model's tokenizer and chat format.
        config: the configuration it was trained with.
        ask: how `generate` and `choice_probabilities` phrase the prompt, see `LanguageModel.ask`.
    """

    def __init__(self, vlm: VLM, llm: LanguageModel, config: DictConfig):
        self.vlm = vlm
        self.llm = llm
        self.config = config
        self.ask = AS_TRAINED

    def __repr__(self) -> str:
        chosen = ", ".join(f"{group}={self.config[group].name}" for group in ("backbone", "projector", "llm"))
        return f"Model({chosen}, {self.vlm.projector.num_tokens} visual tokens, on {self.device})"

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return self.vlm.device

    def generate(
        self, images: Images | Sequence[Images], prompts: str | Sequence[str], max_new_tokens: int = 128
    ) -> list[str]:
        """Answers a batch of questions greedily.

        Args:
            images: one entry per question: an image, a list of images, or None. Visual tokens float[M, E] are used as
                they are.
            prompts: raw questions; the chat template is applied here. A single question may be a string, with its
                image or images.
        """
        visual, prompts = self._questions(images, prompts)
        return answer(self.vlm, self.llm, visual, prompts, max_new_tokens=max_new_tokens, ask=self.ask)

    def choice_probabilities(
        self, images: Images | Sequence[Images], prompts: str | Sequence[str], choices: Sequence[str]
    ) -> Tensor:
        """float[questions, choices]: the first answer token's softmax restricted to the choices."""
        visual, prompts = self._questions(images, prompts)
        return first_token_probabilities(self.vlm, self.llm, visual, prompts, choices, ask=self.ask)

    def answer_losses(
        self, images: Images | Sequence[Images], prompts: str | Sequence[str], answers: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """float[questions], the mean cross-entropy of each given answer's tokens in nats, and bool[questions], whether
        greedy decoding begins with it."""
        visual, prompts = self._questions(images, prompts)
        return answer_losses(self.vlm, self.llm, visual, prompts, answers)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image | str | Path]) -> list[Tensor]:
        """The visual tokens float[M, E] of each image, to reuse in several questions."""
        if not images:
            return []
        # Pillow releases the GIL while it decodes and resizes; in a single thread a GPU would wait for its images.
        with ThreadPoolExecutor(min(16, cores())) as pool:
            pixels = stack_pixels(list(pool.map(self._pixels, images)))
        assert pixels is not None
        return list(self.vlm.visual_tokens({tower: p.to(self.device) for tower, p in pixels.items()}))

    def _pixels(self, image: Image.Image | str | Path) -> dict[str, Tensor]:
        """The input of each tower: float[3, S, S]."""
        opened = image if isinstance(image, Image.Image) else open_image(Path(image))
        return self.vlm.backbone.transform(opened.convert("RGB"))

    def relevance(
        self, image: Image.Image | str | Path, prompt: str, answer: str | None = None, **options: Any
    ) -> Relevance:
        """R-GAE relevance maps: which image regions each token of an answer depends on (DeCo, section 3.1).

        Args:
            prompt: the raw question.
            answer: the text to explain; None generates one.
            options: see `prism_deco.explain.relevance` (method, max_new_tokens).
        """
        return relevance(self.vlm, self.llm, image, prompt, answer, **options)

    def save(self, folder: str | Path, max_shard_size: str = SHARD_SIZE, dtype: torch.dtype | None = None) -> None:
        """Writes the whole model, its frozen tower included, to a new folder that `load` reads anywhere.

        Changes the model in place: LoRA adapters are merged, then `dtype` is applied.

        Args:
            max_shard_size: larger weights are split into several files, for example "500MB".
            dtype: of the weights; None keeps it.
        """
        save_folder(Path(folder), self.config, self.vlm, self.llm, dtype=dtype, max_shard_size=max_shard_size)

    def _questions(
        self, images: Images | Sequence[Images], prompts: str | Sequence[str]
    ) -> tuple[list[list[Tensor]], list[str]]:
        """Visual tokens float[M, E] of each question's images, and the questions. Encodes all images in one batch."""
        if isinstance(prompts, str):
            images, prompts = [images], [prompts]  # type: ignore[list-item]
        if images is None or isinstance(images, Image.Image | str | Path | Tensor):
            raise UsageError("Give a list of images for a list of prompts, one entry per prompt (None: no image).")
        if len(images) != len(prompts):
            raise UsageError(
                f"{len(images)} images for {len(prompts)} prompts: give one entry per prompt, a list if it has several "
                "images, None if it has none."
            )
        by_question = [_listed(entry) for entry in images]
        pending = [image for own in by_question for image in own if not isinstance(image, Tensor)]
        encoded = iter(self.encode_images(pending))
        visual = []
        for own in by_question:
            visual.append([image if isinstance(image, Tensor) else next(encoded) for image in own])
        return visual, list(prompts)


def _listed(images: Images) -> list[ImageLike]:
    """The images of one question."""
    if images is None:
        return []
    return [images] if isinstance(images, Image.Image | str | Path | Tensor) else list(images)


def train(config: DictConfig) -> Path:
    """Trains the configured run, without evaluating it; an interrupted run resumes.

    Returns:
        The run folder, for `load`.

    Raises:
        RuntimeError: the run was stopped or failed; its output on stderr says why.
    """
    # Imported here, since they import Lightning, which `load` does not need.
    from prism_deco.training.entry import run
    from prism_deco.training.run_dir import run_folder

    if code := run(config, None):
        raise RuntimeError(f"The run in {run_folder(config)} ended with exit code {code}.")
    return run_folder(config)


def load(
    run: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    plugins: Iterable[str] = (),
    num_tokens: int | None = None,
) -> Model:
    """Loads a finished run or an export.

    Args:
        run: a run folder, its `model/` folder, or a folder that `Model.save` wrote.
        device: cpu, cuda (or gpu), cuda:N, or auto (a GPU if there is one).
        dtype: casts the weights; None keeps them as they were saved (float32 master weights).
        plugins: modules to import first. The plug-ins that a run names are not imported on their own: the folder may
            come from somebody else, and importing runs their code.
        num_tokens: visual tokens per image, if not as in training: for `matryoshka`, and other projectors whose
            weights do not depend on it.

    Raises:
        UsageError: the folder holds no finished model, its files do not fit together, it needs a plug-in that is
            neither imported nor named, or there is no such device.
    """
    target = requested_device(str(device))
    folder = Path(run)
    check_folder(folder)
    import_plugins(plugins)
    vlm, llm, config = load_model(model_folder(folder), num_tokens)
    if dtype is not None:
        vlm.cast(dtype)
    return Model(vlm.to(device=target), llm, config)

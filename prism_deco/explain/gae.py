"""R-GAE (DeCo, arXiv 2405.20985, section 3.1): where in the image a model looked for each token of an answer.

Text-to-Query: from an answer token to the visual tokens, through the language model.
Query-to-Patch: from the visual tokens to the patches, through the projector.
Text-to-Patch: the product of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from prism_deco.config.registry import unknown
from prism_deco.data.images import open_image
from prism_deco.explain.attention import Recording, eager_attention, float32_weights, frozen, record
from prism_deco.explain.geometry import PatchFrame
from prism_deco.explain.memory import tokens_at_once
from prism_deco.explain.query_maps import QueryMaps, trace
from prism_deco.explain.text_to_query import attention_rows, propagated_rows
from prism_deco.explain.words import Word, encode_answer, merge_words, token_texts
from prism_deco.inference import answer as generate_answer
from prism_deco.llms import LanguageModel
from prism_deco.sequence import build_batch
from prism_deco.vlm import VLM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_NEW_TOKENS = 128


@dataclass(frozen=True, repr=False)
class Relevance:
    """Maps of one answer about one image; T answer tokens, M visual tokens, N patches. All on the CPU.

    Attributes:
        method: one of `METHODS`.
        prompt, answer: the texts.
        tokens: text of each of the T tokens; the token that ends an answer is not among them.
        words: the words that the tokens form.
        text_to_query: float[T, M].
        query_to_patch: float[M, N], or float[T, M, N] where it depends on the token.
        text_to_patch: float[T, N].
        query_grid: (height, width) of the visual tokens.
        patches: the patch grid and its position on the image.
        image: the original image.
    """

    method: str
    prompt: str
    answer: str
    tokens: list[str]
    words: list[Word]
    text_to_query: Tensor
    query_to_patch: Tensor
    text_to_patch: Tensor
    query_grid: tuple[int, int]
    patches: PatchFrame
    image: Image.Image

    def __repr__(self) -> str:
        height, width = self.patches.grid
        return (
            f"Relevance({self.method}, answer={self.answer!r}, {len(self.tokens)} answer tokens, "
            f"{self.query_grid[0]}x{self.query_grid[1]} visual tokens, {height}x{width} patches)"
        )

    def plot(self) -> Figure:
        """A figure with the map of the whole answer and that of each word over the image."""
        from matplotlib.figure import Figure

        from prism_deco.explain.render import overlay

        maps = {self.answer: self.sentence_text_to_patch}
        for number, (word, values) in enumerate(zip(self.words, self.by_word(self.text_to_patch), strict=True), 1):
            maps[f"{number}: {word.text}"] = values
        columns = min(4, len(maps))
        rows = -(-len(maps) // columns)  # rounded up
        figure = Figure(figsize=(3 * columns, 3 * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax in axes:
            ax.set_axis_off()
        # The last row of axes may have more places than there are maps.
        for ax, (title, values) in zip(axes, maps.items(), strict=False):
            ax.imshow(overlay(self.image, values, self.patches))
            ax.set_title(title, fontsize="medium", parse_math=False, wrap=True)
        return figure

    @property
    def sentence_text_to_query(self) -> Tensor:
        """float[M]: the mean over the tokens."""
        return self.text_to_query.mean(dim=0)

    @property
    def sentence_query_to_patch(self) -> Tensor:
        """float[M, N]: the mean over the tokens."""
        return self.query_to_patch.mean(dim=0) if self.query_to_patch.ndim == 3 else self.query_to_patch

    @property
    def sentence_text_to_patch(self) -> Tensor:
        """float[N]: the mean over the tokens (not the product of the other two means)."""
        return self.text_to_patch.mean(dim=0)

    def by_word(self, values: Tensor) -> Tensor:
        """float[T, ...] -> float[words, ...]: the mean over each word's tokens."""
        return torch.stack([values[list(word.tokens)].mean(dim=0) for word in self.words])


def relevance(
    vlm: VLM,
    llm: LanguageModel,
    image: Image.Image | str | Path,
    prompt: str,
    answer: str | None = None,
    *,
    method: str = "r-gae",
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Relevance:
    """Explains an answer about an image; the model's state is restored afterwards.

    The model reads the answer once (teacher forcing), and the logit of each of its tokens, at the position that
    predicts it, is traced back.

    Args:
        prompt: the raw question; the chat template is applied.
        answer: the text to explain; None takes the model's own greedy answer.
        method: "r-gae", or "attention": raw attention, averaged over heads and layers, for comparison.
        max_new_tokens: length limit of the model's own answer.

    Raises:
        UsageError: the answer is empty, the text too long, the method unknown, or memory insufficient.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    opened = image if isinstance(image, Image.Image) else open_image(Path(image))
    pixels = image_pixels(vlm, opened)
    patches = PatchFrame(vlm.backbone.transform.frame(opened.size), vlm.backbone.grid, vlm.backbone.patch_size)
    with frozen(vlm), float32_weights(vlm.projector):
        features = vlm.features(pixels)
        dtype = features.dtype
        # At least float32, as the projector's weights are within this context.
        maps = trace(vlm.projector, vlm.project, features.to(torch.promote_types(dtype, torch.float32)))
        if answer is None:
            # One question with one image: a list of one list of float[M, E].
            visual = [list(maps.tokens.detach())]
            answer = generate_answer(vlm, llm, visual, [prompt], max_new_tokens=max_new_tokens)[0]
        encoded, ids = encode_answer(llm, prompt, answer, vlm.projector.num_tokens)
        batch = build_batch([encoded], vlm.projector.num_tokens).to(vlm.device)
        # Before `record`, which allocates: this refuses a call that does not fit in memory.
        chunk = tokens_at_once(vlm.lm.config, batch.input_ids.shape[1], len(ids), dtype, vlm.device)
        with eager_attention(vlm.lm):
            recording = record(vlm, batch, maps.tokens.detach(), targets=len(ids))
        text_to_query, query_to_patch = METHODS[method](recording, batch.visual[0], maps, chunk)
        query_to_patch = query_to_patch.to(text_to_query.dtype)
        product = "tm,tmn->tn" if query_to_patch.ndim == 3 else "tm,mn->tn"
        text_to_patch = torch.einsum(product, text_to_query, query_to_patch)
    texts = token_texts(ids, llm.tokenizer)
    return Relevance(
        method=method,
        prompt=prompt,
        answer=answer,
        tokens=texts,
        words=merge_words(texts),
        text_to_query=text_to_query.cpu(),
        query_to_patch=query_to_patch.cpu(),
        text_to_patch=text_to_patch.cpu(),
        query_grid=vlm.projector.out_grid,
        patches=patches,
        image=opened,
    )


def image_pixels(vlm: VLM, image: Image.Image) -> dict[str, Tensor]:
    """Per tower float[1, 3, S, S], on the model's device."""
    pixels = vlm.backbone.transform(image.convert("RGB"))
    return {tower: values[None].to(vlm.device) for tower, values in pixels.items()}


def _gae(recording: Recording, visual: Tensor, maps: QueryMaps, chunk: int) -> tuple[Tensor, Tensor]:
    text_to_query, by_token = propagated_rows(recording, visual, chunk)
    return text_to_query, maps.relevance(by_token.to(maps.tokens.dtype))


def _raw_attention(recording: Recording, visual: Tensor, maps: QueryMaps, chunk: int) -> tuple[Tensor, Tensor]:
    return attention_rows(recording, visual), maps.attention()


DEFAULT_METHOD = "r-gae"
# Called with the recording, bool[n] of the visual positions, the projector's maps, and the number of targets in one
# backward pass; returns Text-to-Query and Query-to-Patch. The default, which needs the most memory, comes first.
METHODS: Mapping[str, Callable[[Recording, Tensor, QueryMaps, int], tuple[Tensor, Tensor]]] = {
    DEFAULT_METHOD: _gae,
    "attention": _raw_attention,
}

"""Configures transformers' processors so that images and prompts are those of training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from transformers import (
    LlavaImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from prism_deco.backbones.transforms import TowerTransform
from prism_deco.llms import LanguageModel
from prism_deco.llms.prompts import IMAGE_TAG
from prism_deco.vlm import VLM

IMAGE_TOKEN = IMAGE_TAG
VIDEO_TOKEN = "<video>"

# Precedes the LLM's own template and converts transformers' messages of text and image parts to the messages that it
# expects. PLACE becomes one of `_PLACES`, which put `<image>` at its position. TAG becomes `<image>`, also for videos:
# the processor would count one in a text as an image.
_PRELUDE = """\
{%- set tokenize = 'whole' -%}
{%- set talk = namespace(images='', messages=[]) -%}
{%- for message in messages -%}
  {%- set part = namespace(images='', text='') -%}
  {%- if message.content is string -%}
    {%- set part.images = '<image>' * message.content.count('<image>') -%}
    {%- set part.text = message.content -%}
  {%- else -%}
    {%- for piece in message.content -%}
      {%- if piece.type == 'image' -%}
        {%- set part.images = part.images ~ '<image>' -%}
      {%- elif piece.type != 'text' -%}
        {{- raise_exception('This model takes pieces of the types text and image, not ' ~ piece.type) -}}
      {%- else -%}
        {%- set part.text = part.text ~ piece.text -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set text = part.text.replace('<image>', '').replace('TAG', '').strip() -%}
  PLACE
  {%- set talk.messages = talk.messages + [{'role': message.role, 'content': text}] -%}
{%- endfor -%}
{%- set messages = talk.messages -%}
{%- if talk.images -%}{%- set talk.images = talk.images ~ 'GAP' -%}{%- endif -%}
{%- set image = talk.images -%}
"""
_PLACES = {
    "after_first_token": "{%- set talk.images = talk.images ~ part.images -%}",
    "after_bos": "{%- set talk.images = talk.images ~ part.images -%}",
    "in_place": "{%- set text = (part.images ~ '\\n' ~ text).strip() if part.images else text -%}",
}

_TALK = (
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Is it red?"},
)
_INEXACT = {
    "letterbox": "The image processor pads to an exact square. Training used resize=letterbox, whose canvas is one "
    "pixel short of a square if the sides of an image differ by an odd number of pixels. transformers cannot express "
    "that and shifts such images by half a pixel.",
}
"""Notes on resize strategies that transformers lacks."""


def chat_template(llm: LanguageModel, kind: str, gap: str) -> str:
    """The chat template of training for messages with image parts and for tokenising prompts as a whole.

    Args:
        kind: image, or video if images are passed as videos of one frame.
        gap: text between the images and the text after them.
    """
    prelude = _PRELUDE.replace("PLACE", _PLACES[llm.prompt_format.image_slot]).replace("GAP", gap)
    # The word in the token, in the type of a part and in the error message, but not in names of variables. TAG comes
    # last, as it stays `<image>`.
    prelude = re.sub(r"(?<=<)image(?=>)|(?<=')image(?=')|(?<=and )image", kind, prelude).replace("TAG", IMAGE_TAG)
    # Whitespace between tags would become part of the prompt.
    prelude = "".join(line.strip() for line in prelude.splitlines())
    template = llm.prompt_format.template
    if llm.prompt_format.image_slot != "after_first_token":
        return prelude + template
    # The images go after the first token, whose text is the same in all prompts.
    first = llm.encode([{"role": "user", "content": "What is it?"}], add_generation_prompt=True).input_ids[:1]
    end = len(str(llm.tokenizer.decode(first)))
    # The template prints into a variable, which is then cut open after the first token's text.
    place = f"{{{{- prompt[:{end}] ~ talk.images ~ prompt[{end}:] -}}}}"
    return f"{prelude}{{%- set image = '' -%}}{{%- set prompt -%}}{template}{{%- endset -%}}{place}"


def make_processor(
    vlm: VLM, llm: LanguageModel, tokenizer: PreTrainedTokenizerBase, *, as_video: bool = False
) -> ProcessorMixin:
    """The processor for a model whose `tokenizer` has the token `<image>`, and `<video>` if `as_video`.

    `pad` and `letterbox` pad to a square, `resize-naive` stretches, `resize-crop` crops. Video processors cannot pad;
    the code in the README does. They resize its squares (`pad`), and crop canvases that are one pixel short of a square
    as in training (`letterbox`).

    Args:
        as_video: images are passed as videos of one frame.
    """
    transform = _transform(vlm)
    side = transform.image_size
    square = {"height": side, "width": side}
    pads = transform.resize in ("pad", "letterbox")
    stretches = transform.resize == "resize-naive" or (transform.resize == "pad" and as_video)
    pixels = {
        "size": square if stretches else {"shortest_edge": side},
        "crop_size": square,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }
    # Generation needs left padding.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # `init_kwargs` is what is saved
    shared = {"tokenizer": tokenizer, "vision_feature_select_strategy": "default"}
    if as_video:
        videos = LlavaNextVideoVideoProcessor(**pixels)
        unused = LlavaNextImageProcessor()
        processor = LlavaNextVideoProcessor(videos, unused, patch_size=video_patch(vlm), **shared)
    else:
        # With `vision_feature_select_strategy="default"` the processor subtracts one for the class token.
        processor = LlavaProcessor(
            image_processor=LlavaImageProcessor(do_pad=pads, **pixels),
            # Of a window: the processor counts one visual token per square of this size.
            patch_size=vlm.backbone.patch_size * (vlm.projector.in_grid[0] // vlm.projector.out_grid[0]),
            num_additional_image_tokens=1,
            image_token=IMAGE_TOKEN,
            **shared,
        )
    # In Llama's tokenizer a space belongs to the token of the next word, and only training has one after the image.
    # Take the gap that gives the tokens of training, and none if neither does.
    for gap in ("", " ", ""):
        processor.chat_template = tokenizer.chat_template = chat_template(llm, "video" if as_video else "image", gap)
        if _same_tokens(processor, llm, _TALK[:1]):
            break
    return processor


def video_patch(vlm: VLM) -> int | None:
    """The patch size for which LlavaNextVideoProcessor counts the model's visual tokens; None if there is none.

    It counts a fourth of a frame's patches (`replace_video_token`), whatever the model's stride.
    """
    side = _transform(vlm).image_size
    return next((p for p in range(side, 0, -1) if (side // p) ** 2 // 4 == vlm.projector.num_tokens), None)


def preprocessing_note(vlm: VLM, as_video: bool) -> str | None:
    """How the exported image processor differs from training, beyond rounding."""
    resize = _transform(vlm).resize
    if as_video and resize in ("pad", "letterbox"):
        return (
            f"The video processor cannot pad, as training did (resize={resize}): it "
            f"{'stretches' if resize == 'pad' else 'crops'} images that are not square. Pad them first, as the README "
            "does."
        )
    return _INEXACT.get(resize)


def token_ids_note(processor: ProcessorMixin, llm: LanguageModel) -> str | None:
    """How tokens of prompts differ from training; None if they do not."""
    first, all_turns = (_same_tokens(processor, llm, messages) for messages in (_TALK[:1], _TALK))
    if first and all_turns:
        return None
    where = "in conversations of several turns, some tokens differ" if first else "some tokens differ"
    return (
        "This processor tokenises a prompt as a whole, training tokenised parts of it separately "
        f"(llm.tokenize={llm.spec.tokenize}): {where}, and answers may be worse. Use prism_deco.load for the original "
        "tokens."
    )


def _same_tokens(processor: Any, llm: LanguageModel, messages: Sequence[Mapping[str, str]]) -> bool:
    """Whether the processor gives a conversation about an image the same tokens as training."""
    as_video = isinstance(processor, LlavaNextVideoProcessor)
    image, tag = (processor.video_token_id, VIDEO_TOKEN) if as_video else (processor.image_token_id, IMAGE_TOKEN)
    encoded = llm.encode(messages, num_images=1, add_generation_prompt=True)
    [slot] = encoded.image_slots
    asked = [{"role": "user", "content": f"{tag}\n{messages[0]['content']}"}, *messages[1:]]
    text = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    theirs = []
    for token, repeated in groupby(ids):
        # The processor repeats the image token for every visual token; training has one slot.
        theirs += [token] if token == image else repeated
    return theirs == [*encoded.input_ids[:slot], image, *encoded.input_ids[slot:]]


def _transform(vlm: VLM) -> TowerTransform:
    return next(iter(vlm.backbone.transform.towers.values()))

"""Images, prompts and tokens for LlavaForConditionalGeneration, as transformers' own LlavaProcessor makes them."""

from __future__ import annotations

from itertools import groupby

from transformers import LlavaImageProcessor, LlavaProcessor, PreTrainedTokenizerBase

from prism_deco.backbones.transforms import TowerTransform
from prism_deco.llms import LanguageModel
from prism_deco.llms.prompts import IMAGE_TAG
from prism_deco.vlm import VLM

IMAGE_TOKEN = IMAGE_TAG

# Goes before the LLM's own template. It turns messages of text and image parts, as transformers passes them, into
# what that template expects. PLACE is one of `_PLACES`, which put `<image>` where it belongs.
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
      {%- else -%}
        {%- set part.text = part.text ~ piece.text -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set text = part.text.replace('<image>', '').strip() -%}
  PLACE
  {%- set talk.messages = talk.messages + [{'role': message.role, 'content': text}] -%}
{%- endfor -%}
{%- set messages = talk.messages -%}
{%- set image = talk.images -%}
"""
_PLACES = {
    "after_first_token": "{%- set talk.images = talk.images ~ part.images -%}",
    "after_bos": "{%- set talk.images = talk.images ~ part.images -%}",
    "in_place": "{%- set text = (part.images ~ '\\n' ~ text).strip() if part.images else text -%}",
}

_INEXACT = {
    "letterbox": "The image processor pads to an exact square. Training used resize=letterbox, whose canvas is one "
    "pixel short of a square if the sides of an image differ by an odd number of pixels. transformers cannot express "
    "that and shifts such images by half a pixel.",
}
"""Resize strategies that transformers does not have, with the consequence."""


def chat_template(llm: LanguageModel) -> str:
    """The LLM's template for messages with images, with the spaces of a prompt that is tokenised as a whole."""
    prelude = _PRELUDE.replace("PLACE", _PLACES[llm.spec.image_slot])
    # Whitespace between tags would become part of the prompt.
    prelude = "".join(line.strip() for line in prelude.splitlines())
    template = str(llm.tokenizer.chat_template)
    if llm.spec.image_slot != "after_first_token":
        return prelude + template
    # The images are put behind the text of the first token, which is the same in all prompts.
    first = llm.encode([{"role": "user", "content": "What is it?"}], add_generation_prompt=True).input_ids[:1]
    end = len(str(llm.tokenizer.decode(first)))
    around = "{%- set image = '' -%}{%- set prompt -%}", "{%- endset -%}"
    place = f"{{{{- prompt[:{end}] ~ talk.images ~ prompt[{end}:] -}}}}"
    return prelude + around[0] + template + around[1] + place


def llava_processor(vlm: VLM, llm: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """The processor for a model whose `tokenizer` has the token `<image>`.

    `pad` and `letterbox` pad to a square, `resize-naive` stretches, `resize-crop` crops.
    """
    transform = _transform(vlm)
    side = transform.image_size
    square = {"height": side, "width": side}
    images = LlavaImageProcessor(
        size=square if transform.resize == "resize-naive" else {"shortest_edge": side},
        crop_size=square,
        do_pad=transform.resize in ("pad", "letterbox"),
        image_mean=list(transform.mean),
        image_std=list(transform.std),
    )
    template = chat_template(llm)
    tokenizer.chat_template = template
    # Prompts in a batch must all end where their answers begin.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the second is what is saved
    # The processor counts patches and subtracts one for the class token, so one is added here for all towers.
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vlm.backbone.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
        image_token=IMAGE_TOKEN,
    )


def preprocessing_note(vlm: VLM) -> str | None:
    """How the exported image processor differs from training beyond rounding of pixels."""
    return _INEXACT.get(_transform(vlm).resize)


def token_ids_note(processor: LlavaProcessor, llm: LanguageModel) -> str | None:
    """Whether prompts become other tokens than in training."""
    talk = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
    image = processor.image_token_id
    for messages in (talk[:1], [*talk, {"role": "user", "content": "Is it red?"}]):
        encoded = llm.encode(messages, num_images=1, add_generation_prompt=True)
        [slot] = encoded.image_slots
        ours = [*encoded.input_ids[:slot], image, *encoded.input_ids[slot:]]
        asked = [{"role": "user", "content": f"{IMAGE_TOKEN}\n{messages[0]['content']}"}, *messages[1:]]
        text = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
        theirs = []
        for token, repeated in groupby(ids):
            # One image token for each visual token: the slot counts once.
            theirs += [token] if token == image else repeated
        if theirs != ours:
            return (
                f"This processor tokenises a prompt as a whole, training tokenised parts of it separately "
                f"(llm.tokenize={llm.spec.tokenize}): some tokens differ, and answers may be worse. Use "
                "prism_deco.load for the original tokens."
            )
    return None


def _transform(vlm: VLM) -> TowerTransform:
    return next(iter(vlm.backbone.transform.towers.values()))

"""A folder that plain transformers loads as LlavaForConditionalGeneration (LLaVA-1.5, arXiv 2310.03744)."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from prism_deco.errors import UsageError
from prism_deco.export.card import llava_card
from prism_deco.export.folder import SHARD_SIZE, check_empty, finish_folder, merge_adapters, stored_bytes, whole_folder
from prism_deco.export.processor import IMAGE_TOKEN, llava_processor, preprocessing_note, token_ids_note
from prism_deco.export.vision import vision_model
from prism_deco.llms import LanguageModel
from prism_deco.llms.layers import fill_buffers
from prism_deco.projectors.linear import Linear
from prism_deco.sequence import build_batch
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference of the logits relative to their maximum: float32 sums in another order."""


def save_llava(
    folder: Path,
    config: DictConfig,
    vlm: VLM,
    llm: LanguageModel,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes model, processor and README, after checking that the logits of both models are equal.

    Standardisation of features is folded into the projector's first layer, `token_scale` into its last one.

    Args:
        vlm: on the CPU, in the precision of its training. LoRA adapters are merged into the LLM's weights.
        folder: new, or empty.
        dtype: type of the written weights; None keeps theirs.

    Raises:
        UsageError: the class cannot hold this model (with all reasons), `folder` is not empty, or the disk is full.
    """
    check_empty(folder)
    merge_adapters(vlm)
    tokenizer = copy.deepcopy(llm.tokenizer)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    image_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))  # type: ignore[arg-type]
    model = to_llava(vlm, llm, image_id)
    difference = compare(model, vlm, llm, image_id)
    processor = llava_processor(vlm, llm, tokenizer)
    notes = [note for note in (preprocessing_note(vlm), token_ids_note(processor, llm)) if note]
    for note in notes:
        log.warning("%s", note)
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = next(model.parameters()).dtype
    with whole_folder(folder, stored_bytes(model.state_dict())) as building:
        model.save_pretrained(building, max_shard_size=SHARD_SIZE)
        processor.save_pretrained(building)
        finish_folder(building, llava_card(config, vlm, llm, difference, notes))


def to_llava(vlm: VLM, llm: LanguageModel, image_id: int) -> LlavaForConditionalGeneration:
    """The same model in transformers' class; it shares the weights that need no folding.

    Args:
        image_id: the token that stands for a visual token; the embedding tables grow to cover it.

    Raises:
        UsageError: the class cannot hold it; lists every reason.
    """
    reasons = _reasons(vlm)
    tower = None
    try:
        tower = vision_model(vlm.backbone)
    except UsageError as reason:
        reasons.append(str(reason))
    if reasons or tower is None:
        raise UsageError(
            f"This model cannot become a LlavaForConditionalGeneration: {'; '.join(reasons)}. "
            "Export it without --hf instead, for prism_deco.load."
        )
    rows = max(llm.embedding_rows, -(-(image_id + 1) // 64) * 64 if image_id >= llm.embedding_rows else 0)
    text = copy.deepcopy(vlm.lm.config)
    text.vocab_size = rows
    has_class_token = vlm.backbone.num_patches < tower.get_parameter("embeddings.position_embedding.weight").shape[0]
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=vlm.backbone.num_patches,
        projector_hidden_act="gelu",
        # The tower ends with the block whose output is used.
        vision_feature_layer=-1,
        vision_feature_select_strategy="default" if has_class_token else "full",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    state = {f"model.vision_tower.{k}": v for k, v in tower.state_dict().items()}
    state |= {f"model.multi_modal_projector.{k}": v for k, v in _projector(vlm).items()}
    state |= _language(vlm.lm, rows)
    _, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    fill_buffers(model)
    # A bias of the output layer is zero here (`_reasons`).
    different = [name for name in unexpected if name != "lm_head.bias"]
    different += [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if different:
        raise UsageError(f"LlavaForConditionalGeneration and {type(vlm.lm).__name__} differ in {different[0]}.")
    model.generation_config = GenerationConfig(
        bos_token_id=llm.tokenizer.bos_token_id,
        eos_token_id=list(llm.eos_ids),
        pad_token_id=llm.tokenizer.pad_token_id,
        # Neither the image token nor the rows added for it are words.
        suppress_tokens=sorted({image_id, *range(llm.embedding_rows, rows)}),
    )
    return model.eval()


@torch.no_grad()
def compare(model: LlavaForConditionalGeneration, vlm: VLM, llm: LanguageModel, image_id: int) -> float:
    """Largest difference of the logits for one random image and a question.

    Raises:
        UsageError: it exceeds rounding, so the class computes something else.
    """
    [(tower, side)] = [(name, t.image_size) for name, t in vlm.backbone.transform.towers.items()]
    weight = next(vlm.backbone.parameters())
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(weight)
    question = [{"role": "user", "content": "What is in the image?"}]
    encoded = llm.encode(question, num_images=1, add_generation_prompt=True)
    batch = build_batch([encoded], vlm.projector.num_tokens, pixels={tower: pixels})
    ids = batch.input_ids.masked_fill(batch.visual, image_id)
    log.info("Comparing the logits of both models for %d positions", ids.shape[1])
    expected = vlm.logits(vlm.hidden_states(batch)).float()
    found = model(input_ids=ids, pixel_values=pixels).logits[..., : expected.shape[-1]].float()
    difference = float((found - expected).abs().max())
    tolerance = max(TOLERANCE, 4 * torch.finfo(weight.dtype).eps)
    if not difference <= tolerance * float(expected.abs().max()):
        raise UsageError(
            f"LlavaForConditionalGeneration computes something else with these weights: its logits differ by up to "
            f"{difference:.3g}. Export the model without --hf, for prism_deco.load."
        )
    return difference


def _reasons(vlm: VLM) -> list[str]:
    """Why the class cannot hold the projector, the LLM, or how they are used."""
    reasons = []
    projector = vlm.projector
    width = projector.out_dim
    if not isinstance(projector, Linear):
        reasons.append("its projector compresses the visual tokens, which that class does not do")
    else:
        widths = [layer.out_features for layer in _layers(projector)]
        if widths != [width, width]:
            reasons.append(f"its projector is an MLP of widths {widths}, and that class has two layers of {width}")
    if vlm.turn_mask != "causal":
        reasons.append("it was trained with recipe.turn_mask=block, and that class attends to all turns")
    if vlm.blind:
        reasons.append("it was trained blind, and that class uses the image")
    head = vlm.lm.get_output_embeddings()
    if getattr(head, "bias", None) is not None and bool(head.bias.any()):  # type: ignore[union-attr]
        reasons.append(f"the output layer of {type(vlm.lm).__name__} has a bias, and that class's has none")
    return reasons


def _layers(projector: Linear) -> list[nn.Linear]:
    return [layer for layer in cast(nn.Sequential, projector.mlp) if isinstance(layer, nn.Linear)]


def _projector(vlm: VLM) -> dict[str, Tensor]:
    """The two layers of the MLP with standardisation and scale folded in, computed in float64."""
    first, last = _layers(cast(Linear, vlm.projector))
    weights = [first.weight.double(), first.bias.double(), last.weight.double(), last.bias.double()]
    if vlm.feature_mean is not None and vlm.feature_std is not None:
        # W (x - mean) / std + b = (W / std) x + (b - (W / std) mean)
        weights[0] = weights[0] / vlm.feature_std.double()
        weights[1] = weights[1] - weights[0] @ vlm.feature_mean.double()
    scale = 1.0 if vlm.token_scale is None else vlm.token_scale
    weights[2:] = [weights[2] * scale, weights[3] * scale]
    names = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
    return {name: w.to(first.weight.dtype).detach() for name, w in zip(names, weights, strict=True)}


def _language(lm: PreTrainedModel, rows: int) -> dict[str, Tensor]:
    """Decoder and output layer, embedding tables padded with zeros to `rows` rows."""
    tables = {id(lm.get_input_embeddings().weight), id(lm.get_output_embeddings().weight)}  # type: ignore[union-attr]
    decoder = f"{lm.base_model_prefix}."
    state = {}
    for name, tensor in lm.state_dict(keep_vars=True).items():
        target = f"model.language_model.{name.removeprefix(decoder)}" if name.startswith(decoder) else name
        grows = id(tensor) in tables and len(tensor) < rows
        state[target] = F.pad(tensor.detach(), (0, 0, 0, rows - len(tensor))) if grows else tensor.detach()
    return state

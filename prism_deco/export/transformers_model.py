"""Exports a model to a folder that plain transformers loads, in the class with the same projector."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    InternVLConfig,
    InternVLVisionModel,
    LlavaConfig,
    LlavaNextVideoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prism_deco.backbones.tower import Tower
from prism_deco.errors import UsageError
from prism_deco.export.card import transformers_card
from prism_deco.export.folder import SHARD_SIZE, check_empty, finish_folder, merge_adapters, stored_bytes, whole_folder
from prism_deco.export.processor import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    make_processor,
    preprocessing_note,
    token_ids_note,
    video_patch,
)
from prism_deco.export.vision import vision_model
from prism_deco.llms import LanguageModel
from prism_deco.llms.layers import fill_buffers
from prism_deco.projectors import Projector
from prism_deco.projectors.linear import Linear
from prism_deco.projectors.pixel_shuffle import PixelShuffle
from prism_deco.projectors.pooling import AvgPool, MaxPool
from prism_deco.sequence import build_batch
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference of the logits relative to their maximum, for float32 sums in another order."""


class Holder(NamedTuple):
    """A class of transformers for a projector.

    Attributes:
        config: the class of its configuration.
        settings: maps the side of a window in patches to keys of the configuration.
        of_video: the class compresses videos only, so an image is passed as a video of one frame.
    """

    config: type[Any]
    settings: Callable[[int], dict[str, Any]]
    of_video: bool = False

    @property
    def name(self) -> str:
        return self.config.__name__.removesuffix("Config")


HOLDERS: dict[type[Projector], Holder] = {
    Linear: Holder(LlavaConfig, lambda _: {}),
    AvgPool: Holder(
        LlavaNextVideoConfig, lambda side: {"spatial_pool_mode": "average", "spatial_pool_stride": side}, of_video=True
    ),
    MaxPool: Holder(
        LlavaNextVideoConfig, lambda side: {"spatial_pool_mode": "max", "spatial_pool_stride": side}, of_video=True
    ),
    PixelShuffle: Holder(InternVLConfig, lambda side: {"downsample_ratio": 1 / side}),
}


def save_transformers(
    folder: Path,
    config: DictConfig,
    vlm: VLM,
    llm: LanguageModel,
    *,
    dtype: torch.dtype | None = None,
    run: Path | None = None,
) -> None:
    """Writes model, processor and README, after checking that both models have the same logits.

    Standardisation of features is folded into the projector's first layer, `token_scale` into its last one.

    Args:
        folder: new, or empty.
        vlm: on the CPU, in the precision of its training. LoRA adapters are merged in place.
        dtype: of the written weights; None keeps it.
        run: the run folder, for the scores in the README.

    Raises:
        UsageError: no class can hold this model (lists every reason), `folder` is not empty, or the disk is full.
    """
    check_empty(folder)
    merge_adapters(vlm)
    holder = HOLDERS.get(type(vlm.projector))
    as_video = holder is not None and holder.of_video
    tokenizer = copy.deepcopy(llm.tokenizer)
    # LlavaNextVideo needs both tokens.
    tokenizer.add_tokens([IMAGE_TOKEN, VIDEO_TOKEN] if as_video else [IMAGE_TOKEN], special_tokens=True)
    visual_token = VIDEO_TOKEN if as_video else IMAGE_TOKEN
    model = to_transformers(vlm, llm, tokenizer)
    # Before the cast to `dtype`, so that its rounding does not count as a difference.
    difference = compare(model, vlm, llm, int(tokenizer.convert_tokens_to_ids(visual_token)))  # type: ignore[arg-type]
    processor = make_processor(vlm, llm, tokenizer, as_video=as_video)
    notes = [note for note in (preprocessing_note(vlm, as_video), token_ids_note(processor, llm)) if note]
    for note in notes:
        log.warning("%s", note)
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = next(model.parameters()).dtype
    with whole_folder(folder, stored_bytes(model.state_dict())) as building:
        model.save_pretrained(building, max_shard_size=SHARD_SIZE)
        processor.save_pretrained(building)
        finish_folder(building, transformers_card(config, vlm, llm, difference, notes, visual_token, run))


def to_transformers(vlm: VLM, llm: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The same model in a class of transformers, sharing all weights that need no folding.

    Args:
        tokenizer: with the placeholders of visual tokens; the embedding tables grow to cover them.
    """
    holder = HOLDERS.get(type(vlm.projector))
    reasons = _reasons(vlm, holder)
    tower = None
    try:
        tower = vision_model(vlm.backbone)
    except UsageError as reason:
        reasons.append(str(reason))
    is_internvl = isinstance(tower, InternVLVisionModel)
    if is_internvl and holder is not None and holder.of_video:
        reasons.append("its tower is an InternVLVisionModel, whose image size that class does not read")
    if tower is not None and isinstance(vlm.projector, PixelShuffle) and not is_internvl:
        reasons.append(
            f"its tower is a {type(tower).__name__}, and InternVL's has a class token and no norm before its blocks"
        )
    if reasons or tower is None or holder is None:
        name = f"{holder.name}ForConditionalGeneration" if holder else "model of transformers"
        raise UsageError(
            f"This model cannot become a {name}: {'; '.join(reasons)}. "
            "Export it without --hf instead, for prism_deco.load."
        )
    ids: Any = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, VIDEO_TOKEN])
    image_id, video_id = ids
    visual_ids = [image_id, video_id] if holder.of_video else [image_id]
    grows = max(visual_ids) >= llm.embedding_rows
    # Rows are rounded up to a multiple of 64.
    rows = -(-(max(visual_ids) + 1) // 64) * 64 if grows else llm.embedding_rows
    text = copy.deepcopy(vlm.lm.config)
    text.vocab_size = rows
    projector = vlm.projector
    config = holder.config(
        vision_config=tower.config,
        text_config=text,
        projector_hidden_act="gelu",
        # The exported tower ends with the block whose output is used.
        vision_feature_layer=-1,
        # "default" drops the class token, "full" keeps all positions.
        vision_feature_select_strategy="default" if cast(Tower, vlm.backbone).trunk.prefix_positions else "full",
        tie_word_embeddings=text.tie_word_embeddings,
        **{"video_seq_length" if holder.of_video else "image_seq_length": projector.num_tokens},
        **holder.settings(projector.in_grid[0] // projector.out_grid[0]),
    )
    config.image_token_id = image_id
    if holder.of_video:
        config.video_token_id = video_id
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    state = {f"model.vision_tower.{k}": v for k, v in tower.state_dict().items()}
    state |= {f"model.multi_modal_projector.{k}": v for k, v in _projector(vlm).items()}
    state |= _language(vlm.lm, rows)
    if holder.of_video:  # required, but used for images only
        state["model.image_newline"] = torch.zeros(projector.out_dim, dtype=vlm.lm.dtype)
    _, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    fill_buffers(model)
    # `_reasons` has checked that a bias of the output layer is zero.
    different = [name for name in unexpected if name != "lm_head.bias"]
    # A parameter that is still without values was missing from the state.
    different += [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if different:
        raise UsageError(f"{type(model).__name__} and {type(vlm.lm).__name__} differ in {different[0]}.")
    model.generation_config = GenerationConfig(
        bos_token_id=llm.tokenizer.bos_token_id,
        eos_token_id=list(llm.eos_ids),
        pad_token_id=llm.tokenizer.pad_token_id,
        # Never generate placeholders or padding rows.
        suppress_tokens=sorted({*visual_ids, *range(llm.embedding_rows, rows)}),
    )
    return model.eval()


@torch.no_grad()
def compare(model: PreTrainedModel, vlm: VLM, llm: LanguageModel, visual_id: int) -> float:
    """Largest difference of the logits for a random image and a question.

    Args:
        visual_id: the placeholder of a visual token.

    Raises:
        UsageError: it exceeds rounding.
    """
    [(tower, side)] = [(name, t.image_size) for name, t in vlm.backbone.transform.towers.items()]
    weight = next(vlm.backbone.parameters())
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(weight)
    question = [{"role": "user", "content": "What is in the image?"}]
    encoded = llm.encode(question, num_images=1, add_generation_prompt=True)
    batch = build_batch([encoded], vlm.projector.num_tokens, pixels={tower: pixels})
    ids = batch.input_ids.masked_fill(batch.visual, visual_id)
    log.info("Comparing the logits of both models for %d positions", ids.shape[1])
    expected = vlm.logits(vlm.hidden_states(batch)).float()
    of_video = HOLDERS[type(vlm.projector)].of_video
    # A video of one frame: float[1, 1, 3, S, S].
    seen = {"pixel_values_videos": pixels[:, None]} if of_video else {"pixel_values": pixels}
    # Without the rows that were added to the vocabulary.
    found = model(input_ids=ids, **seen).logits[..., : expected.shape[-1]].float()
    difference = float((found - expected).abs().max())
    tolerance = max(TOLERANCE, 4 * torch.finfo(weight.dtype).eps)
    # Negated, so that NaN fails, too.
    if not difference <= tolerance * float(expected.abs().max()):
        raise UsageError(
            f"{type(model).__name__} computes something else with these weights: its logits differ by up to "
            f"{difference:.3g}. Export the model without --hf, for prism_deco.load."
        )
    return difference


def _reasons(vlm: VLM, holder: Holder | None) -> list[str]:
    """Why the class cannot hold the projector, the LLM, or the recipe's changes to them."""
    reasons = []
    if holder is None:
        reasons.append(f"no class of transformers has the projector {type(vlm.projector).__name__}")
    else:
        reasons += _projector_reasons(vlm, holder)
    if vlm.turn_mask != "causal":
        reasons.append("it was trained with recipe.turn_mask=block, and that class attends to all turns")
    if vlm.blind:
        reasons.append("it was trained blind, and that class uses the image")
    head = vlm.lm.get_output_embeddings()
    if getattr(head, "bias", None) is not None and bool(head.bias.any()):  # type: ignore[union-attr]
        reasons.append(f"the output layer of {type(vlm.lm).__name__} has a bias, and that class's has none")
    return reasons


def _projector_reasons(vlm: VLM, holder: Holder) -> list[str]:
    projector: Any = vlm.projector
    reasons = []
    width = projector.out_dim
    height, out_height = projector.in_grid[0], projector.out_grid[0]
    side = height // out_height
    # The class needs windows of one size, on a square grid.
    if projector.in_grid != (side * out_height,) * 2:
        reasons.append(
            f"its {projector.num_tokens} visual tokens divide {height}x{projector.in_grid[1]} patches into windows of "
            "several sizes, and that class has one size"
        )
    elif holder.of_video and video_patch(vlm) is None:
        reasons.append(f"its processor cannot count {projector.num_tokens} visual tokens")
    widths = [layer.out_features for layer in _layers(projector)]
    if widths != [width, width]:
        reasons.append(f"its projector is an MLP of widths {widths}, and that class has two layers of {width}")
    if getattr(projector, "after_mlp", False) or isinstance(getattr(projector, "norm", None), nn.RMSNorm):
        reasons.append("that class pools in front of the MLP, without a norm (projector.after_mlp, projector.norm)")
    if isinstance(projector, PixelShuffle):
        if not isinstance(projector.window_norm, nn.LayerNorm):
            reasons.append("that class has a norm over the channels of a window (projector.norm=window)")
        # True unless it is a power of two.
        if side & (side - 1):
            reasons.append(f"its windows have {side}x{side} patches, and that class divides by powers of two only")
        if vlm.feature_mean is not None:
            reasons.append("it was trained with recipe.standardise_features, and that class has the norm first")
    return reasons


def _layers(projector: Projector) -> list[nn.Linear]:
    return [layer for layer in cast(nn.Sequential, projector.mlp) if isinstance(layer, nn.Linear)]


def _projector(vlm: VLM) -> dict[str, Tensor]:
    """The MLP's two layers with standardisation and scale folded in (in float64), and InternVL's norm."""
    first, last = _layers(vlm.projector)
    weights = []
    for layer in (first, last):
        bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
        weights += [layer.weight.double(), bias.double()]
    if vlm.feature_mean is not None and vlm.feature_std is not None:
        # W (x - mean) / std + b = (W / std) x + (b - (W / std) mean). Averages and maxima of x commute with it.
        weights[0] = weights[0] / vlm.feature_std.double()
        weights[1] = weights[1] - weights[0] @ vlm.feature_mean.double()
    scale = 1.0 if vlm.token_scale is None else vlm.token_scale
    # The list holds weight and bias of the first layer, then those of the last.
    weights[2:] = [weights[2] * scale, weights[3] * scale]
    names = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
    state = {name: w.to(first.weight.dtype).detach() for name, w in zip(names, weights, strict=True)}
    if isinstance(vlm.projector, PixelShuffle):
        state |= {f"layer_norm.{name}": w.detach() for name, w in vlm.projector.window_norm.named_parameters()}
    return state


def _language(lm: PreTrainedModel, rows: int) -> dict[str, Tensor]:
    """Decoder and output layer, with embedding tables zero-padded to `rows` rows."""
    # With `keep_vars`, the state holds the parameters themselves, which are recognised by their ids.
    tables = {id(lm.get_input_embeddings().weight), id(lm.get_output_embeddings().weight)}  # type: ignore[union-attr]
    decoder = f"{lm.base_model_prefix}."
    state = {}
    for name, tensor in lm.state_dict(keep_vars=True).items():
        target = f"model.language_model.{name.removeprefix(decoder)}" if name.startswith(decoder) else name
        grows = id(tensor) in tables and len(tensor) < rows
        state[target] = F.pad(tensor.detach(), (0, 0, 0, rows - len(tensor))) if grows else tensor.detach()
    return state

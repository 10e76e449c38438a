"""The vision-language model: backbone -> projector -> splice -> LLM (PRISM; DeCo Section 3).

A plain `nn.Module`, independent of trainers, configurations and files.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from prism_deco.backbones import VisionBackbone
from prism_deco.config.registry import unknown
from prism_deco.config.schema import TURN_MASK
from prism_deco.errors import UsageError
from prism_deco.llms.layers import decoder
from prism_deco.llms.packed_attention import Segments, no_mask, use_packed_attention
from prism_deco.loss import summed_cross_entropy
from prism_deco.projectors import Projector
from prism_deco.sequence import Batch

_IMAGES_AT_ONCE = 32


class Loss(NamedTuple):
    """Summed cross-entropy of the supervised positions of one forward pass.

    Attributes:
        total: float[], the sum in nats; the caller divides it by a token count.
        count: int64[], number of supervised positions.
    """

    total: Tensor
    count: Tensor


class VLM(nn.Module):
    """A vision backbone, a projector and a causal LM, composed through `inputs_embeds`.

    Args:
        backbone: runs without gradients unless it is trained (`VisionBackbone.trained`).
        projector: its `in_grid` and `in_dim` must equal the backbone's, its `out_dim` the LLM's.
        lm: a causal LM from transformers.
        standardise_features: normalise feature channels by the statistics that `fit_features` sets.
        token_scale: factor on the projector's output; None is off.
        turn_mask: "causal", or "block": a round sees only the shared prefix (BOS, image) and itself.
        blind: zero the visual tokens (the image-blind baseline).
        max_logits: see `loss.summed_cross_entropy`; the default is 256 MiB of float32.

    Attributes:
        every_unit: also run the backbone and the projector for batches without images. Required if weights are sharded:
            every process must take part in gathering each unit, or the others hang.
    """

    def __init__(
        self,
        backbone: VisionBackbone,
        projector: Projector,
        lm: PreTrainedModel,
        *,
        standardise_features: bool = False,
        token_scale: float | None = None,
        turn_mask: str = "causal",
        blind: bool = False,
        max_logits: int | None = 2**26,
    ):
        super().__init__()
        if turn_mask not in TURN_MASK:
            raise unknown("turn_mask", turn_mask, TURN_MASK)
        if (projector.in_grid, projector.in_dim) != (backbone.grid, backbone.embed_dim):
            raise UsageError(
                f"The projector was built for grid {projector.in_grid} of {projector.in_dim} channels, the backbone "
                f"gives grid {backbone.grid} of {backbone.embed_dim}."
            )
        self.backbone = backbone
        self.projector = projector
        self.lm = lm
        self.token_scale = token_scale
        self.turn_mask = turn_mask
        self.blind = blind
        self.every_unit = False
        self.max_logits = max_logits
        self.feature_mean: Tensor | None
        self.feature_std: Tensor | None
        for name, value in (("feature_mean", 0.0), ("feature_std", 1.0)):
            self.register_buffer(name, torch.full((backbone.embed_dim,), value) if standardise_features else None)

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device

    def cast(self, dtype: torch.dtype) -> None:
        """Casts parameters and persistent buffers to a dtype; the projector's to its own (`Projector.compute_dtype`),
        if it has one. Non-persistent buffers, such as rotary frequencies, stay exact."""
        stored = self.state_dict().keys()
        own = self.projector.compute_dtype or dtype
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if name in stored:
                tensor.data = tensor.data.to(own if name.startswith("projector.") else dtype)

    def features(self, pixels: dict[str, Tensor]) -> Tensor:
        """Per tower float[I, 3, S, S] -> patch features float[I, N, D], standardised if configured."""
        with torch.set_grad_enabled(self.backbone.trained and torch.is_grad_enabled()):
            features = self.backbone(pixels)
            if self.feature_mean is None or self.feature_std is None:
                return features
            return (features - self.feature_mean) / self.feature_std

    @torch.no_grad()
    def fit_features(self, pixels: dict[str, Tensor], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Sets the statistics of `standardise_features` from images, per tower float[I, 3, S, S].

        Args:
            device: that the backbone computes on; None is the model's device.

        Returns:
            Mean and standard deviation, float[D] each.
        """
        if self.feature_mean is None or self.feature_std is None:
            raise UsageError("The model was built without standardise_features.")
        home = self.feature_mean.device
        device = device or home
        self.backbone.to(device)
        parts = []
        for start in range(0, len(next(iter(pixels.values()))), _IMAGES_AT_ONCE):
            part = {tower: images[start : start + _IMAGES_AT_ONCE].to(device) for tower, images in pixels.items()}
            parts.append(self.backbone(part).float().to(home))
        features = torch.cat(parts)
        self.backbone.to(home)
        self.feature_mean.copy_(features.mean(dim=(0, 1)))
        self.feature_std.copy_(features.std(dim=(0, 1)).clamp(min=1e-6))
        return self.feature_mean, self.feature_std

    def visual_tokens(self, pixels: dict[str, Tensor]) -> Tensor:
        """Per tower float[I, 3, S, S] -> visual tokens float[I, M, E]."""
        return self.project(self.features(pixels))

    def project(self, features: Tensor, num_tokens: int | None = None) -> Tensor:
        """float[I, N, D] -> float[I, M, E]: the projector, then `token_scale` and `blind`.

        Args:
            num_tokens: one of the projector's `scales`; None is the first.
        """
        tokens = self.projector(features, num_tokens)
        if self.token_scale is not None:
            tokens = tokens * self.token_scale
        return tokens * 0.0 if self.blind else tokens

    def embed(self, batch: Batch, visual: Tensor | None = None) -> Tensor:
        """The input embeddings float[B, L, E] of text and visual tokens.

        Args:
            visual: float[I, M, E], precomputed visual tokens; None computes them from `batch.pixels`.
        """
        embeddings = self.lm.get_input_embeddings()(batch.input_ids)
        if visual is None and batch.pixels is not None:
            # Not `visual_tokens`, which is a forward method of FSDP: it would count as a forward pass of its own, after
            # which FSDP does not prefetch the next layer.
            visual = self.project(self.features(batch.pixels), batch.tokens_per_image)
        if visual is None:
            needed = self.training or self.every_unit
            return self._touch_vision(embeddings) if needed else embeddings
        return embeddings.masked_scatter(batch.visual[..., None], visual.to(embeddings.dtype))

    def hidden_states(self, batch: Batch, visual: Tensor | None = None) -> Tensor:
        """The LLM's last hidden states float[B, L, E]."""
        body = decoder(self.lm)
        packed = {}
        if batch.lengths is not None:
            use_packed_attention(self.lm)
            packed["segments"] = Segments.of(batch.lengths, batch.input_ids.device)
        output = body(
            inputs_embeds=self.embed(batch, visual),
            attention_mask=self._attention_mask(batch),
            position_ids=batch.position_ids,
            use_cache=False,
            **packed,
        )
        return output.last_hidden_state

    def forward(self, batch: Batch) -> Loss:
        """The loss of one batch. Computes logits only at supervised positions, at most `max_logits` at once."""
        hidden = self.hidden_states(batch).flatten(0, 1)
        predicted = hidden[batch.targets - 1]  # each position predicts the next token
        labels = batch.labels.flatten()[batch.targets]
        head = cast(nn.Linear, self.lm.get_output_embeddings())
        # Under FSDP2 the head's weights are gathered here: they belong to the root module, whose forward this is.
        total = summed_cross_entropy(predicted, head.weight, head.bias, labels, max_logits=self.max_logits)
        return Loss(total, torch.full((), len(batch.targets), device=hidden.device))

    def logits(self, hidden: Tensor) -> Tensor:
        """float[..., E] -> float[..., V] through the LLM's output head."""
        return cast(nn.Module, self.lm.get_output_embeddings())(hidden)

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        visual: Tensor | None,
        *,
        max_new_tokens: int,
        eos_ids: list[int],
        pad_id: int,
        streamer: BaseStreamer | None = None,
    ) -> list[list[int]]:
        """Generates greedily from left-padded prompts; returns the new token ids without the end token.

        Args:
            streamer: receives each token as it is generated; only for a single prompt.
        """
        output = cast(Any, self.lm).generate(
            inputs_embeds=self.embed(batch, visual),
            attention_mask=batch.attention_mask.long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=eos_ids,
            pad_token_id=pad_id,
            streamer=streamer,
        )
        stop = set(eos_ids)
        answers = []
        for row in output.tolist():
            end = next((i for i, token in enumerate(row) if token in stop), len(row))
            answers.append(row[:end])
        return answers

    def _touch_vision(self, embeddings: Tensor) -> Tensor:
        """Adds zero times the output of the projector, and of a trained tower, to float[B, L, E].

        They must be part of the graph even in an all-text batch: gradient synchronisation waits for every trained
        parameter on every rank.
        """
        if self.every_unit or self.backbone.trained:
            features = self.features(self.backbone.blank(embeddings.device))
        else:
            height, width = self.projector.in_grid
            features = embeddings.new_zeros(1, height * width, self.projector.in_dim)
        return embeddings + 0.0 * self.project(features).sum().to(embeddings.dtype)

    def _attention_mask(self, batch: Batch) -> Tensor | None:
        """The mask for the LLM: bool[B, L] of non-padding positions; None if causal attention needs no mask; or, with
        `turn_mask=block`, bool[B, 1, L, L] of the pairs (query, key) that may attend. Packed attention also excludes
        pairs across records."""
        if self.turn_mask == "causal":
            if batch.lengths is not None:
                return no_mask(batch.input_ids.device)
            # Causal attention never sees right padding, and without a mask PyTorch can use flash attention.
            return batch.attention_mask if batch.left_padded else None
        length = batch.input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=batch.rounds.device).tril()
        key_round, query_round = batch.rounds[:, None, :], batch.rounds[:, :, None]
        same = (key_round == 0) | (key_round == query_round)
        allowed = causal & same & batch.attention_mask[:, None, :]
        # Padding must attend to something, itself, or its softmax would be NaN.
        return (allowed | torch.eye(length, dtype=torch.bool, device=allowed.device))[:, None]

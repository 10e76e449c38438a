"""Our training step beside that of transformers' own LLaVA, with the same weights and records, in one process."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from prism_deco.backbones import VisionBackbone, build_backbone
from prism_deco.bench.hf_llava import WholeTowers, build_peer, peer_loss
from prism_deco.bench.measure import Usage, matmul_flops
from prism_deco.bench.records import Group, build_batches, by_length, draw_pool
from prism_deco.bench.train_report import GROUPED, OURS, PLAIN, Agreement, TrainReport, about, row
from prism_deco.bench.variants import ALL, NONE, Optimisations, StepVariant, our_loss, take_step
from prism_deco.build import build_model, group
from prism_deco.errors import UsageError
from prism_deco.sequence import Batch
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

ABLATION: dict[str, Optimisations] = {
    "none of them": NONE,
    "logits at supervised positions": replace(NONE, supervised=True),
    "the same, in chunks": replace(NONE, supervised=True, chunked=True),
    "packing": replace(NONE, packed=True),
    "towers cut off at the tap": replace(NONE, truncated=True),
    "AdamW not fused": replace(NONE, fused=False),
}
"""Each optimisation alone."""

TOLERANCE = {False: 1e-4, True: 3e-2}
"""Relative difference of losses and of gradients that is float error, by whether bfloat16 computes."""


def bench_train(
    config: DictConfig,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
    steps: int = 4,
    rounds: int = 3,
    ablation: bool = False,
    seed: int = 0,
) -> TrainReport:
    """Measures both steps, first making sure that they compute the same.

    In each round every variant takes all steps, the variants alternating step by step, so that a machine that
    slows down meanwhile slows all of them.

    Args:
        config: the model (random weights are drawn, whatever it says); `recipe.max_text_tokens`,
            `recipe.max_logits` and `trainer.precision` are heeded.
        batch_size: records per optimizer step, all in one forward pass.
        steps: optimizer steps of a round.
        ablation: also our step with each of its optimisations alone.

    Raises:
        UsageError: losses or gradients differ, too few rounds, or a model that the peer has no words for.
    """
    if rounds < 2:
        raise UsageError(f"rounds={rounds} shows no spread: use 2 or more.")
    device = torch.device(device)
    autocast = config.trainer.precision.startswith("bf16")
    vlm, whole = _models(config, device, seed)
    groups = draw_pool(
        vlm, batch_size=batch_size, steps=steps, max_text_tokens=config.recipe.max_text_tokens, seed=seed
    )
    variants = _variants(config, vlm, whole, groups, ablation)
    parameters = [p for p in vlm.parameters() if p.requires_grad]
    agreement = _compare(vlm, variants[0], variants[1], autocast)
    vlm.train()
    taken: dict[str, list[list[Usage]]] = {variant.name: [[] for _ in range(rounds)] for variant in variants}
    log.info(
        "%d variants, %d rounds of %d steps of %d records each, on %s", len(variants), rounds, steps, batch_size, device
    )
    with FlopCounterMode(display=False) as counter:  # also warms up
        for batch in variants[0].batches:
            take_step(variants[0], batch, parameters, autocast=autocast)
    for variant in variants[1:]:
        take_step(variant, variant.batches[0], parameters, autocast=autocast)
    for round_ in range(rounds):
        for step in range(steps):
            for variant in variants:
                taken[variant.name][round_].append(
                    take_step(variant, variant.batches[step], parameters, autocast=autocast)
                )
    best = matmul_flops(device, torch.bfloat16 if autocast else torch.float32, 8192 if device.type == "cuda" else 1024)
    rows = [row(variant, taken[variant.name], counter.get_total_flops() / best) for variant in variants]
    return TrainReport(about(config, vlm, variants[0], steps), agreement, rows)


def _models(config: DictConfig, device: torch.device, seed: int) -> tuple[VLM, VisionBackbone]:
    torch.manual_seed(seed)
    config = config.copy()
    config.backbone.pretrained = config.llm.pretrained = False
    # The tokenizer is not needed; its size is where the YAML names it, or that of the tables.
    vlm, _ = build_model(config, device=device)
    if device.type == "cuda" and config.trainer.precision.startswith("bf16"):
        vlm.backbone.to(torch.bfloat16)
    content = group(config, "backbone") | {"layer": -1}
    whole = build_backbone(content, device=device).to(next(vlm.backbone.parameters()).dtype)
    return vlm, WholeTowers(vlm.backbone, whole)


def _variants(
    config: DictConfig, vlm: VLM, whole: VisionBackbone, groups: list[Group], ablation: bool
) -> list[StepVariant]:
    parameters = [p for p in vlm.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = AdamW(parameters, lr=1e-5, fused=True)
    padded = build_batches(vlm, groups, device, pack=False)
    packed = build_batches(vlm, groups, device, pack=True)
    grouped = build_batches(vlm, by_length(groups, vlm.projector.num_tokens), device, pack=False)
    peer = build_peer(vlm, whole)
    untouched = VLM(whole, vlm.projector, vlm.lm)

    def ours(name: str, chosen: Optimisations) -> StepVariant:
        model = vlm if chosen.truncated else untouched
        best = optimizer if chosen.fused else AdamW(parameters, lr=1e-5, foreach=False)
        loss = our_loss(model, chosen, config.recipe.max_logits)
        return StepVariant(name, packed if chosen.packed else padded, loss, best)

    def theirs(batch: Batch, targets: int) -> Tensor:
        return peer_loss(peer, batch, targets)

    variants = [
        ours(OURS, ALL),
        StepVariant(PLAIN, padded, theirs, optimizer),
        StepVariant(GROUPED, grouped, theirs, optimizer),
    ]
    return variants + [ours(name, chosen) for name, chosen in ABLATION.items()] if ablation else variants


def _compare(vlm: VLM, ours: StepVariant, peer: StepVariant, autocast: bool) -> Agreement:
    """The two steps' losses and gradients on the same records, without dropout; leaves no gradients."""
    vlm.eval()
    parameters = [p for p in vlm.parameters() if p.requires_grad]
    losses, gradients = [], []
    for variant in (ours, peer):
        batch = variant.batches[0]
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=autocast):
            loss = variant.loss(batch, batch.num_targets)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append([cast(Tensor, p.grad) for p in parameters])
        vlm.zero_grad(set_to_none=True)
    norm = nn.utils.get_total_norm
    difference = norm([a - b for a, b in zip(*gradients, strict=True)]) / norm(gradients[1])
    agreement = Agreement(abs(losses[0] / losses[1] - 1), float(difference))
    if max(agreement.loss, agreement.gradient) > TOLERANCE[autocast]:
        raise UsageError(f"The two steps disagree numerically ({agreement}), so their timings cannot be compared.")
    log.info("Losses differ by %.1e, gradients by %.1e of their norm", agreement.loss, agreement.gradient)
    return agreement

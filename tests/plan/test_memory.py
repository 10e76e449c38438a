"""The predicted peak beside the measured one: real training steps of miniature models on the CPU.

What is measured is every byte that torch's CPU allocator holds, by its profiler; the plan never allocates any.
"""

import gc

import pytest
import pytorch_lightning as pl
import torch
from torch.profiler import ProfilerActivity, profile

from prism_deco.build import build_model
from prism_deco.config import load_config
from prism_deco.data.loader import Step
from prism_deco.llms.layers import checkpoint_activations
from prism_deco.plan.devices import Setup, setup_of
from prism_deco.plan.fake_memory import PassShape
from prism_deco.plan.memory import step_memory
from prism_deco.sequence import Batch
from prism_deco.training.module import TrainingModule
from prism_deco.training.trainer import half_precision_tower

CAUSAL = "recipe.turn_mask=causal"
PLAIN = ("llm.pretrained=false", "recipe.standardise_features=false", "recipe.token_scale=null")
DEEP = "llm.architecture.num_hidden_layers=6"
NARROW = ("projector.hidden_dim=96", "projector.heads=4")

QWEN = ("llm.architecture.vocab_size=151936", "llm.architecture.hidden_size=64", "llm.pad_to_multiple_of=null")

EXPERTS = [
    f"llm.architecture.{key}"
    for key in (
        "model_type=qwen3_moe",
        "moe_intermediate_size=96",
        "num_experts=4",
        "num_experts_per_tok=2",
        "head_dim=32",
    )
]

SETTINGS = {
    "block mask, two passes": ((), PassShape(4, 128, 16, 200, passes=2)),
    "causal, long": ((CAUSAL,), PassShape(4, 384, 16, 800, passes=1)),
    "phi, c_abstractor": (
        (CAUSAL, "llm=mini_phi", "projector=c_abstractor", "projector.hidden_dim=96"), PassShape(8, 64, 16, 96, 1)
    ),
    "llama, qformer": (
        (CAUSAL, "llm=mini_llama", "projector=qformer", *NARROW, "projector.ffn_dim=384"), PassShape(8, 64, 16, 96, 1)
    ),
    "llama, d_abstractor": ((CAUSAL, "llm=mini_llama", "projector=d_abstractor", *NARROW), PassShape(8, 64, 16, 96, 1)),
    "two towers, linear": ((CAUSAL, "backbone=mini_dinov2_siglip", "projector=linear"), PassShape(8, 96, 64, 96, 1)),
    "the projector is largest": ((CAUSAL, "projector=c_abstractor"), PassShape(4, 48, 16, 32, 1)),
    "vocabulary of Qwen": ((CAUSAL, *QWEN), PassShape(2, 64, 16, 80, 1)),
    "vocabulary of Qwen, logits in chunks": (
        (CAUSAL, *QWEN, "recipe.max_logits=4000000"), PassShape(2, 64, 16, 80, 1)
    ),
    "deep": ((CAUSAL, DEEP), PassShape(4, 128, 16, 64, 1)),
    "deep, recomputed": ((CAUSAL, DEEP, "trainer.activation_checkpointing=full"), PassShape(4, 256, 16, 64, 1)),
    "deep, partly recomputed": (
        (CAUSAL, DEEP, "llm=mini_llama", "trainer.activation_checkpointing=selective"), PassShape(4, 128, 16, 64, 1)
    ),
    "deep, packed": ((CAUSAL, DEEP, "recipe.packing=true"), PassShape(4, 128, 16, 64, 1, packed=True)),
    "bfloat16": ((CAUSAL, "llm=mini_phi", "trainer.precision=bf16-mixed"), PassShape(4, 96, 16, 64, 1)),
    "bfloat16, recomputed": (
        (CAUSAL, DEEP, "trainer.precision=bf16-mixed", "trainer.activation_checkpointing=full"),
        PassShape(4, 96, 16, 64, 1),
    ),
    "experts": ((CAUSAL, *EXPERTS), PassShape(4, 128, 16, 64, 1)),
    "frozen LLM": ((CAUSAL, "recipe.lm=frozen"), PassShape(4, 128, 16, 64, 1)),
    "trained tower": ((CAUSAL, "recipe.tower=full"), PassShape(8, 64, 16, 64, 1)),
    "trained towers, recomputed": (
        (CAUSAL, "recipe.tower=full", "backbone=mini_dinov2_siglip", "trainer.activation_checkpointing=full"),
        PassShape(8, 64, 16, 64, 2),
    ),
    "last block of the tower": ((CAUSAL, "recipe.tower=full", "recipe.tower_layers=1"), PassShape(8, 64, 16, 64, 1)),
    "adapters on the tower": (
        (CAUSAL, "recipe.tower=lora", "recipe.lora_r=8", "recipe.lm=frozen"), PassShape(8, 64, 16, 64, 1)
    ),
    "adapters": ((CAUSAL, DEEP, "recipe.lm=lora", "recipe.lora_r=8"), PassShape(4, 128, 16, 64, 1)),
}  # fmt: skip


def _batch(towers: dict, layout: PassShape) -> Batch:
    rows, length = layout.records, layout.length
    labels = torch.full((rows, length), -100)
    labels[:, -layout.supervised // rows :] = 5
    visual = torch.zeros(rows, length, dtype=torch.bool)
    visual[:, 1 : 1 + layout.visual] = True
    real = torch.ones(rows, length, dtype=torch.bool)
    positions, rounds = torch.arange(length).repeat(rows, 1), torch.ones(rows, length, dtype=torch.long)
    if layout.packed:
        labels, visual, real, positions, rounds = (t.reshape(1, -1) for t in (labels, visual, real, positions, rounds))
    else:
        real[0, -1] = False  # padding, or transformers would leave the mask out
    pixels = {name: torch.randn(rows, 3, t.image_size, t.image_size) for name, t in towers.items()}
    lengths = (length,) * rows if layout.packed else None
    return Batch(torch.full_like(labels, 7), labels, visual, real, positions, rounds, pixels, lengths=lengths)


def _measure(config, layout: PassShape) -> int:
    """Largest number of bytes of tensors in two optimizer steps; the second has AdamW's moments from the start."""
    vlm, _ = build_model(config)
    blocks = vlm.backbone.blocks if vlm.backbone.trained else []
    checkpoint_activations(vlm.lm, config.trainer.activation_checkpointing, blocks)
    module = TrainingModule(vlm, config.recipe, total_steps=2)
    towers = vlm.backbone.transform.towers
    steps = [Step([_batch(towers, layout) for _ in range(layout.passes)], 1, 0, 0) for _ in range(2)]
    pixels = [image for batch in steps[0].batches for image in batch.pixels.values()]
    with half_precision_tower(vlm, config.trainer):
        before = sum(t.numel() * t.element_size() for t in {*vlm.parameters(), *vlm.buffers(), *pixels})
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, precision=config.trainer.precision, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    gc.collect()  # what others have left would be freed meanwhile
    with (
        half_precision_tower(vlm, config.trainer),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        trainer.fit(module, torch.utils.data.DataLoader(steps, batch_size=None))
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = before
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


# Autograd adds the two gradients of a tied table in place, but not those of fake tensors: a plan counts one more.
TIED = "vocabulary of Qwen, logits in chunks"
QUICK = (
    "block mask, two passes",
    "phi, c_abstractor",
    "two towers, linear",
    "deep, recomputed",
    "bfloat16",
    "experts",
    "trained tower",
)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]
)
def test_predicted_memory_is_the_measured_one(name):
    overrides, layout = SETTINGS[name]
    config = load_config([*PLAIN, *overrides])
    measured, memory = _measure(config, layout), step_memory(config, setup_of(config), layout)
    table = 151936 * 64 * 4 if name == TIED else 0
    assert measured * 0.95 < memory.peak < (measured + table) * 1.05, memory


def test_setups_of_trainers():
    ddp = setup_of(load_config(["trainer=ddp", "trainer.devices=4"]))
    assert ddp == Setup(devices=4, shards=1, autocast=True, cuda=True)
    fsdp = setup_of(load_config(["trainer=fsdp", "trainer.devices=8", "trainer.num_nodes=2", "trainer.shard_size=8"]))
    assert fsdp == Setup(devices=16, shards=8, half=True, cuda=True, checkpointing="auto")
    assert setup_of(load_config([])) == Setup()

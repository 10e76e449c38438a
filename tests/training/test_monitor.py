"""The speed monitor: its numbers by hand on a clock of the test's own, and what TensorBoard gets from a real run."""

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prism_deco.config import load_config
from prism_deco.config.schema import RecipeConfig
from prism_deco.data.encoder import Encoder
from prism_deco.data.loader import Collate, Examples
from prism_deco.data.records import open_records
from prism_deco.plan.flops import TrainingFlops
from prism_deco.training import callbacks
from prism_deco.training.board import Loggers
from prism_deco.training.callbacks import SpeedMonitor
from prism_deco.training.module import TrainingModule

FLOPS = TrainingFlops(tower=100, projector=20, position=7, pair=3, target=11)


@pytest.fixture
def steps(colors, tmp_path, tiny):
    vlm, llm = tiny()
    records = open_records(colors / "train.json", tmp_path)
    examples = Examples(records, colors / "images", Encoder(llm, max_text_tokens=200), vlm.backbone.transform)
    return [Collate(4, 3)([examples[i] for i in range(9)]) for _ in range(4)], [examples[i].encoded for i in range(9)]


def test_numbers_by_hand(steps, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(callbacks, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(callbacks, "peak_flops", lambda device: 1000.0)
    logged = {}
    board = SimpleNamespace(scalars=lambda values, step: logged.update(values, step=step))
    strategy = SimpleNamespace(reduce=lambda value, reduce_op: 2 * value)  # another rank did the same
    trainer = SimpleNamespace(global_step=0, strategy=strategy, world_size=2)
    module = SimpleNamespace(device=torch.device("cpu"))
    callback = SpeedMonitor(FLOPS, log_every=2, loggers=board)
    callback.on_train_start(trainer, module)
    for number, step in enumerate(steps[0][:2], start=1):
        clock.now += 1  # the loader
        callback.on_train_batch_start(trainer, module, step, 0)
        clock.now += 3  # the step
        trainer.global_step = number
        callback.on_train_batch_end(trainer, module, None, step, 0)
        if number == 1:
            callback.on_validation_start(trainer, module)
            clock.now += 50
            callback.on_validation_end(trainer, module)
    encoded = steps[1]
    lengths = [len(e.input_ids) + 4 * len(e.image_slots) for e in encoded]
    targets = sum(label >= 0 for e in encoded for label in e.labels)
    assert logged["step"] == 2
    assert logged["train/samples_per_s"] == 2 * 2 * 9 / 8
    assert logged["train/tokens_per_s"] == 2 * 2 * sum(lengths) / 8
    assert logged["train/supervised_tokens_per_s"] == 2 * 2 * targets / 8
    assert logged["train/data_wait"] == 2 / 8
    work = 8 * (100 + 20) + 7 * sum(lengths) + 3 * sum(n * n for n in lengths) + 11 * targets
    assert logged["train/mfu"] == pytest.approx(2 * 2 * work / (8 * 1000 * 2))


def test_tensorboard_gets_them(steps, tmp_path, tiny):
    vlm, _ = tiny()
    settings = OmegaConf.structured(RecipeConfig(name="test"))
    board = Loggers(tmp_path, load_config(["seed=3", "recipe.lr=0.5"]), 0)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=4, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, precision="64-true", callbacks=[SpeedMonitor(FLOPS, 2, board)],
    )  # fmt: skip
    for step in steps[0]:
        for batch in step.batches:
            batch.pixels = batch.pixels and {tower: images.double() for tower, images in batch.pixels.items()}
    loader = torch.utils.data.DataLoader(steps[0], batch_size=None)
    trainer.fit(TrainingModule(vlm.double(), settings, total_steps=4), loader)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    assert "train/mfu" not in tags  # a CPU's peak is not known
    for tag in ("train/samples_per_s", "train/tokens_per_s", "train/supervised_tokens_per_s", "train/memory_gib"):
        assert [event.step for event in events.Scalars(tag) if event.value > 0] == [2, 4]
    assert all(0 <= event.value < 1 for event in events.Scalars("train/data_wait"))
    session = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    for part in (b"mini_siglip", b"avgpool", b"seed", b"projector_lr"):
        assert part in session

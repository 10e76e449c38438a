import json

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from prism_deco.config.schema import RecipeConfig
from prism_deco.data.encoder import Encoder
from prism_deco.data.loader import Collate, Examples, Step
from prism_deco.data.records import open_records
from prism_deco.errors import UsageError
from prism_deco.exits import NonFinite
from prism_deco.training.module import TrainingModule


@pytest.fixture
def examples(colors, tmp_path, tiny):
    vlm, llm = tiny()
    records = open_records(colors / "train.json", tmp_path)
    return Examples(records, colors / "images", Encoder(llm, max_text_tokens=200), vlm.backbone.transform)


def _in_double(step: Step) -> Step:
    for batch in step.batches:
        batch.pixels = batch.pixels and {k: v.double() for k, v in batch.pixels.items()}
    return step


def _fit(vlm, step: Step, **recipe) -> None:
    """Runs one real optimizer step of a Trainer."""
    settings = OmegaConf.structured(RecipeConfig(name="test", warmup_ratio=0.0, **recipe))
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, precision="64-true",
    )  # fmt: skip
    loader = torch.utils.data.DataLoader([_in_double(step)], batch_size=None)
    trainer.fit(TrainingModule(vlm, settings, total_steps=1), loader)


def _gradients(tiny, step: Step, **recipe) -> dict[str, torch.Tensor]:
    """The gradients that one step applied."""
    vlm, _ = tiny()
    _fit(vlm, step, grad_clip=0.0, **recipe)
    return {name: p.grad for name, p in vlm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro_batch_size", [9, 4, 1])
def test_the_token_weighted_loss_does_not_depend_on_the_micro_batch(tiny, examples, micro_batch_size):
    step = Collate(4, micro_batch_size)([examples[i] for i in range(9)])
    assert len(step.batches) == -(-9 // micro_batch_size) and step.records == 9
    got = _gradients(tiny, step, loss="token_mean")

    vlm, _ = tiny()
    total, count = torch.zeros(()), 0
    for i in range(9):  # one record at a time, summed by hand
        [batch] = _in_double(Collate(4, 1)([examples[i]])).batches
        loss = vlm(batch)
        total, count = total + loss.total, count + int(loss.count)
    (total / count).backward()
    assert count == step.num_targets
    for name, parameter in vlm.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_the_gradient_that_went_bad_is_named_before_clipping_spreads_it(tiny, examples):
    vlm, _ = tiny()
    name = "lm.model.layers.0.mlp.up_proj.weight"
    vlm.get_parameter(name).register_hook(lambda gradient: gradient * torch.nan)
    step = Collate(4, 2)([examples[i] for i in range(4)])
    with pytest.raises(NonFinite, match=f"the gradient of {name} is not"):
        _fit(vlm, step, grad_clip=1.0)


def test_the_strict_loss_is_the_mean_of_the_micro_batches_means(tiny, examples):
    step = Collate(4, 4)([examples[i] for i in range(9)])
    got = _gradients(tiny, step, loss="micro_batch_mean")
    vlm, _ = tiny()
    parts = [vlm(batch) for batch in _in_double(Collate(4, 4)([examples[i] for i in range(9)])).batches]
    torch.stack([part.total / part.count for part in parts]).mean().backward()
    for name, parameter in vlm.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_bad_images_follow_the_policy_and_are_counted(colors, tmp_path, tiny):
    vlm, llm = tiny()
    records = json.loads((colors / "train.json").read_text())[:2]
    records[1]["image"] = "gone.png"
    (tmp_path / "t.json").write_text(json.dumps(records))
    opened = open_records(tmp_path / "t.json", tmp_path)

    def load(policy):
        return Examples(
            opened, colors / "images", Encoder(llm, max_text_tokens=200), vlm.backbone.transform, on_bad_image=policy
        )

    with pytest.raises(UsageError, match=r"Record red90: .*gone\.png.*data\.on_bad_image=skip"):
        load("fail")[1]
    skipped = Collate(4, 2)([load("skip")[i] for i in range(2)])
    assert skipped.bad_images == 1 and skipped.num_targets == Collate(4, 2)([load("skip")[0]]).num_targets
    blank = load("blank")[1]
    assert blank.bad_images == 1 and not blank.pixels[0]["mini_siglip"].any()
    assert any(label != -100 for label in blank.encoded.labels)


def test_a_language_model_from_files_is_trained_in_training_mode(tiny):
    vlm, _ = tiny()
    vlm.lm.eval()
    module = TrainingModule(vlm, OmegaConf.structured(RecipeConfig(name="test")), total_steps=1)
    assert all(part.training for part in module.vlm.lm.modules())
    assert not any(part.training for part in module.vlm.backbone.modules())

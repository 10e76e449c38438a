import json

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import get_cosine_schedule_with_warmup

from prism_deco.config.schema import RecipeConfig
from prism_deco.data.encoder import Encoder
from prism_deco.data.loader import Collate, Examples, Step
from prism_deco.data.records import open_records
from prism_deco.errors import UsageError
from prism_deco.exits import NonFinite
from prism_deco.llms import build_llm
from prism_deco.training.module import TrainingModule
from prism_deco.training.optim import parameter_groups


@pytest.fixture
def examples(colors, tmp_path, tiny):
    vlm, llm = tiny()
    records = open_records(colors / "train.json", tmp_path)
    return Examples(records, colors / "images", Encoder(llm, max_text_tokens=200), vlm.backbone.transform)


def _in_double(step: Step) -> Step:
    for batch in step.batches:
        batch.pixels = batch.pixels and {k: v.double() for k, v in batch.pixels.items()}
    return step


def _fit(vlm, *steps: Step, **recipe) -> TrainingModule:
    """Runs real optimizer steps of a Trainer."""
    settings = OmegaConf.structured(RecipeConfig(name="test", warmup_ratio=0.0, **recipe))
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=len(steps), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, precision="64-true",
    )  # fmt: skip
    loader = torch.utils.data.DataLoader([_in_double(step) for step in steps], batch_size=None)
    module = TrainingModule(vlm, settings, total_steps=len(steps))
    trainer.fit(module, loader)
    return module


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


def test_a_step_for_several_numbers_of_visual_tokens_is_the_mean_over_them(tiny, examples):
    def gradients(collate):
        vlm, _ = tiny(projector="matryoshka")
        _fit(vlm, collate([examples[i] for i in range(4)]), grad_clip=0.0, loss="token_mean")
        return {name: p.grad for name, p in vlm.named_parameters() if p.grad is not None}

    both, fine, coarse = (gradients(collate) for collate in (Collate(4, 2, coarser=(1,)), Collate(4, 2), Collate(1, 2)))
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, (fine[name] + coarse[name]) / 2, atol=1e-9, rtol=1e-6)
    assert any(not torch.allclose(fine[name], coarse[name]) for name in fine)


def test_a_step_scales_its_gradients_down_to_the_clipping_norm_and_records_the_norm_before(tiny, examples):
    step = Collate(4, 2)([examples[i] for i in range(4)])
    whole = _gradients(tiny, step)  # 0 does not clip
    norm = sum(float(gradient.double().square().sum()) for gradient in whole.values()) ** 0.5
    vlm, _ = tiny()
    module = _fit(vlm, step, grad_clip=norm / 4)
    assert module.last_step["train/grad_norm"] == pytest.approx(norm, rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(vlm.get_parameter(name).grad, gradient / 4, atol=1e-9, rtol=1e-4)


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


@pytest.mark.parametrize("choice", ["mini_qwen2", "mini_phi", "mini_llama"])
@pytest.mark.parametrize("turn_mask", ["causal", "block"])
def test_packed_records_with_images_behind_the_first_token_are_as_if_alone(tiny, colors, tmp_path, choice, turn_mask):
    """The prompts of DeCo's authors: records begin with text, and a Qwen's header is supervised."""
    vlm, _ = tiny(choice, turn_mask=turn_mask)
    llm = build_llm(choice, prompt_set="deco", image_slot="after_first_token")
    records = open_records(colors / "train.json", tmp_path)
    examples = Examples(records, colors / "images", Encoder(llm, max_text_tokens=200), vlm.backbone.transform)
    chosen = [examples[i] for i in (0, 8, 3, 1)]
    block = turn_mask == "block"
    packed = Collate(4, 2, restart_rounds=block, pack=True)(chosen)
    assert [batch.lengths is not None for batch in packed.batches] == [True, True]
    starts = [int(position) for batch in packed.batches for position in (batch.position_ids[0] == 0).nonzero()]
    assert len(starts) == 4 and not any(batch.visual[0, 0] for batch in packed.batches)
    assert packed.batches[1].visual[0, 1:5].all() and not packed.batches[1].visual[0, 5]

    losses = []
    for example in chosen:
        [batch] = _in_double(Collate(4, 1, restart_rounds=block)([example])).batches
        losses.append(vlm(batch))
    (torch.stack([loss.total for loss in losses]).sum() / sum(loss.count for loss in losses)).backward()
    together, _ = tiny(choice, turn_mask=turn_mask)
    for batch, pair in zip(_in_double(packed).batches, (losses[:2], losses[2:]), strict=True):
        torch.testing.assert_close(together(batch).total, pair[0].total + pair[1].total, atol=1e-9, rtol=1e-9)
    _fit(together, packed, grad_clip=0.0, loss="token_mean")
    for (name, alone), parameter in zip(vlm.named_parameters(), together.parameters(), strict=True):
        if alone.requires_grad:
            torch.testing.assert_close(parameter.grad, alone.grad, atol=1e-9, rtol=1e-7, msg=name)


@pytest.mark.parametrize("order", ["ititt", "titi"])
def test_steps_without_an_image_leave_the_projector_alone(tiny, examples, order):
    """As in a plain loop of torch in which such a step gives the projector no gradient: `i` image, `t` text."""
    steps = [Collate(4, 4)([examples[i] for i in ((0, 3) if kind == "i" else (8,))]) for kind in order]
    assert [step.batches[0].pixels is not None for step in steps] == [kind == "i" for kind in order]
    theirs, _ = tiny()
    theirs.eval()  # without the zeros that the projector is given in training
    groups = parameter_groups(theirs.projector, theirs.lm, lr=1e-3, projector_lr=None, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, len(steps))
    for step, kind in zip(steps, order, strict=True):
        optimizer.zero_grad()
        loss = theirs(_in_double(step).batches[0])
        (loss.total / loss.count).backward()
        assert all((p.grad is None) == (kind == "t") for p in theirs.projector.parameters())
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    for update, counted in ((False, order.count("i")), (True, len(order))):
        ours, _ = tiny()
        module = _fit(ours, *steps, lr=1e-3, loss="micro_batch_mean", update_idle_projector=update)
        same = [
            torch.allclose(a, b, rtol=0, atol=1e-9)
            for a, b in zip(ours.projector.parameters(), theirs.projector.parameters(), strict=True)
        ]
        state = module.optimizers().state
        assert {int(state[p]["step"]) for p in ours.projector.parameters()} == {counted}
        assert {int(state[p]["step"]) for p in ours.lm.parameters()} == {len(order)}
        assert not any(same) if update else all(same)


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


def test_a_step_waits_for_the_device_once(tiny, examples, monkeypatch):
    """On a GPU each number that Python reads waits for all that has been asked of it."""

    class Reads(TorchDispatchMode):
        scalars = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.scalars += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    seen, lists, whole, tolist = [], [], TrainingModule.training_step, torch.Tensor.tolist

    def watched(self, batch, batch_idx):
        lists.clear()
        with Reads() as reads:
            whole(self, batch, batch_idx)
        seen.append((reads.scalars, len(lists)))

    monkeypatch.setattr(TrainingModule, "training_step", watched)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(self) or tolist(self))
    steps = [Collate(4, 2)([examples[i] for i in rows]) for rows in ([0, 1, 2, 8], [3, 4, 5])]
    _fit(tiny()[0], *steps)
    # transformers looks once in every forward pass whether positions start anew.
    assert seen == [(len(step.batches), 1) for step in steps]

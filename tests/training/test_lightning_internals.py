"""The installed Lightning still has what `lightning_internals` touches."""

import pytest
import pytorch_lightning as pl
import torch

from prism_deco.training.lightning_internals import FirstError, count_skipped_step, run_validation, set_position


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(1, 1)
        self.steps, self.validated = [], []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_fit_start(self):
        set_position(self.trainer, 3)
        run_validation(self.trainer)

    def training_step(self, batch, index):
        self.steps.append(self.trainer.global_step)
        if self.trainer.global_step == 4:
            count_skipped_step(self.trainer)
        else:
            self.optimizers().step()

    def validation_step(self, batch, index):
        assert not torch.is_grad_enabled()
        self.validated.append(self.trainer.global_step)


class Fails(pl.Callback):
    def on_train_end(self, *_):
        raise RuntimeError("the first")


def test_a_position_a_skipped_step_a_validation_and_the_first_error():
    first, model = FirstError(), Model()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, max_steps=6, val_check_interval=2, check_val_every_n_epoch=None, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[first, Fails()],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.zeros(20, 1))
    one = torch.utils.data.DataLoader(torch.zeros(1, 1))
    with pytest.raises(RuntimeError, match="the first"):
        trainer.fit(model, loader, one)
    assert str(first.error) == "the first"
    assert model.steps == [3, 4, 5], "it goes on behind the third step, and the skipped one counts"
    assert model.validated == [3, 4, 6], "once by hand, then where the counters say"

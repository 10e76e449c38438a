"""Real processes, killed at some moment and started again: the run must be the one that was never stopped."""

import json
import random
import signal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prism_deco.training.checkpoints import list_checkpoints, newest_checkpoint
from prism_deco.training.progress import read_metrics

DROPOUT = ["projector=qformer", "projector.hidden_dim=32", "projector.heads=2", "projector.ffn_dim=64",
           "projector.dropout=0.3", "trainer.checkpoint_every=2", "recipe.epochs=4"]  # fmt: skip


def _losses(folder):
    rows = [row for row in read_metrics(folder) if "train/loss" in row]
    return [(row["step"], row["train/loss"], row["train/grad_norm"], row["train/lr"]) for row in rows]


def _at_step(step):
    def reached(folder):
        path = folder / "metrics.jsonl"
        return path.exists() and path.read_text().count('"train/loss"') >= step

    return reached


def _saving(step):
    return lambda folder: (folder / "checkpoints" / f".building-step_{step:06d}").is_dir()


@pytest.fixture
def same_model(trained_weights):
    def compare(a, b):
        a, b = trained_weights(a), trained_weights(b)
        return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)

    return compare


@pytest.mark.parametrize(
    "tuning",
    [
        [],
        pytest.param(["recipe.lm=lora", "recipe.lora_dropout=0.3"], marks=pytest.mark.slow),
        pytest.param(["recipe.tower=full", "recipe.tower_lr=1e-3"], marks=pytest.mark.slow),
        pytest.param(["recipe.tower=lora", "recipe.lora_r=4", "recipe.lora_dropout=0.3"], marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(start, tmp_path, same_model, tuning):
    options = [*DROPOUT, *tuning, "data.val_fraction=0.3", "trainer.val_every=0.2"]
    whole = start(*options, run="whole")
    assert whole.wait() == [0], whole.log.read_text()
    job = start(*options)
    job.until(_at_step(5))
    job.kill()
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").name >= "step_000004"
    again = start(*options)
    assert again.wait() == [0], again.log.read_text()
    assert _losses(tmp_path / "run") == _losses(tmp_path / "whole")
    rows = {name: [row for row in read_metrics(tmp_path / name) if "val/loss" in row] for name in ("run", "whole")}
    assert rows["run"] == rows["whole"] != []
    assert same_model(tmp_path / "run", tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


def test_tensorboard_shows_each_step_once_after_kills(start, tmp_path):
    """One before the first checkpoint, one between two."""
    options = [*DROPOUT, "trainer.checkpoint_every=4", "data.val_fraction=0.3", "trainer.val_every=0.2"]
    for step in (3, 6):
        job = start(*options)
        job.until(_at_step(step))
        job.kill()
    job = start(*options)
    assert job.wait() == [0], job.log.read_text()
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = read_metrics(tmp_path / "run")
    for name in ("train/loss", "val/loss"):
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
        assert [(event.step, event.value) for event in board.Scalars(name)] == expected


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_whenever_it_is_killed(start, tmp_path, ranks, same_model):
    """Several kills in one run: within an epoch, where one ends (step 9 of 3), in the middle of a save."""
    options = [*DROPOUT, "recipe.epochs=6", "data.num_workers=1"]
    whole = start(*options, run="whole", ranks=ranks)
    assert whole.wait() == [0] * ranks, whole.log.read_text()
    dice = random.Random(ranks)
    moments = [_at_step(dice.randint(3, 5)), _at_step(9), _saving(12), _at_step(dice.randint(14, 16))]
    for moment in moments:
        job = start(*options, ranks=ranks)
        job.until(moment)
        job.kill()
    again = start(*options, ranks=ranks)
    assert again.wait() == [0] * ranks, again.log.read_text()
    assert _losses(tmp_path / "run") == _losses(tmp_path / "whole")
    assert same_model(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_more_or_fewer_processes_go_on_with_it(start, tmp_path):
    options = ["trainer.checkpoint_every=2", "trainer.activation_checkpointing=none"]
    whole = start(*options, run="whole")
    assert whole.wait() == [0], whole.log.read_text()
    for name, first, then in (("fewer", 2, 1), ("more", 1, 2)):
        job = start(*options, run=name, ranks=first)
        job.until(_at_step(5))
        job.kill()
        job = start(*options, run=name, ranks=then)
        assert job.wait() == [0] * then, job.log.read_text()
        for mine, expected in zip(_losses(tmp_path / name), _losses(tmp_path / "whole"), strict=True):
            assert mine[0] == expected[0] and mine[1:3] == pytest.approx(expected[1:3], rel=1e-4)


@pytest.mark.slow
def test_a_preempted_run_stops_at_one_step_and_goes_on(start, tmp_path):
    """Signals reach the ranks half a second apart."""
    import time

    whole = start("recipe.epochs=16", "trainer.checkpoint_every=1000", run="whole", ranks=2)
    job = start("recipe.epochs=16", "trainer.checkpoint_every=1000", ranks=2)
    job.until(_at_step(2))
    job.signal(signal.SIGUSR1, rank=1)
    time.sleep(0.5)
    job.signal(signal.SIGTERM, rank=0)
    assert job.wait(200) == [75, 75], job.log.read_text()
    state = json.loads((tmp_path / "run" / "status.json").read_text())
    assert state["state"] == "preempted" and "preempted after step" in state["reason"]
    [checkpoint] = list_checkpoints(tmp_path / "run" / "checkpoints")
    stopped = len(_losses(tmp_path / "run"))
    assert checkpoint.name == f"step_{stopped:06d}" and 2 <= stopped < 48
    again = start("recipe.epochs=16", "trainer.checkpoint_every=1000", ranks=2)
    assert again.wait() == [0, 0], again.log.read_text()
    assert whole.wait() == [0, 0]
    assert _losses(tmp_path / "run") == _losses(tmp_path / "whole")


SLOW_VALIDATION = """
import time
from prism_deco.training.module import TrainingModule
validate = TrainingModule.validation_step
def slow(*args):
    print("validating", flush=True)
    time.sleep(2)
    return validate(*args)
TrainingModule.validation_step = slow
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_preempted_run_does_not_finish_its_validation(start, tmp_path, same_model, ranks):
    """It saves at once, and the same command validates that step."""
    options = ["data.val_fraction=0.5", "recipe.micro_batch_size=1", "trainer.val_every=0.5"]
    (tmp_path / "slow.py").write_text(SLOW_VALIDATION)
    whole = start(*options, run="whole", ranks=ranks)
    assert whole.wait() == [0] * ranks, whole.log.read_text()
    job = start(*options, "plugins=[slow]", PLUGINS=str(tmp_path), ranks=ranks)
    job.until(_at_step(1))
    job.until(lambda _: "validating" in job.log.read_text())
    job.signal(signal.SIGTERM, rank=ranks - 1)
    assert job.wait(60) == [75] * ranks, job.log.read_text()
    stopped = len(_losses(tmp_path / "run"))
    checkpoint = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint.name == f"step_{stopped:06d}"
    assert job.log.read_text().count("validating") <= 3 * ranks
    assert not [row for row in read_metrics(tmp_path / "run") if "val/loss" in row]
    (tmp_path / "slow.py").write_text("")
    again = start(*options, "plugins=[slow]", PLUGINS=str(tmp_path), ranks=ranks)
    assert again.wait() == [0] * ranks, again.log.read_text()
    rows = {name: [row for row in read_metrics(tmp_path / name) if "val/loss" in row] for name in ("run", "whole")}
    assert rows["run"] == rows["whole"] != []
    assert same_model(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_saves_and_the_same_command_goes_on(start, tmp_path, ranks):
    """A terminal sends it to all processes; a `kill -INT` reaches the first one alone."""
    options = ["recipe.epochs=16", "trainer.checkpoint_every=1000", "data.num_workers=1", "trainer.requeue=true"]
    job = start(*options, ranks=ranks)
    job.until(_at_step(2))
    job.signal(signal.SIGINT, rank=0)
    assert job.wait(200) == [130] * ranks, job.log.read_text()
    said = job.log.read_text()
    assert "run the same command to continue" in said and "Traceback" not in said and "no SLURM job" not in said
    state = json.loads((tmp_path / "run" / "status.json").read_text())
    stopped = len(_losses(tmp_path / "run"))
    assert state["state"] == "preempted" and state["reason"].startswith(f"interrupted after step {stopped} of 48")
    [checkpoint] = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoint.name == f"step_{stopped:06d}" and 2 <= stopped < 48
    job = start(*options, ranks=ranks)
    job.until(_at_step(stopped + 1))
    assert f"training continues from {checkpoint.name}" in job.log.read_text()


def test_a_second_ctrl_c_ends_the_run_at_once(start, tmp_path):
    job = start("recipe.epochs=400", "trainer.checkpoint_every=1000", "plugins=[slow_to_save]", PLUGINS=str(tmp_path))
    (tmp_path / "slow_to_save.py").write_text(
        "import time\nfrom prism_deco.training import checkpoint_callback\n"
        "checkpoint_callback.save_checkpoint = lambda *_: time.sleep(600)\n"
    )
    job.until(_at_step(2))
    job.signal(signal.SIGINT)
    job.until(lambda _: "saving after this step, press Ctrl-C again" in job.log.read_text())
    job.until(lambda _: "Saving step_" in job.log.read_text())
    job.signal(signal.SIGINT)
    assert job.wait(60) == [130], job.log.read_text()
    state = json.loads((tmp_path / "run" / "status.json").read_text())
    assert state["state"] == "preempted" and "the newest checkpoint is kept" in state["reason"]


SLOW = """
import time
from prism_deco.training import checkpoint_callback, entry
def slow(module, name, seconds):
    do = getattr(module, name)
    def slowed(*args, **kwargs):
        print("entering", name, flush=True)
        time.sleep(seconds)
        return do(*args, **kwargs)
    setattr(module, name, slowed)
slow(checkpoint_callback, "save_checkpoint", 1)
slow(entry, "_advised", 1)
"""


@pytest.mark.parametrize("again", ["save_checkpoint", "_advised"])
def test_a_second_signal_changes_nothing(start, tmp_path, again):
    """While the checkpoint is written, and between the end of the run and that of its process."""
    (tmp_path / "slow.py").write_text(SLOW)
    job = start("recipe.epochs=400", "trainer.checkpoint_every=1000", "plugins=[slow]", PLUGINS=str(tmp_path))
    job.until(_at_step(2))
    job.signal(signal.SIGUSR1)
    job.until(lambda _: f"entering {again}" in job.log.read_text())
    job.signal(signal.SIGTERM)
    assert job.wait(60) == [75], job.log.read_text()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "preempted"
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1


def test_a_ctrl_c_that_reaches_a_rank_twice_is_one(start, tmp_path):
    """A scheduler sends it to each process of a step, and the first passes it on as well."""
    (tmp_path / "slow.py").write_text(SLOW)
    options = ["recipe.epochs=400", "trainer.checkpoint_every=1000", "plugins=[slow]"]
    job = start(*options, ranks=2, PLUGINS=str(tmp_path))
    job.until(_at_step(2))
    job.signal(signal.SIGINT)
    job.until(lambda _: "entering save_checkpoint" in job.log.read_text())
    job.signal(signal.SIGINT, rank=1)
    assert job.wait(60) == [130, 130], job.log.read_text()
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1

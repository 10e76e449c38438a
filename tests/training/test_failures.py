"""What goes wrong in a run of several processes ends all of them, soon, and is told."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from prism_deco.cli import main
from prism_deco.config import load_config, read_config, save_config
from prism_deco.distributed import World
from prism_deco.exits import OutOfMemory, Preempted, Preemption, as_stop, requeue
from prism_deco.training import run_dir as run_folders
from prism_deco.training.entry import _prepare
from prism_deco.training.nonfinite import diagnose
from prism_deco.training.progress import Metrics, read_metrics
from prism_deco.training.run_dir import find_run, locked, open_run

LONG = ["recipe.epochs=400", "trainer.checkpoint_every=10000"]


def _status(folder):
    return json.loads((folder / "status.json").read_text())


def _training(folder):
    return (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text().count("\n") >= 2


@pytest.mark.slow
def test_one_process_that_dies_or_stands_still_ends_the_others(start, tmp_path):
    """Rank 1 is stopped (it answers nothing, and closes no connection), in another run killed."""
    stalled = start(*LONG, "trainer.timeout_minutes=0.2", ranks=2, run="stalled")
    killed = start(*LONG, "trainer.timeout_minutes=5", ranks=2, run="killed")
    stalled.until(_training)
    killed.until(_training)
    begun = time.monotonic()
    stalled.signal(signal.SIGSTOP, rank=1)
    killed.signal(signal.SIGKILL, rank=1)
    killed.processes[0].join(120)
    assert time.monotonic() - begun < 120, "long before its timeout"
    stalled.processes[0].join(120)
    assert stalled.processes[0].exitcode == killed.processes[0].exitcode == 1
    state = _status(tmp_path / "stalled")
    assert state["state"] == "failed" and "rank 1 stopped responding" in state["reason"]
    assert _status(tmp_path / "killed")["state"] == "failed"


def test_the_error_of_one_process_is_the_error_of_all(start, tmp_path):
    """Rank 1 alone meets an image that cannot be read."""
    (tmp_path / "breaks_rank_one.py").write_text(
        "import os\n"
        "from prism_deco.data import loader\n"
        "_load = loader.load_image\n"
        "def load(*a):\n"
        "    if os.environ['RANK'] == '1' and os.environ.get('KIND') == 'memory':\n"
        '        raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 1 bytes")\n'
        "    if os.environ['RANK'] == '1':\n"
        "        raise RuntimeError('a bad disk')\n"
        "    return _load(*a)\n"
        "loader.load_image = load\n"
    )
    options = ["plugins=[breaks_rank_one]", *LONG, "recipe.standardise_features=false"]
    job = start(*options, ranks=2, run="broken", PLUGINS=str(tmp_path))
    memory = start(*options, ranks=2, run="memory", PLUGINS=str(tmp_path), KIND="memory")
    assert job.wait(200) == [1, 1], job.log.read_text()
    assert memory.wait(200) == [76, 76], memory.log.read_text()
    state = _status(tmp_path / "broken")
    assert state["state"] == "failed" and "rank 1" in state["reason"] and "a bad disk" in state["reason"]
    state = _status(tmp_path / "memory")
    assert state["state"] == "out_of_memory" and "Lower recipe.micro_batch_size" in state["reason"]


def _processes(word: str) -> list[int]:
    """Running processes with that word in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                variables = (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if word.encode() in variables and state != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="lists processes as Linux does")
def test_the_command_starts_its_other_processes_and_leaves_none_behind(colors, tmp_path):
    arguments = ["train", "data=llava", f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}",
                 "data.val_fraction=0", "evaluate.benchmarks=null", "recipe.global_batch_size=4", "trainer=fsdp",
                 "trainer.accelerator=cpu", "trainer.devices=2", "backbone.pretrained=false", "data.num_workers=0",
                 "trainer.precision=32-true", f"runs_dir={tmp_path}"]  # fmt: skip
    command = [sys.executable, "-m", "prism_deco.cli", *arguments]
    environment = os.environ | {"STARTED_BY": str(tmp_path)}
    done = subprocess.run([*command, "run_id=short"], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert _status(tmp_path / "short")["state"] == "done" and len(read_metrics(tmp_path / "short")) == 3
    assert done.stderr.count("Training short") == 1, "the other processes are silent"
    again = subprocess.run([*command, "run_id=short"], capture_output=True, text=True, timeout=400)
    assert again.returncode == 0 and "is complete." in " ".join(again.stderr.split())
    child = subprocess.Popen(
        [*command, "run_id=long", *LONG], env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not _training(tmp_path / "long") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(_processes(str(tmp_path))) >= 3, "the command and two ranks"
    child.kill()
    child.wait()
    deadline = time.monotonic() + 60
    while _processes(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _processes(str(tmp_path)) == []


def test_the_records_and_the_module_of_a_loss_that_is_not_finite_are_named(tiny, colors, tmp_path):
    from prism_deco.data.encoder import Encoder
    from prism_deco.data.loader import Collate, Examples
    from prism_deco.data.records import open_records

    vlm, llm = tiny()
    records = open_records(colors / "train.json", tmp_path)
    examples = Examples(records, colors / "images", Encoder(llm, max_text_tokens=200), vlm.backbone.transform)
    batches = Collate(4, 2)([examples[i] for i in range(4)]).batches
    for batch in batches:
        batch.pixels = {name: pixels.double() for name, pixels in batch.pixels.items()}
    assert "only the sums are not finite" in diagnose(vlm, batches)
    vlm(batches[0]).total.backward()
    vlm.lm.model.layers[1].mlp.up_proj.weight.grad[0, 0] = torch.nan
    vlm.lm.model.layers[0].mlp.up_proj.weight.grad[0, 0] = torch.nan
    assert "the gradient of lm.model.layers.1.mlp.up_proj.weight is not" in diagnose(vlm, batches)
    batches[1].pixels["mini_siglip"][0, 0, 0, 0] = torch.inf
    ids = [records[i].id for i in range(4)]
    found = diagnose(vlm, batches)
    assert found.startswith("first in the output of backbone.trunk.vit.patch_embed")
    assert ids[2] in found and ids[3] in found and ids[0] not in found


def test_a_step_that_is_not_finite_stops_the_run_or_is_left_out(start, tmp_path):
    """A learning rate that lets the weights explode."""
    explodes = ["recipe.lr=1e30", "recipe.warmup_ratio=0", "recipe.grad_clip=0"]
    stops, skips = start(*explodes, run="stops"), start(*explodes, "trainer.nonfinite=skip", run="skips")
    assert stops.wait() == [1] and skips.wait() == [0], skips.log.read_text()
    state = _status(tmp_path / "stops")
    assert state["state"] == "failed" and state["reason"].startswith("step 2: loss or gradient not finite: ")
    assert "records " in state["reason"] and "trainer.nonfinite=skip" in state["reason"]
    manifest = json.loads((tmp_path / "skips" / "manifest.json").read_text())
    assert manifest["steps"] == 12 and manifest["steps_skipped"] == 11
    assert [row["step"] for row in read_metrics(tmp_path / "skips")] == list(range(1, 13))


def test_slurm_is_asked_to_queue_the_job_again(start, tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    tool.chmod(0o755)
    path = f"{tool.parent}:{os.environ['PATH']}"
    job = start(*LONG, "trainer.requeue=true", PATH=path, SLURM_JOB_ID="4242")
    job.until(_training)
    job.signal(signal.SIGUSR1)
    assert job.wait() == [75], job.log.read_text()
    assert (tmp_path / "asked").read_text() == "requeue 4242\n"
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue()
    assert (tmp_path / "asked").read_text().endswith("requeue 7_3\n")


@pytest.mark.parametrize("told", [True, False])
def test_a_requeued_job_does_not_overwrite_its_own_run(start, tmp_path, told):
    """Its command line is that of the first start, with --overwrite; another job's, or a later start's, is meant.

    SLURM counts the starts of a job; where it did not say so, the run remembers that it asked to be queued again.
    """
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    path = f"{tool.parent}:{os.environ['PATH']}"
    options = [*LONG, "--overwrite", f"trainer.requeue={str(not told).lower()}"]
    first = start(*options, PATH=path, SLURM_JOB_ID="4242")
    first.until(_training)
    first.signal(signal.SIGUSR1)
    assert first.wait() == [75], first.log.read_text()
    assert "run the same command without --overwrite to continue" in first.log.read_text()
    stopped = len(read_metrics(tmp_path / "run"))
    again = start(*options, PATH=path, SLURM_JOB_ID="4242", **({"SLURM_RESTART_COUNT": "1"} if told else {}))
    again.until(lambda folder: len(read_metrics(folder)) > stopped)
    again.kill()
    assert "training continues from step_" in again.log.read_text()
    other = start(*options, PATH=path, SLURM_JOB_ID="4243")
    other.until(lambda folder: "Removing the earlier run" in other.log.read_text())


def test_a_signal_outside_the_training_loop_ends_the_run_at_once():
    preemption = Preemption()
    with preemption.watched():
        with preemption.at_boundaries():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert preemption.requested
        preemption.requested = None
        with pytest.raises(Preempted, match="received SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_an_earlier_start_said_is_forgotten_before_this_one_listens(start, tmp_path):
    """Else a rank that looks before a slower one has written would end for the reason of last time."""
    stops = start("recipe.lr=1e30", "recipe.warmup_ratio=0", ranks=2)
    assert 0 not in stops.wait()
    told = tmp_path / "run" / ".ranks"
    assert "loss or gradient not finite" in (told / "failure.json").read_text()
    config = read_config(tmp_path / "run" / "config.yaml")
    with ExitStack() as held:
        target, _ = _prepare(config, None, World(), held, [], overwrite=False, force=False)
        assert target.state == "train"
    assert not told.exists()


@pytest.mark.parametrize(("loss", "warns"), [("micro_batch_mean", True), ("token_mean", False)])
def test_other_micro_batches_are_told_where_they_change_the_loss(tmp_path, monkeypatch, caplog, loss, warns):
    settings = [f"recipe.loss={loss}", f"runs_dir={tmp_path}", "run_id=x"]
    (tmp_path / "x").mkdir()
    save_config(load_config([*settings, "recipe.micro_batch_size=16"]), tmp_path / "x" / "config.yaml")
    monkeypatch.setattr(run_folders, "newest_checkpoint", lambda folder: folder / "step_000002")
    config = load_config([*settings, "recipe.micro_batch_size=16", "data.num_workers=1"])
    with ExitStack() as held:
        target = open_run(config, find_run(config), held)
    assert target.state == "train"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    config = load_config([*settings, "recipe.micro_batch_size=8", "trainer.devices=2"])
    with ExitStack() as held:
        assert open_run(config, find_run(config), held).state == "train"
    said = "recipe.micro_batch_size was 16 and is 8, trainer.devices was 1 and is 2: the loss"
    assert (said in caplog.text) == warns


def test_a_closed_terminal_ends_the_run_unless_it_is_to_ignore_that():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under `nohup`, too
    try:
        with Preemption().watched(), pytest.raises(Preempted, match="received SIGHUP"):
            os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` leaves it
        ignoring = Preemption()
        with ignoring.watched():
            ignoring.claim()
            os.kill(os.getpid(), signal.SIGHUP)
        assert not ignoring.requested and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1000 bytes."),
        MemoryError(),
    ],
)
def test_too_little_memory_is_told_from_other_errors(error):
    stop = as_stop(error)
    assert isinstance(stop, OutOfMemory) and stop.exit_code == 76 and stop.state == "out_of_memory"
    assert as_stop(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_a_run_is_trained_by_one_command_at_a_time(tmp_path):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"1\n"
    with pytest.raises(ValueError, match="is being trained by another process"), locked(tmp_path):
        pass
    other.kill()
    other.communicate()
    with locked(tmp_path):
        pass


def test_metrics_of_steps_that_come_again_are_removed(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step, loss in enumerate((0.1, 1 / 3, 2.5e-8), start=1):
        metrics.append(step, {"train/loss": loss})
    metrics.append(2, {"val/loss": 0.5})
    metrics.append(3, {"val/loss": 0.4})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    assert [row.get("train/loss") for row in read_metrics(tmp_path)] == [0.1, 1 / 3, 2.5e-8, None, None]
    again = Metrics(tmp_path, 2)
    assert read_metrics(tmp_path) == [
        {"step": 1, "train/loss": 0.1}, {"step": 2, "train/loss": 1 / 3}, {"step": 2, "val/loss": 0.5}
    ]  # fmt: skip
    assert again.best == 2


def test_a_wrong_number_of_processes_is_an_error(colors, tmp_path, capsys):
    arguments = ["train", "trainer.devices=2", f"runs_dir={tmp_path}", "evaluate.benchmarks=null"]
    assert main([*arguments, "trainer.devices=0"]) == 2
    assert "trainer.devices=0 must be at least 1, or -1" in capsys.readouterr().err

"""How the processes of a run join and leave their group."""

import subprocess
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from prism_deco.config import load_config
from prism_deco.training import ranks as module
from prism_deco.training.ranks import Ranks
from prism_deco.training.sharding import Sharding


class Child:
    """A process that this one has started, and that is through."""

    pid = 1

    def __init__(self, calls):
        self.calls = calls

    def poll(self):
        return None if "killed" not in self.calls and "waited" not in self.calls else 0

    def wait(self, timeout=None):
        self.calls.append("waited")

    def send_signal(self, number):
        self.calls.append("killed")


@pytest.fixture
def nccl(monkeypatch):
    """(Ranks, what it calls): the first of two processes, as on GPUs; nothing is really joined."""
    calls: list[str] = []
    joined = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **options: joined.append(options))
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(joined))
    monkeypatch.setattr(dist, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: (calls.append("destroyed"), joined.clear()))
    monkeypatch.setattr(module, "abort_process_group", lambda: (calls.append("aborted"), joined.clear()))
    ranks = Ranks(load_config(["trainer=ddp", "trainer.devices=2", "trainer.accelerator=gpu"]).trainer)
    monkeypatch.setattr(ranks, "_start", lambda *_: ranks.processes.append(Child(calls)))
    return ranks, calls


def test_all_leave_the_group_before_one_waits_for_the_end_of_another(nccl):
    """What destroys a group of NCCL returns when all processes have called it."""
    ranks, calls = nccl
    with ranks.started([]):
        pass
    assert calls == ["barrier", "destroyed", "waited"]


def test_after_a_failure_nobody_waits_for_the_others(nccl):
    ranks, calls = nccl
    with pytest.raises(RuntimeError, match="broken"), ranks.started([]):
        raise RuntimeError("broken")
    assert calls == ["killed", "waited", "aborted"]


def test_a_process_that_does_not_end_fails_nothing(nccl, monkeypatch, caplog):
    ranks, calls = nccl

    def never(self, timeout=None):
        calls.append("waited")
        if timeout:
            raise subprocess.TimeoutExpired("prism-deco", timeout)

    monkeypatch.setattr(Child, "wait", never)
    monkeypatch.setattr(Child, "poll", lambda self: None)
    with ranks.started([]):
        pass
    assert calls == ["barrier", "destroyed", "waited", "killed", "waited"] and "does not end" in caplog.text


def _look_at_groups(meeting, rank):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=4)
    settings = ["trainer=fsdp", "trainer.shard_size=2", "trainer.timeout_minutes=7"]
    mesh = Sharding.of(load_config(settings).trainer, 4)._hybrid(init_device_mesh("cpu", (4,)))
    assert mesh.mesh.tolist() == [[0, 1], [2, 3]] and mesh.mesh_dim_names == ("replicate", "shard")
    for name, members in {"replicate": mesh.mesh[:, rank % 2], "shard": mesh.mesh[rank // 2]}.items():
        group = mesh.get_group(name)
        assert dist.get_process_group_ranks(group) == members.tolist(), name
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=8), name
    dist.barrier()
    dist.destroy_process_group()


def test_the_groups_of_hybrid_sharding_have_the_runs_timeout(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    started = [context.Process(target=_look_at_groups, args=(tmp_path / "meet", rank)) for rank in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join(200)
    assert [process.exitcode for process in started] == [0] * 4


def test_patience_is_longer_than_the_watchs():
    assert module.patience(timedelta(minutes=30)) == timedelta(minutes=31)

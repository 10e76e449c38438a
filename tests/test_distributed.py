"""How the processes of a run find their place, join and leave their group, and agree."""

import json
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from prism_deco import distributed
from prism_deco.config import load_config
from prism_deco.distributed import World, local_device, requested_device
from prism_deco.errors import UsageError
from prism_deco.exits import Preempted
from prism_deco.training.checkpoints import save_checkpoint
from prism_deco.training.sharding import Sharding


def _run(function, *arguments, size=2):
    """Exit codes of processes that call a function of the rank."""
    context = torch.multiprocessing.get_context("fork")
    started = [context.Process(target=function, args=(rank, *arguments)) for rank in range(size)]
    for process in started:
        process.start()
    for process in started:
        process.join(200)
    return [process.exitcode for process in started]


def _world(rank, port, size=2):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
                   "GROUP_RANK": "0"}  # fmt: skip
    return World.of(load_config(["trainer=ddp", f"trainer.devices={size}", "trainer.accelerator=cpu"]).trainer)


def _agree(rank, port, folder):
    world = _world(rank, port)
    seen = []
    with world.joined():
        seen.append(world.decide(lambda: f"of rank {rank}"))
        with world.patient():
            world.barrier()
    assert not dist.is_initialized()
    (folder / f"{rank}.json").write_text(json.dumps(seen))


def test_what_rank_0_decides_holds_for_all(tmp_path, free_port):
    assert _run(_agree, free_port, tmp_path) == [0, 0]
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert seen == [["of rank 0"], ["of rank 0"]]


def _refuse(rank, port, folder, error):
    world = _world(rank, port)
    try:
        with world.joined():
            world.decide(_raise(error))
    except BaseException as raised:
        (folder / f"{rank}").write_text(repr(raised))


def _raise(error):
    def decision():
        raise error

    return decision


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError("no such file"), 2), (ValueError("too many values"), 1), (OSError("disk"), 1), (Preempted("sig"), 75)],
)
def test_an_error_of_a_decision_is_raised_once(tmp_path, free_port, error, code):
    """By rank 0, as what it is; the others end without a word, with the same exit code."""
    _run(_refuse, free_port, tmp_path, error)
    assert (tmp_path / "0").read_text() == repr(error)
    assert (tmp_path / "1").read_text() == f"SystemExit({code})"


def _stop_together(rank, port, folder):
    world = _world(rank, port)
    try:
        with world.joined():
            raise Preempted("after step 3", agreed=True)
    except Preempted:
        (folder / f"{rank}").touch()


def test_an_agreed_stop_is_a_common_end(tmp_path, free_port):
    assert _run(_stop_together, free_port, tmp_path) == [0, 0]
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()


@pytest.fixture
def nccl(monkeypatch):
    """(World, what it calls): the only process of a GPU's group; nothing is really joined."""
    calls: list[str] = []
    joined = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **options: joined.append(options))
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(joined))
    monkeypatch.setattr(dist, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: (calls.append("destroyed"), joined.clear()))
    monkeypatch.setattr(distributed, "abort_process_group", lambda: (calls.append("aborted"), joined.clear()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    return World.of(load_config(["trainer=ddp", "trainer.devices=1", "trainer.accelerator=gpu"]).trainer), calls


def test_a_group_of_gpus_ends_together_or_is_aborted(nccl):
    """Destroying an NCCL group returns when all processes have called it, which those that failed never do."""
    world, calls = nccl
    with world.joined():
        pass
    assert calls == ["barrier", "destroyed"]
    calls.clear()
    with pytest.raises(RuntimeError, match="broken"), world.joined():
        raise RuntimeError("broken")
    assert calls == ["aborted"]


def _look_at_groups(rank, port):
    world = _world(rank, port, size=4)
    with world.joined():
        settings = ["trainer=fsdp", "trainer.shard_size=2", "trainer.timeout_minutes=7"]
        mesh = Sharding.of(load_config(settings).trainer, 4)._hybrid(init_device_mesh("cpu", (4,)))
        assert mesh.mesh.tolist() == [[0, 1], [2, 3]] and mesh.mesh_dim_names == ("replicate", "shard")
        for name, members in {"replicate": mesh.mesh[:, rank % 2], "shard": mesh.mesh[rank // 2]}.items():
            group = mesh.get_group(name)
            assert dist.get_process_group_ranks(group) == members.tolist(), name
            assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=7), name


def test_the_groups_of_hybrid_sharding_have_the_runs_timeout(free_port):
    assert _run(_look_at_groups, free_port, size=4) == [0] * 4


def _save_hybrid(rank, port, folder):
    world = _world(rank, port, size=4)
    with world.joined():
        settings = ["trainer=fsdp", "trainer.shard_size=2"]
        mesh = Sharding.of(load_config(settings).trainer, 4)._hybrid(init_device_mesh("cpu", (4,)))
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 5)
        whole = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
        fully_shard(layer, mesh=mesh)
        save_checkpoint(folder, 1, dict(layer.named_parameters()), {})
    if rank == 0:
        save_file(whole, folder / "whole.safetensors")


def test_a_hybrid_mesh_writes_each_block_once(tmp_path, free_port):
    """Two groups hold the same halves, of three and two rows; only the first one writes them."""
    assert _run(_save_hybrid, free_port, tmp_path, size=4) == [0] * 4
    places = []
    filled = {name: torch.full_like(t, torch.nan) for name, t in load_file(tmp_path / "whole.safetensors").items()}
    for path in sorted((tmp_path / "step_000001").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                shape, offset = json.loads(file.metadata()[name])
                block = file.get_tensor(name)
                assert shape == list(filled[name].shape)
                filled[name][offset[0] : offset[0] + len(block)] = block
                places.append((name, tuple(offset)))
    assert sorted(places) == [("bias", (0,)), ("bias", (3,)), ("weight", (0, 0)), ("weight", (3, 0))]
    for name, tensor in load_file(tmp_path / "whole.safetensors").items():
        assert torch.equal(filled[name], tensor)


def test_the_environment_says_who_starts_the_processes(monkeypatch):
    def world(*settings):
        return World.of(load_config(["trainer=ddp", "trainer.accelerator=cpu", *settings]).trainer)

    assert world("trainer.devices=2").starts_ranks and not world("trainer.devices=1").starts_ranks
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(UsageError, match="Use `--ntasks-per-node=4` instead"):
        world("trainer.devices=4")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    monkeypatch.setenv("SLURM_NNODES", "2")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    for devices in ("2", "-1"):
        slurm = world(f"trainer.devices={devices}", "trainer.num_nodes=2")
        assert (slurm.rank, slurm.local_rank, slurm.size, slurm.devices) == (3, 1, 4, 2) and not slurm.starts_ranks
    with pytest.raises(UsageError, match="4 processes were started, but trainer.devices=3 on trainer.num_nodes=1"):
        world("trainer.devices=3")


@pytest.mark.parametrize("kind", ["cuda", "gpu", "auto"])
def test_each_process_computes_on_its_own_gpu(monkeypatch, kind):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device(kind) == torch.device("cuda", 1) and local_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device(kind) == torch.device("cpu")


def test_a_device_that_was_asked_for_is_not_replaced(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert requested_device("cpu") == requested_device("auto") == torch.device("cpu")
    for name in ("cuda", "gpu", "cuda:0"):
        with pytest.raises(UsageError, match=f"device {name}: this machine has no GPU .*for example cpu"):
            requested_device(name)
    for name, says in (("foo", "is not a device"), ("meta", "cannot be used"), ("xpu", "cannot be used")):
        with pytest.raises(UsageError, match=says):
            requested_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert requested_device("cuda") == requested_device("gpu") == torch.device("cuda", 1)
    assert requested_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(UsageError, match="cuda:2: this machine has 2"):
        requested_device("cuda:2")


@pytest.mark.parametrize(
    ("gpus", "settings", "says"),
    [
        (0, ["trainer.accelerator=gpu"], "trainer.accelerator=gpu: this machine has no GPU that torch can use. Use"),
        (0, ["trainer.accelerator=cuda", "trainer.devices=-1"], "trainer.accelerator=cuda: this machine has no GPU"),
        (2, ["trainer=fsdp", "trainer.devices=8"], "trainer.devices=8: this machine has 2. Use at most"),
    ],
)
def test_gpus_that_are_not_there_are_refused_at_once(monkeypatch, gpus, settings, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UsageError, match=says):
        World.of(load_config(settings).trainer)

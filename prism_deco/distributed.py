"""The processes of a run: this one's rank and device, the process group, and decisions of rank 0 for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch.distributed.distributed_c10d import _abort_process_group as abort_process_group

from prism_deco.errors import UsageError
from prism_deco.exits import Preempted, Stop

if TYPE_CHECKING:
    from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""Timeout for scoring: a rank that has finished its share waits for the slowest one, which may take days."""


@dataclass
class World:
    """The processes of a run and this one's rank; by default there is only this one.

    torchrun and srun start all processes and describe them in environment variables. Otherwise the command starts one
    process per device; see `processes.start_ranks`.

    Attributes:
        rank, size: of this process, among all of the run.
        local_rank, devices: of this process, among those on its node.
        gpu: whether the run computes on GPUs.
        grouped: whether the processes form a process group; Lightning's strategies need one even for one process.
        timeout: of a collective.
        environment: Lightning's view of the above; None if no Trainer is used.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    devices: int = 1
    gpu: bool = False
    grouped: bool = False
    timeout: timedelta = PATIENCE
    environment: ClusterEnvironment | None = None
    _group: Any = None

    @classmethod
    def of(cls, trainer: DictConfig) -> World:
        """The world that the `trainer` group of a configuration describes. `trainer.devices=-1` means as many processes
        per node as a launcher started, or one per GPU.

        Raises:
            UsageError: the machine lacks the devices, or a launcher started another number of processes.
        """
        if trainer.accelerator in ("gpu", "cuda"):
            hint = "Use trainer.accelerator=cpu, or auto, which takes a GPU where there is one."
            check_gpus(f"trainer.accelerator={trainer.accelerator}", 1, hint)
        gpu = local_device(trainer.accelerator).type == "cuda"
        devices = trainer.devices
        if devices < 1 and devices != -1:
            raise UsageError(f"trainer.devices={devices} must be at least 1, or -1 for all GPUs.")
        if devices == -1:
            devices = _started_here() or (torch.cuda.device_count() if gpu else 1)
        elif gpu and not _started_here():  # a launcher may let each process see only its own GPU
            hint = "Use at most as many devices, or trainer.accelerator=cpu."
            check_gpus(f"trainer.devices={devices}", devices, hint)
        size = devices * trainer.num_nodes
        environment = _environment(size, devices)
        if environment.world_size() != size:
            raise UsageError(
                f"{environment.world_size()} processes were started, but trainer.devices={devices} on "
                f"trainer.num_nodes={trainer.num_nodes} makes {size}. Start one process per device (torchrun, srun), "
                "or set both keys."
            )
        return cls(
            rank=environment.global_rank(),
            size=size,
            local_rank=environment.local_rank(),
            devices=devices,
            gpu=gpu,
            grouped=size > 1 or trainer.strategy in ("ddp", "fsdp"),
            timeout=timedelta(minutes=trainer.timeout_minutes),
            environment=environment,
        )

    @classmethod
    def of_torchrun(cls) -> World:
        """The processes that torchrun started, each with a model of its own (scoring); otherwise this one alone."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        return cls(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")), grouped=True)

    @property
    def is_main(self) -> bool:
        """Whether this process (rank 0) writes the files and the log."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The device that this process computes on."""
        return torch.device("cuda", self.local_rank) if self.gpu else torch.device("cpu")

    @property
    def starts_ranks(self) -> bool:
        """Whether this process must start the ranks of its node, since no launcher did."""
        return self.environment is not None and self.devices > 1 and not self.environment.creates_processes_externally

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of the rendezvous, without the ranks."""
        if self.environment is None:
            return {}  # torchrun has set them
        return {
            "WORLD_SIZE": str(self.size),
            "MASTER_ADDR": self.environment.main_address,
            "MASTER_PORT": str(self.environment.main_port),
        }

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Joins the process group. Leaves it together with the other processes, or alone after a failure."""
        if not self.grouped:
            yield
            return
        ranks = {"RANK": str(self.rank), "LOCAL_RANK": str(self.local_rank)}
        with _environment_variables(self.variables | ranks):
            if self.gpu:
                torch.cuda.set_device(self.local_rank)
            try:
                backend = "nccl" if self.gpu else "gloo"
                dist.init_process_group(backend, rank=self.rank, world_size=self.size, timeout=self.timeout)
                yield
                _end_together()
            except Preempted as stop:
                if stop.agreed:
                    _end_together()
                raise
            finally:
                self.leave()

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Gives `barrier` a timeout of days; collectives of the training have one of minutes."""
        if not dist.is_initialized():
            yield
            return
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group(self._group)
            self._group = None

    def leave(self) -> None:
        """Leaves the group without waiting for the others, some of which may have failed."""
        if dist.is_initialized() and self.gpu:
            abort_process_group()  # destroying an NCCL group would wait for all members
        elif dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Returns when all processes have called it."""
        if dist.is_initialized():
            dist.barrier(group=self._group)

    def decide(self, decision: Callable[[], T]) -> T:
        """Calls a function on rank 0 and returns its result on all ranks.

        An exception ends all processes: rank 0 raises it, the others exit silently with its exit code.
        """
        if not dist.is_initialized():
            return decision()
        outcome: list[Any] = [None, 0]
        if self.is_main:
            try:
                outcome[0] = decision()
            except BaseException as error:
                dist.broadcast_object_list([None, exit_code(error)])
                raise
        dist.broadcast_object_list(outcome)
        result, code = outcome
        if code:
            raise SystemExit(code)
        return result


def gather_objects(value: T) -> list[T]:
    """The values of all processes, by rank; all processes must call this."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ends with an exception."""
    if isinstance(error, Stop):
        return error.exit_code
    return 2 if isinstance(error, UsageError) else 1


def local_device(accelerator: str) -> torch.device:
    """This process's device for a `trainer.accelerator` (auto | cpu | gpu | cuda); the CPU if there is no GPU."""
    if accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def requested_device(name: str) -> torch.device:
    """This process's device for a name from the user (auto | cpu | gpu | cuda | cuda:N | ...); `UsageError` if the
    name is unknown or this machine has no such device."""
    if name == "auto":
        return local_device(name)
    try:
        device = torch.device("cuda" if name == "gpu" else name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is not a device. Use cpu, cuda, or cuda:N for one of several GPUs.") from error
    if device.type == "cuda":
        check_gpus(f"device {name}", 1 + (device.index or 0), "Use another one, for example cpu.")
        return device if device.index is not None else local_device("cuda")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {name} cannot be used ({str(error).splitlines()[0]}). Use cpu or cuda.") from error
    return device


def check_gpus(asked: str, count: int, hint: str) -> None:
    """`UsageError` if torch finds fewer than `count` GPUs."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < count:
        has = f"this machine has {found}" if found else "this machine has no GPU that torch can use"
        raise UsageError(f"{asked}: {has}. {hint}")


def _started_here() -> int:
    """Processes that a launcher started on this node; 0 without a launcher."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    return tasks // int(os.environ.get("SLURM_NNODES", "1")) if tasks > 1 else 0


def _environment(size: int, devices: int) -> ClusterEnvironment:
    # Imported here, since it takes seconds and only training needs it.
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        # Lightning's own requeueing saves within the signal handler, which ranks enter at different steps.
        try:
            return SLURMEnvironment(auto_requeue=False)
        except RuntimeError as error:  # Lightning wants --ntasks-per-node instead of --ntasks
            raise UsageError(str(error)) from error
    environment = LightningEnvironment()
    environment.set_world_size(size)
    environment.set_global_rank(environment.node_rank() * devices + environment.local_rank())
    return environment


def _end_together() -> None:
    # Destroying an NCCL group waits for all members, so bring them together first.
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def _environment_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables temporarily."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

"""The processes of one run: who starts them, how they find each other, and how they agree."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from omegaconf import DictConfig
from torch.distributed.distributed_c10d import _abort_process_group as abort_process_group

from prism_deco.errors import UsageError

log = logging.getLogger(__name__)

T = TypeVar("T")

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def local_devices(trainer: DictConfig) -> int:
    """Processes on this node: `trainer.devices`, where -1 is as many as were started, or one per GPU."""
    if trainer.devices >= 1:
        return trainer.devices
    if trainer.devices != -1:
        raise UsageError(f"trainer.devices={trainer.devices} must be at least 1, or -1 for all GPUs.")
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    if _slurm_tasks() > 1:
        return _slurm_tasks() // int(os.environ.get("SLURM_NNODES", "1"))
    return max(1, torch.cuda.device_count()) if trainer.accelerator != "cpu" else 1


def uses_gpu(trainer: DictConfig) -> bool:
    """Whether the run computes on GPUs."""
    return trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and torch.cuda.is_available())


class Ranks:
    """This process's place among the processes of the run.

    torchrun and srun start all of them, and say so in the environment. Otherwise this process is the first of its
    node, and `started` starts the others with the same command line.

    Args:
        trainer: the `trainer` group of the configuration.

    Raises:
        UsageError: the number of processes is not the one configured.
    """

    def __init__(self, trainer: DictConfig):
        self.devices = local_devices(trainer)
        self.size = self.devices * trainer.num_nodes
        self.strategy = trainer.strategy
        self.timeout = timedelta(minutes=trainer.timeout_minutes)
        self.backend = "nccl" if uses_gpu(trainer) else "gloo"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = self._environment()
        self.local_rank = self.environment.local_rank()
        self.rank = self.environment.global_rank()
        if self.environment.world_size() != self.size:
            raise UsageError(
                f"{self.environment.world_size()} processes were started, but trainer.devices={self.devices} on "
                f"trainer.num_nodes={trainer.num_nodes} makes {self.size}: start one per device (torchrun, srun), or "
                "set both keys."
            )

    @property
    def device(self) -> torch.device:
        """What this process computes on."""
        return torch.device("cuda", self.local_rank) if self.backend == "nccl" else torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this process writes what there is one of."""
        return self.rank == 0

    @property
    def is_group(self) -> bool:
        """Whether the processes talk to each other: there are several, or the strategy wants a group of one."""
        return self.size > 1 or self.strategy in ("ddp", "fsdp")

    @contextmanager
    def started(self, arguments: Sequence[str]) -> Iterator[None]:
        """Starts this node's other processes where nobody else does, and joins all of them into a process group.

        Args:
            arguments: what the others are called with, behind `prism-deco`.
        """
        if not self.is_group:
            yield
            return
        before = {name: os.environ.get(name) for name in _VARIABLES}
        joined = [self.rank, self.local_rank, self.size, self.environment.main_address, self.environment.main_port]
        place: dict[str, str] = dict(zip(_VARIABLES, map(str, joined), strict=True))
        try:
            if not _is_started(self.size):
                self._start(arguments, place)
            os.environ.update(place)
            if self.backend == "nccl":
                torch.cuda.set_device(self.local_rank)
            timeout = patience(self.timeout)
            dist.init_process_group(self.backend, rank=self.rank, world_size=self.size, timeout=timeout)
            yield
            # NCCL's groups end together or not at all: before one process waits for the end of another.
            dist.barrier()
            dist.destroy_process_group()
            self._wait()
        finally:
            self.kill()
            if dist.is_initialized():
                self._abandon()
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def kill(self) -> None:
        """Ends the processes that this one started; a process in a collective hears nothing milder."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()

    def decide(self, decision: Callable[[], T]) -> T:
        """What the first process decides; all of them get its result, or its `UsageError`."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = decision()
            except (ValueError, OSError) as error:
                outcome[1] = str(error)
        if dist.is_initialized():
            dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise UsageError(outcome[1])
        return outcome[0]

    def meet(self) -> None:
        """Returns when all processes have come here."""
        if dist.is_initialized():
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The first process goes through alone, and leaves in the cache what the others then find there."""
        if not self.is_main:
            self.meet()
        yield
        if self.is_main:
            self.meet()

    def _environment(self) -> ClusterEnvironment:
        if TorchElasticEnvironment.detect():
            return TorchElasticEnvironment()
        if _slurm_tasks() > 1:
            # Lightning's own requeueing saves within the signal handler, which ranks enter at different moments.
            return SLURMEnvironment(auto_requeue=False)
        environment = LightningEnvironment()
        environment.set_world_size(self.size)
        environment.set_global_rank(environment.node_rank() * self.devices + environment.local_rank())
        return environment

    def _start(self, arguments: Sequence[str], place: dict[str, str]) -> None:
        command = [sys.executable, "-m", "prism_deco.cli", *arguments]
        for local_rank in range(1, self.devices):
            other = {"LOCAL_RANK": str(local_rank), "RANK": str(self.rank + local_rank)}
            other |= {"PRISM_DECO_PARENT": str(os.getpid()), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
            self.processes.append(subprocess.Popen(command, env=os.environ | place | other))

    def _wait(self) -> None:
        for process in self.processes:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                log.warning("Process %d is through but does not end: it is killed", process.pid)

    def _abandon(self) -> None:
        """Leaves the group after a failure, in which others may have gone."""
        if self.backend == "nccl":
            abort_process_group()  # what destroys a group waits for all of it
        else:
            dist.destroy_process_group()


def patience(timeout: timedelta) -> timedelta:
    """What a collective may take: `Watch` gives up before, after `timeout`, and can say who is missing."""
    return timeout + timedelta(minutes=1)


def _is_started(size: int) -> bool:
    """Whether somebody else starts the processes: torchrun, srun, or the first process of this node."""
    return TorchElasticEnvironment.detect() or "LOCAL_RANK" in os.environ or _slurm_tasks() == size > 1


def _slurm_tasks() -> int:
    return int(os.environ.get("SLURM_NTASKS", "1"))

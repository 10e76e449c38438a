"""Runs in separate processes that tests can stop, kill and restart."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

# Processes are forked from a server that has imported everything, so they start fast.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "prism_deco.training.entry",
        "prism_deco.backbones.siglip",
        "prism_deco.projectors.qformer",
        "prism_deco.projectors.pooling",
        "prism_deco.data.sources",
        "torch.utils.tensorboard",
    ]
)

FAST = ["data.val_fraction=0", "data.num_workers=0", "evaluate.benchmarks=null", "recipe.global_batch_size=4",
        "recipe.micro_batch_size=2",
        "trainer.log_every=1", "trainer.threads=1", "backbone.pretrained=false", "llm.pretrained=false",
        "recipe.epochs=4",
        "trainer.accelerator=cpu", "trainer.precision=32-true"]  # fmt: skip


def _main(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    from prism_deco.cli import main

    multiprocessing.set_start_method("fork", force=True)  # for data loaders, as in an ordinary process
    os.environ.update(environment)
    sys.path.insert(0, environment.get("PLUGINS", "."))
    stream = log.open("a")
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.argv = ["prism-deco", *arguments]
    sys.exit(main())  # as the console script does


class Job:
    """One launch of a run: the processes of its ranks, as torchrun starts them."""

    def __init__(self, folder: Path, arguments: list[str], ranks: int, environment: dict[str, str]):
        self.folder = folder
        self.log = folder.with_suffix(".log")
        group = {}
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            group = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}  # fmt: skip
        self.processes = []
        for rank in range(ranks):
            place = group and group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(CONTEXT.Process(target=_main, args=(arguments, environment | place, self.log)))
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 300) -> list[int | None]:
        """Waits for all ranks; returns their exit codes."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def signal(self, number: int, rank: int | None = None) -> None:
        """Sends a signal to one rank or, by default, to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            with suppress(ProcessLookupError):
                assert process.pid
                os.kill(process.pid, number)

    def kill(self) -> None:
        """Sends SIGKILL to all ranks and waits for them."""
        self.signal(signal.SIGKILL)
        self.wait()

    def until(self, condition, timeout: float = 300) -> None:
        """Waits until `condition(folder)` holds; fails if a process ends before."""
        deadline = time.monotonic() + timeout
        while not condition(self.folder):
            alive = all(process.is_alive() for process in self.processes)
            assert alive and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.002)


@pytest.fixture
def start(colors, tmp_path):
    """(overrides, ranks) -> Job: starts a run on `colors`; more than one rank uses `trainer=fsdp` by default."""
    jobs = []

    def begin(*overrides: str, ranks: int = 1, run: str = "run", **environment: str) -> Job:
        source = [f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}"]
        kind = ["trainer=fsdp", f"trainer.devices={ranks}"] if ranks > 1 else ["trainer=cpu"]
        arguments = ["train", "data=llava", *kind, *source, f"runs_dir={tmp_path}", f"run_id={run}", *FAST, *overrides]
        cache = {"PRISM_DECO_CACHE": os.environ["PRISM_DECO_CACHE"], "OMP_NUM_THREADS": "1"}
        jobs.append(Job(tmp_path / run, arguments, ranks, cache | environment))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()


@pytest.fixture(scope="session")
def trained_weights():
    """Run folder -> its trained weights: projector, LLM and tower, or their adapters."""

    def read(folder: Path) -> dict:
        return {
            f"{file.parent.name}/{name}": tensor
            for file in (folder / "model").rglob("*.safetensors")
            for name, tensor in load_file(file).items()
        }

    return read

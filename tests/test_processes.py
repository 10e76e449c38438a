"""Ranks that a command starts: whoever dies, however early, the others end within seconds and the reason is said once.

Real processes and real signals. Ranks are told from other processes by a variable of their environment.
"""

import logging
import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from prism_deco import processes
from prism_deco.config import load_config
from prism_deco.distributed import World, exit_code
from prism_deco.errors import UsageError
from prism_deco.exits import Stop

HERE = """
import os, time
from pathlib import Path


def here():
    (Path(os.environ["RANKS_FOLDER"]) / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
"""

# Python imports it before anything else.
SITE = f"""{HERE}
if "RANK" in os.environ and os.environ["RANKS_STAGE"] == "import":
    here()
    time.sleep(600)
"""

WORK = f"""{HERE}
import logging
from contextlib import nullcontext
if "RANK" in os.environ:  # as libraries do while they are imported
    logging.getLogger("timm").warning("No pretrained weights loaded")
import torch
import torch.distributed as dist
from prism_deco.distributed import World
from prism_deco.errors import UsageError
from prism_deco.exits import OutOfMemory
from prism_deco.exits import Preemption


def work(stage):
    world = World.of_torchrun()
    if stage == "rendezvous":
        here()
        if world.rank == 1:
            time.sleep(600)
    with world.joined(), Preemption().watched() if stage == "watched" else nullcontext():
        if stage == "done":
            return 0
        if stage == "refused by rank 0":
            world.decide(refuse)
        if stage == "refused by all":
            refuse()
        if stage == "memory" and world.rank == 1:
            raise OutOfMemory("too large")
        if stage == "bug":
            {{}}["not there"]
        here()
        while True:
            dist.all_reduce(torch.zeros(1))


def refuse():
    raise UsageError("no such file")
"""


def _command(folder: Path, stage: str, world: World) -> None:
    """What the command does: starts two ranks; says how they ended."""
    os.dup2(os.open(folder / "stderr", os.O_CREAT | os.O_WRONLY), 2)
    sys.stderr = os.fdopen(2, "w")
    os.environ |= {"RANKS_FOLDER": str(folder), "RANKS_STAGE": stage, "OMP_NUM_THREADS": "1"}
    os.environ["PYTHONPATH"] = str(folder)
    sys.path.insert(0, str(folder))
    from ranks_work import work  # pyright: ignore[reportMissingImports]

    logging.getLogger("prism_deco").setLevel(logging.INFO)
    try:
        sys.exit(processes.start_ranks(work, (stage,), world))
    except (UsageError, Stop) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}")
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        sys.exit(130)


class Command:
    """A command that starts two ranks.

    Args:
        stage: where the ranks are or what they do.
    """

    def __init__(self, folder: Path, stage: str):
        self.folder = folder
        self.mark = f"RANKS_FOLDER={folder}".encode()
        (folder / "sitecustomize.py").write_text(SITE)
        (folder / "ranks_work.py").write_text(WORK)
        world = World.of(load_config(["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]).trainer)
        self.process = torch.multiprocessing.get_context("fork").Process(target=_command, args=(folder, stage, world))
        self.process.start()

    def ready(self) -> list[int]:
        """Waits until both ranks are there; their process ids."""
        deadline = time.monotonic() + 200
        while len(list(self.folder.glob("*.pid"))) < 2:
            assert time.monotonic() < deadline and self.process.is_alive(), (self.folder / "stderr").read_text()
            time.sleep(0.05)
        time.sleep(1.0)
        return [int(path.read_text()) for path in sorted(self.folder.glob("*.pid"))]

    def left(self) -> dict[int, str]:
        """The states of its ranks that live, by process id."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = (entry / "environ").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if self.mark in variables and state != "Z":
                    found[int(entry.name)] = state
        return found

    def end(self) -> tuple[int, str]:
        """Exit code and what was said, when no process is left."""
        self.process.join(300)
        deadline = time.monotonic() + 20
        while self.left():
            assert time.monotonic() < deadline, "processes are left behind"
            time.sleep(0.1)
        return self.process.exitcode, (self.folder / "stderr").read_text()


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 3.0)
    started = []

    def start(stage):
        started.append(Command(tmp_path, stage))
        return started[-1]

    yield start
    for made in started:
        made.process.kill()
        made.process.join()
        for pid in made.left():
            os.kill(pid, signal.SIGKILL)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "who", "number", "code", "says"),
    [
        pytest.param(stage, *case, marks=[] if stage == "import" else SLOW)
        for stage in ("import", "rendezvous", "joined")
        for case in (
            ("command", signal.SIGKILL, -9, "^$"),
            ("command", signal.SIGTERM, 75, "Preempted: received SIGTERM$"),
            ("command", signal.SIGINT, 130, ""),
            ("rank", signal.SIGKILL, 1, r"RankFailed: rank 1 was killed by SIGKILL$"),
            ("rank", signal.SIGTERM, 75, "Preempted: received SIGTERM$"),
        )
    ],
)
def test_whoever_dies_the_others_end(command, stage, who, number, code, says):
    run = command(stage)
    ranks = run.ready()
    os.kill(run.process.pid if who == "command" else ranks[1], number)
    ended, said = run.end()
    assert ended == code and re.search(says, said), said


@pytest.mark.slow
def test_ctrl_c_reaches_the_ranks_as_what_it_is(command):
    """As another signal it would have the job queued again."""
    run = command("watched")
    run.ready()
    os.kill(run.process.pid, signal.SIGINT)
    assert run.end() == (130, "Interrupted: received SIGINT")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(
    "stage", ["import", pytest.param("rendezvous", marks=SLOW), pytest.param("joined", marks=SLOW)]
)
def test_a_stopped_rank_does_not_outlive_the_command(command, stage, number):
    """It obeys no signal but SIGKILL."""
    run = command(stage)
    os.kill(run.ready()[1], signal.SIGSTOP)
    os.kill(run.process.pid, number)
    assert run.end()[0] == (75 if number == signal.SIGTERM else -9)


def test_a_command_that_is_paused_pauses_its_ranks(command):
    """Ctrl-Z, which a terminal sends to the command alone; then a Ctrl-C for a rank that heeds none, and another."""
    run = command("import")
    ranks = run.ready()
    os.kill(run.process.pid, signal.SIGTSTP)
    _until(lambda: set(run.left().values()) == {"T"})
    os.kill(run.process.pid, signal.SIGCONT)
    _until(lambda: "T" not in run.left().values())
    os.kill(ranks[0], signal.SIGSTOP)
    os.kill(ranks[1], signal.SIGSTOP)
    os.kill(run.process.pid, signal.SIGINT)
    time.sleep(1)
    assert len(run.left()) == 2
    os.kill(run.process.pid, signal.SIGINT)
    assert run.end()[0] == 130


def _until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("stage", "code", "says"),
    [
        pytest.param("done", 0, "", marks=SLOW),
        ("refused by rank 0", 2, "UsageError: no such file"),
        pytest.param("refused by all", 2, "UsageError: no such file", marks=SLOW),
        pytest.param("memory", 76, "OutOfMemory: too large", marks=SLOW),
    ],
)
def test_an_error_reaches_the_command_once_as_what_it_is(command, stage, code, says):
    ended, said = command(stage).end()
    assert ended == code and said.splitlines()[-1:] == [says][: len(says)], said
    assert "Traceback" not in said and "No pretrained weights" not in said


def test_a_bug_is_shown_once_with_the_line_it_is_in(command):
    run = command("bug")
    ended, said = run.end()
    assert ended == 1 and said.count("Traceback") == said.count("KeyError") == 1
    line = 1 + WORK.splitlines().index('            {}["not there"]')
    expected = [f'  File "{run.folder}/ranks_work.py", line {line}, in work', '    {}["not there"]']
    assert [row for row in said.splitlines() if "^^" not in row][-3:] == [*expected, "KeyError: 'not there'"]

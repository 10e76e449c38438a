"""Ranks that a command starts: whoever dies, however early, the others end within seconds and the reason is said once.

Real processes and real signals. They are told from others by a variable of their environment.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, time
from pathlib import Path

FOLDER, STAGE = Path(os.environ["RANKS_FOLDER"]), os.environ["RANKS_STAGE"]


def here():
    (FOLDER / f"{os.environ.get('RANK', os.getpid())}.pid").write_text(str(os.getpid()))


if __name__ == "__mp_main__" and STAGE == "import":  # a new process, which does not know its rank yet
    here()
    time.sleep(4)

import torch
import torch.distributed as dist
from prism_deco.config import load_config
from prism_deco.distributed import World, exit_code
from prism_deco.errors import UsageError
from prism_deco.exits import OutOfMemory, Stop
from prism_deco.processes import start_ranks


def world():
    return World.of(load_config(["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]).trainer)


def work():
    here()
    if STAGE == "import" or (STAGE == "rendezvous" and world().rank == 1):
        time.sleep(600)
    with world().joined():
        if STAGE == "done":
            return 0
        if STAGE == "refused by rank 0":
            world().decide(refuse)
        if STAGE == "refused by all":
            refuse()
        if STAGE == "memory" and world().rank == 1:
            raise OutOfMemory("too large")
        if STAGE == "bug":
            {}["not there"]
        while True:
            dist.all_reduce(torch.zeros(1))


def refuse():
    raise UsageError("no such file")


if __name__ == "__main__":
    try:
        sys.exit(start_ranks(work, (), world()))
    except (UsageError, Stop) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}")
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        sys.exit(130)
"""


class Command:
    """A command that starts two ranks.

    Args:
        stage: where the ranks are or what they do.
    """

    def __init__(self, folder: Path, stage: str):
        self.folder = folder / stage.replace(" ", "_")
        self.folder.mkdir()
        self.mark = f"RANKS_FOLDER={self.folder}".encode()
        script = self.folder / "work.py"
        script.write_text(SCRIPT)
        own = {"RANKS_FOLDER": str(self.folder), "RANKS_STAGE": stage, "OMP_NUM_THREADS": "1"}
        path = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.Popen(
            [sys.executable, script], env=os.environ | own | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
        )

    def ready(self) -> list[int]:
        """Waits until both ranks are there; their process ids."""
        deadline = time.monotonic() + 200
        while len(list(self.folder.glob("*.pid"))) < 2:
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.05)
        time.sleep(1.0)
        return [int(path.read_text()) for path in sorted(self.folder.glob("*.pid"))]

    def left(self) -> list[int]:
        """Its processes that live."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if self.mark in variables and state != "Z":
                found.append(int(entry.name))
        return found

    def end(self) -> tuple[int, str]:
        """Exit code and what was said, when no process is left."""
        said = self.process.communicate(timeout=300)[1]
        deadline = time.monotonic() + 60
        while self.left():
            assert time.monotonic() < deadline, "processes are left behind"
            time.sleep(0.1)
        return self.process.returncode, said


@pytest.fixture
def command(tmp_path):
    started = []

    def start(stage):
        started.append(Command(tmp_path, stage))
        return started[-1]

    yield start
    for made in started:
        for pid in made.left():
            os.kill(pid, signal.SIGKILL)
        made.process.communicate()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "who", "number", "code", "says"),
    [
        pytest.param(stage, *case, marks=[] if stage == "rendezvous" and case[1] == signal.SIGKILL else SLOW)
        for stage in ("import", "rendezvous", "joined")
        for case in (
            ("command", signal.SIGKILL, -9, "$"),
            ("command", signal.SIGTERM, 75, "Preempted: received SIGTERM$"),
            ("command", signal.SIGINT, 130, ""),
            ("rank", signal.SIGKILL, 1, r"RankFailed: rank \d was killed by SIGKILL$"),
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
@pytest.mark.parametrize("stage", ["import", "rendezvous", "joined"])
def test_a_stopped_rank_does_not_keep_the_command_from_ending(command, stage):
    """It heeds no signal but SIGKILL."""
    run = command(stage)
    os.kill(run.ready()[1], signal.SIGSTOP)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.end()[0] == 75


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
    assert "Traceback" not in said


def test_a_bug_is_shown_once_with_the_line_it_is_in(command):
    run = command("bug")
    ended, said = run.end()
    assert ended == 1 and said.count("Traceback") == said.count("KeyError") == 1
    line = 1 + SCRIPT.splitlines().index('            {}["not there"]')
    expected = [f'  File "{run.folder}/work.py", line {line}, in work', '    {}["not there"]']
    assert [row for row in said.splitlines() if "^^" not in row][-3:] == [*expected, "KeyError: 'not there'"]

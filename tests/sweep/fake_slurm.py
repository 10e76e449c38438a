"""A stand-in for a SLURM cluster of this machine: sbatch, srun, scancel and sacct, as far as sweeps use them.

The folder `$FAKE_SLURM` holds a file per job with its state, and `ID.pid`. Jobs start at once.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

COMMANDS = ("sbatch", "srun", "scancel", "sacct")
PLACE = Path(os.environ.get("FAKE_SLURM", "."))


def install(folder: Path) -> None:
    """Writes the commands into a folder for PATH."""
    folder.mkdir()
    for name in COMMANDS:
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        script.chmod(0o755)


def sbatch(script: str) -> None:
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", Path(script).read_text(), re.M))
    if options.get("partition") == "closed":
        sys.exit("sbatch: error: invalid partition specified: closed")
    job = str(len(list(PLACE.glob("*.state"))) + 1)
    (PLACE / f"{job}.state").write_text("RUNNING")
    nodes, per_node = int(options["nodes"]), int(options["ntasks-per-node"])
    env = os.environ | {"SLURM_JOB_ID": job, "SLURM_NTASKS": str(nodes * per_node), "SLURM_JOB_NUM_NODES": str(nodes)}
    env |= {"SLURM_NNODES": str(nodes), "TASKS_PER_NODE": str(per_node)}
    output = options["output"].replace("%j", job).strip("'")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with open(output, "a") as file:
        process = subprocess.Popen(
            [sys.executable, __file__, "batch", script], env=env, stdout=file, stderr=file, start_new_session=True
        )
    (PLACE / f"{job}.pid").write_text(str(process.pid))
    print(f"Submitted batch job {job}")


def batch(script: str) -> None:
    # sbatch reads the script when it is submitted: submitit moves the file away at once.
    code = subprocess.run(["bash", "-c", Path(script).read_text()]).returncode
    state = PLACE / f"{os.environ['SLURM_JOB_ID']}.state"
    if state.read_text() == "RUNNING":
        state.write_text("COMPLETED" if code == 0 else "FAILED")


def srun(*arguments: str) -> int:
    start = next(i for i, argument in enumerate(arguments) if "python" in argument)
    assert "--kill-on-bad-exit=1" in arguments[:start]
    output = arguments[arguments.index("--output") + 1]
    tasks = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        node, local = divmod(rank, int(os.environ["TASKS_PER_NODE"]))
        env = os.environ | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
        path = output.replace("%j", env["SLURM_JOB_ID"]).replace("%t", str(rank))
        with open(path, "a") as file:
            tasks.append(subprocess.Popen(arguments[start:], env=env, stdout=file, stderr=file))
    while True:
        codes = [task.poll() for task in tasks]
        if any(codes):
            _end([psutil.Process(task.pid) for task in tasks if task.poll() is None])
            return 1
        if None not in codes:
            return 0
        time.sleep(0.05)


def scancel(*arguments: str) -> None:
    *options, job = arguments
    if options == ["--state=PENDING"] or not psutil.pid_exists(int((PLACE / f"{job}.pid").read_text())):
        return
    parts = _steps(int((PLACE / f"{job}.pid").read_text()))
    if options == ["--signal=USR2"]:
        for part in parts:  # every process of the job's steps
            part.send_signal(signal.SIGUSR2)
    elif not options:
        (PLACE / f"{job}.state").write_text("CANCELLED")
        _end(parts)


def sacct(*arguments: str) -> None:
    print("JobID|State|NodeList")
    for state in PLACE.glob("*.state"):
        print(f"{state.stem}|{state.read_text()}|here")


def _steps(batch_pid: int) -> list[psutil.Process]:
    """The processes below srun."""
    everyone = psutil.Process(batch_pid).children(recursive=True)
    return [child for process in everyone if "srun" in process.cmdline() for child in process.children(recursive=True)]


def _end(processes: list[psutil.Process]) -> None:
    everyone = {child for process in processes for child in [process, *process.children(recursive=True)]}
    for process in everyone:
        process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(list(everyone), timeout=1)
    for process in alive:
        process.kill()


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))

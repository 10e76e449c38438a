"""Several processes and one cache."""

import multiprocessing
import os
import signal
import time

import torch

FORK = multiprocessing.get_context("fork")


def _build(cache, projector, backbone, first, journal, pause, ready):
    torch.set_num_threads(1)

    def compress(features):
        with open(journal, "a") as file:
            file.write(f"{os.getpid()} {len(features)}\n")
        ready.set()
        time.sleep(pause)
        return projector.compress(features)

    cache.build(range(3), backbone, compress, device=torch.device("cpu"), first=first)


def _start(cache, projector, backbone, journal, first=0.0, pause=0.1):
    ready = FORK.Event()
    process = FORK.Process(target=_build, args=(cache, projector, backbone, first, journal, pause, ready))
    process.start()
    return process, ready


def test_processes_share_the_work_and_build_no_shard_twice(make, backbone, tmp_path):
    cache, projector = make()
    journal = tmp_path / "journal"
    started = [_start(cache, projector, backbone, journal, first) for first in (0.0, 0.5, 0.0)]
    for process, _ in started:
        process.join(200)
    assert [process.exitcode for process, _ in started] == [0, 0, 0]
    lines = [line.split() for line in journal.read_text().splitlines()]
    # Shards of one batch each: 32, 32 and 6 images.
    assert sorted(int(size) for _, size in lines) == [6, 32, 32]
    assert len({pid for pid, _ in lines}) > 1
    assert cache.find_damaged() == []


def test_the_work_of_a_process_that_is_killed_is_taken_over(make, backbone, tmp_path):
    cache, projector = make()
    killed, ready = _start(cache, projector, backbone, tmp_path / "a", pause=600)
    assert ready.wait(200)
    other, _ = _start(cache, projector, backbone, tmp_path / "b", pause=0)
    deadline = time.monotonic() + 200
    while cache.missing > 32 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert cache.missing == 32 and other.is_alive()  # it waits for the first shard
    os.kill(killed.pid, signal.SIGKILL)
    other.join(200)
    assert other.exitcode == 0 and cache.find_damaged() == []
    assert len((tmp_path / "b").read_text().splitlines()) == 3

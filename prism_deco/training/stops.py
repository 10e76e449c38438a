"""Why a training run stopped before its end, and the exit code that tells a scheduler what to do about it."""

from __future__ import annotations

from prism_deco.stopping import OUT_OF_MEMORY, PREEMPTED


class Stop(Exception):
    """Ends a run with a one-line reason.

    Attributes:
        state: what `status.json` says.
        exit_code: what the process returns.
    """

    state = "failed"
    exit_code = 1


class Preempted(Stop):
    """A signal asked the run to make way; run again, the same command line goes on.

    Args:
        agreed: all processes stop, at the same step.
    """

    state = "preempted"
    exit_code = PREEMPTED

    def __init__(self, reason: str, agreed: bool = False):
        super().__init__(reason)
        self.agreed = agreed


class OutOfMemory(Stop):
    """The device or the host has too little memory."""

    state = "out_of_memory"
    exit_code = OUT_OF_MEMORY


class NonFinite(Stop):
    """A loss or a gradient was infinite or no number."""


class CheckpointFailed(Stop):
    """A checkpoint could not be written."""


class RankFailed(Stop):
    """Another process of the run failed, or stopped answering."""


STOPS = {stop.state: stop for stop in (Preempted, OutOfMemory, RankFailed)}
"""The kind of stop that a state stands for."""


def as_stop(error: BaseException) -> Stop | None:
    """The stop that an exception amounts to; None where it is an error of its own kind."""
    if isinstance(error, Stop):
        return error
    text = str(error).lower()
    # torch has a class for the memory of a GPU only; on the CPU its allocator raises a RuntimeError.
    on_host = isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or on_host:
        return OutOfMemory(
            f"Out of memory ({' '.join(str(error).split())[:200]}). Lower recipe.micro_batch_size, set "
            "trainer.activation_checkpointing=full, or shard over more devices (trainer=fsdp)."
        )
    return None

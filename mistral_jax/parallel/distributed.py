"""Several processes as one program, on JAX's distributed runtime: startup and agreement.

All processes start with the same arguments and do the same. For input from outside (a prompt, a
clock, a signal), all use the value of the first process. With one process, these functions do
nothing.
"""

import os
import pickle
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

# A process without a heartbeat for this long counts as dead, and the others end.
HEARTBEAT_SECONDS = 30

# Variables in which launchers state the number of tasks.
_LAUNCHED = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def initialize(pods: bool = True) -> None:
    """Joins the other processes of this program, if a launcher has started several.

    Launchers that JAX knows (SLURM, Open MPI, TPU pods, Kubernetes) need no settings; any other
    sets JAX_COORDINATOR_ADDRESS=host:port of process 0, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Call
    this before any device is used. JAX ends the program if the others do not join within five
    minutes, and half a minute after one of them dies.

    Args:
      pods: whether to join by the machine's place in a TPU pod or a Kubernetes job, where a program
        may also have been started alone.

    Raises:
      ValueError: these variables are incomplete or invalid.
    """
    if jax.distributed.is_initialized():
        return
    # This service catches SIGTERM and waits for the program to ask for it, which ours does not.
    jax.config.update("jax_enable_preemption_service", False)
    given = [name for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name)]
    if COUNT in given or INDEX in given:
        count, index = _by_hand(given)
        if count > 1:
            jax.distributed.initialize(
                os.environ[ADDRESS],
                count,
                index,
                cluster_detection_method="deactivate",
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        return
    launched = {os.environ.get(name) for name in _LAUNCHED} - {None}
    if not (launched or pods):
        return
    if "1" in launched:
        return  # JAX would give a single SLURM task only one of its accelerators.
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" not in os.environ:
        return  # The pod is not part of an indexed job; for example a notebook's.
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        if given:
            raise ValueError(
                f"{ADDRESS} is set without {COUNT} and {INDEX}, and JAX finds no launcher that "
                f"sets them: {error}"
            ) from None
        if "coordinator_address" not in str(error):  # JAX asks for it if it finds no launcher.
            raise
    except RuntimeError as error:  # A single process that already uses devices.
        if launched or given or "must be called before" not in str(error):
            raise


def count() -> int:
    """Returns the number of processes."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Returns whether this is process 0, which alone reads, prints and writes."""
    return count() == 1 or jax.process_index() == 0


def from_first(task: Callable[[], T]) -> T:
    """Calls `task` in the first process; returns its result, or raises its error, in all."""
    if count() == 1:
        return task()
    # The first exchange connects the processes, and fails if one is half a minute late. Connect
    # now, because `task` may take longer.
    sync()
    outcome = b""
    if is_first():
        try:
            outcome = pickle.dumps((task(), None))
        except (Exception, KeyboardInterrupt) as error:
            try:
                outcome = pickle.dumps((None, error))
            except Exception:
                outcome = pickle.dumps((None, RuntimeError(str(error))))
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(outcome))))
    # Pad to one of a few sizes, because JAX compiles a program for each.
    room = max(1024, 1 << (size - 1).bit_length())
    filled = np.frombuffer(outcome.ljust(room, b"\0"), np.uint8)
    result, error = pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(filled)).tobytes())
    if error is not None:
        raise error
    return result


def largest(number: int) -> int:
    """Returns the largest `number` of all processes."""
    if count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def any_of(flag: bool) -> bool:
    """Returns whether `flag` is true in any process."""
    return bool(largest(flag))


def sync() -> None:
    """Waits for all processes."""
    any_of(False)


def gather(array: jax.Array) -> np.ndarray:
    """Returns a whole array in host memory, wherever its shards are; all processes must call it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _by_hand(given: list[str]) -> tuple[int, int]:
    """Returns the number of processes and the index of this one, from the environment."""
    if len(given) < 3:
        raise ValueError(
            f"{ADDRESS}, {COUNT} and {INDEX} belong together, but only {given} are set; set all "
            "three"
        )
    try:
        number, index = int(os.environ[COUNT]), int(os.environ[INDEX])
    except ValueError:
        number, index = 0, 0
    if not 0 <= index < number:
        raise ValueError(
            f"{COUNT} is {os.environ[COUNT]!r} and {INDEX} {os.environ[INDEX]!r}; expected whole "
            f"numbers, the second from 0 to one less than the first"
        )
    if ":" not in os.environ[ADDRESS]:
        raise ValueError(f"{ADDRESS} is {os.environ[ADDRESS]!r}; expected host:port of process 0")
    return number, index

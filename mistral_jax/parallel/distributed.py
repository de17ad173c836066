"""Several processes as one program, on JAX's own runtime: its start, and what they must agree on.

Each process is started with the same arguments and does the same; where something comes from
outside (a prompt, a clock, a signal), all take the first one's. It knows no models. With one
process, the usual case, nothing of this does anything.
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

# A process that gives no sign of life for so long has died, and ends the others.
HEARTBEAT_SECONDS = 30

# How many tasks a launcher says there are, by its own variable.
_LAUNCHED = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def initialize(pods: bool = True) -> None:
    """Joins the other processes of this program, if a launcher has started several.

    Launchers that JAX knows (SLURM, Open MPI, TPU pods, Kubernetes) need nothing; any other sets
    JAX_COORDINATOR_ADDRESS=host:port of process 0, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Call it
    before anything that uses a device. If the others do not come within five minutes, JAX ends the
    program; a process that dies later ends the others within half a minute.

    Args:
      pods: whether to join by the machine's place in a TPU pod or a Kubernetes job, where a program
        may also have been started alone.

    Raises:
      ValueError: these variables are not what they should be.
    """
    if jax.distributed.is_initialized():
        return
    # It would take SIGTERM for a notice that the program asks for, and none here does.
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
        return  # JAX would show a task that SLURM started alone but one of its accelerators.
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" not in os.environ:
        return  # A pod of no indexed job, such as a notebook's.
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        if given:
            raise ValueError(f"{ADDRESS} is set, but no launcher says more: {error}") from None
        if "coordinator_address" not in str(error):  # Else nobody has started several.
            raise
    except RuntimeError as error:  # A program that uses devices already, and was started alone.
        if launched or given or "must be called before" not in str(error):
            raise


def count() -> int:
    """Returns the number of processes."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Tells whether this is process 0, which alone reads, prints and writes."""
    return count() == 1 or jax.process_index() == 0


def from_first(task: Callable[[], T]) -> T:
    """Calls `task` in the first process; in all of them returns, or raises, what it did there."""
    if count() == 1:
        return task()
    # The runtime connects at the first exchange, and gives up on one who is half a minute late.
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
    # Few sizes: each is a program to compile.
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
    """Tells whether `flag` is true in any process."""
    return bool(largest(flag))


def sync() -> None:
    """Waits for all processes."""
    any_of(False)


def gather(array: jax.Array) -> np.ndarray:
    """Returns a whole array in host memory, wherever its parts are; all processes must ask."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _by_hand(given: list[str]) -> tuple[int, int]:
    """Returns the number of processes and this one's, from the environment."""
    if len(given) < 3:
        raise ValueError(f"of {ADDRESS}, {COUNT} and {INDEX} only {given} are set; set all three")
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

"""What a model costs on a layout and will do on given hardware: each program compiled, and priced.

It prints nothing, and needs neither weights nor the hardware.
"""

import dataclasses
import os
from collections.abc import Sequence

import jax

from mistral_jax.config import ModelConfig
from mistral_jax.parallel.hardware import Hardware
from mistral_jax.parallel.sharding import Layout
from mistral_jax.planning import arithmetic, collectives, programs
from mistral_jax.planning.collectives import Collective
from mistral_jax.planning.estimate import Estimate, estimate
from mistral_jax.planning.programs import Shapes


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What one program costs, on one device unless said otherwise.

    Attributes:
      program: one of `programs.PROGRAMS`; a chunk of prompts, a step of decoding or of training.
      tokens: that it works on, on all devices together.
      held: bytes that stay: weights, and the cache or the optimizer's state.
      temporaries: bytes that the compiler needs on top, activations and gradients among them; None
        where it refuses the program.
      model_flops: of the model's arithmetic.
      flops: that the compiler counts; a loop's body counts once.
      model_moved: bytes that must at least be read and written.
      moved: bytes that the compiler counts, before it knows what stays in a cache.
      collectives: what the compiled program exchanges.
      model_sent: bytes to be sent by arithmetic.
      estimate: the least time on the hardware asked for; None without one.
      refusal: why the compiler refuses the program, which then does not fit; its counts are those
        of arithmetic. None if it does not.
    """

    program: str
    tokens: int
    held: dict[str, int]
    temporaries: int | None
    model_flops: float
    flops: float
    model_moved: float
    moved: float
    collectives: list[Collective]
    model_sent: float
    estimate: Estimate | None
    refusal: str | None = None

    @property
    def bytes(self) -> int:
        """All memory of a device that the program needs."""
        return sum(self.held.values()) + (self.temporaries or 0)

    def fits(self, memory: float, own_compiler: bool) -> bool | None:
        """Tells whether a device of so many bytes can run the program; None = it is not certain.

        Its own compiler refuses what does not fit; another's temporaries are others.
        """
        if self.refusal or own_compiler:
            return self.refusal is None
        if sum(self.held.values()) > memory:
            return False
        return True if self.bytes <= memory else None

    @property
    def sent(self) -> float:
        """Bytes that a device sends, as compiled."""
        return arithmetic.sent(self.collectives)


def forecast(
    program: str,
    config: ModelConfig,
    layout: Layout,
    of: Shapes,
    hardware: Hardware | None = None,
    remat: bool = True,
) -> Forecast:
    """Compiles a program for the devices of a layout, and reads what it costs.

    Args:
      program: one of `programs.PROGRAMS`.
      config: the model.
      layout: mesh and rules.
      of: sizes of the request or the batch.
      hardware: the chip that times are estimated for.
      remat: whether training computes blocks again on the way back.
    """
    again = "nothing_saveable" if remat else None
    model = programs.model(config, layout, of).clone(remat=again)
    held = programs.arguments(program, model, layout, of)
    expected = arithmetic.exchanges(program, model, layout, of)
    flops, moved = arithmetic.flops(program, config, of), arithmetic.moved(program, held, config)
    flops /= layout.mesh.size
    temporaries, found, costs, refusal = None, expected, {}, None
    lowered = programs.lower(program, model, layout, of)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
    else:
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        found = collectives.read(compiled.as_text(), layout.mesh.size)
        if program == "decode":  # What follows the loop happens once for many steps.
            found = [collective for collective in found if collective.loops]
        costs = compiled.cost_analysis()
    compiled_flops = costs.get("flops", flops)
    return Forecast(
        program=program,
        tokens=arithmetic.tokens(program, of),
        held=arithmetic.state_sizes(program, held),
        temporaries=temporaries,
        model_flops=flops,
        flops=compiled_flops,
        model_moved=moved,
        moved=costs.get("bytes accessed", moved),
        collectives=found,
        model_sent=arithmetic.sent(expected),
        estimate=estimate(hardware, max(flops, compiled_flops), moved, found) if hardware else None,
        refusal=refusal,
    )


def fake_devices(count: int) -> list[jax.Device]:
    """Makes CPU devices for programs that are compiled and not run.

    Raises:
      ValueError: this process uses fewer already.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has begun with what it has.
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"this program uses {len(devices)} devices already, {count} are planned for: plan in a "
            "process of its own"
        )
    return devices[:count]


def tpu_devices(name: str, topology: str) -> Sequence[jax.Device]:
    """Describes a slice of TPUs to their own compiler, which needs libtpu and no TPU.

    Args:
      name: kind of chip, such as "v5e".
      topology: such as "2x4".

    Raises:
      ValueError: libtpu is not installed, or does not know the slice.
    """
    from jax.experimental import topologies

    # It would ask a machine that is none for its place in a pod, and lock a chip that it has not.
    defaults = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{name}-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    for variable, value in defaults.items():
        os.environ.setdefault(variable, value)
    # By default a host has four chips.
    alone = {"chips_per_host_bounds": (1, 1, 1)} if topology == "1x1" else {}
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{name}:{topology}", **alone
        )
        return described.devices
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"there is no compiler for a {name} slice of {topology} ({reason}): "
            "pip install libtpu, or plan with --compiler cpu"
        ) from None

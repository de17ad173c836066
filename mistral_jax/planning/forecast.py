"""The forecast of a program: compile it for a layout, and estimate its cost on given hardware.

This needs neither weights nor the hardware. `report.py` prints forecasts.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jaxlib

from mistral_jax.config import ModelConfig
from mistral_jax.parallel.hardware import Hardware
from mistral_jax.parallel.sharding import Layout
from mistral_jax.planning import arithmetic, collectives, cycles, programs
from mistral_jax.planning.collectives import Collective
from mistral_jax.planning.estimate import Estimate, estimate
from mistral_jax.planning.programs import Shapes


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The cost of one program, on one device unless stated otherwise.

    Attributes:
      program: one of `programs.PROGRAMS`: a chunk of prompts, a step of decoding, or a step of
        training.
      tokens: number of tokens that it processes, on all devices together.
      held: bytes that stay in memory, by kind: weights, and the cache or the optimizer's state.
      temporaries: bytes that the compiled program needs in addition, for activations and gradients;
        None if the compiler refuses the program.
      model_flops: FLOPs by arithmetic.
      flops: FLOPs that the compiler counts, with the body of a loop counted once.
      model_moved: the least bytes of memory traffic, by arithmetic.
      moved: bytes of memory traffic that the compiler counts, without regard to caches.
      collectives: the collectives of the compiled program.
      model_sent: bytes sent, by arithmetic.
      estimate: the least time on the given hardware; None without hardware.
      refusal: the reason why the compiler refuses the program, which then does not fit; the counts
        are then those of arithmetic. None if it compiles.
      operations: the operations that the compiler estimates; empty if it estimates none.
      chunk: for prefill, tokens of a row (C) that a chunk holds.
      cached: for prefill, tokens of a row that are cached before the chunk, on average over the
        chunks of a prompt. FLOPs and times are averages over these chunks, too.
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
    operations: list[cycles.Operation] = dataclasses.field(default_factory=list)
    chunk: int | None = None
    cached: float | None = None

    @property
    def compiler_seconds(self) -> float | None:
        """Time by the compiler's estimate; None if there is none.

        The compiler does not count copies in the background, so that its estimate may be below the
        roofline, which then counts.
        """
        if not self.operations or self.estimate is None:
            return None
        return max(cycles.total(self.operations), self.estimate.seconds)

    @property
    def bytes(self) -> int:
        """Bytes of device memory that the program needs in all."""
        return sum(self.held.values()) + (self.temporaries or 0)

    def fits(self, memory: float, own_compiler: bool) -> bool | None:
        """Tells whether the program fits on a device; None = it is not certain.

        Args:
          memory: bytes of the device's memory.
          own_compiler: whether the device's own compiler made the program. That compiler refuses a
            program that does not fit; another compiler needs other temporaries.
        """
        if self.refusal or own_compiler:
            return self.refusal is None
        if sum(self.held.values()) > memory:
            return False
        return True if self.bytes <= memory else None

    @property
    def sent(self) -> float:
        """Bytes that a device sends in the compiled program."""
        return arithmetic.sent(self.collectives)


def forecast(
    program: str,
    config: ModelConfig,
    layout: Layout,
    of: Shapes,
    hardware: Hardware | None = None,
    remat: str | None = "nothing_saveable",
    save_hlo: Path | None = None,
) -> Forecast:
    """Compiles a program for the devices of a layout, and reads its cost.

    Args:
      program: one of `programs.PROGRAMS`.
      config: the model's architecture.
      layout: mesh and rules.
      of: sizes of the request or of the batch.
      hardware: the chip to estimate times for; None = estimate none.
      remat: what blocks save for the backward pass of training, as in `Transformer`.
      save_hlo: folder in which to save the program's optimised text, as `program`.txt.
    """
    model = programs.model(config, layout, of).clone(remat=remat)
    held = programs.arguments(program, model, layout, of)
    expected = arithmetic.exchanges(program, model, layout, of)
    flops, moved = arithmetic.flops(program, config, of), arithmetic.moved(program, held, config)
    flops /= layout.mesh.size
    temporaries, found, costs, refusal, operations = None, expected, {}, None, []
    lowered = programs.lower(program, model, layout, of)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
    else:
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        text = text_of(compiled)
        if save_hlo is not None:
            save_hlo.mkdir(parents=True, exist_ok=True)
            (save_hlo / f"{program}.txt").write_text(text, encoding="utf-8")
        found = collectives.read(text, layout.mesh.size)
        if hardware is not None:
            share = arithmetic.attended(program, model, of)
            steps = program == "decode"
            operations = cycles.read(text, hardware, layout.mesh.size, steps, share)
        if program == "decode":  # Collectives after the loop run once for many steps.
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
        operations=operations,
        chunk=of.chunk if program == "prefill" else None,
        cached=(of.length - of.chunk) / 2 if program == "prefill" else None,
    )


def text_of(compiled: jax.stages.Compiled) -> str:
    """Returns the optimised text of a compiled program.

    Raises:
      ValueError: jaxlib cannot read the program of another version's libtpu.
    """
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"jaxlib {jaxlib.__version__} cannot read the program that libtpu compiled ({reason}); "
            "expected the libtpu that this JAX names: pip install 'mistral-jax-flax[tpu-compiler]'"
        ) from None


def fake_devices(count: int) -> list[jax.Device]:
    """Returns CPU devices for programs that are compiled and not run.

    Raises:
      ValueError: JAX has already started in this process with fewer devices.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has started already, with the devices that it has.
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"this program uses {len(devices)} devices already, {count} are planned for: plan in a "
            "process of its own"
        )
    return devices[:count]


def tpu_devices(name: str, topology: str) -> Sequence[jax.Device]:
    """Returns the devices of a TPU slice to compile for, which needs libtpu but no TPU.

    Args:
      name: kind of chip, such as "v5e".
      topology: shape of the slice, such as "2x4".

    Raises:
      ValueError: libtpu is not installed, or does not know the slice.
    """
    from jax.experimental import topologies

    # Without these variables libtpu queries the pod's metadata server for this machine's place in
    # the pod, and locks a chip, neither of which exists here.
    defaults = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{name}-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    for variable, value in defaults.items():
        os.environ.setdefault(variable, value)
    # libtpu's default is four chips for each host, more than such a slice has.
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
            "pip install 'mistral-jax-flax[tpu-compiler]', or plan with --compiler cpu"
        ) from None

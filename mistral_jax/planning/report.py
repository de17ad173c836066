"""Forecasts as a table for people, and as JSON values for programs."""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

from rich.filesize import decimal

from mistral_jax.parallel.hardware import Hardware
from mistral_jax.planning import cycles
from mistral_jax.planning.forecast import Forecast

_WORK = {
    "prefill": "a chunk of {} prompt tokens, {} a row, after {:,.0f} that are cached (a mean)",
    "decode": "a step of {} tokens",
    "train": "a step on {} tokens",
}


# The compiler's estimate and the roofline are called far apart above this ratio.
FAR = 1.5


def fields(of: Forecast, chip: Hardware | None, own_compiler: bool) -> dict[str, Any]:
    """Returns a forecast as JSON values; bytes, FLOPs and times are those of one device."""
    found = {
        "program": of.program,
        "tokens": of.tokens,
        **{f"{name}_bytes": size for name, size in of.held.items()},
        "temporary_bytes": of.temporaries,
        "refusal": of.refusal,
        "total_bytes": of.bytes,
        "model_flops": of.model_flops,
        "compiled_flops": of.flops,
        "model_moved_bytes": of.model_moved,
        "compiled_moved_bytes": of.moved,
        "model_sent_bytes": of.model_sent,
        "compiled_sent_bytes": of.sent,
        "collectives": _by_kind(of),
    }
    if of.program == "prefill":
        found |= {"chunk": of.chunk, "cached_tokens": of.cached}
    if chip is None:
        return found
    seconds = of.compiler_seconds
    found |= {
        "compiler_seconds": seconds,
        "compiler_tokens_per_second": seconds and of.tokens / seconds,
        "costly": None if seconds is None else _costly(of),
        "warning": _warning(of),
    }
    return found | {
        "fits": of.fits(chip.memory, own_compiler),
        "seconds": of.estimate.seconds,
        "compute_seconds": of.estimate.compute,
        "memory_seconds": of.estimate.memory,
        "exchange_seconds": of.estimate.exchange,
        "binds": of.estimate.binds,
        "tokens_per_second": of.tokens / of.estimate.seconds,
        "tokens_per_second_without_overlap": of.tokens / of.estimate.serial_seconds,
        "mfu": of.model_flops / of.estimate.seconds / chip.flops,
    }


def lines(found: Sequence[Forecast], chip: Hardware | None, own_compiler: bool) -> Iterator[str]:
    """Yields the lines of a table about programs that share a device."""
    yield from _memory(found, chip, own_compiler)
    for of in found:
        yield ""
        yield f"{of.program}: {_WORK[of.program].format(of.tokens, of.chunk, of.cached)}"
        yield _row("FLOPs", f"{of.model_flops:.3g} of the model, {of.flops:.3g} compiled")
        moved = f"{decimal(round(of.model_moved))} at least, {decimal(round(of.moved))} compiled"
        yield _row("moved", moved)
        for kind, (count, size) in _by_kind(of).items():
            yield _row(kind, f"{count}, of {decimal(size)} in all")
        sent = f"{decimal(round(of.model_sent))} by arithmetic, {decimal(round(of.sent))} compiled"
        yield _row("sent", sent)
        if chip is not None:
            yield from _times(of, chip)


def _memory(found, chip: Hardware | None, own_compiler: bool) -> Iterator[str]:
    yield "memory"
    for name, size in found[0].held.items():
        yield _row(name, decimal(size))
    # Programs that share a device run one after another, so only the largest counts.
    for of in found:
        if of.refusal:
            yield _row("temporaries", f"the compiler refuses {of.program}: {of.refusal}")
        else:
            among = "activations and gradients" if of.program == "train" else "activations"
            size = f"{decimal(of.temporaries)} in {of.program}, {among} among them"
            yield _row("temporaries", size)
    needed = decimal(max(of.bytes for of in found))
    if chip is None:
        yield _row("together", needed)
        return
    verdicts = [of.fits(chip.memory, own_compiler) for of in found]
    room = decimal(round(chip.memory))
    if False in verdicts:
        yield _row("together", f"{needed} of {room}: IT DOES NOT FIT")
    elif None in verdicts:
        held = decimal(sum(found[0].held.values()))
        yield _row("together", f"{held} of {room} beside the temporaries: they decide whether it")
        yield _row("", "fits. Those above are a CPU's, which holds much of bfloat16 as float32")
    else:
        yield _row("together", f"{needed} of {room}: it fits")


def _times(of: Forecast, chip: Hardware) -> Iterator[str]:
    estimate = of.estimate
    yield _row(
        "time",
        f"{_seconds(estimate.seconds)} at best on {chip.name}: compute {_seconds(estimate.compute)}"
        f", memory {_seconds(estimate.memory)}, exchange {_seconds(estimate.exchange)}",
    )
    best, serial = of.tokens / estimate.seconds, of.tokens / estimate.serial_seconds
    compiled = of.compiler_seconds
    rate = f"{best:,.0f} tokens/s at best"
    if compiled:
        rate = f"by the compiler {of.tokens / compiled:,.0f} tokens/s, at best {best:,.0f}"
    yield _row(
        "rate",
        f"{rate} ({serial:,.0f} if exchanges wait for the rest), "
        f"{of.model_flops / estimate.seconds / chip.flops:.0%} MFU; {estimate.binds} binds",
    )
    for i, each in enumerate(_costly(of) if compiled else ()):
        share = f"{each['share']:.0%}" if i else f"{each['share']:.0%} of {_seconds(compiled)}"
        runs = _count(each["runs"], "run")
        yield _row("" if i else "most costly", f"{each['place']}: {share}, {runs}")
    if warning := _warning(of):
        yield _row("warning", warning)


def _costly(of: Forecast) -> list[dict[str, Any]]:
    """Returns the most costly operations, those of all layers together."""
    whole = cycles.total(of.operations)
    return [
        {"place": place, "seconds": seconds, "share": seconds / whole, "runs": runs}
        for place, seconds, runs in cycles.costly(of.operations)
    ]


def _warning(of: Forecast) -> str | None:
    if of.compiler_seconds is None or of.compiler_seconds <= FAR * of.estimate.seconds:
        return None
    ratio = of.compiler_seconds / of.estimate.seconds
    return (
        f"the compiler expects {ratio:.1f} times the least time; the operations above take most of "
        "it"
    )


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _by_kind(of: Forecast) -> dict[str, tuple[int, int]]:
    """Returns the number of collectives of each kind, and the total size of their results."""
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for collective in of.collectives:
        counts[collective.kind][0] += collective.times
        counts[collective.kind][1] += collective.times * collective.bytes
    return {kind: (count, size) for kind, (count, size) in sorted(counts.items())}


def _row(label: str, text: str) -> str:
    return f"  {label:<19}{text}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"

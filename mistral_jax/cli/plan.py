"""The planning command, `python -m mistral_jax.plan`."""

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path

from mistral_jax.cli import command

DESCRIPTION = """\
Tells what a model needs and does on many devices, without them and without its weights: compiles
what `sample` and `train` run for as many devices as asked, and reads off memory, work and
exchanges, with the time that hardware takes at best.
"""
EPILOG = """\
Examples:
  %(prog)s mistral-7b-v0.3 --sharding tensor --devices 4 --hardware v5e \\
      --batch 32 --length 32768
  %(prog)s mistral-7b-v0.3 --sharding fsdp --devices 64 --hardware v5p \\
      --batch 128 --length 4096 --train

With a TPU as --hardware and libtpu installed (the extra tpu-compiler), the TPU's own compiler is
asked. Memory is then what it will be, and the compiler's estimate of the time
stands beside the least time. Else programs are compiled for CPU devices, whose temporaries are
others and as a rule larger: they hold much of bfloat16 as float32.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    return command.run(lambda: _run(arguments), pods=False, show_traceback="traceback" in arguments)


def _parser() -> command.Parser:
    parser = command.Parser(
        prog=command.called("plan"),
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="name of a file in configs/models, a file like it, or a checkpoint's folder")
    command.add_layout(parser)
    add("--devices", type=int, metavar="N", help="how many [the product of --mesh; 1 without]")
    add("--batch", type=int, default=1, metavar="B", help="rows, in all [1]")
    add(
        "--length",
        type=int,
        default=4096,
        metavar="T",
        help="tokens of a row: prompt and answer, or what is trained on [4096]",
    )
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of computation and weights; those that are trained are float32 [bfloat16]",
    )
    add(
        "--quantize",
        choices=("int8",),
        help="with matrices in 8 bits, as sample --quantize; a checkpoint that has them needs none",
    )
    add(
        "--kv-cache-dtype",
        choices=("int8",),
        metavar="int8",
        help="with cached keys and values in 8 bits, as sample --kv-cache-dtype [as computed in]",
    )
    add("--train", action="store_true", help="a step of training, in place of prefill and decode")
    add(
        "--remat",
        nargs="?",
        const="nothing_saveable",
        default="nothing_saveable",
        metavar="POLICY",
        help="what blocks save for the backward pass of training, as in a recipe "
        "[nothing_saveable]",
    )
    add("--no-remat", dest="remat", action="store_const", const="none", help="save everything")
    add("--hardware", metavar="CHIP", help="one of configs/hardware.toml: v5e, v5p, v6e, A100, ...")
    add(
        "--compiler",
        choices=("cpu", "tpu"),
        help="whose [tpu for a TPU where libtpu is installed, else cpu]",
    )
    add(
        "--layers",
        type=int,
        metavar="N",
        help="plan the first N layers only, for a quick look [all]",
    )
    add(
        "--save-hlo",
        type=Path,
        metavar="DIR",
        help="save the optimised text of each program as DIR/PROGRAM.txt, for instance "
        "DIR/decode.txt",
    )
    add("--json", action="store_true", help="one JSON object a program, each on a line")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    for name in ("devices", "batch", "length"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; expected at least 1")
    if arguments.kv_cache_dtype and arguments.train:
        raise ValueError(
            "--kv-cache-dtype is for generation: training keeps no keys and values; leave one out"
        )
    import jax

    from mistral_jax.checkpoint.names import count_parameters
    from mistral_jax.parallel.hardware import known
    from mistral_jax.parallel.sharding import Layout, read_layout
    from mistral_jax.planning import forecast, programs, report
    from mistral_jax.training.recipe import REMAT

    if arguments.remat not in REMAT:
        raise ValueError(f"--remat is {arguments.remat!r}; expected one of {', '.join(REMAT)}")
    config = _config(arguments.model)
    all_layers = config.num_layers
    if arguments.layers is not None:
        config = _first_layers(config, arguments.layers, arguments.model)
    chips = known()
    if arguments.hardware is not None and arguments.hardware not in chips:
        raise ValueError(f"no hardware {arguments.hardware!r}; expected one of {', '.join(chips)}")
    chip = chips.get(arguments.hardware)
    count = _count(arguments)
    devices, compiler = _devices(arguments, chip, count)
    own = devices[0].platform != "cpu"
    layout = read_layout(arguments.sharding, config, devices, arguments.mesh)
    layout = layout or Layout(jax.make_mesh((1,), ("device",), devices=devices[:1]), ())
    quantized = _quantized(arguments, config)
    sizes = arguments.batch, arguments.length, arguments.dtype
    of = programs.shapes(layout, *sizes, quantized, arguments.kv_cache_dtype, arguments.train)
    found = []
    for program in ("train",) if arguments.train else ("prefill", "decode"):
        print(f"compiling {program} for {compiler} ...", file=sys.stderr, flush=True)
        options = None if arguments.remat == "none" else arguments.remat, arguments.save_hlo
        found.append(forecast.forecast(program, config, layout, of, chip, *options))
    mesh = dict(layout.mesh.shape)
    if arguments.json:
        about = {
            "model": arguments.model,
            "layers": config.num_layers,
            "sharding": arguments.sharding,
            "mesh": mesh,
            "batch": of.batch,
            "length": of.length,
            "dtype": arguments.dtype,
            "quantize": "int8" if quantized else None,
            "kv_cache_dtype": arguments.kv_cache_dtype,
            "hardware": arguments.hardware,
            "compiler": compiler,
        }
        if config.num_experts:
            counts = count_parameters(config), count_parameters(config, active=True)
            about |= dict(zip(("parameters", "active_parameters"), counts, strict=True))
        for each in found:
            print(json.dumps(about | report.fields(each, chip, own)))
        return
    where = ", ".join(f"{axis} = {size}" for axis, size in mesh.items())
    rows = "1 row" if of.batch == 1 else f"{of.batch} rows"
    dtypes = [arguments.dtype]
    dtypes += ["matrices in int8"] if quantized else []
    dtypes += [f"cache in {arguments.kv_cache_dtype}"] if arguments.kv_cache_dtype else []
    layers = config.num_layers
    if layers < all_layers:
        dtypes.append(f"only {layers} of {all_layers} layers")
    print(f"{arguments.model}, {rows} of {of.length} tokens, {', '.join(dtypes)}: {where}")
    if config.num_experts:
        total, active = count_parameters(config), count_parameters(config, active=True)
        print(f"{total:,} parameters, of which {active:,} compute each token")
    print(f"compiled for {compiler}; all figures are those of one device\n")
    print("\n".join(report.lines(found, chip, own)))


def _config(model: str):
    from mistral_jax.base.files import read_toml
    from mistral_jax.checkpoint import manifest
    from mistral_jax.config import ModelConfig

    if manifest.is_checkpoint(model):
        return manifest.read(model)[0]
    if Path(model).exists() and not Path(model).is_dir():
        return ModelConfig.from_dict(read_toml(model), model)
    return ModelConfig.from_name(model)


def _first_layers(config, count: int, model: str):
    """Returns the config of a model with the first layers only."""
    if not 1 <= count <= config.num_layers:
        raise ValueError(
            f"--layers is {count}; expected 1 to {config.num_layers}, the layers of {model}"
        )
    return dataclasses.replace(
        config,
        num_layers=count,
        sliding_window=config.windows[:count],
        dilation=config.dilations[:count],
    )


def _quantized(arguments: argparse.Namespace, config):
    """Returns the weights in int8: all with --quantize, else those of the checkpoint."""
    from flax.traverse_util import flatten_dict

    from mistral_jax.checkpoint import arrays, manifest, quantization
    from mistral_jax.model.transformer import Transformer
    from mistral_jax.ops.backend import PLAIN
    from mistral_jax.parallel.sharding import abstract_params

    shapes = abstract_params(Transformer(config, backend=PLAIN))
    small = quantization.matrices(shapes, output=True)
    if arguments.quantize is None:
        model, stored = arguments.model, {}
        if manifest.is_checkpoint(model):
            stored = flatten_dict(arrays.stored(Path(model) / "params"))
        small = {path: outputs for path, outputs in small.items() if (*path, "values") in stored}
    if small and arguments.train:
        raise ValueError(
            f"{arguments.model} is planned with matrices in int8, which take no steps; leave "
            "--train out, or plan the model in float"
        )
    return small


def _count(arguments: argparse.Namespace) -> int:
    """Returns the number of devices to plan for."""
    if arguments.sharding is None and (arguments.devices or 1) > 1:
        raise ValueError(f"--devices is {arguments.devices}; name the --sharding that uses them")
    if arguments.devices is not None:
        return arguments.devices
    if arguments.sharding not in (None, "single") and not arguments.mesh:
        raise ValueError("a sharding is for several devices; say how many with --devices or --mesh")
    return math.prod(size for size in (arguments.mesh or {}).values() if size > 0)


def _devices(arguments: argparse.Namespace, chip, count: int):
    """Returns the devices to compile for, and their name for messages."""
    from mistral_jax.planning import forecast

    slices = {math.prod(map(int, t.split("x"))): t for t in (chip.topologies if chip else ())}
    installed = importlib.util.find_spec("libtpu") is not None
    compiler = arguments.compiler or ("tpu" if count in slices and installed else "cpu")
    if arguments.compiler is None and count in slices and not installed:
        command.tell(
            "note: the CPU's compiler is asked, whose temporaries are larger; for the TPU's own: "
            "pip install 'mistral-jax-flax[tpu-compiler]'"
        )
    cpus = forecast.fake_devices(count if compiler == "cpu" else 1)
    if compiler == "cpu":
        return cpus, "a CPU device" if count == 1 else f"{count} CPU devices"
    if count not in slices:
        sizes = ", ".join(map(str, sorted(slices))) or "none: name a TPU with --hardware"
        raise ValueError(f"the TPU's compiler has no slice of {count} chips; it has {sizes}")
    topology = slices[count]
    devices = forecast.tpu_devices(arguments.hardware, topology)
    return list(devices), f"a {arguments.hardware} slice of {topology}"

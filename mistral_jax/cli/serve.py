"""The command `python -m mistral_jax.serve`: serves a model over HTTP, in OpenAI's protocol."""

import argparse
import functools
import logging
import sys
from pathlib import Path

from mistral_jax.base import VERSION
from mistral_jax.base.output import tell
from mistral_jax.cli import command

_DESCRIPTION = """\
Serves a Mistral model over HTTP in OpenAI's protocol, with a chat page at /. Clients use the
address that it prints. It listens on this machine only, unless --host says otherwise. Defaults are
in brackets.
"""
_EPILOG = """\
Examples:
  %(prog)s
  %(prog)s --checkpoint mistral-7b-instruct-v0.3 --dtype bfloat16 --slots 32
  %(prog)s --checkpoint mistral-7b-instruct-v0.3 --host 0.0.0.0 --api-keys keys.txt --json-logs
"""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = parser().parse_args(argv)
    return command.run(lambda: _run(arguments), show_traceback="traceback" in arguments)


def parser() -> command.Parser:
    """Builds the parser of the command."""
    made = command.Parser(
        prog=command.called("serve"),
        usage="%(prog)s [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=26, width=100
        ),
        allow_abbrev=False,
    )
    version = f"mistral_jax {VERSION}"
    made.add_argument("--version", action="version", version=version, help="print it and exit")

    group = made.add_argument_group("the model")
    command.add_model(group)
    command.add_chat_form(group)
    command.add_layout(group)
    add = group.add_argument
    add(
        "--kv-cache-dtype",
        choices=("int8",),
        metavar="int8",
        help="store keys and values in 8 bits, in half of the memory or less [the compute dtype]",
    )
    add("--name", help="name of the model for clients [the checkpoint folder's]")
    command.add_cache(group)

    add = made.add_argument_group("requests").add_argument
    number = functools.partial(_count, add)
    number("--slots", 8, "requests that run at a time, each with memory of its own")
    add(
        "--length",
        type=command.count,
        metavar="N",
        help="maximum number of tokens of prompt and answer together [the model's, at most 4096 "
        "without a window]",
    )
    number("--max-waiting", 1024, "requests that may wait for a slot")
    number("--max-waiting-tokens", 1 << 20, "prompt tokens that may wait")
    number("--prefix-cache-mib", 256, "memory for keys and values of earlier texts")
    add("--no-prefix-cache", action="store_true", help="read every prompt whole")

    add = made.add_argument_group("sampling of requests that state none").add_argument
    for name, kind, default in (
        *(("temperature", float, 0.7), ("top-p", float, 0.95), ("top-k", int, 0)),
        *(("min-p", float, 0.0), ("repetition-penalty", float, 1.0)),
    ):
        letter = "N" if kind is int else "X"
        add(f"--{name}", type=kind, default=default, metavar=letter, help=f"[{default:g}]")

    add = made.add_argument_group("the server").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all [127.0.0.1]")
    add("--port", type=_port, default=8000, metavar="N", help="port; 0 is any free one [8000]")
    add("--api-keys", type=Path, metavar="FILE", help="file of keys that clients need, one a line")
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin use the server, * is all; may be repeated [none]",
    )
    number = functools.partial(_count, add)
    number("--max-body-mib", 8, "maximum size of the body of a request")
    number("--drain-seconds", 30, "time that running requests have after SIGTERM or Ctrl-C")
    add("--no-page", action="store_true", help="do not serve the chat page")
    add("--json-logs", action="store_true", help="log each request as a JSON object on one line")
    return made


def _run(arguments: argparse.Namespace) -> None:
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{error.name} is needed to serve: pip install 'mistral-jax-flax[serve]'"
        ) from None
    from mistral_jax.engine.sampling import Sampling
    from mistral_jax.serving import server
    from mistral_jax.serving.app import make_app
    from mistral_jax.serving.http import Keys
    from mistral_jax.serving.service import Service

    sampling = Sampling(**{name: getattr(arguments, name) for name in _SAMPLING})
    keys = Keys.read(arguments.api_keys) if arguments.api_keys else None
    given = arguments.checkpoint
    name = arguments.name or (Path(given).resolve().name if given else "nano")
    service = Service(name, sampling)
    app = make_app(
        service,
        keys=keys,
        origins=arguments.cors_origin,
        most_body=arguments.max_body_mib << 20,
        has_page=not arguments.no_page,
    )
    _log(arguments.json_logs)
    listening = server.bind(arguments.host, arguments.port)
    load = functools.partial(_load, arguments, service, listening)
    tell(f"listening on {arguments.host}, port {listening.getsockname()[1]}; loading the model")
    server.run(app, service, listening, load, arguments.drain_seconds)


def _load(arguments: argparse.Namespace, service, listening) -> None:
    """Loads the model, compiles its programs, and says where the server is."""
    from mistral_jax.engine.engine import Engine
    from mistral_jax.serving.service import Loaded

    def build() -> Loaded:
        model, params, tokenizer = command.load_model(
            arguments, arguments.checkpoint, chat_form=arguments.chat_form
        )
        model = model.clone(kv_cache_dtype=arguments.kv_cache_dtype)
        engine = Engine(
            model,
            params,
            tokenizer,
            slots=arguments.slots,
            length=arguments.length,
            most_waiting=arguments.max_waiting,
            most_waiting_tokens=arguments.max_waiting_tokens,
            prefix_bytes=0 if arguments.no_prefix_cache else arguments.prefix_cache_mib << 20,
        )
        with command.announced():
            engine.warm_up()
        eos = tuple(model.config.eos_ids)
        return Loaded(engine, tokenizer, eos, (*eos, *tokenizer.fim_end_ids), engine.length)

    service.load(build)
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    tell(_started(service))
    tell(f"serving at http://{host}:{port} (Ctrl-C ends it)")


def _started(service) -> str:
    """Describes the model and its devices in one line."""
    import jax

    devices = jax.devices()
    kind = devices[0].device_kind
    stats = service.stats()
    return (
        f"model {service.name}, on {len(devices)} x {kind}, {stats['slots']} slots of "
        f"{service.length} tokens"
    )


def _log(as_json: bool) -> None:
    """Logs to standard error, one line for each request."""
    from mistral_jax.serving.app import LOG, JsonLines

    handler = logging.StreamHandler(sys.stderr)
    line = JsonLines() if as_json else logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    handler.setFormatter(line)
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    # A full disk must not stop a request.
    logging.raiseExceptions = False


def _count(add, name: str, default: int, meaning: str) -> None:
    add(name, type=command.count, default=default, metavar="N", help=f"{meaning} [{default}]")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, a number from 0 to 65535")
    return int(text)

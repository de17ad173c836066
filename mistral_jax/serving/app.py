"""The routes of the server: `make_app` builds the ASGI app of a `Service`."""

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from mistral_jax.base import VERSION
from mistral_jax.base.output import one_line
from mistral_jax.engine.worker import Busy
from mistral_jax.serving import page, protocol, text_routes
from mistral_jax.serving.http import (
    EventStream,
    Gate,
    Gone,
    HttpError,
    Json,
    Keys,
    dump,
    in_thread,
    read_body,
    unless_gone,
)
from mistral_jax.serving.jobs import Failed, Job
from mistral_jax.serving.metrics import CONTENT_TYPE, Metrics
from mistral_jax.serving.openapi import describe
from mistral_jax.serving.requests import TooLong
from mistral_jax.serving.service import Service, Unavailable

LOG = logging.getLogger("mistral_jax.serving")

# Paths that need no key: they show nothing but the model's name.
PUBLIC = ("/", "/health", "/v1/health", "/models", "/v1/models", "/openapi.json")
# Default maximum bytes of a body.
MOST_BODY = 8 << 20
# Seconds after which a client should try again.
_RETRY = {"retry-after": "1"}


def make_app(
    service: Service,
    *,
    keys: Keys | None = None,
    origins: Sequence[str] = (),
    most_body: int = MOST_BODY,
    has_page: bool = True,
) -> Gate:
    """Builds the app of a server.

    Args:
      service: the model and its requests.
      keys: keys of clients; None = none is needed.
      origins: origins whose pages may use the server, "*" = all.
      most_body: maximum bytes of the body of a request.
      has_page: whether `/` is the chat page.
    """
    routes = _Routes(service, most_body)
    answers = {
        "/v1/completions": (service.complete, "COMPLETION"),
        "/v1/chat/completions": (service.chat, "CHAT"),
        "/chat/completions": (service.chat, "CHAT"),
        "/completion": (service.native, "NATIVE"),
        "/completions": (service.native, "NATIVE"),
        "/infill": (service.infill, "INFILL"),
    }
    texts = {
        "/tokenize": (text_routes.tokenize, "TOKENIZE"),
        "/detokenize": (text_routes.detokenize, "DETOKENIZE"),
    }
    listed = [
        *(_post(path, partial(routes.answer, *found)) for path, found in answers.items()),
        *(_post(path, partial(routes.text, *found)) for path, found in texts.items()),
        *(Route(path, routes.models, methods=["GET"]) for path in ("/v1/models", "/models")),
        Route("/v1/models/{name:path}", routes.model, methods=["GET"]),
        *(Route(path, routes.health, methods=["GET"]) for path in ("/health", "/v1/health")),
        Route("/tokenizer_info", routes.tokenizer_info, methods=["GET"]),
        Route("/metrics", routes.metrics, methods=["GET"]),
        Route("/openapi.json", routes.openapi, methods=["GET"]),
    ]
    if has_page:
        listed.append(Route("/", page.show, methods=["GET"]))
    app = Starlette(
        routes=listed,
        exception_handlers={HTTPException: _http_error, HttpError: _error, Exception: _error},
    )
    app.router.redirect_slashes = False
    methods = {route.path: "POST" if "POST" in route.methods else "GET" for route in listed}
    return Gate(app, keys, origins, PUBLIC, methods)


def _post(path: str, endpoint: Callable) -> Route:
    async def handle(request: Request) -> Response:
        return await endpoint(request)

    return Route(path, handle, methods=["POST"])


class _Routes:
    """The endpoints of the routes."""

    def __init__(self, service: Service, most_body: int):
        self._service, self._most_body = service, most_body
        self._metrics = Metrics(service)

    async def answer(
        self, start: Callable[[dict[str, Any], str], Job], table: str, request: Request
    ) -> Response:
        """Generates answers, as one response or as a stream of events."""
        began, path, owner = time.perf_counter(), request.url.path, request.state.owner
        log = partial(self._log, path, owner, began)
        try:
            body = await read_body(request, self._most_body)
            job = await in_thread(lambda: start(_parse(table, body), owner))
        except HttpError as error:
            log(error.status, None)
            raise
        except Exception as error:
            raised = _known(error)
            log(raised.status, None)
            raise raised from error
        if job.context.fields.get("stream"):
            return EventStream(self._events(job, log))
        status = 499
        try:
            await unless_gone(request.receive, job.wait())
            made = Json(job.response())
            status = 200
            return made
        except Gone:
            return Response(status_code=status)  # nobody reads it
        except Exception as error:
            raised = _known(error)
            status = raised.status
            raise raised from error
        finally:
            job.cancel()
            log(status, job)

    async def _events(self, job: Job, log: Callable[[int, Job], None]) -> AsyncIterator[str]:
        """Yields the events of a stream; an error is its last event."""
        status = 499
        try:
            async for event in job.events():
                yield dump(event)
            status = 200
        except Exception as error:
            raised = _known(error)
            status = raised.status
            yield dump(raised.body)
        finally:
            job.cancel()
            log(status, job)
        yield "[DONE]"

    async def text(
        self, work: Callable[..., dict[str, Any]], table: str, request: Request
    ) -> Response:
        """Answers a question about texts and tokens, without the model."""
        body = await read_body(request, self._most_body)
        try:
            return Json(await in_thread(lambda: work(self._service.loaded, _parse(table, body))))
        except (ValueError, Unavailable) as error:
            raise _known(error) from error

    async def models(self, request: Request) -> Response:
        """Lists the models."""
        listed = [self._card(name) for name in self._service.names]
        return Json({"object": "list", "data": listed})

    async def model(self, request: Request) -> Response:
        """Describes one model."""
        name = request.path_params["name"]
        if name not in self._service.names:
            known = ", ".join(self._service.names)
            raise HttpError(404, f"there is no model {name[:80]!r}; expected {known}")
        return Json(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        card = {
            "id": name,
            "object": "model",
            "created": self._service.started,
            "owned_by": "mistral_jax",
            # Fields of Mistral's API, whose client needs them.
            "type": "base",
            "capabilities": {"completion_chat": True, "function_calling": True},
        }
        if length := self._service.length:
            card["max_model_len"] = length
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        defaults = {name: getattr(self._service.sampling, name) for name in names}
        return card | {"default_sampling": defaults}

    async def health(self, request: Request) -> Response:
        """Tells whether the server takes requests."""
        if problem := self._service.problem():
            raise HttpError(503, problem, "unavailable_error", _RETRY)
        return Json({"status": "ok"})

    async def tokenizer_info(self, request: Request) -> Response:
        """Describes the tokenizer."""
        try:
            return Json(text_routes.tokenizer_info(self._service.loaded))
        except Unavailable as error:
            raise _known(error) from error

    async def metrics(self, request: Request) -> Response:
        """Returns Prometheus metrics."""
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        """Returns the description of the API."""
        return Json(describe(VERSION))

    def _log(self, path: str, owner: str, began: float, status: int, job: Job | None) -> None:
        """Counts and logs a request that has ended."""
        self._metrics.responded(path, status)
        fields: dict[str, Any] = {"path": path, "status": status, "owner": owner}
        seconds = time.perf_counter() - began
        if job is not None:
            usage = job.usage()
            times = job.times()
            for one in times:
                self._metrics.answered(*one)
            new = usage["completion_tokens"]
            fields |= {
                "id": job.id,
                "tokens_in": usage["prompt_tokens"],
                "cached": usage["prompt_tokens_details"]["cached_tokens"],
                "tokens_out": new,
                "first_token_s": round(min(first for _, first, _, _ in times), 4),
                "tokens_per_s": round(new / seconds, 2) if seconds > 0 else 0.0,
                "end": ",".join(sorted({reason for reason, *_ in times})),
            }
        fields["seconds"] = round(seconds, 4)
        LOG.info("%s", " ".join(f"{k}={v}" for k, v in fields.items() if v != ""), extra=fields)


def _parse(table: str, body: bytes) -> dict[str, Any]:
    return protocol.parse(body, getattr(protocol, table), protocol.REQUIRED.get(table, ()))


def _known(error: Exception) -> HttpError:
    """Returns the response for an error."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, TooLong):
        more = {"n_prompt_tokens": error.tokens, "n_ctx": error.length}
        return HttpError(400, str(error), "exceed_context_size_error", **more)
    if isinstance(error, Busy | Unavailable):
        return HttpError(503, str(error), "unavailable_error", _RETRY)
    if isinstance(error, ClientDisconnect):
        return HttpError(499, "the client closed the connection")
    if isinstance(error, Failed):
        return HttpError(500, str(error), "server_error")
    if isinstance(error, ValueError):
        return HttpError(400, str(error))
    LOG.error("%s", one_line(f"{type(error).__name__}: {error}"), exc_info=error)
    what = "the engine ended" if isinstance(error, RuntimeError) else "the request failed inside"
    return HttpError(500, f"{what}; the server's log says more", "server_error")


async def _error(request: Request, error: Exception) -> Response:
    return _known(error).response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    where = f"{request.method} {request.url.path[:80]}"
    if error.status_code == 405:
        message = f"{where} is not supported; the path takes another method"
    else:
        message = f"there is no route {where}; /openapi.json lists the routes"
    made = HttpError(error.status_code, message, "not_found_error", error.headers)
    return made.response()


class JsonLines(logging.Formatter):
    """Formats log records as JSON, one on each line."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns a record as a line."""
        known = ("path", "status", "owner", "id", "tokens_in", "cached", "tokens_out")
        known += ("first_token_s", "tokens_per_s", "end", "seconds")
        fields = {name: getattr(record, name) for name in known if hasattr(record, name)}
        fields = fields or {"message": one_line(record.getMessage())}
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return json.dumps({"time": f"{when}Z", "level": record.levelname.lower()} | fields)

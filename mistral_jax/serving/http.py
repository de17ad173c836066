"""The parts of HTTP below the routes: bodies, errors, streams of events, keys, and origins.

All of it is plain ASGI, because middleware that buffers responses hides disconnected clients.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mistral_jax.base import files
from mistral_jax.base.output import one_line

T = TypeVar("T")

# Seconds in which a client must send a whole body, and accept an event of a stream.
_BODY_SECONDS, _SEND_SECONDS = 60.0, 120.0
# Seconds between comments that keep an idle stream open through proxies.
_PING_SECONDS = 15.0
# Maximum bytes of a file of keys.
_MOST_KEYS = 1 << 20


class HttpError(Exception):
    """An error with a status code, as a response in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
        **fields: Any,
    ):
        """Makes an error.

        Args:
          status: the status code.
          message: what is wrong, in one sentence.
          kind: OpenAI's type of the error.
          headers: headers of the response.
          **fields: more fields of the error.
        """
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {
            "error": {
                "message": one_line(message),
                "type": kind,
                "param": None,
                "code": status,
                **fields,
            }
        }

    def response(self) -> "Json":
        """Returns the response."""
        return Json(self.body, self.status, self.headers)


class Json(Response):
    """A response of JSON, which has no NaN and no infinity."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Returns the body."""
        return dump(content).encode()


def dump(value: Any) -> str:
    """Returns a value as compact JSON; lone surrogates are escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


async def read_body(request: Request, most: int) -> bytes:
    """Reads the body of a request.

    Args:
      request: the request.
      most: maximum number of bytes.

    Raises:
      HttpError: the body is too large, or the client does not send it in time.
    """
    too_large = HttpError(413, f"the body is larger than {most} bytes; send less at a time")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > most:
                    raise too_large
    except TimeoutError:
        raise HttpError(408, f"the body did not arrive within {_BODY_SECONDS:.0f} s") from None
    return b"".join(parts)


class Gone(Exception):
    """Raised when the client has closed the connection."""


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Waits for work, and cancels it if the client closes the connection.

    Raises:
      Gone: the client closed the connection.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of server-sent events, which ends when the client closes the connection."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str]):
        """Makes a response.

        Args:
          events: data of the events; it is closed in any case.
        """
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        async with contextlib.aclosing(self._events):
            with contextlib.suppress(Gone, OSError):
                await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        coming = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(self._events, None))
                done, _ = await asyncio.wait((coming,), timeout=_PING_SECONDS)
                if not done:
                    await self._write(send, ": waiting\n\n")
                    continue
                data, coming = coming.result(), None
                if data is None:
                    break
                await self._write(send, f"data: {data}\n\n")
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @staticmethod
    async def _write(send: Send, text: str) -> None:
        body = {"type": "http.response.body", "body": text.encode(), "more_body": True}
        try:
            async with asyncio.timeout(_SEND_SECONDS):
                await send(body)
        except TimeoutError:
            raise Gone from None


class Keys:
    """The keys that clients may have."""

    def __init__(self, keys: Iterable[str]):
        self._hashes = [_hash(key) for key in keys]

    @staticmethod
    def read(path: Path) -> "Keys":
        """Reads a file with one key a line; empty lines and lines that begin with # do not count.

        Raises:
          ValueError: the file has no key, or one of fewer than 8 characters or with a space.
        """
        lines = map(str.strip, files.split_lines(files.read_text(path, _MOST_KEYS)))
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ValueError(f"{path} has no key; expected one a line")
        for number, key in enumerate(keys, 1):
            if len(key) < 8 or not key.isascii() or len(key.split()) > 1:
                raise ValueError(
                    f"key {number} of {path} is too short or has a space; expected at least 8 "
                    "letters, digits and signs"
                )
        return Keys(keys)

    def owner(self, headers: Mapping[str, str]) -> str | None:
        """Returns the owner of a request, a short name of its key; None = it has no valid key.

        The time it takes does not depend on how much of a key is right.
        """
        given = headers.get("x-api-key", "")
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given = token.strip()
        digest = _hash(given)
        matches = [hmac.compare_digest(digest, known) for known in self._hashes]
        return f"key-{matches.index(True) + 1}" if any(matches) else None


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Gate:
    """ASGI middleware: checks keys, and answers browsers that ask for another origin."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys | None,
        origins: Sequence[str],
        public: Sequence[str],
        methods: Mapping[str, str],
    ):
        """Wraps an app.

        Args:
          app: the app.
          keys: the keys of clients; None = no request needs one.
          origins: origins whose pages may use the server; "*" = all.
          public: paths that need no key.
          methods: method of each path, which OPTIONS names.
        """
        self._app, self._keys, self._origins, self._public = app, keys, origins, public
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        added = self._cors(headers.get("origin"))

        async def send_with(message: Message) -> None:
            if message["type"] == "http.response.start" and added:
                MutableHeaders(scope=message).update(added)
            await send(message)

        if scope["method"] == "OPTIONS":
            allow = self._methods.get(scope["path"], "GET, POST")
            await Response(headers={"allow": f"{allow}, OPTIONS"})(scope, receive, send_with)
            return
        owner = "" if self._keys is None else self._keys.owner(headers)
        if owner is None and scope["path"] not in self._public:
            error = HttpError(
                401,
                "the request has no valid key; send it as 'Authorization: Bearer KEY'",
                "authentication_error",
                {"www-authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send_with)
            return
        scope.setdefault("state", {})["owner"] = owner or ""
        await self._app(scope, receive, send_with)

    def _cors(self, origin: str | None) -> dict[str, str]:
        if origin is None or not {"*", origin} & set(self._origins):
            return {}
        return {
            "access-control-allow-origin": origin if origin in self._origins else "*",
            "access-control-allow-methods": "GET, POST",
            # A wildcard does not include Authorization.
            "access-control-allow-headers": "Authorization, Content-Type, X-Api-Key",
            "access-control-max-age": "600",
            "vary": "Origin",
        }


async def in_thread(function: Callable[[], T]) -> T:
    """Runs a function in a thread, so that it does not stop the event loop."""
    return await anyio.to_thread.run_sync(function)

"""Runs an app on a socket until a signal drains it."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from mistral_jax.base.output import tell
from mistral_jax.serving.service import Service

# Maximum bytes of the head of a request, all headers together.
_MOST_HEAD = 1 << 16
# Seconds that an idle connection stays open.
_KEEP_ALIVE = 75
# Seconds that connections have to end after the last request, or after a second signal.
_LAST_SECONDS = 5


def bind(host: str, port: int) -> socket.socket:
    """Opens the server's socket.

    Raises:
      OSError: the address does not exist, or is in use.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"cannot listen on {host}, port {port}: {reason}") from None


class Server(uvicorn.Server):
    """A server that drains its service before it ends."""

    def __init__(self, app: ASGIApp, service: Service, drain_seconds: float):
        """Makes a server.

        Args:
          app: the app.
          service: the service behind it.
          drain_seconds: maximum seconds that running requests have after SIGTERM or Ctrl-C.
        """
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            http="h11",
            ws="none",
            lifespan="off",
            server_header=False,
            h11_max_incomplete_event_size=_MOST_HEAD,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=_LAST_SECONDS,
        )
        super().__init__(config)
        self._service, self._seconds = service, drain_seconds
        self._drain: threading.Thread | None = None

    def handle_exit(self, number: int, frame) -> None:
        """Drains at the first signal, and ends at the second."""
        if self._drain is None and number in (signal.SIGTERM, signal.SIGINT):
            self._drain = threading.Thread(target=self._end, name="drain", daemon=True)
            self._drain.start()
        else:
            self.should_exit = True

    def _end(self) -> None:
        running = self._service.stats().get("running", 0)
        tell(f"shutting down; {running} requests run, for at most {self._seconds:g} s")
        self._service.drain(self._seconds)
        self.should_exit = True


def run(
    app: ASGIApp,
    service: Service,
    listening: socket.socket,
    load: Callable[[], None],
    drain_seconds: float,
) -> None:
    """Serves until a signal.

    The server listens while the model is being loaded; requests are refused meanwhile.

    Args:
      app: the app.
      service: the service behind it.
      listening: the open socket.
      load: loads the model into the service; called in a thread.
      drain_seconds: maximum seconds that running requests have after SIGTERM or Ctrl-C.

    Raises:
      Exception: what `load` raised.
    """
    server, failures = Server(app, service, drain_seconds), []

    def work() -> None:
        try:
            load()
        except BaseException as error:
            failures.append(error)
            server.should_exit = True

    loader = threading.Thread(target=work, name="load", daemon=True)
    loader.start()
    with contextlib.closing(service):
        server.run(sockets=[listening])
    if failures:
        raise failures[0]

"""A stand-in for the Hugging Face Hub on this machine, which serves folders as repositories."""

import contextlib
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_PATH = re.compile(rf"/(api/models/)?(\w[\w.-]*/\w[\w.-]*)(/tree/{COMMIT}|/resolve/{COMMIT}/(.*))?")


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
      repositories: folder of each repository, by name.
      given: names of the requested files, in order.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.given = repositories, []


@contextlib.contextmanager
def serve(repositories: dict[str, Path]):
    """Yields a running Hub. A repository whose name contains "gated" requires a login."""
    hub = Hub(repositories)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def environment(port: int, cache: Path) -> dict[str, str]:
    """Returns the environment of a program that uses the stand-in as its Hub."""
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return kept | {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def cached(home: Path, repository: str, source: Path, commit: str = COMMIT) -> Path:
    """Writes the files of a folder as the Hub's cache lays them out; returns the snapshot."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for path in (snapshot, folder / "blobs", folder / "refs"):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    for file in source.iterdir():
        blob = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        found = _PATH.fullmatch(self.path.split("?")[0])
        api, name, rest, file = found.groups() if found else (None, "", None, None)
        root = self.server.repositories.get(name)
        if root is None:
            gated = "gated" in name
            self.send_response(401 if gated else 404)
            self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if file:
            if self.command == "GET":
                self.server.given.append(file)
            return self._answer((root / file).read_bytes(), "application/octet-stream")
        assert api, self.path
        if rest:
            about = [
                {"type": "file", "path": each.name, "size": each.stat().st_size, "oid": "0"}
                for each in sorted(root.iterdir())
            ]
        else:
            files = [{"rfilename": each.name} for each in sorted(root.iterdir())]
            about = {"id": name, "sha": COMMIT, "siblings": files}
        return self._answer(json.dumps(about).encode(), "application/json")

    do_HEAD = do_GET

    def _answer(self, body, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass
